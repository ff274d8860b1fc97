"""A loop over tokens that tracing unrolled, as one operator: every step's operands stacked back to whole tensors.

The steps are read once, at the last of them (their blocks are equal): the next state and what is read of states become
terms (`terms`), the terms roles (`roles`), and everything that a step computes from its tokens alone is computed for
all steps at once (`stacking`). So is what a step computes from its reads, after the operator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from attnc.passes.graph import GraphFacts, NoMatch, Unliftable, hint, op_name, tensor_of
from attnc.passes.recurrence.emit import Draft
from attnc.passes.recurrence.loops import Loop
from attnc.passes.recurrence.reading import Steps
from attnc.passes.recurrence.rewriting import Rewriting, finished, misplaced
from attnc.passes.recurrence.rolling import Rolling
from attnc.passes.recurrence.stacking import Stacked, Stacker, rank_of
from attnc.passes.recurrence.step import entry
from attnc.passes.recurrence.terms import ZEROS

aten = torch.ops.aten
AFFORDABLE = 1 << 22  # elements of all states, up to which a loop is checked with all its steps
FEW = 24  # steps that are checked of a longer one


def steps_of(facts: GraphFacts, loop: Loop) -> Steps:
    """A loop's steps. Raises: Unliftable where a step reads more or less than the others."""
    last = loop.blocks[-1]
    states = {place: entry(loop, -1, place) for place in loop.carried}
    first: dict[int, fx.Node | None] = {}
    for place in loop.carried:
        node = entry(loop, 0, place)
        first[place] = None if op_name(node) in ZEROS else node
    inside = set(loop.nodes)
    outer: dict[fx.Node, list[fx.Node]] = {}
    for place, node in enumerate(last):
        rows = [block[place].all_input_nodes for block in loop.blocks]
        if any(len(row) != len(rows[-1]) for row in rows):
            raise Unliftable("one step reads other tensors than another", node)
        for column in zip(*rows, strict=True):
            if column[-1] not in inside:
                outer.setdefault(column[-1], list(column))
    return Steps(
        loop.blocks, states, first, outer, loop.steps, lambda node: not facts.needs_grad(node.args[0])
    )


def reroll(facts: GraphFacts, loop: Loop) -> Rewriting | NoMatch:
    """The replacement of an unrolled loop; why there is none."""
    found = _attempt(facts, loop, joined=True)
    if isinstance(found, NoMatch):
        return found
    wrong = misplaced(facts, found)
    if wrong is not None:
        return wrong
    states = sum(_count(tensor_of(loop.blocks[-1][p])) for p in loop.carried)
    if loop.steps > FEW and loop.steps * states > AFFORDABLE:
        sample = _attempt(facts, Loop(loop.blocks[:FEW], loop.carried), joined=False)
        if isinstance(sample, NoMatch):
            return sample
        found.sample = sample
    return found


def _count(value: torch.Tensor | None) -> int:
    return 0 if value is None else math.prod(map(hint, value.shape))


def _attempt(facts: GraphFacts, loop: Loop, *, joined: bool) -> Rewriting | NoMatch:
    try:
        return _reroll(facts, loop, joined)
    except Unliftable as exc:
        return exc.no_match
    except (RuntimeError, TypeError, ValueError, IndexError) as exc:
        reason = f"its steps cannot be drawn up at once: {type(exc).__name__}: {str(exc).partition(chr(10))[0]}"
        return NoMatch(reason, loop.blocks[-1][0])


def _reroll(facts: GraphFacts, loop: Loop, joined: bool) -> Rewriting | NoMatch:
    steps = steps_of(facts, loop)
    draft = Draft()
    stacker = Stacker(draft, loop.blocks)
    rolling = Rolling(facts, steps, draft, stacker)
    inside = set(loop.nodes)
    leaving = {p for p in range(len(loop.blocks[0])) if any(u not in inside for b in loop.blocks for u in b[p].users)}
    finals = {
        p for p in leaving & set(steps.states)
        if not any(u not in inside for b in loop.blocks[:-1] for u in b[p].users)
    }  # fmt: skip
    rolling.roll(sorted(leaving - finals))
    last = {place: rolling.last_state(place) for place in sorted(finals)}
    if not rolling.emitted:
        return NoMatch("nothing of its states is read", loop.blocks[-1][0])
    results: list[tuple[fx.Node, fx.Node]] = []
    for place in sorted(leaving - finals):
        results += _collected(draft, loop, inside, place, stacker.at(place), joined)
    results += [(loop.blocks[-1][place], node) for place, node in last.items()]
    main = max(rolling.emitted, key=lambda e: (e.shape.K * e.shape.V, e.shape.V))
    return finished(draft, results, main.rule, main.shape, loop.steps)


def _collected(
    draft: Draft, loop: Loop, inside: set[fx.Node], place: int, stacked: Stacked, joined: bool
) -> list[tuple[fx.Node, fx.Node]]:
    """What takes the place of a step's results: joined where they are joined, else one by one."""
    nodes = [block[place] for block in loop.blocks]
    members = set(nodes)
    users = {u for n in nodes for u in n.users if u not in inside}
    found = []
    left = not joined
    for user in users if joined else ():
        joins = op_name(user) in ("stack", "cat") and isinstance(user.args[0], list | tuple)
        parts = list(user.args[0]) if joins else []
        held = [n for n in parts if n in members]
        backwards = held == nodes[::-1]
        start = parts.index(held[0]) if held else -1
        if held not in (nodes, nodes[::-1]) or parts[start : start + len(nodes)] != held:
            left = True
            continue
        others = [*parts[:start], *parts[start + len(nodes) :]]
        if any(_follows(n, inside) for n in others):
            left = True
            continue
        dim = int(user.args[1] if len(user.args) > 1 else user.kwargs.get("dim", 0)) % rank_of(user)
        turned = stacked
        if backwards and stacked.moving:
            turned = Stacked(draft.call(aten.flip.default, stacked.node, [0]), True)
        found.append((user, _joined(draft, user, parts, start, len(nodes), dim, turned)))
    if left:
        for k, node in enumerate(nodes):
            if any(u not in inside and not any(u is out for out, _ in found) for u in node.users):
                row = draft.call(aten.select.int, stacked.node, 0, k) if stacked.moving else stacked.node
                found.append((node, row))
    return found


def _follows(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether `node` is computed from what the loop computes."""
    stack, seen = [node], {node}
    while stack:
        at = stack.pop()
        if at in inside:
            return True
        fresh = [x for x in at.all_input_nodes if x not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return False


def _joined(
    draft: Draft, user: fx.Node, parts: Sequence[fx.Node], start: int, count: int, dim: int, stacked: Stacked
) -> fx.Node:
    """The steps' results along `dim`, with what else is joined before and after."""
    whole = stacked.node
    value = tensor_of(whole)
    assert value is not None
    if not stacked.moving:
        whole = draft.call(aten.expand.default, draft.call(aten.unsqueeze.default, whole, 0),
                           [count, *([-1] * value.dim())])  # fmt: skip
        value = tensor_of(whole)
        assert value is not None
    rank = value.dim()
    order = [*range(1, dim + 1), 0, *range(dim + 1, rank)]
    whole = draft.permuted(whole, order)
    if op_name(user) == "cat":
        whole = draft.call(aten.flatten.using_ints, whole, dim, dim + 1)
    pieces: list[fx.Node] = []
    for run in (parts[:start], [None], parts[start + count :]):
        if run == [None]:
            pieces.append(whole)
        elif run and op_name(user) == "stack":
            pieces.append(draft.call(aten.stack.default, [draft.leaf(x) for x in run], dim))
        else:
            pieces += [draft.leaf(x) for x in run]
    return whole if len(pieces) == 1 else draft.call(aten.cat.default, pieces, dim)

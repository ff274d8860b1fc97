"""A loop over tokens that tracing unrolled, as one operator: every step's operands stacked back to whole tensors.

The steps are read once, at the last of them (their blocks are equal): the next state and what is read of states become
terms (`terms`), the terms roles (`roles`), and everything that a step computes from its tokens alone is computed for
all steps at once (`stacking`). So is what a step computes from its reads, after the operator.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from attnc.expr import ONE, ZERO, Expr, var
from attnc.passes.graph import GraphFacts, NoMatch, Unliftable, hint, op_name, shape_of, tensor_of
from attnc.passes.recurrence.emit import Draft
from attnc.passes.recurrence.loops import Loop
from attnc.passes.recurrence.mixer import TIME, Emitted, Mixer, arranged, emit
from attnc.passes.recurrence.rewriting import Rewriting, finished, misplaced
from attnc.passes.recurrence.roles import Update, mixer_of, read_of, update_of
from attnc.passes.recurrence.stacking import Stacked, Stacker
from attnc.passes.recurrence.step import entry
from attnc.passes.recurrence.terms import ZEROS, Factor, Term, Terms, contraction
from attnc.passes.views import Ranges, through

aten = torch.ops.aten
AFFORDABLE = 1 << 22  # elements of all states, up to which a loop is checked with all its steps
FEW = 24  # steps that are checked of a longer one
# What a step computes from its tokens alone and terms look into, so that the same key is the same however it is cut.
PRODUCTS = ("mul", "neg", "to", "_to_copy", "float")


@dataclass
class Steps:
    """The steps of a loop, whether Dynamo unrolled them or an operator holds their body.

    blocks: nodes of each step, equal in form; of a body there is one block. states: place of the next state in a
    block -> the node that holds the state before the step, in the last block. first: place -> the state given at the
    start, None for zero. outer: nodes that the last block reads from outside -> those of each step.
    """

    blocks: list[list[fx.Node]]
    states: dict[int, fx.Node]
    first: dict[int, fx.Node | None]
    outer: dict[fx.Node, list[fx.Node]]
    count: int


def steps_of(loop: Loop) -> Steps:
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
    return Steps(loop.blocks, states, first, outer, loop.steps)


class _Reading:
    """What the last step does, as terms."""

    def __init__(self, facts: GraphFacts, steps: Steps) -> None:
        self.facts, self.steps, self.block = facts, steps, steps.blocks[-1]
        self.entries = set(steps.states.values())
        self.next = {self.block[p] for p in steps.states}
        reached = set(self.entries)
        for node in self.block:
            if any(x in reached for x in node.all_input_nodes):
                reached.add(node)
        self.dependent = reached - self.entries
        self.carrying = self._behind(self.next) & self.dependent
        self.same = self._equal_nodes()
        own = [(k, n) for k, n in enumerate(self.block) if n not in self.dependent]
        self.inside = self.dependent | {n for k, n in own if self._looked_into(n, k)}

    def _behind(self, nodes: set[fx.Node]) -> set[fx.Node]:
        members = set(self.block)
        seen, stack = set(nodes), list(nodes)
        while stack:
            for x in stack.pop().all_input_nodes:
                if x in members and x not in seen:
                    seen.add(x)
                    stack.append(x)
        return seen

    def _equal_nodes(self) -> dict[fx.Node, fx.Node]:
        """Each node of the block -> the first one that computes the same."""
        known: dict[Hashable, fx.Node] = {}
        same: dict[fx.Node, fx.Node] = {}
        for node in self.block:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: same.get(n, n))
            key = (node.target, _frozen(args), _frozen(kwargs))
            same[node] = known.setdefault(key, node)
        return same

    def _is_outer_product(self, node: fx.Node) -> bool:
        """Whether a product of matrices sums over nothing."""
        found = contraction(node)
        if found is None:
            return False
        operands, labels, out = found
        sizes = [(x, s) for operand, mine in zip(operands, labels, strict=True)
                 for x, s in zip(mine, shape_of(operand), strict=True)]  # fmt: skip
        return all(x in out or s == ONE for x, s in sizes)

    def _looked_into(self, node: fx.Node, at: int) -> bool:
        value = tensor_of(node)
        if value is None or not value.is_floating_point():
            return False
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if op_name(node) in PRODUCTS:
            return True
        if self._is_outer_product(node):
            return True
        if any(_plain_arguments(block[at]) != _plain_arguments(node) for block in self.steps.blocks):
            return False
        view = through(node, tuple(var(f"z{d}") for d in range(value.dim())), Ranges())
        return view is not None and source in self.same and source is view[0]

    def terms(self, node: fx.Node, states: Sequence[fx.Node], prefix: str) -> tuple[Terms, tuple[Expr, ...], list[Term]]:
        inside = self.inside | {node}
        terms = Terms(inside, states, lambda n: not self.facts.needs_grad(n.args[0]))
        index = terms.indices(node, prefix)
        if node in states:
            return terms, index, [Term(1.0, (Factor(node, index),))]
        found = terms.of(node, index)
        return terms, index, [self._unified(t) for t in found]

    def _unified(self, term: Term) -> Term:
        factors = tuple(Factor(self.same.get(f.node, f.node), f.index, f.power) for f in term.factors)
        return Term(term.coef, factors, term.summed)

    def updates(self) -> dict[int, Update]:
        found = {}
        for place, own in self.steps.states.items():
            node = self.block[place]
            value, before = tensor_of(node), tensor_of(own)
            if value is None or before is None or not value.is_floating_point() or value.shape != before.shape:
                raise Unliftable("what is carried is no state: it changes its shape, or is no floating tensor", node)
            _, index, terms = self.terms(node, list(self.entries), f"s{place}_")
            found[place] = update_of(node, index, terms, list(self.entries), own)
        return found


def _plain_arguments(node: fx.Node) -> Hashable:
    """The arguments of a node that are no nodes."""
    return _frozen(fx.node.map_arg((node.args, node.kwargs), lambda n: None))


def _frozen(tree: Any) -> Hashable:
    if isinstance(tree, list | tuple):
        return tuple(map(_frozen, tree))
    if isinstance(tree, dict):
        return tuple((k, _frozen(v)) for k, v in tree.items())
    return tree if isinstance(tree, Hashable) else repr(tree)


@dataclass
class Rerolled:
    """The draft of a loop: stacked values by place, last states by place; the operators in it."""

    draft: Draft
    stacker: Stacker
    final: dict[int, fx.Node] = field(default_factory=dict)
    emitted: list[Emitted] = field(default_factory=list)


class _Rolling:
    """Draws up the replacement of the steps, for the places that are asked for."""

    def __init__(self, facts: GraphFacts, steps: Steps, draft: Draft, stacker: Stacker) -> None:
        self.facts, self.steps, self.draft, self.stacker = facts, steps, draft, stacker
        self.reading = _Reading(facts, steps)
        self.block = steps.blocks[-1]
        self.place = {node: k for k, node in enumerate(self.block)}
        self.updates = self.reading.updates()
        self.final: dict[int, tuple[Emitted, Update]] = {}
        self.emitted: list[Emitted] = []

    def roll(self, wanted: Sequence[int]) -> None:
        """Stack what stands at the places `wanted` and is read from states."""
        for place in sorted(wanted):
            self._stack(self.block[place])

    def _stack(self, node: fx.Node) -> None:
        """Make `node` known to the stacker, reads of states behind it first."""
        place = self.place.get(node)
        if place is None or place in self.stacker.known or node not in self.reading.dependent:
            return
        if self._read(node, place):
            return
        if node in self.reading.carrying:
            raise Unliftable("a part of the state's update is used for something else", node)
        for x in node.all_input_nodes:
            if x in self.reading.entries:
                raise Unliftable("the state before a step is used as a whole", node)
            self._stack(x)

    def _read(self, node: fx.Node, place: int) -> bool:
        """Stack `node` if it is a read of states; False if it is computed from reads."""
        states = [*self.reading.entries, *self.reading.next]
        try:
            terms, index, found = self.reading.terms(node, states, "r")
            held = [t for t in found if t.of(states)]
            if not held or (node not in self.reading.next and not all(t.summed for t in held)):
                return False
            if self._deeper(node, states):
                return False
            reads = [read_of(t, states, node) for t in held]
        except Unliftable:
            return False
        self._emit(node, place, index, reads, [t for t in found if not t.of(states)])
        return True

    def _deeper(self, node: fx.Node, states: Sequence[fx.Node]) -> bool:
        """Whether an input of `node` is a read already: then `node` is computed from that."""
        if op_name(node) in ("add", "sub", "mul", "div", "neg", "rsub"):
            for x in node.all_input_nodes:
                if x in self.reading.dependent and x not in states:
                    try:
                        _, _, found = self.reading.terms(x, states, "q")
                    except Unliftable:
                        return True
                    held = [t for t in found if t.of(states)]
                    if held and all(t.summed for t in held):
                        return True
        return False

    def _emit(self, node: fx.Node, place: int, index: Sequence[Expr], reads: Sequence[Any], rest: Sequence[Term]) -> None:
        if len(reads) != 1:
            raise Unliftable(f"the state is read in {len(reads)} ways at once, expected one", node)
        (read,) = reads
        owner = next(p for p, own in self.steps.states.items() if read.state.node in (own, self.block[p]))
        value = tensor_of(node)
        assert value is not None
        mixer, renames = mixer_of(self.updates[owner], read, tensor_of(self.block[owner]).dtype)  # type: ignore[union-attr]
        mixer.before = read.state.node is self.steps.states[owner]
        if mixer.before and mixer.delta:
            raise Unliftable("a delta rule whose state is read before the update", node)
        mixer = self._placed(mixer, owner)
        made = emit(self.draft, mixer, self.facts)
        wanted = [TIME, *(renames.get(e, e).args[0] if e != ZERO else None for e in index)]
        out = arranged(self.draft, made.out, made.labels, wanted)
        if rest:
            out = self.draft.call(aten.add.Tensor, out, self._without_state(node, index, rest))
        self.stacker.known[place] = Stacked(self.draft.cast(out, value.dtype), True)
        self.emitted.append(made)
        self.final.setdefault(owner, (made, self.updates[owner]))

    def _placed(self, mixer: Mixer, owner: int) -> Mixer:
        """The mixer over the draft, its operands stacked."""
        for name in ("query", "outputs", "keys", "values", "beta"):
            setattr(mixer, name, [self._factor(f) for f in getattr(mixer, name)])
        mixer.decay = [Term(t.coef, tuple(map(self._factor, t.factors)), t.summed) for t in mixer.decay]
        if mixer.low_rank is not None:
            a, b, coef = mixer.low_rank
            mixer.low_rank = [self._factor(f) for f in a], [self._factor(f) for f in b], coef
        first = self.steps.first[owner]
        if first is not None:
            at = tuple(ZERO if s == ONE else e for s, e in zip(shape_of(first), self.updates[owner].index, strict=True))
            mixer.initial = Factor(self.draft.leaf(first), at)
        mixer.length = self.steps.count
        return mixer

    def _factor(self, factor: Factor) -> Factor:
        node = factor.node
        stacked = self.stacker.at(self.place[node]) if node in self.place else self._outer(node)
        lead = (var(TIME),) if stacked.moving else ()
        return Factor(stacked.node, (*lead, *factor.index), factor.power)

    def _outer(self, node: fx.Node) -> Stacked:
        return self.stacker.of(self.steps.outer.get(node, [node] * self.steps.count))

    def _without_state(self, node: fx.Node, index: Sequence[Expr], rest: Sequence[Term]) -> fx.Node:
        """What is added to a read and has no state in it, with the steps in front."""
        total: fx.Node | None = None
        wanted = [e.args[0] for e in index if e != ZERO]
        for term in rest:
            factors = [self._factor(f) for f in term.factors]
            order = [TIME, *wanted, *sorted(term.summed)]
            part = self.draft.product(factors, order)
            if part is None:
                raise Unliftable("a number is added to what is read", node)
            if term.summed:
                dims = list(range(len(order) - len(term.summed), len(order)))
                part = self.draft.call(aten.sum.dim_IntList, part, dims)
            part = part if term.coef == 1.0 else self.draft.call(aten.mul.Tensor, part, term.coef)
            total = part if total is None else self.draft.call(aten.add.Tensor, total, part)
        assert total is not None
        return arranged(
            self.draft, total, [TIME, *wanted], [TIME, *(e.args[0] if e != ZERO else None for e in index)]
        )

    def last_state(self, place: int) -> fx.Node:
        """The state after the last step, laid out as written."""
        if place not in self.final:
            mixer, _ = mixer_of(self.updates[place], None, tensor_of(self.block[place]).dtype)  # type: ignore[union-attr]
            made = emit(self.draft, self._placed(mixer, place), self.facts)
            self.emitted.append(made)
            self.final[place] = made, self.updates[place]
        made, update = self.final[place]
        state, labels = made.state, list(made.state_labels)
        known = {e.args[0] for e in update.index if e != ZERO}
        for position in reversed(range(len(labels))):  # axes that only the reads have: the state is the same along them
            if labels[position] not in known:
                state = self.draft.call(aten.select.int, state, position, 0)
                del labels[position]
        node = arranged(self.draft, state, labels, [e.args[0] if e != ZERO else None for e in update.index])
        return self.draft.cast(node, tensor_of(self.block[place]).dtype)  # type: ignore[union-attr]


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
    steps = steps_of(loop)
    draft = Draft()
    stacker = Stacker(draft, loop.blocks, {})
    rolling = _Rolling(facts, steps, draft, stacker)
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
    users = {u for n in nodes for u in n.users if u not in inside}
    found = []
    left = not joined
    for user in users if joined else ():
        parts = list(user.args[0]) if op_name(user) in ("stack", "cat") and isinstance(user.args[0], list | tuple) else []
        start = parts.index(nodes[0]) if nodes[0] in parts else -1
        if start < 0 or parts[start : start + len(nodes)] != nodes or any(n in nodes for n in parts[:start]):
            left = True
            continue
        if any(n in nodes or n in inside for n in [*parts[:start], *parts[start + len(nodes) :]]):
            left = True
            continue
        dim = int(user.args[1] if len(user.args) > 1 else user.kwargs.get("dim", 0)) % tensor_of(user).dim()  # type: ignore[union-attr]
        found.append((user, _joined(draft, user, parts, start, len(nodes), dim, stacked)))
    if left:
        for k, node in enumerate(nodes):
            if any(u not in inside and not any(u is out for out, _ in found) for u in node.users):
                row = draft.call(aten.select.int, stacked.node, 0, k) if stacked.moving else stacked.node
                found.append((node, row))
    return found


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

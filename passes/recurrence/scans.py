"""torch's `scan` operator as the recurrence operator: the body is one step, its inputs are the stacked tokens.

Source: torch._higher_order_ops.scan (carry, y = body(carry, x) along the first axis of xs).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.scan import scan_op

from attnc.errors import CaptureError
from attnc.passes.capture import capture
from attnc.passes.graph import GraphFacts, NoMatch, Unliftable, op_name, tensor_of
from attnc.passes.recurrence.emit import Draft
from attnc.passes.recurrence.reading import Steps
from attnc.passes.recurrence.rewriting import Rewriting, finished, misplaced
from attnc.passes.recurrence.rolling import Rolling
from attnc.passes.recurrence.stacking import Stacked, Stacker
from attnc.passes.recurrence.terms import ZEROS

aten = torch.ops.aten


def scans(facts: GraphFacts, taken: Collection[fx.Node]) -> Iterator[tuple[fx.Node, Rewriting | NoMatch]]:
    """The scans of a graph, each with what may take its place."""
    for node in facts.graph.nodes:
        if node.target is not scan_op or node in taken:
            continue
        found: Rewriting | NoMatch
        try:
            found = _scan(facts, node)
        except Unliftable as exc:
            found = NoMatch(exc.no_match.reason, node)
        except (RuntimeError, TypeError, ValueError, IndexError, CaptureError) as exc:
            found = NoMatch(f"its body cannot be read: {type(exc).__name__}: {str(exc).partition(chr(10))[0]}", node)
        yield node, found


def _scan(facts: GraphFacts, node: fx.Node) -> Rewriting | NoMatch:
    body_at, init, xs, *more = node.args
    extra = more[0] if more else node.kwargs.get("additional_inputs", ())
    body = getattr(facts.graph.owning_module, str(body_at.target))
    inner = _body(body)
    given = inner.graph.find_nodes(op="placeholder")
    if len(given) != len(init) + len(xs) + len(extra):
        return NoMatch("its body takes other arguments than it is given", node)
    carries, tokens, rest = (
        given[: len(init)], given[len(init) : len(init) + len(xs)], given[len(init) + len(xs) :]
    )  # fmt: skip
    results = list(next(iter(inner.graph.find_nodes(op="output"))).args[0])
    block = [n for n in inner.graph.nodes if n.op == "call_function"]
    if any(n.op == "get_attr" for n in inner.graph.nodes):
        return NoMatch("its body holds a constant", node)
    place = {n: k for k, n in enumerate(block)}
    draft = Draft()
    stacked = {x: Stacked(draft.leaf(outer), True) for x, outer in zip(tokens, xs, strict=True)}
    stacked |= {x: Stacked(draft.leaf(outer), False) for x, outer in zip(rest, extra, strict=True)}
    if any(x not in place for x in results):
        return NoMatch("a carry or a result is handed through as it comes in", node)
    states = {place[_origin(x, place)]: carry for x, carry in zip(results, carries, strict=False)}
    if len(states) != len(carries):
        return NoMatch("two carries are the same", node)
    first = {p: None if op_name(x) in ZEROS else x for p, x in zip(states, init, strict=True)}
    count = draft.size(stacked[tokens[0]].node, 0)
    steps = Steps([block], states, first, {}, count, lambda n: False)
    stacker = Stacker(draft, [block], stacked)
    rolling = Rolling(facts, steps, draft, stacker)
    pairs: list[tuple[fx.Node, fx.Node]] = []
    used = {int(u.args[1]): u for u in node.users if u.target is getitem}
    at = list(states)
    for k, user in sorted(used.items()):
        if not user.users:
            continue
        if k < len(carries):
            pairs.append((user, rolling.last_state(at[k])))
            continue
        y = place[results[k]]
        rolling.roll([y])
        out = stacker.at(y)
        if not out.moving:
            return NoMatch("a result is the same at every step", node)
        pairs.append((user, out.node))
    if not rolling.emitted:
        return NoMatch("nothing of what it carries is read", node)
    main = max(rolling.emitted, key=lambda e: (e.shape.K * e.shape.V, e.shape.V))
    found = finished(draft, pairs, main.rule, main.shape, main.shape.L)
    wrong = misplaced(facts, found)
    return found if wrong is None else wrong


def _origin(node: fx.Node, place: dict[fx.Node, int]) -> fx.Node:
    """A carry without the copies that keep results from sharing memory."""
    while op_name(node) in ("clone", "alias", "contiguous") and node.args[0] in place:
        node = node.args[0]
    return node


def _body(body: fx.GraphModule) -> fx.GraphModule:
    """The body as ATen, on fake tensors of one token."""
    inputs: list[Any] = [
        n.meta.get("example_value", n.meta.get("val")) for n in body.graph.find_nodes(op="placeholder")
    ]
    if any(tensor_of(n) is None for n in body.graph.find_nodes(op="placeholder")):
        raise CaptureError("its body takes something that is no tensor")
    return capture(body, inputs)

"""Choices of experts whose experts are not in the graph: loops over the experts that were hit break it.

`for e in hit: rows = where(mask[e])` has lengths that are known at run time only, so the graph ends before the loop.
What is left of the block is its router; the entry of the report says how the rest can be brought in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import Tensor, fx

from attnc.passes.graph import GraphFacts, hint, module_path, op_name, tensor_of
from attnc.passes.moe.data import origin
from attnc.passes.moe.outcome import between
from attnc.passes.moe.products import contraction
from attnc.region import Unmatched

PICKS = ("topk", "argmax", "sort", "argsort")
REASON = (
    "the chosen experts leave the graph with the tokens: a loop over the experts that were hit has lengths known at "
    "run time only, which breaks the graph; loop over all experts by number and multiply by their weights, or gather "
    "their rows with torch._dynamo.config.capture_dynamic_output_shape_ops set"
)


def leaving(facts: GraphFacts, done: Collection[fx.Node]) -> Iterator[Unmatched]:
    """One entry for each choice among logits that leaves the graph beside what the logits were computed from."""
    end = next((n for n in reversed(facts.graph.nodes) if n.op == "output"), None)
    outputs = [] if end is None else end.all_input_nodes
    origins = set(map(origin, outputs))
    for node in facts.graph.nodes:
        if op_name(node) not in PICKS or node in done:
            continue
        logits = _logits(node)
        dot = None if logits is None else contraction(logits)
        reached = _reached(node)
        if dot is None or logits in outputs or any(map(contraction, reached)) or reached.isdisjoint(outputs):
            continue
        if {origin(dot.left), origin(dot.right)} & origins:
            yield Unmatched(node.name, REASON, node.name, module_path(node))


def _logits(node: fx.Node) -> fx.Node | None:
    """The product that the classes of a choice are outputs of."""
    source = tensor_of(node.args[0])
    if source is None or not source.is_floating_point() or source.dim() < 2:
        return None
    width = hint(source.shape[-1])
    found = [n for n in between([node.args[0]]) if contraction(n) is not None]
    return next((n for n in found if isinstance(t := tensor_of(n), Tensor) and hint(t.shape[-1]) == width), None)


def _reached(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        at = stack.pop()
        if at not in found:
            found.add(at)
            stack += [u for u in at.users if u.op != "output"]
    return found

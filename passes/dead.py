"""What a graph computes and nothing uses: named in the report, since a reader counts the module's layers."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import fx

from attnc.passes.attention.lift import ANCHORS
from attnc.passes.found import missed
from attnc.passes.graph import NoMatch, op_name
from attnc.region import Unmatched

PRODUCTS = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d", "conv2d", "conv3d"}
SOFTMAXES = {*ANCHORS, "multi_head_attention_forward"}
# What changes more than its result: items, x += y, running statistics, hooks.
WRITES = {operator.setitem, operator.delitem} | {
    function for name, function in vars(operator).items() if name.startswith("i") and f"__{name}__" in vars(operator)
}
WRITES_BY_NAME = {"batch_norm", "instance_norm", "register_hook"}


def dead_ends(graph: fx.Graph) -> Iterator[Unmatched]:
    """An entry for each result with no use behind which stand two products or a softmax that serve nothing else.

    A region has as many; one product may be the last update of a state, which every chunked recurrence drops.

    graph: Dynamo's, before tracing it again drops what is dead, or a captured one.
    """
    dead = _dead(graph)
    for end in graph.nodes:
        if end not in dead or end.users:
            continue
        served = [_name(node) for node in _behind(end, dead)]
        products, softmaxes = (sum(name in known for name in served) for known in (PRODUCTS, SOFTMAXES))
        if products > 1 or softmaxes:
            only = f"{products} products and {softmaxes} softmaxes"
            yield missed(end, NoMatch(f"nothing uses its result, so it and {only} behind it are not computed", end))


def _dead(graph: fx.Graph) -> set[fx.Node]:
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("output", "placeholder", "get_attr") or _writes(node) or node.users.keys() & live:
            live.add(node)
    return set(graph.nodes) - live


def _behind(end: fx.Node, dead: set[fx.Node]) -> set[fx.Node]:
    """`end` and the dead nodes that lead to it."""
    found, todo = {end}, [end]
    while todo:
        more = [node for node in todo.pop().all_input_nodes if node in dead and node not in found]
        found.update(more)
        todo += more
    return found


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else op_name(node)


def _writes(node: fx.Node) -> bool:
    """Whether it changes something that outlives it; names decide where there is no schema."""
    name = _name(node)
    in_place = name.startswith("__i") if name.endswith("__") else name.endswith("_") or name in WRITES_BY_NAME
    return node.is_impure() or node.target in WRITES or in_place or "out" in node.kwargs

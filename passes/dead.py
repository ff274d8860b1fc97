"""What a graph computes and nothing uses: named in the report, since a reader counts the module's layers."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import fx

from attnc.passes.found import missed
from attnc.passes.graph import NoMatch, op_name
from attnc.region import Unmatched

PRODUCTS = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d", "conv2d", "conv3d"}
SOFTMAXES = {"softmax", "_softmax", "scaled_dot_product_attention", "multi_head_attention_forward"}
WRITES = {operator.setitem, operator.delitem}


def dead_ends(graph: fx.Graph) -> Iterator[Unmatched]:
    """An entry for each result with no use behind which stands a product or a softmax that serves nothing else.

    graph: Dynamo's, before tracing it again drops what is dead, or a captured one.
    """
    dead = _dead(graph)
    for end in graph.nodes:
        if end not in dead or end.users:
            continue
        served = [_name(node) for node in _behind(end, dead)]
        products, softmaxes = (sum(name in known for name in served) for known in (PRODUCTS, SOFTMAXES))
        if products or softmaxes:
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
    in_place = name.endswith("_") and not name.endswith("__")
    return node.is_impure() or node.target in WRITES or in_place or "out" in node.kwargs

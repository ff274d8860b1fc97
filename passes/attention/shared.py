"""Attention maps that several layers share: each product with values gets a softmax of its own.

    p = softmax(s); o1 = p @ v1; o2 = p @ v2    ->    o1 = softmax(s) @ v1; o2 = softmax(s) @ v2

Each then is an attention like any other, computed tile by tile from the shared query and key, and no map is kept. What
stays as written shares the softmax again: the inner backend merges equal nodes. A map that anything but products reads
is left, since it must exist anyway.

Source: Rajabzadeh et al. 2024, "EchoAtt", arXiv:2409.14595.
"""

from __future__ import annotations

from torch import fx

from attnc.passes.attention.lift import lift
from attnc.passes.attention.weights import carriers
from attnc.passes.graph import GraphFacts, op_name

_SOFTMAXES = ("softmax", "_softmax", "_safe_softmax")
_RANDOM = ("dropout", "dropout_", "native_dropout")


def own_weights(graph: fx.Graph) -> int:
    """Give each product that reads a shared map its own softmax, where all lift; returns how many were added."""
    facts, added = GraphFacts(graph), 0
    for anchor in [n for n in graph.nodes if op_name(n) in _SOFTMAXES]:
        paths = carriers(anchor)
        if paths is None or len(paths) < 2 or not _may_copy(facts, anchor, paths):
            continue
        copies = [_copy(graph, anchor, path) for path in paths[1:]]
        facts = GraphFacts(graph)
        if all(lift(facts, one) for one in (anchor, *(chain[0] for chain in copies))):
            added += len(copies)
            continue
        for chain, path in zip(copies, paths[1:], strict=True):
            path[-1].replace_input_with(chain[-1], path[-2] if len(path) > 1 else anchor)
            for node in reversed(chain):
                graph.erase_node(node)
        facts = GraphFacts(graph)
    return added


def _may_copy(facts: GraphFacts, anchor: fx.Node, paths: list[list[fx.Node]]) -> bool:
    """Whether a copy of every path holds what the path held: no random stream, no memory that is written."""
    nodes = {n for path in paths for n in path[:-1]} | {anchor}
    drawn = any(op_name(n) in _RANDOM and n.args[2:3] != (False,) for n in nodes)
    written = any(facts.root(n) in facts.writes for n in (*nodes, *anchor.all_input_nodes))
    return not drawn and not written


def _copy(graph: fx.Graph, anchor: fx.Node, path: list[fx.Node]) -> list[fx.Node]:
    """Softmax and carriers once more, before the product that ends `path`, which reads them."""
    product, old = path[-1], anchor
    with graph.inserting_before(product):
        chain = [graph.node_copy(anchor)]
        for node in path[:-1]:
            replaced, by = old, chain[-1]
            chain.append(graph.node_copy(node, lambda n, old=replaced, new=by: new if n is old else n))
            old = node
    product.replace_input_with(old, chain[-1])
    return chain

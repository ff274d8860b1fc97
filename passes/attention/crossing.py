"""Cross-attention: queries of tokens that the keys know nothing of, told by what both are made of in the graph.

What makes a row's query makes its own key too where it is among the keys, also where the others come from a cache:
an input of tokens that the query depends on and no key does says that it is not. Where queries and keys are inputs
themselves nothing is known.
"""

from __future__ import annotations

import torch
from torch import fx

from attnc.passes.attention.lift import Match
from attnc.passes.graph import GraphFacts, op_name, tensor_of
from attnc.predicate import distances

PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "einsum", "embedding", "convolution")
PRODUCT = 1  # the bit that says that a product was on the way


def crosses(facts: GraphFacts, match: Match) -> bool:
    """Whether the rows of `match` are not among its keys."""
    keep, (rows, columns) = match.masked.keep, match.lengths
    if distances(keep)[0] is not None:
        return False
    masks = keep.names() | match.masked.score.names()
    if rows != columns and not (rows.is_const and rows.value == 1) and "i" not in masks:
        return True
    origins = _origins(facts)
    query, key = (_joined(origins, operand.sources) for operand in (match.query, match.key))
    return bool(query & PRODUCT and query & ~key)


def _joined(origins: dict[fx.Node, int], nodes: list[fx.Node]) -> int:
    bits = 0
    for node in nodes:
        bits |= origins[node]
    return bits


def _origins(facts: GraphFacts) -> dict[fx.Node, int]:
    """The inputs of tokens that each node is made of, a bit each, with what was written into its memory before it."""
    if facts.origins:
        return facts.origins
    found, held, count = facts.origins, dict.fromkeys(facts.graph.nodes, 0), PRODUCT
    written = {at: root for root, places in facts.writes.items() for at in places}
    for at, node in enumerate(facts.graph.nodes):
        bits = PRODUCT if op_name(node) in PRODUCTS else 0
        if node.op == "placeholder" and _is_of_tokens(node):
            count *= 2
            bits = count
        for x in node.all_input_nodes:
            bits |= found[x] | held[facts.root(x)]
        found[node] = bits
        if at in written:
            held[written[at]] |= bits
    return found


def _is_of_tokens(node: fx.Node) -> bool:
    """Whether an input is numbers of tokens or their states, with an axis of sequences, and no weight."""
    value = tensor_of(node)
    if value is None or node.meta.get("requires_grad") or isinstance(value, torch.nn.Parameter):
        return False
    return value.dim() >= (3 if value.is_floating_point() else 2) and value.dtype != torch.bool

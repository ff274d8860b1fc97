"""Projections of heads that one more shared matrix follows: the matrix is folded into the projection's weight.

    (x W_h^T) T = x (T^T W_h)^T      for every head h

The fold is a product of weights inside the graph, so an updated weight is never stale; it is made where the tokens are
more than the channels that the weight reads, because then it costs less than the matrix applied to every token.

Source: "Knocking-heads attention", arXiv:2510.23052, section 3 (the linear form folds at inference).
"""

from __future__ import annotations

from math import prod

import torch
from torch import fx

from attnc.expr import terms_of, var
from attnc.passes.attention.absorb import Emitter
from attnc.passes.check import Change, Orders, Trial
from attnc.passes.graph import GraphFacts, hint, module_path, op_name, shape_of, tensor_of
from attnc.passes.views import Ranges, through

aten = torch.ops.aten
_FIXED = ("t", "transpose", "permute", "mT", "view", "reshape", "contiguous", "detach", "alias")


def fold_heads(graph: fx.Graph, trial: Trial) -> Orders:
    """Fold the matrices that heads share into the projections before them, where `trial` says that this holds."""
    facts, orders = GraphFacts(graph), Orders()
    for node in list(graph.nodes):
        views = _projection(facts, node)
        if views is None:
            continue
        where = module_path(node) or node.name
        sentence = f"{where}: a matrix that all heads share is folded into the projection before it"
        source, weight = views[-1].args[:2]
        leaves = (source, weight, node.args[1])
        *tokens, channels = (hint(n) for n in tensor_of(source).shape)  # type: ignore[union-attr]
        kept = (channels, *(hint(n) for x in leaves[1:] for n in tensor_of(x).shape))  # type: ignore[union-attr]
        work = 2.0 * prod(tokens) * channels * kept[1]
        verdict = trial(facts, Change("fold", node, leaves, tuple(tokens), kept, work, _again, placed=True))
        if not verdict.passed:
            failed = orders.left if verdict.unknown else orders.rejected
            failed.append(f"{sentence}: {verdict.reason}. It is left as written.")
            continue
        orders.done.append(f"{sentence}.")
        _fold(graph, node, views)
        facts = GraphFacts(graph)
    if orders.done:
        graph.eliminate_dead_code()
    return orders


def _again(graph: fx.Graph, out: fx.Node) -> bool:
    """Fold the matrix that ends `graph`; whether there is one."""
    views = _projection(GraphFacts(graph), out, any_length=True)
    if views is not None:
        _fold(graph, out, views)
    return views is not None


def _projection(facts: GraphFacts, node: fx.Node, *, any_length: bool = False) -> list[fx.Node] | None:
    """The views from a projection's heads back to the projection, where `node` multiplies them by a shared matrix.

    any_length: whether it is looked at whatever the number of tokens is.
    """
    if op_name(node) != "matmul" or facts.writes.get(facts.root(node)):
        return None
    left, matrix = node.args[:2]
    value, square = tensor_of(left), tensor_of(matrix)
    if value is None or square is None or square.dim() != 2 or value.dim() < 3 or not _is_weight(matrix):
        return None
    index = tuple(var(f"y{d}") for d in range(value.dim()))
    ranges = Ranges()
    for name, extent in zip(index, shape_of(left), strict=True):
        ranges.declare(name.args[0], extent)
    views: list[fx.Node] = []
    at = left
    while (step := through(at, index, ranges)) is not None:
        if not facts.unchanged(at, at, node) or len(at.users) != 1 or not isinstance(step[0], fx.Node):
            return None
        views.append(at)
        at, index = step
    if op_name(at) != "linear" or any(x is not None for x in at.args[2:]) or at.kwargs or len(at.users) != 1:
        return None
    offset, terms = terms_of(index[-1])
    coefs, last = dict(terms), var(f"y{value.dim() - 1}")
    width, weight = square.shape[0], tensor_of(at.args[1])
    heads = [name for name in coefs if name != last]
    if weight is None or offset != 0 or coefs.get(last) != 1 or len(heads) != 1 or coefs[heads[0]] != width:
        return None
    if hint(square.shape[1]) != hint(width) or hint(weight.shape[0]) % hint(width) or weight.dtype != square.dtype:
        return None
    if not all(facts.unchanged(x, at, node) for x in (at, *at.all_input_nodes)) or not _is_weight(at.args[1]):
        return None
    tokens = prod(hint(n) for n in value.shape) // hint(weight.shape[0])
    return [*views, at] if any_length or tokens > hint(weight.shape[1]) else None


def _is_weight(node: object) -> bool:
    """Whether a value comes from outside the graph as it is or as a view: a parameter, not something made of tokens."""
    while isinstance(node, fx.Node) and op_name(node) in _FIXED:
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr")


def _fold(graph: fx.Graph, node: fx.Node, views: list[fx.Node]) -> None:
    *chain, projection = views
    source, weight = projection.args[:2]
    matrix = node.args[1]
    square = tensor_of(matrix)
    assert square is not None
    emit = Emitter(graph, node)
    with graph.inserting_before(node):
        heads = emit(aten.unflatten.int, weight, 0, [-1, square.shape[0]])
        knocked = emit(aten.einsum.default, "hec,ef->hfc", [heads, matrix])
        result = emit(aten.linear.default, source, emit(aten.flatten.using_ints, knocked, 0, 1))
        for view in reversed(chain):
            result = graph.node_copy(view, lambda n, of=view.args[0], by=result: by if n is of else n)
    node.replace_all_uses_with(result)

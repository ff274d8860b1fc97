"""Put the chosen form in the graph: one `attnc::attention` node where the region's output was, nothing else touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import getitem
from typing import Any

import torch
from torch import fx

from attnc.codegen.float8 import FLOAT8, wide_type, widest_type
from attnc.expr import Expr, size
from attnc.expr_text import spell
from attnc.ops import ATTENTION, parse_attention, spell_attention
from attnc.passes.attention.lift import Match, sizes_of
from attnc.passes.attention.operands import batch_of
from attnc.passes.graph import GraphFacts, hint, tensor_of
from attnc.predicate import rebuild
from attnc.rule_attention import AttentionRule, AttentionShape

aten = torch.ops.aten


def rule_of(match: Match) -> AttentionRule:
    """The rule of a match, its shape symbols named n0, n1, ... in the order of `sizes_of`."""
    names = {name: f"n{k}" for k, name in enumerate(sizes_of(match))}

    def rename(e: Expr) -> Expr:
        return rebuild(e, lambda x: size(names[x.args[0]]) if x.op == "size" else None) if names else e

    masked = match.masked
    return AttentionRule(
        rename(masked.score), rename(masked.keep), masked.empty,
        None if match.sink is None else rename(match.sink), match.dropout,
        None if match.row_factor is None else rename(match.row_factor),
        None if match.gain is None else rename(match.gain),
    )


def size_nodes(facts: GraphFacts, match: Match) -> list[fx.Node]:
    """The nodes whose values are the sizes n0, n1, ... of the rule."""
    return [facts.symbol_nodes[name] for name in sizes_of(match)]


def shape_of_match(match: Match) -> AttentionShape:
    """Sizes at compile time, and which of them are symbolic."""
    out = tensor_of(match.out)
    assert out is not None
    symbolic = {}
    values = []
    for name, e in (("B", match.batch), ("L", match.lengths[0]), ("S", match.lengths[1])):
        if e.is_const:
            values.append(int(e.value))
        else:
            symbolic[name] = spell(e)
            values.append(_hint(match, name))
    batch, length_q, length_k = values
    heads = match.q_heads, match.key.heads(match.q_heads)
    return AttentionShape(batch, *heads, length_q, length_k, *match.widths, symbols=symbolic)


def _hint(match: Match, name: str) -> int:
    """The compile-time value of a symbolic size, read off the tensor that has it."""
    sides = {"B": (match.query, match.key, match.value), "L": (match.query,), "S": (match.key,)}[name]
    role = "b" if name == "B" else "n"
    for operand in sides:
        kinds = [kind for kind, _ in operand.roles]
        value = tensor_of(operand.source)
        if role in kinds and value is not None:
            return hint(value.shape[kinds.index(role)])
    return 1


def rewrite(
    facts: GraphFacts, match: Match, spelling: str, weights: Mapping[str, torch.Tensor] | None = None
) -> fx.Node:
    """Replace the region by its operator and return the operator's node; the old nodes die with their last reader.

    weights: what the user supplies for the region, by name; the form takes those it needs.
    """
    graph, out = facts.graph, match.out
    value = tensor_of(out)
    assert value is not None
    with graph.inserting_before(out):
        batch = batch_of(graph, (match.query, match.key, match.value), match.batch)
        query = match.query.emit(graph, batch, match.q_heads)
        key = match.key.emit(graph, batch, match.q_heads)
        val = match.value.emit(graph, batch, match.q_heads)
        key, val = _same_heads(graph, key, val, match.q_heads)
        query, key, val = _same_dtype(graph, query, key, val)
        sizes = size_nodes(facts, match)
        text = spell_attention(spelling, rule_of(match))
        held = parse_attention(text)[0].tensors(match.widths[0], weights or {})
        captured = [*match.captured, *(_kept(graph, tensor) for tensor in held)]
        call = graph.call_function(ATTENTION, (query, key, val, captured, sizes, text))
        result = graph.call_function(getitem, (call, 0))
        wide = tensor_of(query)
        assert wide is not None
        result.meta["val"] = wide.new_empty((*wide.shape[:3], match.widths[1]), dtype=wide_type(wide.dtype))
        for node in (call, result):
            node.meta.update({k: v for k, v in out.meta.items() if k in ("stack_trace", "nn_module_stack")})
        result = _restore(graph, match, result, value)
    out.replace_all_uses_with(result)
    return call


def _kept(graph: fx.Graph, tensor: torch.Tensor) -> fx.Node:
    """A tensor from outside as a buffer of the graph's module: by reference, so that what changes it is seen."""
    module = graph.owning_module
    assert module is not None
    known = dict(module.named_buffers(recurse=False, remove_duplicate=False))
    name = next((name for name, buffer in known.items() if buffer is tensor), None)
    if name is None:
        name = next(n for n in map("attnc_weight_{}".format, range(len(known) + 1)) if not hasattr(module, n))
        module.register_buffer(name, tensor)
    return graph.get_attr(name)


def _emit(graph: fx.Graph, target, *args) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]))
    return node


def _same_heads(graph: fx.Graph, key: fx.Node, val: fx.Node, q_heads: int) -> tuple[fx.Node, fx.Node]:
    """Key and value with one number of heads: the one with fewer is repeated to the other's."""
    counts = [int(tensor_of(x).shape[1]) for x in (key, val)]  # type: ignore[union-attr]
    most = max(counts)
    key, val = (
        x if n == most else _emit(graph, aten.repeat_interleave.self_int, x, most // n, 1)
        for x, n in zip((key, val), counts, strict=True)
    )
    return key, val


def _same_dtype(graph: fx.Graph, *nodes: fx.Node) -> list[fx.Node]:
    """All nodes in the widest of their types but those of 8 bits, which the operator reads as they are."""
    dtypes = [tensor_of(n).dtype for n in nodes]  # type: ignore[union-attr]
    widest, kept = widest_type(dtypes), (*FLOAT8, widest_type(dtypes))
    return [n if d in kept else _emit(graph, aten.to.dtype, n, widest) for n, d in zip(nodes, dtypes, strict=True)]


def _restore(graph: fx.Graph, match: Match, result: fx.Node, value: torch.Tensor) -> fx.Node:
    """From (B, Hq, L, Ev) to the axes and dtype of the product that the region ended in."""
    labels = match.layout
    batch = [d for d, name in enumerate(labels) if name not in ("i", "e")]
    order = [*batch, labels.index("i"), labels.index("e")]
    shape = [value.shape[d] for d in order]
    current = tensor_of(result)
    assert current is not None
    if list(current.shape) != shape:
        result = _emit(graph, aten.reshape.default, result, _sizes(graph, result, shape))
    inverse = [order.index(d) for d in range(len(order))]
    if inverse != list(range(len(order))):
        result = _emit(graph, aten.permute.default, result, inverse)
    if current.dtype != value.dtype:
        result = _emit(graph, aten.to.dtype, result, value.dtype)
    return result


def _sizes(graph: fx.Graph, node: fx.Node, shape: Sequence[Any]) -> list[Any]:
    """`shape` with what is known at run time only as nodes, read off `node`; one of them may be what is left."""
    have = list(tensor_of(node).shape)  # type: ignore[union-attr]
    found: list[Any] = []
    for extent in shape:
        if isinstance(extent, int):
            found.append(extent)
            continue
        same = (d for d, own in enumerate(have) if not isinstance(own, int) and own.node.expr == extent.node.expr)
        dim = next(same, None)
        if dim is None and -1 in found:
            return list(shape)
        found.append(-1 if dim is None else _emit(graph, aten.sym_size.int, node, dim))
    return found

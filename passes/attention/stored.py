"""Operands that lie in memory in 8 bits and are widened on the way: read as they lie, their scales moved to where they
cost nothing.

    softmax(q (c k8)^T) (d v8) = d softmax(c q k8^T) v8        for numbers c, d of the run, of a head or of all

Every number of 8 bits is one of bfloat16, float16 and float32 too, so the widening rounds nothing. A scale that was
multiplied in rounded each key and value, and now rounds a query row, or nothing. Scales of tokens or
channels stay as written, and so does what trains.

Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv:2209.05433, section 3 (scales of tensors).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from attnc.codegen.float8 import FLOAT8
from attnc.expr import ONE, SCORE, ZERO, Expr, I, J, const, div, mul, to_float, var
from attnc.passes.attention.lift import Match, named
from attnc.passes.attention.operands import Operand, Roles, trace_operand
from attnc.passes.graph import GraphFacts, NoMatch, Unliftable, op_name, shape_of, tensor_of
from attnc.passes.masks import Lift
from attnc.passes.views import Index, broadcast_index, through
from attnc.predicate import rebuild

CASTS = ("to", "_to_copy", "type_as", "float", "half", "bfloat16")
PRODUCTS = {"mul": mul, "multiply": mul, "div": div, "divide": div, "true_divide": div}


def as_stored(facts: GraphFacts, match: Match) -> Match:
    """`match` over its operands of 8 bits where the graph widens some, with their scales in the score and the gain."""
    if facts.needs_grad(match.out) or match.gain is not None:
        return match
    try:
        return _as_stored(facts, match)
    except Unliftable:  # a scale that is written to on the way
        return match


def _as_stored(facts: GraphFacts, match: Match) -> Match:
    width, (length_q, length_k), heads = const(match.widths[0]), match.lengths, const(match.q_heads)
    pulling = Lift(facts, match.out)
    pulling.captured = list(match.captured)
    pulling.ranges = named(match.batch, heads, length_q, length_k, width)

    def behind(operand: Operand, row: Expr, length: Expr, columns: int) -> tuple[Operand, Expr] | None:
        extents = match.batch, length, const(columns)
        return _behind(pulling, operand, Roles(row, var("e"), match.q_heads, extents, scalars=False))

    changed: dict[str, Any] = {}
    factor = const(1.0)
    found = behind(match.key, J, length_k, match.widths[0])
    if found is not None:
        changed["key"], factor = found
    found = behind(match.value, J, length_k, match.widths[1])
    if found is not None:
        changed["value"], gain = found
        changed["gain"] = None if gain == const(1.0) else gain
    wide = tensor_of(match.query.source)
    if changed and wide is not None and wide.dtype == torch.bfloat16:  # what the output is where queries have 8 bits
        found = behind(match.query, I, length_q, match.widths[0])
        if found is not None:
            changed["query"], factor = found[0], mul(factor, found[1])
    if not changed:
        return match
    if factor != const(1.0):
        score = rebuild(match.masked.score, lambda x: mul(SCORE, factor) if x == SCORE else None)
        changed["masked"] = replace(match.masked, score=score)
    return replace(match, captured=pulling.captured, **changed)


def _behind(pulling: Lift, operand: Operand, roles: Roles) -> tuple[Operand, Expr] | None:
    """The operand of 8 bits that `operand` is made of, and the factor between them; None where there is none."""
    facts, end = pulling.facts, pulling.end
    node, index, factor = operand.source, operand.index, const(1.0)
    known = len(pulling.captured)
    if operand.more or operand.weight != 1.0:
        return None
    while (value := tensor_of(node)) is not None and value.dtype not in FLOAT8:
        step = _step(pulling, node, index) if facts.unchanged(node, node, end) else None
        if step is None or not facts.unchanged(step[0], node, end):
            del pulling.captured[known:]
            return None
        node, index, by = step
        factor = mul(factor, by)
    found = None if value is None else trace_operand(facts, node, index, roles, pulling.ranges, end)
    if found is None or isinstance(found, NoMatch):
        del pulling.captured[known:]
        return None
    return replace(found, factor=operand.factor), factor


def _step(pulling: Lift, node: fx.Node, index: Index) -> tuple[fx.Node, Index, Expr] | None:
    """What `node` is made of, through a view, a widening or the product with a scale; and that scale."""
    view = through(node, index, pulling.ranges)
    if view is not None:
        return (*view, const(1.0))
    name = op_name(node)
    if name in CASTS:
        source, given = node.args[0], tensor_of(node.args[0])
        return (source, index, const(1.0)) if given is not None and given.is_floating_point() else None
    if name not in PRODUCTS or len(node.args) != 2 or node.kwargs:
        return None
    scaled, scale = node.args
    if PRODUCTS[name] is mul and not _is_scale(scale, node, index):
        scaled, scale = scale, scaled
    if not isinstance(scaled, fx.Node) or tensor_of(scaled) is None or not _is_scale(scale, node, index):
        return None
    if shape_of(scaled) != shape_of(node):  # the stored tensor is not repeated by its scale
        return None
    return scaled, index, PRODUCTS[name](const(1.0), to_float(pulling.element(scale, _at(scale, node, index))))


def _is_scale(scale: Any, node: fx.Node, index: Index) -> bool:
    """Whether a factor of `node` is one number for all tokens and channels of a head."""
    value = tensor_of(scale)
    if value is None:
        return isinstance(scale, int | float) and not isinstance(scale, bool) and scale != 0
    number = value.is_floating_point() and value.dtype not in FLOAT8
    return number and not any(e.names() & {"i", "j", "e"} for e in _at(scale, node, index))


def _at(scale: Any, node: fx.Node, index: Index) -> Index:
    """The element of `scale` that multiplies the element `index` of `node`."""
    if tensor_of(scale) is None:
        return ()
    found = broadcast_index(index, shape_of(scale), shape_of(node))
    return tuple(ZERO if extent == ONE else e for e, extent in zip(found, shape_of(scale), strict=True))

"""Element-wise rules: element of an operator's result from elements of its operands.

One table, `RULES`, from operator name to rule; a rule returns None where it cannot say (the tensor is then captured).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from attnc import predicate
from attnc.expr import (
    BOOL,
    FLOAT,
    ONE,
    ZERO,
    Expr,
    add,
    const,
    div,
    maximum,
    minimum,
    mul,
    neg,
    scale,
    to_float,
    unary,
)
from attnc.passes.graph import op_name, shape_of, tensor_of
from attnc.passes.indexing import RULES as INDEXING
from attnc.passes.indexing import Lift
from attnc.passes.thresholds import compared
from attnc.passes.views import Index, broadcast_index


def _operand(lift: Lift, node: fx.Node, argument: Any, index: Index) -> Expr:
    value = tensor_of(argument)
    if value is None:
        return lift.element(argument, ())
    return lift.element(argument, broadcast_index(index, shape_of(argument), shape_of(node)))


def _pointwise(rule: Callable[..., Expr], arity: int) -> Callable:
    def apply(lift: Lift, node: fx.Node, index: Index) -> Expr:
        return rule(*(_operand(lift, node, a, index) for a in node.args[:arity]))

    return apply


def _add(sign: int) -> Callable:
    def apply(lift: Lift, node: fx.Node, index: Index) -> Expr:
        a, c = (_operand(lift, node, x, index) for x in node.args[:2])
        alpha = lift.element(node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1), ())
        result = tensor_of(node)
        assert result is not None
        if result.dtype == torch.bool:
            return predicate.disjunction(a, c)
        if sign == 2:  # rsub: other - alpha * self
            a, c = c, a
        return add(a, mul(c, alpha if sign == 1 else neg(alpha)))

    return apply


def _mul(a: Expr, c: Expr) -> Expr:
    return predicate.conjunction(a, c) if a.kind == BOOL and c.kind == BOOL else mul(a, c)


def _div(lift: Lift, node: fx.Node, index: Index) -> Expr | None:
    a, c = (_operand(lift, node, x, index) for x in node.args[:2])
    mode = node.kwargs.get("rounding_mode")
    if mode is None:
        return div(to_float(a), c)
    if FLOAT in (a.kind, c.kind):
        return None
    low = lift.ranges.of(a)
    if mode == "floor" or (low is not None and low[0] >= 0 and c.is_const and c.value > 0):
        return lift.ranges.floordiv(a, c)
    return None


def _floordiv(lift: Lift, node: fx.Node, index: Index) -> Expr | None:
    a, c = (_operand(lift, node, x, index) for x in node.args[:2])
    return None if FLOAT in (a.kind, c.kind) else lift.ranges.floordiv(predicate.num(a), c)


def _mod(lift: Lift, node: fx.Node, index: Index) -> Expr | None:
    a, c = (_operand(lift, node, x, index) for x in node.args[:2])
    if FLOAT in (a.kind, c.kind):
        return None
    if op_name(node) == "fmod" and ((low := lift.ranges.of(a)) is None or low[0] < 0):
        return None
    return lift.ranges.mod(predicate.num(a), c)


def _bitwise(logic: Callable[..., Expr]) -> Callable:
    def apply(lift: Lift, node: fx.Node, index: Index) -> Expr | None:
        parts = [_operand(lift, node, a, index) for a in node.args]
        value = tensor_of(node)
        logical = op_name(node).startswith("logical")
        if not logical and (value is None or value.dtype != torch.bool):
            return None
        return logic(*(predicate.truth(p) for p in parts))

    return apply


def _where(lift: Lift, node: fx.Node, index: Index) -> Expr | None:
    if len(node.args) != 3:
        return None
    p, yes, no = (_operand(lift, node, a, index) for a in node.args)
    return predicate.where(p, yes, no)


def _masked_fill(lift: Lift, node: fx.Node, index: Index) -> Expr:
    x, p, fill = (_operand(lift, node, a, index) for a in node.args[:3])
    return predicate.where(p, to_float(fill) if x.kind == FLOAT else fill, x)


def _clamp(lift: Lift, node: fx.Node, index: Index) -> Expr:
    names = {"clamp": ("min", "max"), "clamp_min": ("min",), "clamp_max": ("max",)}[op_name(node)]
    x = _operand(lift, node, node.args[0], index)
    for position, name in enumerate(names, start=1):
        bound = node.args[position] if position < len(node.args) else node.kwargs.get(name)
        if bound is not None:
            limit = _operand(lift, node, bound, index)
            x = maximum(x, limit) if name == "min" else minimum(x, limit)
    return x


def _filled(position: int | None, value: float | bool = 0) -> Callable:
    def apply(lift: Lift, node: fx.Node, index: Index) -> Expr:
        return const(value) if position is None else lift.element(node.args[position], ())

    return apply


def _cast(lift: Lift, node: fx.Node, index: Index) -> Expr:
    source, value = node.args[0], lift.element(node.args[0], index)
    to, given = tensor_of(node), tensor_of(source)
    if to is None or given is None or not (to.is_floating_point() and given.is_floating_point()):
        return value
    if torch.finfo(to.dtype).max >= torch.finfo(given.dtype).max:
        return value
    return predicate.rebuild(value, lambda x: _in_range(x, to.dtype))


def _in_range(x: Expr, dtype: torch.dtype) -> Expr | None:
    """A constant as `dtype` holds it: finfo.min of a wider one becomes -inf, and rows without keys NaN."""
    if not x.is_const or x.kind != FLOAT or abs(x.value) <= torch.finfo(dtype).max:
        return None
    return const(torch.tensor(x.value, dtype=torch.float64).to(dtype).item())


def _power(lift: Lift, node: fx.Node, index: Index) -> Expr | None:
    x, p = (_operand(lift, node, a, index) for a in node.args[:2])
    if not p.is_const:
        return None
    if p.value == 2:
        return mul(x, x)
    return unary("sqrt", x) if p.value == 0.5 else None


def _sign(e: Expr) -> Expr:
    one = const(1.0) if e.kind == FLOAT else ONE
    return predicate.where(
        predicate.lt(e, ZERO), neg(one), predicate.where(predicate.eq(e, ZERO), scale(one, 0), one)
    )


def _of_two(rule: Callable[[Expr, Expr], Expr]) -> Callable:
    """`max(a, b)` of two tensors; the reduction of the same name is no element-wise operator."""

    def apply(lift: Lift, node: fx.Node, index: Index) -> Expr | None:
        if len(node.args) != 2 or tensor_of(node.args[1]) is None or node.kwargs:
            return None
        return rule(*(_operand(lift, node, a, index) for a in node.args))

    return apply


def _one_minus(e: Expr) -> Expr:
    return predicate.logical_not(e)


RULES: dict[str, Callable[[Lift, fx.Node, Index], Expr | None]] = {
    **INDEXING,
    "add": _add(1),
    "sub": _add(-1),
    "subtract": _add(-1),
    "rsub": _add(2),
    "mul": _pointwise(_mul, 2),
    "multiply": _pointwise(_mul, 2),
    "div": _div,
    "divide": _div,
    "true_divide": _div,
    "floor_divide": _floordiv,
    "remainder": _mod,
    "fmod": _mod,
    "neg": _pointwise(neg, 1),
    "pow": _power,
    "square": _pointwise(lambda x: mul(x, x), 1),
    "reciprocal": _pointwise(lambda x: div(const(1.0), x), 1),
    **{
        op: _pointwise(lambda x, op=op: unary(op, x), 1)
        for op in ("exp", "tanh", "sqrt", "log", "sigmoid", "abs")
    },
    "sign": _pointwise(_sign, 1),
    "max": _of_two(maximum),
    "min": _of_two(minimum),
    "maximum": _pointwise(maximum, 2),
    "minimum": _pointwise(minimum, 2),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp,
    **{
        op: compared(_pointwise(rule, 2), scores)
        for op, rule, scores in (
            ("le", predicate.le, 1),
            ("lt", predicate.lt, 0),
            ("ge", lambda a, c: predicate.le(c, a), 0),
            ("gt", lambda a, c: predicate.lt(c, a), 1),
        )
    },
    "eq": _pointwise(predicate.eq, 2),
    "ne": _pointwise(predicate.ne, 2),
    **{op: _bitwise(predicate.conjunction) for op in ("bitwise_and", "logical_and", "__and__")},
    **{op: _bitwise(predicate.disjunction) for op in ("bitwise_or", "logical_or", "__or__")},
    **{op: _bitwise(predicate.xor) for op in ("bitwise_xor", "logical_xor", "__xor__")},
    **{op: _bitwise(_one_minus) for op in ("bitwise_not", "logical_not")},
    "where": _where,
    "masked_fill": _masked_fill,
    "full": _filled(1),
    "full_like": _filled(1),
    "new_full": _filled(2),
    "scalar_tensor": _filled(0),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _filled(None, 0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _filled(None, 1)),
    **dict.fromkeys(
        ("to", "_to_copy", "type_as", "float", "bool", "int", "long", "half", "bfloat16", "double"), _cast
    ),
}

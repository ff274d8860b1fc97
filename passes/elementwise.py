"""Element-wise rules: element of an operator's result from elements of its operands.

One table, `RULES`, from operator name to rule; a rule returns None where it cannot say (the tensor is then captured).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import fx

from attnc import predicate
from attnc.expr import (
    BOOL,
    FALSE,
    FLOAT,
    ONE,
    TRUE,
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
    sub,
    to_float,
    unary,
)
from attnc.passes.graph import integer, op_name, shape_of, tensor_of
from attnc.passes.views import Index, Ranges, broadcast_index


class Lift(Protocol):
    """What a rule needs of a lift, see `attnc.passes.masks.Lift`."""

    ranges: Ranges

    def element(self, node: Any, index: Index) -> Expr: ...


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


def _arange(lift: Lift, node: fx.Node, index: Index) -> Expr | None:
    args = node.args
    start, step = (args[0], args[2] if len(args) > 2 else 1) if len(args) > 1 else (0, 1)
    if any(isinstance(x, float) for x in (start, step)):
        return None
    return add(integer(start), mul(index[0], integer(step)))


def _filled(position: int | None, value: float | bool = 0) -> Callable:
    def apply(lift: Lift, node: fx.Node, index: Index) -> Expr:
        return const(value) if position is None else lift.element(node.args[position], ())

    return apply


def _triangle(keep: Callable[[Expr, Expr], Expr]) -> Callable:
    def apply(lift: Lift, node: fx.Node, index: Index) -> Expr:
        x = lift.element(node.args[0], index)
        diagonal = integer(node.args[1]) if len(node.args) > 1 else integer(node.kwargs.get("diagonal", 0))
        zero = FALSE if x.kind == BOOL else const(0.0) if x.kind == FLOAT else ZERO
        return predicate.where(keep(sub(index[-1], index[-2]), diagonal), x, zero)

    return apply


def _cumsum(lift: Lift, node: fx.Node, index: Index) -> Expr | None:
    dim = int(node.args[1])
    x = lift.element(node.args[0], index)
    return mul(predicate.num(x), add(index[dim], ONE)) if x.is_const else None


def _diff(lift: Lift, node: fx.Node, index: Index) -> Expr | None:
    names = ("n", "dim", "prepend", "append")
    given = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    source = node.args[0]
    if given.get("n", 1) != 1 or given.get("append") is not None or not isinstance(source, fx.Node):
        return None
    dim = int(given.get("dim", -1)) % len(index)

    def at(tensor: fx.Node, position: Expr) -> Expr:
        return predicate.num(lift.element(tensor, index[:dim] + (position,) + index[dim + 1 :]))

    front = given.get("prepend")
    if not isinstance(front, fx.Node):
        return sub(at(source, add(index[dim], ONE)), at(source, index[dim]))
    ahead = shape_of(front)[dim]
    if ahead != ONE:
        return None
    first = predicate.eq(index[dim], ZERO)
    before = predicate.where(first, at(front, ZERO), at(source, sub(index[dim], ONE)))
    return (
        sub(at(source, index[dim]), before)
        if not before.has("where")
        else _steps(at(source, index[dim]), before)
    )


def _steps(here: Expr, before: Expr) -> Expr:
    p, first, later = before.args if before.op == "where" else (TRUE, before, before)
    # At the first position the coordinate is zero, so what is there can be compared by value.
    zero = p.args[0] if p.op == "eq" else None
    at_first = predicate.rebuild(here, lambda x: ZERO if zero is not None and x == zero else None)
    return predicate.where(p, sub(at_first, first), sub(here, later))


def _cat(lift: Lift, node: fx.Node, index: Index) -> Expr | None:
    parts = [p for p in node.args[0] if isinstance(p, fx.Node)]
    dim = (int(node.args[1]) if len(node.args) > 1 else int(node.kwargs.get("dim", 0))) % len(index)
    result: Expr | None = None
    ends: list[tuple[Expr, fx.Node, Expr]] = []
    offset = ZERO
    for part in parts:
        value = tensor_of(part)
        if value is not None and value.numel() == 0:
            continue
        ends.append((offset, part, add(offset, shape_of(part)[dim])))
        offset = ends[-1][2]
    for begin, part, end in reversed(ends):
        inside = predicate.conjunction(
            _decide(lift, predicate.lt(index[dim], end)), _decide(lift, predicate.le(begin, index[dim]))
        )
        if inside == FALSE:
            continue
        here = lift.element(part, index[:dim] + (sub(index[dim], begin),) + index[dim + 1 :])
        result = here if result is None or inside == TRUE else predicate.where(inside, here, result)
    return result


def _decide(lift: Lift, p: Expr) -> Expr:
    """`p` as a constant where the ranges of the coordinates decide it."""
    known = lift.ranges.of(p)
    if known is not None and known[1] is True:
        return TRUE
    return FALSE if known is not None and known[0] is False else p


def _pad(lift: Lift, node: fx.Node, index: Index) -> Expr | None:
    source, widths = node.args[0], list(node.args[1])
    fill = node.args[2] if len(node.args) > 2 else node.kwargs.get("value", 0)
    at, inside = list(index), []
    shape = shape_of(source)
    for k in range(len(widths) // 2):
        dim = len(index) - 1 - k
        at[dim] = sub(index[dim], integer(widths[2 * k]))
        inside += [
            _decide(lift, predicate.le(ZERO, at[dim])),
            _decide(lift, predicate.lt(at[dim], shape[dim])),
        ]
    return predicate.where(
        predicate.conjunction(*inside),
        lift.element(source, tuple(at)),
        lift.element(0 if fill is None else fill, ()),
    )


def _index(lift: Lift, node: fx.Node, index: Index) -> Expr | None:
    """Advanced indexing with integer tensors."""
    source, keys = node.args
    used = [d for d, k in enumerate(keys) if k is not None]
    if not used or any(tensor_of(keys[d]).dtype == torch.bool for d in used):
        return None
    rank = len(shape_of(source))
    keys = [*keys, *([None] * (rank - len(keys)))]
    shapes = [tensor_of(keys[d]).shape for d in used]
    joint = torch.broadcast_shapes(*shapes)
    # The joint dimensions stand where the first key was if the keys are neighbours, else in front.
    first = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    inner = index[first : first + len(joint)]
    rest = iter(index[:first] + index[first + len(joint) :])
    outer = tuple(integer(s) for s in joint)
    at = []
    for d in range(rank):
        if keys[d] is None:
            at.append(next(rest))
            continue
        position = predicate.num(lift.element(keys[d], broadcast_index(inner, shape_of(keys[d]), outer)))
        low = lift.ranges.of(position)
        if position.is_const and position.value < 0:
            position = add(position, shape_of(source)[d])
        elif low is None or low[0] < 0:
            extent = shape_of(source)[d]
            if position.op not in ("var", "load", "lin") or _may_be_negative(position):
                position = predicate.where(predicate.lt(position, ZERO), add(position, extent), position)
        at.append(position)
    return lift.element(source, tuple(at))


def _may_be_negative(position: Expr) -> bool:
    if position.op == "lin":
        constant, terms = position.args
        return constant < 0 or any(coef < 0 or atom.op == "load" for atom, coef in terms)
    return position.op == "load"


def _index_select(lift: Lift, node: fx.Node, index: Index) -> Expr | None:
    source, dim, key = node.args
    d = int(dim) % len(index)
    position = predicate.num(lift.element(key, (index[d],)))
    return lift.element(source, index[:d] + (position,) + index[d + 1 :])


def _cast(lift: Lift, node: fx.Node, index: Index) -> Expr:
    return lift.element(node.args[0], index)


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


def _index_put(lift: Lift, node: fx.Node, index: Index) -> Expr | None:
    """`x[..., mask] = number`: a fill by a boolean mask over the last axes."""
    x, keys, value = node.args[:3]
    accumulate = node.args[3] if len(node.args) > 3 else node.kwargs.get("accumulate", False)
    masks = [k for k in keys if k is not None]
    number = tensor_of(value)
    if accumulate or len(masks) != 1 or keys[-1] is None or number is None or number.numel() != 1:
        return None
    mask = tensor_of(masks[0])
    if mask is None or mask.dtype != torch.bool or len(keys) - 1 + mask.dim() != len(index):
        return None
    inside = lift.element(masks[0], index[len(keys) - 1 :])
    return predicate.where(inside, lift.element(value, (ZERO,) * number.dim()), lift.element(x, index))


def _one_minus(e: Expr) -> Expr:
    return predicate.logical_not(e)


RULES: dict[str, Callable[[Lift, fx.Node, Index], Expr | None]] = {
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
    "index_put": _index_put,
    "max": _of_two(maximum),
    "min": _of_two(minimum),
    "maximum": _pointwise(maximum, 2),
    "minimum": _pointwise(minimum, 2),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp,
    **{
        op: _pointwise(rule, 2)
        for op, rule in (
            ("eq", predicate.eq),
            ("ne", predicate.ne),
            ("le", predicate.le),
            ("lt", predicate.lt),
            ("ge", lambda a, c: predicate.le(c, a)),
            ("gt", lambda a, c: predicate.lt(c, a)),
        )
    },
    **{op: _bitwise(predicate.conjunction) for op in ("bitwise_and", "logical_and", "__and__")},
    **{op: _bitwise(predicate.disjunction) for op in ("bitwise_or", "logical_or", "__or__")},
    **{op: _bitwise(predicate.xor) for op in ("bitwise_xor", "logical_xor", "__xor__")},
    **{op: _bitwise(_one_minus) for op in ("bitwise_not", "logical_not")},
    "where": _where,
    "masked_fill": _masked_fill,
    "arange": _arange,
    "full": _filled(1),
    "full_like": _filled(1),
    "new_full": _filled(2),
    "scalar_tensor": _filled(0),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _filled(None, 0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _filled(None, 1)),
    "tril": _triangle(predicate.le),
    "triu": _triangle(lambda offset, diagonal: predicate.le(diagonal, offset)),
    "cumsum": _cumsum,
    "diff": _diff,
    "cat": _cat,
    "concat": _cat,
    "concatenate": _cat,
    "constant_pad_nd": _pad,
    "pad": lambda lift, node, index: (
        _pad(lift, node, index) if node.args[2:3] in ((), ("constant",)) else None
    ),
    "index": _index,
    "index_select": _index_select,
    **dict.fromkeys(
        ("to", "_to_copy", "type_as", "float", "bool", "int", "long", "half", "bfloat16", "double"), _cast
    ),
}

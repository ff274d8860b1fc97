"""Indexing rules: element of a tensor that is joined, padded, looked up or counted from elements of its sources.

One table, `RULES`, from operator name to rule, beside the element-wise one; a rule returns None where it cannot say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import fx

from attnc import predicate
from attnc.expr import BOOL, FALSE, FLOAT, ONE, TRUE, ZERO, Expr, add, const, mul, sub
from attnc.passes.graph import integer, op_name, shape_of, tensor_of
from attnc.passes.views import Index, Ranges, broadcast_index


class Lift(Protocol):
    """What a rule needs of a lift, see `attnc.passes.masks.Lift`."""

    ranges: Ranges

    def element(self, node: Any, index: Index) -> Expr: ...

    def on_list(self, node: fx.Node, index: Index, axis: int) -> Expr | None: ...


def _arange(lift: Lift, node: fx.Node, index: Index) -> Expr | None:
    args = node.args
    start, step = (args[0], args[2] if len(args) > 2 else 1) if len(args) > 1 else (0, 1)
    if any(isinstance(x, float) for x in (start, step)):
        return None
    return add(integer(start), mul(index[0], integer(step)))


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
    place = 3 if op_name(node) == "pad" else 2  # behind the mode
    fill = node.args[place] if len(node.args) > place else node.kwargs.get("value", 0)
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
    tables = [t for d in used if (t := tensor_of(keys[d])) is not None]
    if not used or len(tables) != len(used) or any(t.dtype == torch.bool for t in tables):
        return None
    rank = len(shape_of(source))
    keys = [*keys, *([None] * (rank - len(keys)))]
    joint = torch.broadcast_shapes(*(t.shape for t in tables))
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


def _scatter(lift: Lift, node: fx.Node, index: Index) -> Expr | None:
    """One number wherever a list says: `full(-inf).scatter(-1, top_k.indices, 0)`."""
    table, dim, numbers, value = node.args[:4]
    if len(node.args) > 4 or node.kwargs or tensor_of(numbers) is None:
        return None  # reduced with what is there
    axis = int(dim) % len(index)
    sizes = zip(shape_of(table), shape_of(numbers), strict=True)
    if any(own != given for d, (own, given) in enumerate(sizes) if d != axis):
        return None
    number = lift.element(value, () if tensor_of(value) is None else index)
    inside = lift.on_list(numbers, index, axis) if number.is_const else None
    return None if inside is None else predicate.where(inside, number, lift.element(table, index))


def _sum(lift: Lift, node: fx.Node, index: Index) -> Expr | None:
    """A sum over axes of length 1 is a view."""
    if len(node.args) < 2 or not isinstance(node.args[0], fx.Node):
        return None
    source, dims = shape_of(node.args[0]), node.args[1]
    axes = {int(d) % len(source) for d in ([dims] if isinstance(dims, int) else dims)}
    if any(source[d] != ONE for d in axes):
        return None
    kept = len(index) == len(source)
    rest = iter(index)
    at = tuple(next(rest) if kept or d not in axes else ZERO for d in range(len(source)))
    return lift.element(node.args[0], at)


RULES: dict[str, Callable[[Lift, fx.Node, Index], Expr | None]] = {
    "index_put": _index_put,
    "scatter": _scatter,
    "arange": _arange,
    "tril": _triangle(predicate.le),
    "triu": _triangle(lambda offset, diagonal: predicate.le(diagonal, offset)),
    "cumsum": _cumsum,
    "diff": _diff,
    "sum": _sum,
    "cat": _cat,
    "concat": _cat,
    "concatenate": _cat,
    "constant_pad_nd": _pad,
    "pad": lambda lift, node, index: (
        _pad(lift, node, index) if node.args[2:3] in ((), ("constant",)) else None
    ),
    "index": _index,
    "index_select": _index_select,
}

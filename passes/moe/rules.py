"""How operators make sums of expert outputs from others: one table from operator name to rule.

A rule takes an element of the operator's result apart into summands; it returns None where the operator is used in a
way that is not its own, and raises where it can be no sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import fx

from attnc.expr import ONE, ZERO, Expr
from attnc.passes.graph import Unliftable, op_name, shape_of, tensor_of
from attnc.passes.moe.norms import normed
from attnc.passes.moe.products import is_weight
from attnc.passes.moe.rows import CASTS, Element, Rows, is_single
from attnc.passes.moe.summand import Scatter, Summand
from attnc.passes.views import Index, broadcast_index


class Sums(Protocol):
    """What a rule needs of `attnc.passes.moe.combine.Sums`."""

    rows: Rows
    col: Expr

    def of(self, node: fx.Node, index: Index) -> list[Summand]: ...
    def fresh(self, extent: Expr) -> Expr: ...
    def is_free(self, at: Element) -> bool: ...
    def summed(self, rows: Element, over: list[tuple[Expr, Expr]], *factors: Element) -> list[Summand]: ...


def _operands(at: Element) -> list[Element | float]:
    """The operands of an element-wise operator at this element, numbers as they are."""
    outer = shape_of(at.node)
    found: list[Element | float] = []
    for x in at.node.args[:2]:
        if tensor_of(x) is not None:
            found.append(Element(x, broadcast_index(at.index, shape_of(x), outer)))
        elif isinstance(x, int | float) and not isinstance(x, bool):
            found.append(float(x))
        else:
            raise Unliftable("a number known at run time only is part of the sum", at.node)
    return found


def _add(sums: Sums, at: Element) -> list[Summand]:
    node = at.node
    if node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1) != 1:
        raise Unliftable("a sum with another factor than 1", node)
    a, c = _operands(at)
    if isinstance(a, float) or isinstance(c, float):
        if 0.0 in (a, c):
            return sums.of(*_pair(a if isinstance(c, float) else c))
        raise Unliftable("a number is added to the sum of expert outputs", node)
    for bias, rows in ((c, a), (a, c)):
        if _is_bias(sums, bias):
            below = sums.of(rows.node, rows.index)
            if len(below) != 1 or below[0].factors or below[0].unit is None:
                raise Unliftable("a bias is added to what is no single expert's output", node)
            return [replace(below[0], biased=True)]
    return [*sums.of(a.node, a.index), *sums.of(c.node, c.index)]


def _pair(at: Any) -> tuple[fx.Node, Index]:
    return at.node, at.index


def _is_bias(sums: Sums, at: Element) -> bool:
    """A parameter, or one row of a parameter for each expert."""
    node = at.node
    while True:
        if is_weight(node):
            return True
        if op_name(node) in ("index", "index_select", "embedding"):
            return is_weight(node.args[0])
        if op_name(node) not in (*CASTS, "unsqueeze", "view", "reshape", "expand", "squeeze"):
            return False
        node = node.args[0]


def _mul(sums: Sums, at: Element) -> list[Summand] | None:
    if normed(at.node) is not None:
        return None
    a, c = _operands(at)
    for constant, rows in ((a, c), (c, a)):
        if isinstance(constant, float) and isinstance(rows, Element):
            return [replace(s, scale=s.scale * constant) for s in sums.of(rows.node, rows.index)]
    if isinstance(a, float) or isinstance(c, float):
        return None
    for factor, rows in ((a, c), (c, a)):
        if sums.is_free(factor) and not sums.is_free(rows):
            number = _constant(sums, factor)
            if number is not None:
                return [replace(s, scale=s.scale * number) for s in sums.of(rows.node, rows.index)]
            return [replace(s, factors=(*s.factors, factor)) for s in sums.of(rows.node, rows.index)]
    for gain, rows in ((a, c), (c, a)):
        if is_weight(gain.node):
            below = sums.of(rows.node, rows.index)
            if len(below) == 1 and below[0].unit is not None and not below[0].factors:
                return [replace(below[0], gained=not below[0].norm)]
            raise Unliftable("the channels of the sum are multiplied by a parameter", at.node)
    return None


def _constant(sums: Sums, at: Element) -> float | None:
    if not is_single(at.node):
        return None
    e = sums.rows.number(at.node, (ZERO,) * len(shape_of(at.node)))
    return float(e.value) if e.is_const else None


def _div(sums: Sums, at: Element) -> list[Summand] | None:
    a, c = _operands(at)
    if isinstance(c, float) and isinstance(a, Element) and c != 0 and not at.node.kwargs:
        return [replace(s, scale=s.scale / c) for s in sums.of(a.node, a.index)]
    return None


def _sum(sums: Sums, at: Element) -> list[Summand] | None:
    node = at.node
    source, dims = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    dims = [dims] if isinstance(dims, int) else dims
    if not dims:
        return None
    shape = shape_of(source)
    chosen = {int(d) % len(shape) for d in dims}
    left = iter(at.index)
    where, over = [], []
    for d, extent in enumerate(shape):
        if d in chosen:
            where.append(sums.fresh(extent) if extent != ONE else ZERO)
            if extent != ONE:
                over.append((where[-1], extent))
            if keep:
                next(left)
        else:
            where.append(next(left))
    below = sums.summed(Element(source, tuple(where)), over)
    if op_name(node) == "mean":
        if not all(shape[d].is_const for d in chosen):
            raise Unliftable("a mean over a number known at run time only", node)
        count = math.prod(int(shape[d].value) for d in chosen)
        below = [replace(s, scale=s.scale / count) for s in below]
    return below


def _index_add(sums: Sums, at: Element) -> list[Summand] | None:
    into, dim, key, rows = at.node.args[:4]
    if at.node.kwargs.get("alpha", 1) != 1:
        raise Unliftable("a sum with another factor than 1", at.node)
    return _scattered(sums, at, into, int(dim) % len(at.index), key, rows)


def _index_put(sums: Sums, at: Element) -> list[Summand] | None:
    into, keys, rows = at.node.args[:3]
    adds = at.node.args[3] if len(at.node.args) > 3 else at.node.kwargs.get("accumulate", False)
    if len(keys) != 1 or tensor_of(keys[0]) is None or tensor_of(keys[0]).dtype == torch.bool:  # type: ignore[union-attr]
        return None
    if not adds:  # out[key] = out[key] + rows, where no key comes twice
        before, rows = _own_rows(into, keys[0], rows)
        if before is None:
            return None
    return _scattered(sums, at, into, 0, keys[0], rows)


def _own_rows(into: fx.Node, key: fx.Node, rows: fx.Node) -> tuple[Any, Any]:
    if op_name(rows) not in ("add", "add_"):
        return None, None
    for a, c in (rows.args[:2], rows.args[1::-1]):
        if op_name(a) == "index" and a.args[0] is into and list(a.args[1]) == [key]:
            return a, c
    return None, None


def _scatter_add(sums: Sums, at: Element) -> list[Summand] | None:
    """Rows added at keys that are the same for all channels."""
    into, dim, keys, rows = at.node.args[:4]
    d = int(dim) % len(at.index)
    extent = shape_of(rows)[d]
    row = sums.fresh(extent)
    where = (*at.index[:d], row, *at.index[d + 1 :])
    key = sums.rows.settle(keys, where)
    if any(e.names() & sums.col.names() for e in key.index):
        raise Unliftable("rows are scattered channel by channel", at.node)
    scatter = Scatter(row, extent, sums.rows.number(key.node, key.index), at.index[d], key.node)
    return [*sums.of(into, at.index), *_marked(sums, at, Element(rows, where), scatter)]


def _scattered(sums: Sums, at: Element, into: Any, dim: int, key: Any, rows: Any) -> list[Summand]:
    extent = shape_of(rows)[dim]
    row = sums.fresh(extent)
    where = (*at.index[:dim], row, *at.index[dim + 1 :])
    scatter = Scatter(row, extent, sums.rows.number(key, (row,)), at.index[dim], key)
    return [*sums.of(into, at.index), *_marked(sums, at, Element(rows, where), scatter)]


def _marked(sums: Sums, at: Element, rows: Element, scatter: Scatter) -> list[Summand]:
    below = sums.of(rows.node, rows.index)
    if any(s.scatter is not None for s in below):
        raise Unliftable("rows are scattered twice", at.node)
    return [replace(s, scatter=scatter) for s in below]


def _where(sums: Sums, at: Element) -> list[Summand] | None:
    """Rows kept where a mask says so, zero elsewhere."""
    node, outer = at.node, shape_of(at.node)
    if op_name(node) == "masked_fill":
        rows, mask, fill = node.args[:3]
    else:
        mask, rows, fill = node.args[:3]
    if tensor_of(fill) is not None:
        e = sums.rows.number(fill, broadcast_index(at.index, shape_of(fill), outer))
        fill = e.value if e.is_const else None
    if fill != 0 or tensor_of(rows) is None or tensor_of(mask) is None:
        return None
    factor = Element(mask, broadcast_index(at.index, shape_of(mask), outer))
    if not sums.is_free(factor):
        return None
    below = sums.of(rows, broadcast_index(at.index, shape_of(rows), outer))
    if op_name(node) == "masked_fill":
        raise Unliftable("rows are set to zero by a mask", node)
    return [replace(s, factors=(*s.factors, factor)) for s in below]


RULES: dict[str, Callable[[Sums, Element], list[Summand] | None]] = {
    **dict.fromkeys(("add", "add_"), _add),
    **dict.fromkeys(("mul", "multiply", "mul_"), _mul),
    **dict.fromkeys(("div", "divide"), _div),
    **dict.fromkeys(("sum", "mean"), _sum),
    "index_add": _index_add,
    "index_add_": _index_add,
    "index_put": _index_put,
    "scatter_add": _scatter_add,
    **dict.fromkeys(("where", "masked_fill"), _where),
}

"""Bounds of an index expression over a box of positions: which tiles of a mask are empty, full or partial.

    bounds(e, box) -> (lowest, highest) for numbers, (may, must) for predicates

A box gives each coordinate a lowest and a highest position, as Python integers (one tile) or as integer tensors (all
tiles at once, also under symbolic lengths and from run-time data). `may` false means no position of the tile is kept,
`must` true means all are. Bounds are safe: a tile may be called partial though it is not, never the reverse; for linear
comparisons with one occurrence of each coordinate (causal, windows, chunks at multiples of the tile) they are exact.

Source: Moore 1966, "Interval Analysis"; tile classes as in FlexAttention's BlockMask (Dong et al. 2024,
arXiv:2412.05496).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from attnc.expr import BOOL, INT, Expr, combination

Bound = tuple[Any, Any]
Lookup = Callable[[Expr], "Bound | None"]


def bounds(
    e: Expr, box: Mapping[str, Bound], sizes: Sequence[Any] = (), lookup: Lookup | None = None
) -> Bound | None:
    """Bounds of `e` over `box`; None where a number cannot be bounded; `lookup` bounds captured tensors."""
    memo: dict[Expr, Bound | None] = {}

    def go(x: Expr) -> Bound | None:
        if x not in memo:
            memo[x] = (
                _leaf(x) if x.op in ("const", "var", "size", "load") else _RULES.get(x.op, _unknown)(x, go)
            )
            if memo[x] is None and x.kind == BOOL:
                memo[x] = (True, False)
        return memo[x]

    def _leaf(x: Expr) -> Bound | None:
        if x.op == "const":
            return (x.value, x.value)
        if x.op == "size":
            name = x.args[0]
            if name in box:
                return box[name]
            return (sizes[int(name[1:])],) * 2 if name[1:].isdigit() and int(name[1:]) < len(sizes) else None
        if x.op == "var":
            return box.get(x.args[0])
        return lookup(x) if lookup is not None else None

    return go(e)


def _unknown(x: Expr, go) -> Bound | None:
    return None


def _tensor(a, like: torch.Tensor) -> torch.Tensor:
    return a if isinstance(a, torch.Tensor) else torch.as_tensor(a, device=like.device)


def _pair(tensor_op, scalar_op):
    def op(a, c):
        if isinstance(a, torch.Tensor):
            return tensor_op(a, _tensor(c, a))
        if isinstance(c, torch.Tensor):
            return tensor_op(_tensor(a, c), c)
        return scalar_op(a, c)

    return op


_min = _pair(torch.minimum, min)
_max = _pair(torch.maximum, max)
_and = _pair(torch.logical_and, lambda a, c: bool(a and c))
_or = _pair(torch.logical_or, lambda a, c: bool(a or c))


def _not(a):
    return ~a if isinstance(a, torch.Tensor) else not a


def _sum(x: Expr, go) -> Bound | None:
    constant, terms = x.args
    low = high = constant
    for atom, coef in terms:
        bound = go(atom)
        if bound is None:
            return None
        a, c = bound if coef >= 0 else (bound[1], bound[0])
        low, high = low + a * coef, high + c * coef
    return low, high


def _product(x: Expr, go) -> Bound | None:
    total = go(x.args[0])
    for factor in x.args[1:]:
        bound = go(factor)
        if bound is None or total is None:
            return None
        corners = [a * c for a in total for c in bound]
        total = (
            _min(_min(corners[0], corners[1]), _min(corners[2], corners[3])),
            _max(_max(corners[0], corners[1]), _max(corners[2], corners[3])),
        )
    return total


def _floordiv(x: Expr, go) -> Bound | None:
    bound, divisor = go(x.args[0]), x.args[1]
    if bound is None or not divisor.is_const or divisor.value <= 0 or x.kind != INT:
        return None
    return bound[0] // divisor.value, bound[1] // divisor.value


def _mod(x: Expr, go) -> Bound | None:
    divisor = x.args[1]
    if not divisor.is_const or divisor.value <= 0 or x.kind != INT:
        return None
    c = divisor.value
    bound = go(_congruent(x.args[0], c))
    if bound is None:
        return 0, c - 1
    low, high = bound
    same = (low // c) == (high // c)  # no wrap inside the box: the remainder is linear there
    if isinstance(same, torch.Tensor):
        return torch.where(same, low % c, 0), torch.where(same, high % c, c - 1)
    return (low % c, high % c) if same else (0, c - 1)


def _congruent(e: Expr, c: int) -> Expr:
    """`e` but for multiples of `c`, its coefficients as small as they get: `i - j` for `i + 3 * j` and 4."""
    if e.op != "lin" or e.kind != INT:
        return e
    constant, terms = e.args
    return combination(constant, {atom: (coef + c // 2) % c - c // 2 for atom, coef in terms}, INT)


def _extreme(op):
    def rule(x: Expr, go) -> Bound | None:
        a, c = go(x.args[0]), go(x.args[1])
        return None if a is None or c is None else (op(a[0], c[0]), op(a[1], c[1]))

    return rule


def _abs(x: Expr, go) -> Bound | None:
    bound = go(x.args[0])
    if bound is None:
        return None
    low, high = bound
    return _max(_max(low, -high), 0), _max(high, -low)


def _where(x: Expr, go) -> Bound | None:
    (may, must), yes, no = go(x.args[0]), go(x.args[1]), go(x.args[2])
    if not isinstance(may, torch.Tensor) and not isinstance(must, torch.Tensor) and (must or not may):
        return yes if must else no
    if yes is None or no is None:
        return None
    return _min(yes[0], no[0]), _max(yes[1], no[1])


def _le(x: Expr, go) -> Bound | None:
    bound = go(x.args[0])
    return None if bound is None else (bound[0] <= 0, bound[1] <= 0)


def _eq(x: Expr, go) -> Bound | None:
    bound = go(x.args[0])
    if bound is None:
        return None
    low, high = bound
    return _and(low <= 0, high >= 0), _and(low == 0, high == 0)


def _logic(op):
    def rule(x: Expr, go) -> Bound | None:
        parts = [go(a) for a in x.args]
        may, must = parts[0]
        for a, c in parts[1:]:
            may, must = op(may, a), op(must, c)
        return may, must

    return rule


def _compare(rule):
    """Two-sided (float) comparisons, where both sides can be bounded."""

    def bound(x: Expr, go) -> Bound | None:
        a, c = go(x.args[0]), go(x.args[1])
        return None if a is None or c is None else rule(a, c)

    return bound


_RULES = {
    "lin": _sum,
    "mul": _product,
    "float": lambda x, go: go(x.args[0]),
    "floordiv": _floordiv,
    "mod": _mod,
    "min": _extreme(_min),
    "max": _extreme(_max),
    "abs": _abs,
    "where": _where,
    "le": _le,
    "eq": _eq,
    "le2": _compare(lambda a, c: (a[0] <= c[1], a[1] <= c[0])),
    "eq2": _compare(
        lambda a, c: (_and(a[0] <= c[1], c[0] <= a[1]), _and(_and(a[0] == a[1], c[0] == c[1]), a[0] == c[0]))
    ),
    "not": lambda x, go: (_not((r := go(x.args[0]))[1]), _not(r[0])),
    "and": _logic(_and),
    "or": _logic(_or),
}

"""Read an index expression as tensors: a dense mask, one tile of it, or the scalars of a FlexAttention function.

read(keep, grid(rows=(0, L), cols=(0, S), ...), captured, sizes) -> bool tensor broadcastable to (B, Hq, L, S)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from attnc.expr import BOOL, FLOAT, Expr

Value = torch.Tensor | int | float | bool


ANYWHERE = -1  # positions that are not contiguous


@dataclass(frozen=True)
class Axis:
    """Positions of one coordinate: `index` broadcasts along its dimension; `start` is set when they are contiguous."""

    index: torch.Tensor
    dim: int = -1
    start: int = ANYWHERE
    length: int = 1


def span(name: str, start: int, length: int, device: torch.device) -> Axis:
    """The contiguous positions start .. start + length of coordinate `name`, laid out for (b, h, i, j)."""
    dim = "bhij".index(name)
    index = torch.arange(start, start + length, device=device)
    return Axis(index.view([-1 if d == dim else 1 for d in range(4)]), dim, start, length)


def picked(name: str, positions: torch.Tensor) -> Axis:
    """Any positions of coordinate `name`; `positions` already broadcasts against the others."""
    return Axis(positions, "bhij".index(name))


def read(
    e: Expr,
    axes: Mapping[str, Axis],
    captured: Sequence[torch.Tensor],
    sizes: Sequence[int],
    score: torch.Tensor | None = None,
) -> Value:
    """The value of `e` at every position of `axes`.

    Shapes: broadcastable to the axes; `score` is the raw product where `e` mentions `s`.
    """
    memo: dict[Expr, Value] = {}

    def go(x: Expr) -> Value:
        if x not in memo:
            if x.op == "among":
                memo[x] = on_list(x)
            else:
                memo[x] = leaf(x) if x.op in ("const", "var", "size", "load") else _RULES[x.op](x, go)
        return memo[x]

    def leaf(x: Expr) -> Value:
        if x.op == "const":
            return x.value
        if x.op == "size":
            return sizes[int(x.args[0][1:])]
        if x.op == "var":
            if x.args[0] != "s":
                return axes[x.args[0]].index
            assert score is not None, "an expression of s is read with a score"
            return score
        return _lookup(captured[x.args[0]], x.args[1:], axes, go)

    def on_list(x: Expr) -> torch.Tensor:
        wanted, (slot, *index, count) = x.args[0], x.args[1].args
        table, position = captured[slot][..., : count.value], torch.as_tensor(go(wanted))
        numbers = table[tuple(torch.as_tensor(go(at), device=table.device) for at in index)] if index else table
        return (position.to(table.device).unsqueeze(-1) == numbers).any(-1)

    return go(e)


def as_tensor(value: Value, like: torch.Tensor, rank: int = 4) -> torch.Tensor:
    """A value read from an expression as a tensor of `rank` dimensions; plain booleans stay boolean."""
    if isinstance(value, torch.Tensor):
        return value
    dtype = torch.bool if isinstance(value, bool) else like.dtype
    return torch.full((1,) * rank, value, dtype=dtype, device=like.device)


def _lookup(table: torch.Tensor, index: tuple[Expr, ...], axes: Mapping[str, Axis], go) -> torch.Tensor:
    names = [x.args[0] if x.op == "var" else None for x in index]
    plain = all(
        (n is not None and axes[n].start != ANYWHERE) or x.is_const for n, x in zip(names, index, strict=True)
    )
    live = [n for n in names if n is not None]
    if plain and len(set(live)) == len(live):
        ends = [axes[n].start + axes[n].length if n else 0 for n in names]
        if all(
            n is None or end <= table.shape[d] for d, (n, end) in enumerate(zip(names, ends, strict=True))
        ):
            return _view(table, index, names, axes)
    # Positions that a choice elsewhere discards may lie outside the table: they read its edge.
    at = []
    for d, x in enumerate(index):
        position = go(x)
        if isinstance(position, torch.Tensor):
            at.append(position.clamp(0, table.shape[d] - 1))
        else:
            at.append(torch.as_tensor(position, device=table.device))
    return table[tuple(at)] if at else table


def _view(table: torch.Tensor, index, names, axes: Mapping[str, Axis]) -> torch.Tensor:
    """A lookup at contiguous positions is a slice: no gather, no copy."""
    for d in reversed(range(len(index))):
        if names[d] is None:
            table = table.select(d, index[d].value)
        else:
            axis = axes[names[d]]
            table = table.narrow(d, axis.start, axis.length)
    live = [axes[n].dim for n in names if n is not None]
    table = table.permute(sorted(range(len(live)), key=live.__getitem__))
    for d in range(4):
        if d not in live:
            table = table.unsqueeze(d)
    return table


def _fold(op, values):
    total = values[0]
    for value in values[1:]:
        total = op(total, value)
    return total


def _sum(x: Expr, go) -> Value:
    constant, terms = x.args
    scored = [term for term in terms if x.kind == FLOAT and "s" in term[0].names()]
    rest = [term for term in terms if term not in scored]
    if scored and len(rest) + (constant != 0) > 1:
        # As it is written: a score added to `big * mask` before `big` is taken off would be rounded away.
        return _sum_of(scored, 0, x.kind, go) + _sum_of(rest, constant, x.kind, go)
    return _sum_of(terms, constant, x.kind, go)


def _sum_of(terms, constant, kind: str, go) -> Value:
    parts = []
    for atom, coef in terms:
        value = go(atom)
        if kind == FLOAT and isinstance(value, torch.Tensor) and not value.is_floating_point():
            value = value.to(torch.float32)
        parts.append(value if coef == 1 else -value if coef == -1 else value * coef)
    if not parts:
        return constant
    total = _fold(lambda a, c: a + c, parts)
    return total + constant if constant != 0 else total


def _typed(value: Value, like: Value, kind: str) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    device = like.device if isinstance(like, torch.Tensor) else None
    dtype = {BOOL: torch.bool, FLOAT: torch.float32}.get(kind, torch.int64)
    if kind == FLOAT and isinstance(like, torch.Tensor) and like.is_floating_point():
        dtype = like.dtype
    return torch.full((), value, dtype=dtype, device=device)


def _where(x: Expr, go) -> Value:
    p, yes, no = (go(a) for a in x.args)
    if not isinstance(p, torch.Tensor):
        return yes if p else no
    yes, no = _typed(yes, no if isinstance(no, torch.Tensor) else p, x.kind), _typed(no, yes, x.kind)
    return torch.where(p, yes, no.to(p.device))


def _extreme(tensor_op, scalar_op):
    def rule(x: Expr, go) -> Value:
        a, c = (go(y) for y in x.args)
        if not isinstance(a, torch.Tensor) and not isinstance(c, torch.Tensor):
            return scalar_op(a, c)
        return tensor_op(_typed(a, c, x.kind), _typed(c, a, x.kind))

    return rule


def _unary(op: str):
    def rule(x: Expr, go) -> Value:
        value = go(x.args[0])
        if not isinstance(value, torch.Tensor):
            value = torch.full((), value, dtype=torch.float32)
        if op not in ("abs", "trunc") and not value.is_floating_point():
            value = value.to(torch.float32)
        result = getattr(torch, op)(value)
        return result.to(torch.int64) if op == "trunc" else result

    return rule


_RULES = {
    "lin": _sum,
    "mul": lambda x, go: _fold(lambda a, c: a * c, [go(a) for a in x.args]),
    "recip": lambda x, go: 1.0 / go(x.args[0]),
    "float": lambda x, go: go(x.args[0]) * 1.0,
    "floordiv": lambda x, go: go(x.args[0]) // go(x.args[1]),
    "mod": lambda x, go: go(x.args[0]) % go(x.args[1]),
    "min": _extreme(torch.minimum, min),
    "max": _extreme(torch.maximum, max),
    "le": lambda x, go: go(x.args[0]) <= 0,
    "eq": lambda x, go: go(x.args[0]) == 0,
    "le2": lambda x, go: go(x.args[0]) <= go(x.args[1]),
    "eq2": lambda x, go: go(x.args[0]) == go(x.args[1]),
    "not": lambda x, go: ~v if isinstance(v := go(x.args[0]), torch.Tensor) else not v,
    "and": lambda x, go: _fold(lambda a, c: a & c, [go(a) for a in x.args]),
    "or": lambda x, go: _fold(lambda a, c: a | c, [go(a) for a in x.args]),
    "where": _where,
    **{op: _unary(op) for op in ("exp", "tanh", "sqrt", "log", "sigmoid", "abs", "trunc")},
}

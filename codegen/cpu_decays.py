"""Decays inside of a chunk: scores of pairs of tokens, what is left of the state at each token, the triangular inverse.

For a chunk of C tokens, a power of two, the decay of a pair (i, j) with j < i is exp(sum from j to m) times exp(sum
from m to i), m a token between them: both exponents are sums of logarithms, never differences, so nothing is ever
multiplied by more than one, minus infinity is an ordinary decay, and no precision is lost where decays differ by orders
of magnitude. With one logarithm per token m is the start of i's block of 16 tokens, and pairs within a block have a sum
each. With one per channel pairs are split by halves, into blocks of 1, 2, 4 ... C / 2 rows of a second half and columns
of the first half before it, m being the middle. The inverse of a unit triangular matrix follows such halves too.

What is left below FAINT counts as nothing: products of subnormal numbers take processors a hundred times longer.

Source: Yang et al. 2023, arXiv:2312.06635, section 4.3 (secondary chunks, of which this is the recursion to the end);
Blelloch 1990, "Prefix sums and their applications" (sums by halves).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

BASE = 16  # rows of the blocks whose inverse comes from substitution
LEAST = -1e4  # a logarithm whose exponential is 0
FAINT = {torch.float32: 1e-32, torch.float64: 1e-290}
NOTHING = {torch.float32: -80.0, torch.float64: -700.0}  # its exponential is faint, but not subnormal: that is slow
Both = tuple[Tensor, Tensor]


def square(like: Tensor, count: int, size: int) -> Tensor:
    """Unwritten matrices (count, size, size) whose diagonal blocks of one size all lie at one distance."""
    return like.new_empty(count, size + 1, size)[:, :size]


def _squared(x: Tensor) -> Tensor:
    """Matrices as from `square`."""
    count, size, _ = x.shape
    return x if x.stride(0) == size * (size + 1) else square(x, count, size).copy_(x)


def lower_blocks(x: Tensor, s: int) -> Tensor:
    """Of matrices from `square`, the blocks (count, s, s) below the diagonal: second halves and first."""
    return _blocks(x, s, s, 0)


def _blocks(x: Tensor, s: int, row: int, column: int) -> Tensor:
    count, size, _ = x.shape
    start = x.storage_offset() + row * size + column
    return x.as_strided((count * (size // (2 * s)), s, s), (2 * s * (size + 1), size, 1), start)


def halves(x: Tensor, s: int) -> Both:
    """First and second halves, (N, C / 2s, s, ...), of the blocks of 2 s tokens of (N, C, ...)."""
    parts = x.view(x.shape[0], -1, 2, s, *x.shape[2:])
    return parts[:, :, 0], parts[:, :, 1]


def unit_inverse(lower: Tensor) -> Tensor:
    """(I + N)^-1 for what stands below the diagonal of matrices (M, C, C); the rest is not read."""
    count, size, _ = lower.shape
    inverse, s = lower.new_zeros(lower.shape), min(BASE, size)
    ones = _ones(s, lower.dtype, lower.device).expand(count, size // s, s, s)
    blocks, into = _diagonal_blocks(lower, s), _diagonal_blocks(inverse, s)
    into.copy_(torch.linalg.solve_triangular(blocks, ones, upper=False, unitriangular=True))
    while s < size:
        for start in range(0, size, 2 * s):
            first, second = slice(start, start + s), slice(start + s, start + 2 * s)
            right = torch.bmm(lower[:, second, first], inverse[:, first, first])
            torch.neg(torch.bmm(inverse[:, second, second], right), out=inverse[:, second, first])
        s *= 2
    return inverse


def _diagonal_blocks(x: Tensor, s: int) -> Tensor:
    """(M, C / s, s, s)."""
    return x.unflatten(2, (-1, s)).unflatten(1, (-1, s)).diagonal(0, 1, 3).movedim(-1, 1)


@lru_cache(maxsize=64)
def _ones(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.eye(size, dtype=dtype, device=device)


class Level(NamedTuple):
    """Blocks of s rows and s columns: what is left from the middle to each row, and from each column to the middle."""

    s: int
    rows: Tensor
    columns: Tensor


def by_halves(g: Tensor) -> tuple[list[Level], Tensor, Tensor]:
    """For logarithms (N, C, ...): the factors of each level, then those from the start and those to the end."""
    since, until, s, levels = g.clone(), torch.zeros_like(g), 1, []
    while s < g.shape[1]:
        first, second = halves(since, s)
        to_end, _ = halves(until, s)
        levels.append(Level(s, second.exp(), to_end.exp()))
        to_end += second[:, :, -1:]
        second += first[:, :, -1:]
        s *= 2
    return levels, since.exp_(), until.exp_()


class Sums(NamedTuple):
    """Which logarithms a product sums, and what is added where a sum stands for nothing.

    inner: of pairs within a block of s tokens, (s, s s). outer: for each block, from every token before to its start,
    (C, C / s C); from each block's start to its tokens, from the chunk's start, to its end, (C, C) each.
    """

    s: int
    inner: Tensor
    no_inner: Tensor
    outer: Tensor
    no_outer: Tensor


@lru_cache(maxsize=64)
def _sums(C: int, dtype: torch.dtype, device: torch.device) -> Sums:
    s = min(BASE, C)
    t, at, block = torch.arange(C)[:, None], torch.arange(C), torch.arange(0, C, s)[:, None]
    row, column = at[:s, None], at[:s]
    inner = (t[:s, :, None] > column) & (t[:s, :, None] <= row)
    outer = (t[:, :, None] > at) & (t[:, :, None] < block)
    outer = torch.cat([outer.flatten(1), (t >= at // s * s) & (t <= at), t <= at, t > at], 1)
    without = torch.cat([(at >= block).flatten(), torch.zeros(3 * C, dtype=torch.bool)])
    found = [
        x
        for sums, none in ((inner.flatten(1), (column > row).flatten()), (outer, without))
        for x in (sums.to(dtype), torch.zeros(none.shape, dtype=dtype).masked_fill_(none, NOTHING[dtype]))
    ]
    return Sums(s, *(x.to(device) for x in found))


class NoDecay:
    """Nothing is lost: scores are products below the diagonal."""

    enter: Tensor | None = None
    leave: Tensor | None = None
    total: Tensor | None = None

    def __init__(self, heads: int) -> None:
        self.heads = heads

    def scores(self, rows: list[Tensor], columns: list[Tensor]) -> Iterator[Tensor]:
        for r in rows:
            for c in columns:
                yield for_heads(_product(r, c).tril_(), self.heads)

    def gradients(
        self, rows: list[Tensor], columns: list[Tensor], grads: list[Tensor], scores: list[Tensor] | None
    ) -> tuple[list[Tensor], list[Tensor], None]:
        each = [of_keys(g.tril_(), rows[0].shape[1]) for g in grads]
        return *_through_products(rows, columns, each), None


class ByToken:
    """One logarithm per token, (n, N, C), or one chunk of them for all; operands of heads that share a key once."""

    def __init__(self, g: Tensor) -> None:
        C, faint = g.shape[-1], FAINT[g.dtype]
        sums, g = _sums(C, g.dtype, g.device), g.clamp(min=LEAST)
        s, blocks = sums.s, C // sums.s
        least = NOTHING[g.dtype]
        left = torch.addmm(sums.no_outer, g.view(-1, C), sums.outer).clamp_(min=least).exp_()
        before, within, enter, leave = torch.threshold_(left, faint, 0.0).split([blocks * C, C, C, C], 1)
        own = torch.addmm(sums.no_inner, g.view(-1, s), sums.inner).clamp_(min=least).exp_()
        if blocks > 1:
            pair = torch.mul(within.unflatten(1, (blocks, s, 1)), before.unflatten(1, (blocks, 1, C)))
            pair.unflatten(3, (blocks, s)).diagonal(0, 1, 3).copy_(own.view(-1, blocks, s, s).movedim(1, 3))
            own = pair
        self.pair = torch.threshold_(own, faint, 0.0).view(*g.shape, C)
        self.enter, self.leave = (x.view(*g.shape, 1) for x in (enter, leave))
        self.total = self.enter[:, :, -1:]

    def _decayed(self, x: Tensor) -> Tensor:
        """In place where every head has its own product."""
        keys, heads = x.shape[1], self.pair.shape[1]
        if keys == heads:
            return x.mul_(self.pair)
        return (x[:, :, None] * self.pair.unflatten(1, (keys, heads // keys))).flatten(1, 2)

    def scores(self, rows: list[Tensor], columns: list[Tensor]) -> Iterator[Tensor]:
        for r in rows:
            for c in columns:
                yield self._decayed(_product(r, c))

    def gradients(
        self, rows: list[Tensor], columns: list[Tensor], grads: list[Tensor], scores: list[Tensor] | None
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """Of the rows, of the columns, and, given the scores, of the sum of logarithms up to each token.

        `grads` are overwritten.
        """
        of_sums = None if scores is None else torch.zeros_like(grads[0][..., :1])
        for g, a in zip(grads, scores or [], strict=False):
            both = g * a
            both.diagonal(0, -2, -1).zero_()
            of_sums = both.sum(-1, keepdim=True) - both.sum(-2)[..., None] + (0.0 if of_sums is None else of_sums)
        each = [of_keys(g.mul_(self.pair), rows[0].shape[1]) for g in grads]
        return *_through_products(rows, columns, each), of_sums


class ByChannel:
    """One logarithm per token and channel of the key, (n, N, C, K)."""

    def __init__(self, g: Tensor) -> None:
        self.levels, enter, leave = by_halves(g.flatten(0, 1))
        self.enter, self.leave = enter.view(g.shape), leave.view(g.shape)
        self.total = self.enter[:, :, -1:].mT

    def scores(self, rows: list[Tensor], columns: list[Tensor]) -> Iterator[Tensor]:
        shape = rows[0].shape[:3]
        rows, columns = ([_flat(x) for x in group] for group in (rows, columns))
        found = [square(r, *r.shape[:2]).zero_() for r in rows for _ in columns]
        for level in self.levels:
            columns_there = [_flat(halves(c, level.s)[0] * level.columns).mT for c in columns]
            rows_there = [_flat(halves(r, level.s)[1] * level.rows) for r in rows]
            pairs = ((r, c) for r in rows_there for c in columns_there)
            for into, (r, c) in zip(found, pairs, strict=True):
                lower_blocks(into, level.s).copy_(torch.bmm(r, c))
        for into, (r, c) in zip(found, ((r, c) for r in rows for c in columns), strict=True):
            torch.sum(r * c, -1, out=into.diagonal(0, -2, -1))
        yield from (x.unflatten(0, shape[:2]) for x in found)

    def gradients(
        self, rows: list[Tensor], columns: list[Tensor], grads: list[Tensor], scores: list[Tensor] | None
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """As by token; the sum of logarithms moves what its rows and columns move."""
        shape = rows[0].shape
        rows, columns = ([_flat(x) for x in group] for group in (rows, columns))
        grads = [_squared(_flat(g)) for g in grads]
        of_rows, of_columns = ([torch.zeros_like(x) for x in group] for group in (rows, columns))
        for s, left, right in self.levels:
            columns_there = [_flat(halves(c, s)[0] * right) for c in columns]
            rows_there = [_flat(halves(r, s)[1] * left) for r in rows]
            blocks = [lower_blocks(g, s) for g in grads]
            for i, into in enumerate(of_rows):
                for j, c in enumerate(columns_there):
                    found = torch.bmm(blocks[i * len(columns) + j], c).view_as(left)
                    halves(into, s)[1].addcmul_(found, left)
            for j, into in enumerate(of_columns):
                for i, r in enumerate(rows_there):
                    found = torch.bmm(blocks[i * len(columns) + j].mT, r).view_as(right)
                    halves(into, s)[0].addcmul_(found, right)
        of_sums = None if scores is None else _summed(rows, of_rows, columns, of_columns).view(shape)
        for i, r in enumerate(rows):
            for j, c in enumerate(columns):
                own = grads[i * len(columns) + j].diagonal(0, -2, -1)[..., None]
                of_rows[i].addcmul_(own, c)
                of_columns[j].addcmul_(own, r)
        of_rows, of_columns = ([x.view(shape) for x in group] for group in (of_rows, of_columns))
        return of_rows, of_columns, of_sums


def _summed(rows: list[Tensor], of_rows: list[Tensor], columns: list[Tensor], of_columns: list[Tensor]) -> Tensor:
    found = torch.zeros_like(rows[0])
    for x, d in zip(rows, of_rows, strict=True):
        found.addcmul_(x, d)
    for x, d in zip(columns, of_columns, strict=True):
        found.addcmul_(x, d, value=-1)
    return found


Decay = NoDecay | ByToken | ByChannel


def decays(g: Tensor | None, heads: int) -> Decay:
    """For logarithms (n, N, C) or (n, N, C, K), or None; operands (n, N, C, K), or (n, 1, C, K) for heads alike."""
    return NoDecay(heads) if g is None else ByToken(g) if g.dim() == 3 else ByChannel(g)


def for_heads(x: Tensor, heads: int) -> Tensor:
    """(n, Hk, ...) as (n, heads, ...)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def of_keys(x: Tensor, keys: int) -> Tensor:
    """(n, heads, ...) summed to (n, keys, ...)."""
    return x if x.shape[1] == keys else x.unflatten(1, (keys, -1)).sum(2)


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    return torch.bmm(_flat(rows), _flat(columns).mT).unflatten(0, rows.shape[:2])


def _through_products(
    rows: list[Tensor], columns: list[Tensor], grads: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of rows and columns; `grads` holds those of the scores, row after row."""
    shape = rows[0].shape
    rows, columns, grads = ([_flat(x) for x in group] for group in (rows, columns, grads))
    of_rows, of_columns = [], []
    for i in range(len(rows)):
        of_rows.append(torch.bmm(grads[i * len(columns)], columns[0]))
        for j in range(1, len(columns)):
            of_rows[i].baddbmm_(grads[i * len(columns) + j], columns[j])
    for j in range(len(columns)):
        of_columns.append(torch.bmm(grads[j].mT, rows[0]))
        for i in range(1, len(rows)):
            of_columns[j].baddbmm_(grads[i * len(columns) + j].mT, rows[i])
    return [x.view(shape) for x in of_rows], [x.view(shape) for x in of_columns]


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)

"""Decays inside of a chunk: scores of pairs of tokens, what is left of the state at each token, the triangular inverse.

For a chunk of C tokens, a power of two, pairs (i, j) with j < i are split by halves: into blocks of 1, 2, 4 ... C / 2
rows of a second half and columns of the first half before it. The decay of such a pair is exp(sum from the middle to i)
times exp(sum from j to the middle): both exponents are sums of logarithms, never differences, so nothing is ever
multiplied by more than one, minus infinity is an ordinary decay, and no precision is lost where decays differ by orders
of magnitude. The inverse of a unit triangular matrix follows the same blocks.

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
    """(I + N)^-1 for what stands below the diagonal of matrices from `square`; the rest is not read."""
    count, size, _ = lower.shape
    lower, inverse = _squared(lower), square(lower, count, size).zero_()
    s = min(BASE, size)
    ones = _ones(s, lower.dtype, lower.device).expand(count * (size // s), s, s)
    parts = _diagonal_blocks(lower, s)
    solved = torch.linalg.solve_triangular(parts, ones, upper=False, unitriangular=True)
    _diagonal_blocks(inverse, s).copy_(solved)
    while s < size:
        right = torch.bmm(_blocks(lower, s, s, 0), _blocks(inverse, s, 0, 0))
        torch.neg(torch.bmm(_blocks(inverse, s, s, s), right), out=_blocks(inverse, s, s, 0))
        s *= 2
    return inverse


def _diagonal_blocks(x: Tensor, s: int) -> Tensor:
    count, size, _ = x.shape
    return x.as_strided((count * (size // s), s, s), (s * (size + 1), size, 1), x.storage_offset())


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


@lru_cache(maxsize=64)
def _sums(C: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What `by_halves` sums, as a matrix of zeros and ones, (C, 2 (levels C / 2 + C)): rows, columns, ends."""
    at = torch.arange(C)
    to, since = at[:, None], at[None]
    rows, columns, s = [], [], 1
    while s < C:
        middle = at // (2 * s) * 2 * s + s
        chosen = at % (2 * s) >= s
        rows.append(((to >= middle) & (to <= since))[:, chosen])
        columns.append(((to > since) & (to < middle))[:, ~chosen])
        s *= 2
    return torch.cat([*rows, *columns, to <= since, to > since], 1).to(dtype).to(device)


class NoDecay:
    """Nothing is lost: scores are products below the diagonal."""

    enter: Tensor | None = None
    leave: Tensor | None = None
    total: Tensor | None = None

    def scores(self, rows: list[Tensor], columns: list[Tensor]) -> Iterator[Tensor]:
        for r in rows:
            for c in columns:
                yield _product(r, c).tril_()

    def gradients(
        self, rows: list[Tensor], columns: list[Tensor], grads: list[Tensor], _: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], None]:
        return *_through_products(rows, columns, [g.tril() for g in grads]), None


class ByToken:
    """One logarithm per token, (N, C); a leading dimension of the operands may be a multiple of N."""

    def __init__(self, g: Tensor) -> None:
        N, C = g.shape
        left = torch.exp(g.clamp(min=LEAST) @ _sums(C, g.dtype, g.device))
        half, s, at = C // 2, 1, 0
        ends = left.shape[1] - 2 * C
        self.pair = square(g, N, C).zero_()
        while s < C:
            rows = left[:, at : at + half].view(N, -1, s, 1)
            columns = left[:, ends // 2 + at : ends // 2 + at + half].view(N, -1, 1, s)
            torch.mul(rows, columns, out=lower_blocks(self.pair, s).view(N, -1, s, s))
            at, s = at + half, 2 * s
        self.pair.diagonal(0, -2, -1).fill_(1.0)
        self.enter, self.leave = left[:, ends : ends + C, None], left[:, ends + C :, None]
        self.total = self.enter[:, -1:]

    def _decayed(self, x: Tensor) -> Tensor:
        out = square(x, *x.shape[:2])
        N = self.pair.shape[0]
        torch.mul(_in_groups(x, N), self.pair, out=_in_groups(out, N))
        return out

    def scores(self, rows: list[Tensor], columns: list[Tensor]) -> Iterator[Tensor]:
        for r in rows:
            for c in columns:
                yield self._decayed(_product(r, c))

    def gradients(
        self, rows: list[Tensor], columns: list[Tensor], grads: list[Tensor], scores: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Of the rows, of the columns, and of the sum of logarithms up to each token."""
        of_sums = torch.zeros_like(grads[0][..., 0])
        for g, a in zip(grads, scores, strict=True):
            both = g * a
            both.diagonal(0, -2, -1).zero_()
            of_sums = of_sums + both.sum(-1) - both.sum(-2)
        of_rows, of_columns = _through_products(rows, columns, [self._decayed(g) for g in grads])
        return of_rows, of_columns, of_sums[..., None]


class ByChannel:
    """One logarithm per token and channel of the key, (N, C, K)."""

    def __init__(self, g: Tensor) -> None:
        self.levels, self.enter, self.leave = by_halves(g)
        self.total = self.enter[:, -1:].mT

    def scores(self, rows: list[Tensor], columns: list[Tensor]) -> Iterator[Tensor]:
        found = [square(r, *r.shape[:2]).zero_() for r in rows for _ in columns]
        for level in self.levels:
            columns_there = [_flat(halves(c, level.s)[0] * level.columns).mT for c in columns]
            rows_there = [_flat(halves(r, level.s)[1] * level.rows) for r in rows]
            pairs = ((r, c) for r in rows_there for c in columns_there)
            for into, (r, c) in zip(found, pairs, strict=True):
                lower_blocks(into, level.s).copy_(torch.bmm(r, c))
        for into, (r, c) in zip(found, ((r, c) for r in rows for c in columns), strict=True):
            torch.sum(r * c, -1, out=into.diagonal(0, -2, -1))
        yield from found

    def gradients(
        self, rows: list[Tensor], columns: list[Tensor], grads: list[Tensor], _: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """As by token; the sum of logarithms moves what its rows and columns move."""
        grads = [_squared(g) for g in grads]
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
        of_sums = torch.zeros_like(rows[0])
        for x, d in zip(rows, of_rows, strict=True):
            of_sums.addcmul_(x, d)
        for x, d in zip(columns, of_columns, strict=True):
            of_sums.addcmul_(x, d, value=-1)
        for i, r in enumerate(rows):
            for j, c in enumerate(columns):
                own = grads[i * len(columns) + j].diagonal(0, -2, -1)[..., None]
                of_rows[i].addcmul_(own, c)
                of_columns[j].addcmul_(own, r)
        return of_rows, of_columns, of_sums


Decay = NoDecay | ByToken | ByChannel


def decays(g: Tensor | None) -> Decay:
    """For logarithms (N, C) or (N, C, K), or None."""
    return NoDecay() if g is None else ByToken(g) if g.dim() == 2 else ByChannel(g)


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    return torch.bmm(rows, columns.mT)


def _through_products(
    rows: list[Tensor], columns: list[Tensor], grads: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of rows and columns; `grads` holds those of the scores, row after row."""
    of_rows, of_columns = [], []
    for i in range(len(rows)):
        of_rows.append(torch.bmm(grads[i * len(columns)], columns[0]))
        for j in range(1, len(columns)):
            of_rows[i].baddbmm_(grads[i * len(columns) + j], columns[j])
    for j in range(len(columns)):
        of_columns.append(torch.bmm(grads[j].mT, rows[0]))
        for i in range(1, len(rows)):
            of_columns[j].baddbmm_(grads[i * len(columns) + j].mT, rows[i])
    return of_rows, of_columns


def _in_groups(x: Tensor, N: int) -> Tensor:
    return x if x.shape[0] == N else x.unflatten(0, (-1, N))


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)

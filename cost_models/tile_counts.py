"""How many tiles of the score matrix a flash kernel really visits, in closed form: causal, window, documents.

Row i sees keys i + shift - back .. i + shift + ahead, with shift = S - L for queries that end where the keys end. Sums
of floors over blocks of rows are exact and take logarithmic time: a prediction costs microseconds at any length.

Source: Hassani et al. 2025, "Generalized Neighborhood Attention", arXiv:2504.16922, section 4 (tiles visited, not pairs
kept, decide the time); Knuth, Graham, Patashnik 1994, "Concrete Mathematics", section 3.5 (floor sums).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Band:
    """Keys that a row sees: `back` before its own and `ahead` after it; None: all. shift: its own key less its row."""

    back: int | None = None
    ahead: int | None = None
    shift: int = 0

    @classmethod
    def causal(cls, L: int, S: int, window: int = 0) -> Band:
        """Causal with the last query at the last key; window: keys seen, the own one included, 0 for all."""
        return cls(window - 1 if window else None, 0, S - L)


@dataclass(frozen=True)
class TileCount:
    """Tiles per head. visited: in all; masked: those with a mask; longest: of one block of rows, within one."""

    visited: float
    masked: float
    longest: float


@lru_cache(maxsize=65536)
def band_tiles(L: int, S: int, block_m: int, block_n: int, band: Band) -> TileCount:
    """Exact number of visited tiles of a band; a last block of rows that is not whole takes a mask everywhere."""
    rows = L // block_m
    visited = whole = longest = 0
    back = -S - L - abs(band.shift) if band.back is None else band.shift - band.back
    if rows:
        ahead = S if band.ahead is None else band.shift + block_m - 1 + band.ahead
        ends = _clipped(rows, block_m, ahead, S - 1, block_n)
        starts = 0 if band.back is None else _clipped(rows, block_m, back, S - 1, block_n)
        visited = ends - starts + _meeting(rows, block_m, back, ahead, S)
        longest = _longest(rows, block_m, back, ahead, S, block_n)
        whole = _whole(rows, block_m, block_n, S, band, back)
    if rows * block_m < L:
        ahead = S if band.ahead is None else band.shift + L - rows * block_m - 1 + band.ahead
        last = _met(rows * block_m, back, ahead, S, block_n)
        visited, longest = visited + last, max(longest, last)
    return TileCount(visited, max(0, visited - whole), longest)


def _whole(count: int, block_m: int, block_n: int, S: int, band: Band, back: int) -> int:
    """Tiles whose pairs are all kept: keys from where the last row begins to where the first row ends."""
    low = back + block_m - 1
    high = S if band.ahead is None else band.shift + band.ahead + 1
    if band.back is not None and band.ahead is not None and high - low < block_n:
        return 0
    ends = _clipped(count, block_m, high, S, block_n)
    starts = 0 if band.back is None else _clipped(count, block_m, low + block_n - 1, S + block_n - 1, block_n)
    return max(0, ends - starts)


def _longest(count: int, block_m: int, back: int, ahead: int, S: int, block_n: int) -> int:
    """Tiles of the longest block of rows: at either end, or where the band first touches the last key."""
    touch = (S - 1 - ahead) // block_m
    found = 0
    for m in {0, count - 1, touch, touch + 1, -(back // block_m)}:
        if 0 <= m < count:
            found = max(found, _met(m * block_m, back, ahead, S, block_n))
    return found


def _met(i: int, back: int, ahead: int, S: int, block_n: int) -> int:
    """Tiles of a block of rows from row i."""
    low, high = max(0, i + back), min(S - 1, i + ahead)
    return high // block_n - low // block_n + 1 if high >= low else 0


def _meeting(count: int, block_m: int, back: int, ahead: int, S: int) -> int:
    """Blocks of rows whose band meets some key 0 .. S - 1."""
    low = max(0, -(ahead // block_m))  # m * block_m + ahead >= 0
    high = min(count - 1, (S - 1 - back) // block_m)  # m * block_m + back <= S - 1
    return max(0, high - low + 1)


def _clipped(count: int, step: int, offset: int, top: int, block: int) -> int:
    """Sum of floor(clamp(m * step + offset, 0, top) / block) over m = 0 .. count - 1."""
    zero = min(max(-(offset // step), 0), count)  # values below 0, clamped
    full = min(max(-((offset - top) // step), zero), count)  # from here on clamped to top
    return floor_sum(full - zero, block, step, zero * step + offset) + (count - full) * (top // block)


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Sum of floor((a * i + b) / m) over i = 0 .. n - 1, for b >= 0."""
    total = 0
    while n > 0:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        last = a * n + b
        if last < m:
            break
        n, b = divmod(last, m)
        a, m = m, a
    return total


def document_tiles(L: int, S: int, block_m: int, block_n: int, band: Band, documents: float) -> TileCount:
    """Tiles of `documents` equal documents packed into one sequence, each with the band inside."""
    if documents <= 1:
        return band_tiles(L, S, block_m, block_n, band)
    one = band_tiles(max(1, round(L / documents)), max(1, round(S / documents)), block_m, block_n, band)
    # A border between documents lies anywhere in a block: one more half block of rows and of keys.
    rows = -(-L // block_m) / documents
    visited = documents * one.visited + documents * (one.longest * 0.5 + rows * 0.5)
    most = -(-L // block_m) * -(-S // block_n)
    visited = min(visited, float(most))
    return TileCount(visited, min(visited, documents * (one.masked + one.longest + rows)), one.longest + 1)

"""Group the query blocks of a block-sparse mask so that few batched calls visit every kept tile.

Query blocks that see equally many key blocks form one batch; those that see the very same keys become rows of one
block; where there are too many different counts, neighbouring ones are rounded up. Pure integers: no tensors here.

Source: the "blocked" local attention of Zaheer et al. 2020, "Big Bird", arXiv:2007.14062, appendix D, for any mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import dropwhile, pairwise

# Share of the tiles that may be added to save calls: each call is compiled and launched on its own.
SPARE = 0.06

Visits = tuple[tuple[tuple[int, bool], ...], ...]


@dataclass(frozen=True)
class Group:
    """Query blocks computed in one call.

    rows:   the query blocks, ascending.
    cols:   visited key blocks, one tuple for all rows (`shared`) or one for each, equally long; -1 visits nothing.
    full:   per position in `cols`, whether every row keeps the whole tile.
    shared: all rows see the same keys.
    """

    rows: tuple[int, ...]
    cols: tuple[tuple[int, ...], ...]
    full: tuple[bool, ...]
    shared: bool

    @property
    def width(self) -> int:
        return len(self.full)

    @property
    def stride(self) -> int | None:
        """How far apart the query blocks are, where that is the same throughout; 1 for neighbours and a single one."""
        gaps = {b - a for a, b in pairwise(self.rows)}
        return 1 if not gaps else gaps.pop() if len(gaps) == 1 else None

    @cached_property
    def step(self) -> int | None:
        """By how many key blocks the visits move from one row to the next, where that is the same throughout, but for
        the first ones, which may stay where they are."""
        if self.shared or any(n < 0 for cols in self.cols for n in cols) or self.stride is None:
            return None
        moves = [{two[n] - one[n] for one, two in pairwise(self.cols)} for n in range(self.width)]
        steps = set().union(*dropwhile(lambda found: found == {0}, moves))
        return steps.pop() if len(steps) == 1 and min(steps) > 0 else None

    @cached_property
    def still(self) -> int:
        """How many of the visits, the first ones, are the same for all rows while the others move by `step`."""
        return 0 if self.step is None else next(n for n in range(self.width) if self.cols[0][n] != self.cols[1][n])

    def tiles(self) -> int:
        return len(self.rows) * self.width


def is_run(numbers: Sequence[int]) -> bool:
    """Whether `numbers` are consecutive."""
    return all(b == a + 1 for a, b in pairwise(numbers))


@lru_cache(maxsize=256)
def grouped(visits: Visits, ragged_row: bool, ragged_col: int | None, limit: int) -> tuple[Group, ...]:
    """At most about `limit` groups (twice that where the last key block is ragged).

    ragged_row: the last query block is shorter: a group of its own.
    ragged_col: number of the key block that is shorter, or None: rows that see it form groups of their own.
    """
    last = len(visits) - 1
    plain: dict[int, list[int]] = {}
    touching: dict[int, list[int]] = {}
    alone: list[int] = []
    for row, seen in enumerate(visits):
        if ragged_row and row == last:
            alone.append(row)
        elif ragged_col is not None and any(n == ragged_col for n, _ in seen):
            touching.setdefault(len(seen), []).append(row)
        else:
            plain.setdefault(len(seen), []).append(row)
    buckets = _merged(plain, visits, limit) + _merged(touching, visits, limit) + [[row] for row in alone]
    groups = [group for rows in buckets for group in _split(rows, visits)]
    return tuple(sorted(groups, key=lambda g: g.rows[0]))


def _merged(by_count: dict[int, list[int]], visits: Visits, limit: int) -> list[list[int]]:
    """Round the smallest steps between counts up: while that costs little and the rows come to share their keys, and on
    until `limit` buckets are left. Rows that see nothing stay apart.
    """
    buckets = [_Bucket(count, rows, _seen(rows, visits)) for count, rows in sorted(by_count.items()) if count]
    spare = SPARE * sum(bucket.count * len(bucket.rows) for bucket in buckets)
    steps = [_Step.between(one, two) for one, two in pairwise(buckets)]
    while steps:
        cheap = [n for n, step in enumerate(steps) if step.waste <= spare and step.shares]
        if not cheap and len(buckets) <= limit:
            break
        n = min(cheap or range(len(steps)), key=lambda n: steps[n].waste)
        spare -= steps[n].waste
        one, two = buckets[n : n + 2]
        buckets[n : n + 2] = [_Bucket(two.count, one.rows + two.rows, one.seen | two.seen)]
        near = range(max(n - 1, 0), min(n + 1, len(buckets) - 1))  # the steps around the new bucket
        steps[max(n - 1, 0) : n + 2] = [_Step.between(*buckets[k : k + 2]) for k in near]
    return [sorted(bucket.rows) for bucket in buckets] + ([sorted(by_count[0])] if 0 in by_count else [])


@dataclass(frozen=True)
class _Bucket:
    """Rows that will see `count` key blocks each, and all the key blocks that they see."""

    count: int
    rows: list[int]
    seen: set[int]


@dataclass(frozen=True)
class _Step:
    """Between two buckets: the tiles that rounding the smaller up adds, and whether their rows then share all keys."""

    waste: int
    shares: bool

    @classmethod
    def between(cls, one: _Bucket, two: _Bucket) -> _Step:
        together = len(one.seen) + len(two.seen - one.seen)
        return cls(len(one.rows) * (two.count - one.count), together == two.count)


def _seen(rows: list[int], visits: Visits) -> set[int]:
    return {n for row in rows for n, _ in visits[row]}


def _split(rows: list[int], visits: Visits) -> list[Group]:
    seen = [dict(visits[row]) for row in rows]
    most = max(len(s) for s in seen)
    union = sorted({n for s in seen for n in s})
    if len(union) == most:
        full = tuple(all(s.get(n, False) for s in seen) for n in union)
        return [Group(tuple(rows), (tuple(union),), full, True)]
    cols = [(*sorted(s), *(-1,) * (most - len(s))) for s in seen]
    full = tuple(all(c[at] >= 0 and s[c[at]] for c, s in zip(cols, seen, strict=True)) for at in range(most))
    return [Group(tuple(rows), tuple(cols), full, False)]

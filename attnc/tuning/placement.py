"""Placement: which regions take which option, where the errors of regions add up to one error of the model.

    minimise sum_u seconds_u(x_u)   subject to   sum_u error_u(x_u) <= budget,   for all budgets at once

Each region takes one of its options, the first of which is exact. That is a knapsack with one choice from each group,
solved over budgets in cells of `limit / CELLS`: exactly but for errors rounded up to cells, where a greedy choice by
time saved per error may miss the gain of a whole layer, and a few layers are all there are.

Source: Kellerer, Pferschy and Pisinger 2004, "Knapsack Problems", section 11.5 (multiple-choice, by dynamic programs).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

CELLS = 4096

Option = tuple[float, float]  # seconds, error
Assignment = tuple[int, ...]  # the option of each region


def totals(menus: Sequence[Sequence[Option]], chosen: Assignment) -> Option:
    """Seconds and error of an assignment, summed."""
    taken = [menu[at] for menu, at in zip(menus, chosen, strict=True)]
    return math.fsum(s for s, _ in taken), math.fsum(e for _, e in taken)


def undominated(points: Sequence[Option]) -> list[int]:
    """Places of the points that no other beats in one way and equals in the other, slowest first; of equals one."""
    kept: list[int] = []
    least = math.inf
    for at in sorted(range(len(points)), key=lambda n: (*points[n], n)):
        if points[at][1] < least:
            kept.append(at)
            least = points[at][1]
    return kept[::-1]


def additive_front(menus: Sequence[Sequence[Option]], limit: float) -> list[Assignment]:
    """Assignments that no other beats in both sums, up to an error of `limit`; the exact one, the slowest, first.

    menus: the options of each region, an exact one of error 0 first.
    """
    least = np.zeros(CELLS + 1)  # seconds by cells of error that may be used
    picks: list[np.ndarray] = []
    cells = np.arange(CELLS + 1)
    for menu in menus:
        best, pick = np.full(CELLS + 1, np.inf), np.zeros(CELLS + 1, dtype=np.int32)
        for at, (seconds, error) in enumerate(menu):
            used = math.ceil(min(error / limit, 2.0) * CELLS)
            if used > CELLS:
                continue
            reached = np.full(CELLS + 1, np.inf)
            reached[used:] = least[: CELLS + 1 - used] + seconds
            better = reached < best
            best[better], pick[better] = reached[better], at
        least = best
        picks.append(pick)
    found = []
    for cell in cells[np.r_[True, np.diff(least) < 0]]:
        chosen, left = [], int(cell)
        for menu, pick in zip(reversed(menus), reversed(picks), strict=True):
            at = int(pick[left])
            chosen.append(at)
            left -= math.ceil(min(menu[at][1] / limit, 2.0) * CELLS)
        found.append(tuple(reversed(chosen)))
    sums = [totals(menus, chosen) for chosen in found]
    return [found[at] for at in undominated(sums)]

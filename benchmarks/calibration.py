"""Intervals from errors that the fit has not seen: the shortest ones that hold 77 to 85% of them.

Source: Lei et al. 2018, arXiv:1604.04173.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np

# Rows of a model that its intervals hold: the first of these at which their median width is at most WIDEST.
HELD, WIDEST = (0.85, 0.84, 0.83, 0.82, 0.81, 0.8, 0.79, 0.78, 0.77), 1.78
SHARES = tuple(0.5 + 0.02 * i for i in range(24))
REGIMES = (0.2, 0.5, 0.8)
FEWEST = 60  # rows of one regime


def shortest(off: np.ndarray, held: float) -> tuple[float, float]:
    """The shortest interval that holds the share `held` of the values."""
    ordered = np.sort(off)
    inside = min(len(ordered) - 1, math.ceil(held * len(ordered)))
    widths = ordered[inside:] - ordered[: len(ordered) - inside]
    i = int(np.argmin(widths))
    return float(ordered[i]), float(ordered[i + inside])


def around_one(ratios: Sequence[float], held: float) -> tuple[float, float]:
    """The narrowest interval around 1 that holds the share `held` of measured over predicted times."""
    off = np.sort(np.log(np.asarray(ratios, float)))
    best = (float(off[0]), float(off[-1]))
    for low in (*off[off < math.log(0.98)], math.log(0.98)):
        above = np.sort(off[off >= low])
        need = math.ceil(held * len(off))
        if len(above) < need:
            break
        high = max(float(above[need - 1]), math.log(1.02))
        if high - low < best[1] - best[0]:
            best = (float(low), high)
    return math.exp(best[0]), math.exp(best[1])


def interval(off: np.ndarray, share: np.ndarray, regimes: Sequence[float] = REGIMES) -> dict[str, list[float]]:
    """Bounds on measured / predicted by regime; off: log(predicted / measured) of rows, share: their fixed share.

    regimes: where the fixed share is cut, as far as rows are enough.

    Regimes hold different shares of their rows, so that all together hold one of HELD at the least width: where the
    formula is far off for a few rows, width buys little.
    """
    edges: list[float] = []
    for edge in regimes:
        last = edges[-1] if edges else 0.0
        if np.sum((share >= last) & (share < edge)) >= FEWEST and np.sum(share >= edge) >= FEWEST:
            edges.append(edge)
    regime = np.digitize(share, edges)
    rows = np.bincount(regime, minlength=len(edges) + 1)
    bounds = [[shortest(-off[regime == i], held) for held in SHARES] for i in range(len(rows))]
    widths = np.array([[b - a for a, b in each] for each in bounds])
    every = np.array(list(product(range(len(SHARES)), repeat=len(rows))))
    held = np.array(SHARES)[every] @ rows
    total = sum(n * widths[i][every[:, i]] for i, n in enumerate(rows))
    narrow = sum(n * (widths[i][every[:, i]] <= math.log(WIDEST)) for i, n in enumerate(rows)) >= rows.sum() / 2
    for share_held in HELD:
        lawful = (held >= share_held * rows.sum()) & narrow
        if lawful.any():
            break
    else:
        lawful = held >= HELD[-1] * rows.sum()
    chosen = every[np.argmin(np.where(lawful, total, np.inf))]
    low = [min(math.exp(each[c][0]), 0.98) for each, c in zip(bounds, chosen, strict=True)]
    high = [max(math.exp(each[c][1]), 1.02) for each, c in zip(bounds, chosen, strict=True)]
    return {"edges": edges, "low": low, "high": high}


def inside(bounds: dict[str, list[float]], off: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each measured value lies in its interval, and the interval's width."""
    regime = np.digitize(share, bounds["edges"])
    low, high = np.array(bounds["low"])[regime], np.array(bounds["high"])[regime]
    ratio = np.exp(-off)
    return (ratio >= low) & (ratio <= high), high / low


def rounded_bounds(bounds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Bounds as files keep them."""
    return {name: [round(value, 4) for value in values] for name, values in bounds.items()}

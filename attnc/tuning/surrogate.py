"""A Gaussian process over the settings of a space: which one to try next.

    log t(x) = log prior(x) + f(x),  f ~ GP(m, s^2 (k(x, x') + noise)),  k Matern 5/2 with one length scale per knob

`prior` is the time at the next cheaper fidelity, so the process learns only where that one is wrong; without one it
learns the time itself. Beside the knobs stand the product and the ratio of each two (rows a warp, tiles in flight times
their keys): where the fast settings lie on a diagonal of two knobs, that is one length scale. A knob that makes no
difference is left out, and settings that differ in nothing else are tried once. The next setting has the greatest
expected improvement over all settings not yet tried: spaces are small enough to ask about each of them.

Source: Jones, Schonlau, Welch 1998, doi:10.1023/A:1008306431147 (expected improvement); Kennedy, O'Hagan 2000,
doi:10.1093/biomet/87.1.1 (cheap fidelity as the mean of the dear one); Rasmussen, Williams 2006, section 5.4.1 (length
scales by marginal likelihood).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from attnc.forms.base import Form

Array = np.ndarray

# Times beyond this factor of the best are all the same to the search: a slow corner must not set the scale.
CEILING = 2.5
NOISE = 1e-4  # variance of f that no knob explains, as a share of s^2
OFF = math.inf  # length scale of what makes no difference
LEFT_OUT = 1.5  # log likelihood that a column left out must gain
SHORTEST, LONGEST = 0.08, 12.0  # length scales, where a column goes from 0 to 1
FEW = 80  # settings tried, up to which length scales are gone through twice


class Features(NamedTuple):
    """columns: a row per setting, each column from 0 to 1. knobs: how many of them are knobs; the rest are pairs."""

    columns: Array
    knobs: int


def features(settings: Sequence[Form]) -> Features:
    """Numbers by their logarithm over the range of the space, words one column each; sums and differences of two."""
    columns: list[Array] = []
    pairs: list[Array] = []
    logs: dict[str, list[Array]] = {}
    names = sorted({(form.name, knob) for form in settings for knob in form.knobs()})
    for owner, knob in names:
        values = [getattr(form, knob) if form.name == owner else None for form in settings]
        given = [v for v in values if v is not None]
        if all(isinstance(v, int | float) and not isinstance(v, bool) and v > 0 for v in given):
            log = np.array([np.nan if v is None else math.log2(v) for v in values])
            columns += _scaled(log)
            if len(set(given)) > 2:
                pairs += [
                    each for other in logs.get(owner, []) for sign in (1, -1) for each in _scaled(log + sign * other)
                ]
                logs.setdefault(owner, []).append(log)
        else:
            words = sorted(set(map(str, given)))
            columns += [np.array([float(str(v) == word) for v in values]) for word in words[1:]]
    forms = sorted({form.name for form in settings})
    columns += [np.array([float(form.name == name) for form in settings]) for name in forms[1:]]
    columns = columns or [np.zeros(len(settings))]
    return Features(np.stack(columns + pairs, axis=1), len(columns))


def _scaled(log: Array) -> list[Array]:
    """The column from 0 to 1, a half where the knob is another form's; none where all are alike."""
    low, high = np.nanmin(log), np.nanmax(log)
    return [np.nan_to_num((log - low) / (high - low), nan=0.5)] if high > low else []


@dataclass(frozen=True)
class Tried:
    """What is known: rows of the space and log seconds, less the log of the prior."""

    rows: Array
    logs: Array


def _matern(a: Array, b: Array) -> Array:
    square = np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2 * a @ b.T, 0.0)
    r = np.sqrt(5 * square)
    return (1 + r + r * r / 3) * np.exp(-r)


class _Process(NamedTuple):
    """A fit: log likelihood, Cholesky factor, mean, what it leaves over in the factor's terms, and s^2."""

    value: float
    factor: Array
    mean: float
    left: Array
    variance: float


def _process(points: Array, y: Array, scales: Array) -> _Process:
    """The process with these length scales, mean and s^2 at their best values."""
    n, on = len(y), scales < OFF
    scaled = points[:, on] / scales[on]
    factor = np.linalg.cholesky(_matern(scaled, scaled) + NOISE * np.eye(n))
    one, solved = np.linalg.solve(factor, np.stack([np.ones(n), y], axis=1)).T
    mean = float(one @ solved) / float(one @ one)
    left = solved - mean * one
    variance = max(float(left @ left) / n, 1e-12)
    # A weak preference for scales near 1: with few points the likelihood alone is flat.
    prior = -0.5 * float(((np.log(scales[on]) - 0.3) ** 2).sum()) - LEFT_OUT * float((~on).sum())
    value = -0.5 * n * math.log(variance) - float(np.log(np.diag(factor)).sum()) + prior
    return _Process(value, factor, mean, left, variance)


def _fit(points: Array, knobs: int, y: Array, rng: np.random.Generator) -> tuple[Array, _Process]:
    """Length scales, one column after the other in a seeded order: left out, longer or shorter, if more likely."""
    best = np.where(np.arange(points.shape[1]) < knobs, 1.0, OFF)
    found, step = _process(points, y, best), 2.0
    for _ in range(2 if len(y) <= FEW else 1):
        for column in rng.permutation(len(best)):
            at = best[column]
            for scale in (OFF, at * step, at / step) if at < OFF else (0.5, 1.5):
                if SHORTEST <= scale <= LONGEST or scale == OFF:
                    scales = best.copy()
                    scales[column] = scale
                    other = _process(points, y, scales)
                    if other.value > found.value:
                        best, found = scales, other
        step = step**0.6
    return best, found


def expected_improvement(mean: Array, deviation: Array, best: float) -> Array:
    gap = best - mean
    z = gap / deviation
    density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    below = 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
    return gap * below + deviation * density


def propose(space: Features, tried: Tried, free: Array, prior: Array, rng: np.random.Generator) -> int:
    """The row of `free` with the greatest expected improvement.

    space: of all settings. prior: log seconds of the cheaper fidelity for the whole space, or zeros.
    """
    logs = np.minimum(tried.logs, tried.logs.min() + math.log(CEILING))
    known = space.columns[tried.rows]
    scales, found = _fit(known, space.knobs, logs - prior[tried.rows], rng)
    on = scales < OFF
    points = space.columns[:, on] / scales[on]
    free = _fresh(np.column_stack([points, prior]), tried.rows, free)
    cross = np.linalg.solve(found.factor, _matern(points[tried.rows], points[free]))
    expected = prior[free] + found.mean + cross.T @ found.left
    deviation = np.sqrt(max(found.variance, 1e-6) * np.maximum(1 + NOISE - (cross**2).sum(0), 1e-9))
    gain = expected_improvement(expected, deviation, float(logs.min()))
    return int(free[int(np.argmax(gain))])


def _fresh(points: Array, tried: Array, free: Array) -> Array:
    """Of `free` those that are no twins of a tried one in all that makes a difference; all where none is left."""
    kinds = np.unique(points.round(6), axis=0, return_inverse=True)[1].reshape(-1)
    fresh = free[~np.isin(kinds[free], kinds[tried])]
    return fresh if len(fresh) else free

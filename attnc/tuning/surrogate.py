"""A Gaussian process over the settings of a space: which one to try next.

    log t(x) = log prior(x) + f(x),  f ~ GP(m, s^2 (k(x, x') + noise)),  k Matern 5/2 with one length scale per knob

`prior` is the time at the next cheaper fidelity, so the process learns only where that one is wrong; without one it
learns the time itself. The next setting has the greatest expected improvement over all settings not yet tried: spaces
are small enough to ask about each of them.

Source: Jones, Schonlau, Welch 1998, doi:10.1023/A:1008306431147 (expected improvement); Kennedy, O'Hagan 2000,
doi:10.1093/biomet/87.1.1 (cheap fidelity as the mean of the dear one); Rasmussen, Williams 2006, section 5.4.1 (length
scales by marginal likelihood).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attnc.forms.base import Form

Array = np.ndarray

# Times beyond this factor of the best are all the same to the search: a spilling kernel must not set the scale.
CEILING = 8.0
DRAWS = 40  # length scales tried per fit
NOISE = 1e-4  # variance of f that no knob explains, as a share of s^2


def features(settings: Sequence[Form]) -> Array:
    """One row per setting: numbers by their logarithm over the range of the space, words one column each."""
    columns: list[Array] = []
    names = sorted({(form.name, knob) for form in settings for knob in form.knobs()})
    for owner, knob in names:
        values = [getattr(form, knob) if form.name == owner else None for form in settings]
        given = [v for v in values if v is not None]
        if all(isinstance(v, int | float) and not isinstance(v, bool) and v > 0 for v in given):
            logs = np.array([np.nan if v is None else math.log2(v) for v in values])
            low, high = np.nanmin(logs), np.nanmax(logs)
            if high > low:
                columns.append(np.nan_to_num((logs - low) / (high - low), nan=0.5))
        else:
            words = sorted(set(map(str, given)))
            columns += [np.array([float(str(v) == word) for v in values]) for word in words[1:]]
    forms = sorted({form.name for form in settings})
    columns += [np.array([float(form.name == name) for form in settings]) for name in forms[1:]]
    return np.stack(columns, axis=1) if columns else np.zeros((len(settings), 1))


@dataclass(frozen=True)
class Tried:
    """What is known: rows of the space and log seconds, less the log of the prior."""

    rows: Array
    logs: Array


def _matern(a: Array, b: Array) -> Array:
    square = np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2 * a @ b.T, 0.0)
    r = np.sqrt(5 * square)
    return (1 + r + r * r / 3) * np.exp(-r)


def _likelihood(points: Array, y: Array, scales: Array) -> tuple[float, Array]:
    """Log marginal likelihood with mean and s^2 at their best values, and the Cholesky factor."""
    n = len(y)
    scaled = points / scales
    factor = np.linalg.cholesky(_matern(scaled, scaled) + NOISE * np.eye(n))
    one, solved = np.linalg.solve(factor, np.stack([np.ones(n), y], axis=1)).T
    mean = (one @ solved) / (one @ one)
    left = solved - mean * one
    variance = max(left @ left / n, 1e-12)
    # A weak preference for scales near 1: with few points the likelihood alone is flat.
    prior = -0.5 * float((((np.log(scales) - 0.3) / 1.0) ** 2).sum())
    return -0.5 * n * math.log(variance) - float(np.log(np.diag(factor)).sum()) + prior, factor


def _fit(points: Array, y: Array, rng: np.random.Generator) -> Array:
    """Length scales of greatest likelihood among seeded draws, half of them around the best so far."""
    best = np.full(points.shape[1], 1.0)
    value = _likelihood(points, y, best)[0]
    draws = DRAWS if len(y) < 80 else DRAWS // 3
    for draw in range(draws):
        if draw < draws // 2:
            scales = np.exp(rng.uniform(math.log(0.15), math.log(6.0), points.shape[1]))
        else:
            scales = np.clip(best * np.exp(rng.normal(0, 0.4, points.shape[1])), 0.1, 10.0)
        found = _likelihood(points, y, scales)[0]
        if found > value:
            best, value = scales, found
    return best


def expected_improvement(mean: Array, deviation: Array, best: float) -> Array:
    gap = best - mean
    z = gap / deviation
    density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    below = 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
    return gap * below + deviation * density


def propose(points: Array, tried: Tried, free: Array, prior: Array, rng: np.random.Generator) -> int:
    """The row of `free` with the greatest expected improvement.

    points: features of the whole space. prior: log seconds of the cheaper fidelity for the whole space, or zeros.
    """
    logs = np.minimum(tried.logs, tried.logs.min() + math.log(CEILING))
    y = logs - prior[tried.rows]
    known = points[tried.rows]
    scales = _fit(known, y, rng)
    _, factor = _likelihood(known, y, scales)
    ones = np.ones(len(y))
    one, solved = np.linalg.solve(factor, np.stack([ones, y], axis=1)).T
    mean = (one @ solved) / (one @ one)
    left = solved - mean * one
    variance = max(float(left @ left) / len(y), 1e-6)
    cross = np.linalg.solve(factor, _matern(known / scales, points[free] / scales))
    expected = prior[free] + mean + cross.T @ left
    deviation = np.sqrt(variance * np.maximum(1 + NOISE - (cross**2).sum(0), 1e-9))
    gain = expected_improvement(expected, deviation, float(logs.min()))
    return int(free[int(np.argmax(gain))])

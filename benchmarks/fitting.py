"""Fitting the latency models: rows of the measured tables, robust least squares, leaving a part or shapes out.

The residual of a row is log(predicted / measured), near-absolute beyond a few percent, so that a row 3x off counts
three times one 1.4x off and not nine times. Parts weigh the same however many rows they have. What the rows do not
determine stays near the expected value of the coefficient (its `start`, as sure as its `spread`), and classes of
matrix instruction stay near each other (`class_spread`): a part left out is predicted from those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import pandas as pd
import sympy
from scipy.optimize import least_squares

from attnc.cost_models.latency import KINDS, MODELS
from attnc.cost_models.latency.matrix_units import figures_of_sheet, of_class
from attnc.cost_models.latency.terms import Model

MEASURED = Path(__file__).resolve().parents[2] / "shared" / "measurements"
ROWS = 1200  # at most, per part, in one fit
WEIGHT = 1000  # what the rows of one part count together
KNEE = 0.08
Fitted = dict[str, float | dict[str, float]]


@dataclass
class Rows:
    """The rows of one model: columns of shapes and figures of devices as arrays, seconds measured."""

    model: Model
    frame: pd.DataFrame
    columns: np.ndarray
    figures: np.ndarray
    arch: np.ndarray
    part: np.ndarray
    seconds: np.ndarray

    @property
    def kind(self) -> str:
        return str(self.frame.kind.iloc[0])


def best_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that count: the fastest of at least two libraries; of one where no shape of the kernel has two."""
    table = table[table.best]
    keys = [c for c in ("kind", "variant", "stage", "phase") if c in table]
    most = table.groupby(keys).n_frameworks.transform("max")
    return table[(table.n_frameworks >= 2) | (most == 1)]


def rows_by_model(tables: Mapping[str, pd.DataFrame], sheets: Mapping[str, Mapping]) -> dict[str, Rows]:
    found: dict[str, Rows] = {}
    for kind, table in tables.items():
        table = best_rows(table).reset_index(drop=True)
        encoded = [KINDS[kind].encode(kind, row) for row in table.to_dict("records")]
        names = np.array([name for name, _ in encoded])
        gpus = {name: figures_of_sheet(name, sheets[name]) for name in table.gpu.unique()}
        for name in dict.fromkeys(names):
            at = np.flatnonzero(names == name)
            frame = table.iloc[at].reset_index(drop=True)
            figures = [gpus[g].values(d) for g, d in zip(frame.gpu, frame.dtype, strict=True)]
            found[name] = Rows(
                MODELS[name],
                frame,
                np.array([encoded[i][1] for i in at], float).T,
                np.array(figures, float).T,
                np.array([gpus[g].arch for g in frame.gpu]),
                frame.gpu.to_numpy(str),
                frame.latency_us.to_numpy(float) * 1e-6,
            )
    return found


EXTREMES = {"largest": lambda *a: reduce(np.maximum, a), "least": lambda *a: reduce(np.minimum, a)}
_FORMULAS: dict[tuple[str, str], object] = {}


def formula(model: Model, what: str):
    """A property of the model (`latency`, `fixed`, `roofline`) as a numpy function."""
    if (model.name, what) not in _FORMULAS:
        expr = getattr(model, what)
        _FORMULAS[model.name, what] = sympy.lambdify(model.arguments, expr, modules=[EXTREMES, "numpy"], cse=True)
    return _FORMULAS[model.name, what]


def evaluate(rows: Rows, fitted: Fitted, what: str = "latency") -> np.ndarray:
    """Seconds of every row."""
    values = []
    for c in rows.model.coefficients:
        value = fitted[c.name]
        if isinstance(value, dict):
            each = {arch: of_class(value, arch) for arch in np.unique(rows.arch)}
            values.append(np.array([each[arch] for arch in rows.arch]))
        else:
            values.append(value)
    with np.errstate(all="ignore"):
        seconds = formula(rows.model, what)(*rows.columns, *rows.figures, *values)
    return np.broadcast_to(seconds, rows.seconds.shape).astype(float)


def _chosen(rows: Rows, use: np.ndarray, cap: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `cap` rows of each part, and the weight of each."""
    random = np.random.default_rng(0)
    at, weight = [], []
    for part in np.unique(rows.part[use]):
        here = random.permutation(np.flatnonzero(use & (rows.part == part)))[:cap]
        at.append(here)
        weight.append(np.full(len(here), math.sqrt(WEIGHT / len(here))))
    return np.concatenate(at), np.concatenate(weight)


def fit(rows: Rows, use: np.ndarray, cap: int = ROWS) -> Fitted:
    """The coefficients that the rows where `use` is true ask for."""
    at, weight = _chosen(rows, use, cap)
    listed = rows.model.coefficients
    classes = [str(arch) for arch in np.unique(rows.arch[at])]
    by_class = [i for i, c in enumerate(listed) if c.per_class]
    code = np.array([classes.index(arch) for arch in rows.arch[at]])
    columns, figures, measured = rows.columns[:, at], rows.figures[:, at], np.log(rows.seconds[at])
    n, k = len(listed), len(classes)
    start = np.array([math.log(c.start) for c in listed])
    spread = np.array([c.spread for c in listed])
    class_spread = np.repeat([listed[i].class_spread for i in by_class], k)
    low = np.concatenate([[math.log(c.low) for c in listed], np.full(len(by_class) * k, -2.5)])
    high = np.concatenate([[math.log(c.high) for c in listed], np.full(len(by_class) * k, 2.5)])
    call = formula(rows.model, "latency")

    def residuals(theta: np.ndarray) -> np.ndarray:
        values: list = list(np.exp(theta[:n]))
        for j, i in enumerate(by_class):
            values[i] = np.minimum(np.exp(theta[i] + theta[n + j * k : n + (j + 1) * k]), listed[i].high)[code]
        with np.errstate(all="ignore"):
            off = np.log(call(*columns, *figures, *values)) - measured
        bent = np.sign(off) * np.sqrt(2 * KNEE * (np.sqrt(off * off + KNEE * KNEE) - KNEE))
        expected = np.concatenate([(theta[:n] - start) / spread, theta[n:] / class_spread])
        return np.concatenate([np.nan_to_num(bent, nan=5, posinf=5, neginf=-5) * weight, expected])

    theta0 = np.concatenate([start, np.zeros(len(by_class) * k)])
    theta = least_squares(residuals, theta0, bounds=(low, high), x_scale=0.3, max_nfev=80).x
    fitted: Fitted = {c.name: float(math.exp(theta[i])) for i, c in enumerate(listed)}
    for j, i in enumerate(by_class):
        shift = theta[n + j * k : n + (j + 1) * k]
        fitted[listed[i].name] = {
            "base": float(math.exp(theta[i])),
            **{a: min(float(math.exp(theta[i] + d)), listed[i].high) for a, d in zip(classes, shift, strict=True)},
        }
    return fitted


def left_out_parts(rows: Rows) -> np.ndarray:
    """Seconds of every row, predicted by a fit without its part; NaN where one part has them all."""
    seconds = np.full(rows.seconds.shape, np.nan)
    parts = np.unique(rows.part)
    if len(parts) > 1:
        for part in parts:
            fitted = fit(rows, rows.part != part)
            seconds[rows.part == part] = evaluate(rows, fitted)[rows.part == part]
    return seconds


def left_out_shapes(rows: Rows, share: float = 0.3, folds: int = 1) -> np.ndarray:
    """Seconds of the rows of random shapes, predicted by a fit without those shapes; NaN for rows never left out."""
    seconds = np.full(rows.seconds.shape, np.nan)
    shapes, of_row = np.unique(rows.columns, axis=1, return_inverse=True)
    draw = np.random.default_rng(1).random(shapes.shape[1])[of_row.ravel()]
    for fold in range(folds):
        out = (draw >= fold * share) & (draw < (fold + 1) * share)
        if out.any():
            seconds[out] = evaluate(rows, fit(rows, ~out))[out]
    return seconds

"""The latency models for shared/measurements/score.py, which leaves one part out at a time.

python ../shared/measurements/score.py benchmarks/score_latency.py
"""

from __future__ import annotations

from collections.abc import Mapping

import fitting
import numpy as np
import pandas as pd
from fitting import Fitted, rows_by_model

from attnc.cost_models.latency import KINDS, MODELS, encode, figures_of_sheet, scalar
from attnc.cost_models.latency.matrix_units import of_class


def fit(tables: Mapping[str, pd.DataFrame], gpus: Mapping[str, Mapping]) -> dict[str, Fitted]:
    """Coefficients by model."""
    rows = rows_by_model({k: t for k, t in tables.items() if k in KINDS and len(t)}, gpus)
    return {name: fitting.fit(each, np.ones(len(each.seconds), bool)) for name, each in rows.items()}


def predict(fitted: Mapping[str, Fitted], kind: str, gpu: Mapping, row: Mapping) -> float | None:
    """Seconds of one row on an entry of gpus.json."""
    name, columns = encode(kind, row)
    if name not in fitted:
        return None
    figures = figures_of_sheet("gpu", gpu)
    values = [of_class(fitted[name][c.name], figures.arch) for c in MODELS[name].coefficients]
    return scalar(name)(*columns, *figures.values(row["dtype"]), *values)[0]

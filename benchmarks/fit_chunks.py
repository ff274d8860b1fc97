"""Fit what cost_models/chunk_model.py says that measured kernels reach: share, start, intervals; printed, to be copied.

    python benchmarks/fit_chunks.py [rows]

The chunked scans of flash-linear-attention in shared/measurements/gdn.parquet, gated delta rule (decay by token) and
Kimi's (by channel): up to `rows` calls, 200 by default, of each part and rule. Their chunks have 64 tokens, fewer where
the sequence is shorter, and their products keep bfloat16 between them. Of each table stand the share of measured times
that its interval holds, also where the figures are those of the other half of its shapes, and the interval's width.

Source: shared/measurements/README.md (NVIDIA aiconfigurator, Apache-2.0); needs the extra "fit".
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
from calibration import inside, interval, rounded_bounds
from fitting import MEASURED
from scipy.optimize import least_squares

from attnc.cost_models import chunk_model
from attnc.cost_models.chunk_model import DATA_CENTRE, ChunkKnobs, ChunkWork, chunk_fits, chunk_seconds, kernels_of
from attnc.cost_models.device import gpu_named
from attnc.cost_models.estimate import Bounds

DECAYS = {"gdn": "token", "kda": "channel"}
CHUNK = 64
REGIMES = (0.25, 0.6)


@dataclass
class Table:
    """Calls of one part and rule, seconds: the closed form of the best setting, with share 1 and no start; measured."""

    closed: np.ndarray
    measured: np.ndarray

    def of(self, rows: np.ndarray) -> Table:
        return Table(self.closed[rows], self.measured[rows])


def table(found: pd.DataFrame, gpu: str, decay: str) -> Table:
    device, closed = gpu_named(gpu), []
    for r in found.itertuples():
        work = ChunkWork(
            r.batch, r.v_heads, r.k_heads, r.seq, r.head_k_dim, r.head_v_dim, "bfloat16", decay, delta=True
        )
        chunk = min(CHUNK, max(16, 1 << (r.seq - 1).bit_length()))
        knobs = [ChunkKnobs(chunk, *rest) for rest in product((32, 64, 128), (2, 4, 8), (1, 2, 3))]
        closed.append(min(chunk_seconds(work, k, device) for k in knobs if chunk_fits(work, k, device) is None))
    return Table(np.array(closed), found.latency_us.to_numpy(float) * 1e-6)


def fitted(seen: Table) -> tuple[float, float]:
    """Share of the closed form, and seconds that a call takes beside it."""

    def wrong(x: np.ndarray) -> np.ndarray:
        return np.log((seen.closed / np.exp(x[0]) + np.exp(x[1])) / seen.measured)

    share, start = np.exp(least_squares(wrong, np.log([0.8, 2e-5]), loss="soft_l1", f_scale=0.1).x)
    return float(share), float(start)


def errors(seen: Table, share: float, start: float) -> tuple[np.ndarray, np.ndarray]:
    """log(predicted / measured) of the calls, and the share of the prediction that is `start`."""
    predicted = seen.closed / share + start
    return np.log(predicted / seen.measured), start / predicted


def halves(seen: Table) -> float:
    """The share of each half of the calls that figures and intervals of the other half hold."""
    order = np.random.default_rng(1).permutation(len(seen.measured))
    held = []
    for mine in (order[::2], order[1::2]):
        other = np.setdiff1d(order, mine)
        found = fitted(seen.of(other))
        bounds = interval(*errors(seen.of(other), *found), REGIMES)
        held.append(inside(bounds, *errors(seen.of(mine), *found))[0].mean())
    return float(np.mean(held))


def main(rows: int = 200) -> None:
    plain = chunk_model.Reached(1.0, 0.0, Bounds((), (1.0,), (1.0,)))
    chunk_model.REACHED = dict.fromkeys(chunk_model.REACHED, plain)
    kernels = len(kernels_of(ChunkWork(1, 1, 1, 64, 64, 64)))
    every = pd.read_parquet(MEASURED / "gdn.parquet")
    every = every[(every.stage == "scan") & every.kernel.isin(["chunk_gated_delta_rule", "chunk_kda"])]
    for (gpu, variant), found in every.groupby(["gpu", "variant"]):
        seen = table(found.sample(min(rows, len(found)), random_state=0), gpu, DECAYS[variant])
        share, start = fitted(seen)
        off, fixed = errors(seen, share, start)
        bounds = interval(off, fixed, REGIMES)
        held, width = inside(bounds, off, fixed)
        print(
            f"{gpu} {variant}: {len(off)} calls, error {np.mean(np.abs(np.exp(off) - 1)):.0%}, held {held.mean():.0%}, "
            f"by the other half {halves(seen):.0%}, width {np.median(width):.2f}"
        )
        key = gpu_named(gpu).arch in DATA_CENTRE, DECAYS[variant] == "channel"
        each = f"share {share:.3g}, start {start / kernels:.3g} s a kernel"
        print(f"    {key}: {each}, {rounded_bounds(bounds)}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""Fit the coefficients of cost_models/tile_model.json on measured attention, and write them with their intervals.

    python benchmarks/fit_tiles.py <folder of attn_prefill.parquet, attn_encoder.parquet, attn_decode.parquet> [kernels]

Intervals are found for the closed form and for what is refined by compiling (tile_errors.py). kernels: of ours that are
compiled for each table and part, those that the closed form chooses for most rows, by default 4; all their rows then
count. A kind whose interval is too wide keeps the closed form's with an allowance on the low side. About ten minutes on
one core, most of them for the compiler.

The tables hold the best library for each shape, not our kernels. So a measured time is read as a constant of its table
(launch, cache writes) plus the best setting of our space, faster by the share that a Triton kernel reaches of that
library: `SHARE`. Classes without a table (tcgen05, mfma) keep what the others show, but for their efficiency.

Source: shared/measurements/README.md (NVIDIA aiconfigurator, Apache-2.0); needs the extra "fit".
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd
import sympy
from scipy.optimize import least_squares
from tile_errors import Predicted, compiled, intervals, kernel_of, narrow

from attnc.cost_models.device import gpu_named
from attnc.cost_models.tile_kernels import matrix_class, tile_of
from attnc.cost_models.tile_model import Band, FlashTiles, FlashWork, fits, sm_figures, tile_figures
from attnc.cost_models.tile_terms import Coefficients, SmFigures, TileFigures, seconds_expression

OUT = Path(__file__).resolve().parent.parent / "cost_models" / "tile_model.json"
KINDS = ("attn_prefill", "attn_encoder", "attn_decode")
PARTS = ("a100", "h100", "rtxpro6000")
# Triton's share of the best library: FlashAttention-3 is ahead on Hopper, elsewhere they run level (README of Triton's
# fused attention; vLLM's and FlexAttention's published comparisons).
SHARE = {"a100": 1.0, "h100": 0.85, "rtxpro6000": 1.0}
ROWS = 160  # of a table and part
LEFT_OUT, COMPILED = 400, 4  # rows of a table and part that intervals are found on, and kernels compiled for them
# What an interval gets on either side where no table shows the kernel: the backward, other types than bf16 and fp16,
# classes of GUESSED. Best dense matmuls, by which those are guessed, lie 51 to 87% of the peak apart (shared/gpus.md).
ALLOWANCE = 1.3
LAUNCH = 3e-6
# Start, bounds and how sure we are (log standard deviation) of each coefficient.
PRIORS = {
    "efficiency": (0.85, 0.4, 0.97, 0.1),
    "serial": (0.7, 0.05, 1.5, 0.5),
    "softmax": (1.0, 1.0, 1.6, 0.15),
    "sync": (60.0, 5.0, 250.0, 0.5),
    "block": (1500.0, 200.0, 4000.0, 0.5),
    "latency": (1200.0, 600.0, 2000.0, 0.2),
    "l2_bytes": (40.0, 28.0, 64.0, 0.3),
    "memory": (0.85, 0.6, 0.95, 0.1),
    "joule": (1.5, 0.4, 3.0, 0.3),
}
FITTED = ("mma", "wgmma")
# What no table shows: efficiency of a class by matmuls of others (shared/gpus.md), energy by its node.
GUESSED = {
    "tcgen05": (
        "wgmma",
        {"efficiency": 0.95, "serial": 0.45, "joule": 0.7},
        "efficiency: of the best dense matmul; serial: products run beside the warps; joule: B200's at 1000 W",
    ),
    "mfma": (
        "mma",
        {"efficiency": 0.85, "joule": 0.8},
        "efficiency: of the best dense matmul; joule: of MI300X",
    ),
}


@dataclass
class Cases:
    """All settings of all measured rows, flat: figures, the row and the class of each."""

    figures: np.ndarray
    row: np.ndarray
    kind: np.ndarray
    measured: np.ndarray
    table: np.ndarray
    part: np.ndarray
    setting: list[tuple[FlashWork, FlashTiles]]

    def of(self, rows: np.ndarray) -> Cases:
        """The cases of the rows where `rows` is true."""
        at = rows[self.row]
        place = np.cumsum(rows) - 1
        setting = [self.setting[i] for i in np.flatnonzero(at)]
        flat = (self.figures[at], place[self.row[at]], self.kind[at])
        return Cases(*flat, self.measured[rows], self.table[rows], self.part[rows], setting)


def work_of(r: dict) -> FlashWork:
    """The shape of a measured row."""
    L, S = int(r["seq_q"]), int(r["seq_kv"])
    band = Band.causal(L, S, int(r["window"])) if r["causal"] else Band()
    heads = int(r["q_heads"]), int(r["kv_heads"])
    return FlashWork(int(r["batch"]), *heads, L, S, int(r["head_dim"]), int(r["head_dim"]), "bf16", band)


def settings(work: FlashWork) -> list[FlashTiles]:
    """Knobs that our kernels would try."""
    if work.L == 1:
        grid = itertools.product((16, 64), (32, 64, 128), (4,), (2, 3, 4), (1, 2, 4, 8, 16, 32))
        found = [FlashTiles(m, n, w, s, splits=k, pack=True) for m, n, w, s, k in grid]
        return [t for t in found if t.splits == 1 or t.splits * t.block_n <= work.S]
    grid = itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
    return [FlashTiles(*knobs) for knobs in grid]


def beside_seconds(work: FlashWork, tiles: FlashTiles, device) -> float:
    """What runs beside the kernel: the merge of splits as `flash_seconds` adds it; in the tables, writing the cache."""
    if tiles.splits == 1:
        cache = 4 * work.B * work.H * (work.E + work.Ev) * (work.L if work.band.ahead == 0 else 0) * 2
        return cache / (0.8 * device.bandwidth) * cache**3 / (cache**3 + device.l2_bytes**3)
    partial = 2 * tiles.splits * work.B * work.Hq * work.L * (work.Ev + 1) * 4
    return LAUNCH + partial * min(1.0, partial / device.l2_bytes) / (device.bandwidth * 0.8)


def measured_rows(t: pd.DataFrame, gpu: str) -> pd.DataFrame:
    """A sample of a part's rows that say something about tiles: no short prompts, no windows below a library's tile."""
    t = t[t.best & (t.n_frameworks >= 2) & (t.gpu == gpu) & (t.dtype == "bf16") & (t.head_dim <= 256)]
    t = t[(t.window == 0) | (t.window >= 1024)]
    t = t[(t.seq_q == 1) | (t.seq_q >= 128)]
    # Long calls say more about tiles than about launches.
    weight = np.clip(t.latency_us.astype(float), 5, 500) ** 0.7
    return t.sample(min(ROWS, len(t)), random_state=0, weights=weight) if len(t) else t


def any_rows(t: pd.DataFrame, gpu: str) -> pd.DataFrame:
    """A sample of a part's rows of any size, mask and head width up to 256."""
    t = t[t.best & (t.n_frameworks >= 2) & (t.gpu == gpu) & (t.dtype == "bf16") & (t.head_dim <= 256)]
    return t.sample(min(LEFT_OUT, len(t)), random_state=1) if len(t) else t


def cases(folder: Path, rows_of: Callable[[pd.DataFrame, str], pd.DataFrame] = measured_rows) -> Cases:
    """Sampled rows of the tables with every setting that fits."""
    flat, row, kind, measured, table, part, setting = [], [], [], [], [], [], []
    for name, gpu in itertools.product(KINDS, PARTS):
        t = pd.read_parquet(folder / f"{name}.parquet")
        t = rows_of(t, gpu)
        if t.empty:
            continue
        device = gpu_named(gpu)
        for r in t.to_dict("records"):
            work = work_of(r)
            for tiles in settings(work):
                if fits(work, tiles, device):
                    continue
                tile = tile_of("forward", tiles, work.E, work.Ev, work.kind, device)
                figures = tile_figures(work, tiles, tile, device, None)
                if figures is None:
                    continue
                flat.append((*figures, *sm_figures(device), beside_seconds(work, tiles, device)))
                setting.append((work, tiles))
                row.append(len(measured))
                kind.append(FITTED.index(matrix_class(device.arch, tile.held, tile.warps)))
            measured.append(r["latency_us"] * 1e-6)
            table.append(KINDS.index(name))
            part.append(PARTS.index(gpu))
    return Cases(*(np.array(x) for x in (flat, row, kind, measured, table, part)), setting)


class Fit:
    """Parameters in logarithms: coefficients of each fitted class, then one constant for each table and part."""

    def __init__(self, seen: Cases) -> None:
        self.seen = seen
        names = [f.name for c in (TileFigures, SmFigures, Coefficients) for f in fields(c)]
        symbols = [sympy.Symbol(n, positive=True) for n in names]
        self.seconds = sympy.lambdify(symbols, seconds_expression(), modules="numpy", cse=True)
        one = list(PRIORS.values())
        tables = len(KINDS) * len(PARTS)
        self.start = np.log([p[0] for p in one] * len(FITTED) + [8e-6] * tables)
        self.low = np.log([p[1] for p in one] * len(FITTED) + [2e-6] * tables)
        self.high = np.log([p[2] for p in one] * len(FITTED) + [4e-5] * tables)
        self.spread = np.array([p[3] for p in one] * len(FITTED) + [1.0] * tables)
        self.first = np.flatnonzero(np.diff(seen.row, prepend=-1))

    def bodies(self, x: np.ndarray, launch: float = 0.0) -> np.ndarray:
        """Seconds of every setting of every row."""
        columns = [*self.seen.figures.T[:-1], *constants(x)[self.seen.kind].T, launch]
        return self.seconds(*columns) + self.seen.figures.T[-1]

    def predicted(self, x: np.ndarray) -> np.ndarray:
        """Seconds of each measured row: its table's constant and the best setting."""
        best = np.minimum.reduceat(self.bodies(x), self.first)
        share = np.array([SHARE[p] for p in PARTS])[self.seen.part]
        constant = np.exp(x[len(PRIORS) * len(FITTED) :])[self.seen.table * len(PARTS) + self.seen.part]
        return constant + share * best

    def residuals(self, x: np.ndarray) -> np.ndarray:
        wrong = np.log(self.predicted(x) / self.seen.measured)
        return np.concatenate([wrong / 0.25, (x - self.start) / self.spread])

    def solved(self) -> np.ndarray:
        """The parameters that the rows ask for."""
        bounds = (self.low, self.high)
        return least_squares(self.residuals, self.start, bounds=bounds, loss="soft_l1", diff_step=0.02).x


def constants(x: np.ndarray) -> np.ndarray:
    """Coefficients of each fitted class, in the order of PRIORS."""
    return np.exp(x[: len(PRIORS) * len(FITTED)]).reshape(len(FITTED), len(PRIORS))


def left_out(seen: Cases, every: Cases, kernels: int) -> tuple[list[Predicted], list[Predicted]]:
    """Rows of `every`, each predicted by a fit of `seen` without its part: closed form, and those of the `kernels` that
    most rows of a table would run, compiled."""
    closed, made = [], []
    for p, part in enumerate(PARTS):
        x = Fit(seen.of(seen.part != p)).solved()
        for k, kind in enumerate(KINDS):
            rows = every.of((every.part == p) & (every.table == k))
            if not len(rows.measured):
                continue
            fit = Fit(rows)
            bodies = fit.bodies(x, LAUNCH)
            ends = [*fit.first[1:], len(bodies)]
            best = [int(a + np.argmin(bodies[a:b])) for a, b in zip(fit.first, ends, strict=True)]
            closed.append(Predicted(kind, part, bodies[best], rows.measured, SHARE[part]))
            chosen = [kernel_of(*rows.setting[i], part) for i in best]
            common = {kernel for kernel, _ in Counter(chosen).most_common(kernels)}
            times = np.array([_compiled_seconds(fit, x, i, part) if kernel in common else np.nan
                              for i, kernel in zip(best, chosen, strict=True)])  # fmt: skip
            known = np.flatnonzero(np.isfinite(times))
            slower = np.median(times[known] / bodies[best][known]) if len(known) else np.nan
            print(f"{kind} {part}: {len(known)} of {len(times)} rows run {len(common)} of {len(set(chosen))} kernels; "
                  f"compiled they take {slower:.2f} of the closed form's time", flush=True)  # fmt: skip
            made.append(Predicted(kind, part, times[known], rows.measured[known], SHARE[part]))
    return closed, made


def _compiled_seconds(fit: Fit, x: np.ndarray, i: int, part: str) -> float:
    """Seconds of one setting as compiled; NaN where it does not compile or then does not fit."""
    (work, tiles), device = fit.seen.setting[i], gpu_named(part)
    stats = compiled(kernel_of(work, tiles, part))
    tile = tile_of("forward", tiles, work.E, work.Ev, work.kind, device)
    figures = None if stats is None else tile_figures(work, tiles, tile, device, stats)
    if figures is None:
        return float("nan")
    beside = fit.seen.figures[i, -1]
    return float(fit.seconds(*figures, *sm_figures(device), *constants(x)[fit.seen.kind[i]], LAUNCH) + beside)


def main(folder: Path, kernels: int = COMPILED) -> None:
    seen = cases(folder)
    fit = Fit(seen)
    solved = fit.solved()
    wrong = np.log(fit.predicted(solved) / seen.measured)
    errors = {}
    for (k, name), (p, part) in itertools.product(enumerate(KINDS), enumerate(PARTS)):
        rows = wrong[(seen.table == k) & (seen.part == p)]
        if len(rows):
            fold, bias = float(np.exp(np.mean(np.abs(rows)))), float(np.exp(np.median(rows)))
            errors[f"{name} {part}"] = {"rows": len(rows), "fold": round(fold, 3), "median_ratio": round(bias, 3)}
            print(f"{name:14s} {part:11s} rows {len(rows):4d}  fold error {fold:.3f}  median ratio {bias:.3f}")
    values = constants(solved)
    classes = {
        name: {**{k: float(f"{v:.4g}") for k, v in zip(PRIORS, row, strict=True)}, "launch": LAUNCH}
        for name, row in zip(FITTED, values, strict=True)
    }
    for name, (like, changes, _) in GUESSED.items():
        classes[name] = {**classes[like], **changes}
    closed, made = left_out(seen, cases(folder, any_rows), kernels)
    found = intervals(closed, LAUNCH)
    text = {
        "source": "benchmarks/fit_tiles.py on NVIDIA aiconfigurator's tables (Apache-2.0), best libraries on "
        + ", ".join(PARTS),
        "triton_share_of_library": SHARE,
        "fit_error": errors,
        "guessed": {name: why for name, (_, _, why) in GUESSED.items()},
        "classes": classes,
        "interval": {
            "closed": found,
            "compiled": narrow(intervals(made, LAUNCH), found, ALLOWANCE),
            "allowance": ALLOWANCE,
        },
    }
    OUT.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))

"""How far the tile model is off on devices that its fit has not seen, and the intervals that follow.

For each part, its rows are predicted with the coefficients of the other parts; only the constant of a table (launch and
what its libraries do beside the kernel) is the part's own, since the model does not predict that. Errors are split by
kind of call, by size (the launch's share of the prediction) and by whether the kernel was compiled. The class of matrix
instruction explains no more: leaving out the H100 leaves out all of wgmma.

Source: as benchmarks/fit_tiles.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pandas as pd
import torch
from calibration import inside, interval, rounded_bounds

from attnc.codegen.compile_stats import Compiled, compile_job
from attnc.codegen.decode_jobs import decode_jobs
from attnc.codegen.flash_jobs import flash_job
from attnc.codegen.gpu_decode import DecodeKnobs
from attnc.codegen.gpu_flash import FlashKnobs
from attnc.cost_models.device import gpu_named
from attnc.cost_models.tile_model import FlashTiles, FlashWork
from attnc.rule_attention import AttentionRule

WIDTH = 1.8  # of an interval, high over low, that is worth telling
GROUP = 4  # query heads per key head of what is compiled
REGIMES = (0.04, 0.12, 0.4)
CONSTANTS = np.exp(np.linspace(np.log(1e-6), np.log(4e-5), 300))  # seconds tried for a table's constant


@dataclass(frozen=True)
class Kernel:
    """A forward kernel of ours on a part. width: of a head; tiles without splits."""

    part: str
    causal: bool
    width: int
    tiles: FlashTiles


@dataclass
class Predicted:
    """Rows of one part by a fit without it. kernel: seconds of the best setting, as a share of the library's time."""

    kind: str
    part: str
    kernel: np.ndarray
    measured: np.ndarray
    share: float

    def frame(self, launch: float) -> pd.DataFrame:
        """Errors by row: log(predicted / measured) with the constant that suits the table best."""
        body = self.share * self.kernel
        wrong = [np.mean(np.abs(np.log((c + body) / self.measured))) for c in CONSTANTS]
        constant = CONSTANTS[int(np.argmin(wrong))]
        off = np.log((constant + body) / self.measured)
        columns = {"kind": self.kind, "part": self.part, "off": off, "launch": launch / self.kernel}
        return pd.DataFrame(columns)


def intervals(found: list[Predicted], launch: float) -> dict[str, dict]:
    """By kind of call: bounds, the share of rows they hold, by part too, and the median width."""
    rows = pd.concat([one.frame(launch) for one in found])
    told = {}
    for kind, here in rows.groupby("kind"):
        off, share = here.off.to_numpy(), here.launch.to_numpy()
        bounds = interval(off, share, REGIMES)
        held, width = inside(bounds, off, share)
        parts = {part: round(float(held[here.part == part].mean()), 3) for part in here.part.unique()}
        told[str(kind)] = {
            **rounded_bounds(bounds),
            "rows": len(here),
            "fold": round(float(np.exp(np.mean(np.abs(off)))), 3),
            "covered": round(float(held.mean()), 3),
            "width": round(float(np.median(width)), 3),
            "covered_by_part": parts,
        }
        print(
            f"{kind}: a part left out is off by {told[str(kind)]['fold']:.2f}; intervals hold {held.mean():.2f} "
            f"(median width {np.median(width):.2f}), by part {parts}"
        )
    return told


def narrow(made: dict[str, dict], closed: dict[str, dict], allowance: float) -> dict[str, dict]:
    """Bounds of what is compiled; where they are wider than WIDTH, the closed form's with an allowance below."""
    told = {}
    for kind, bounds in closed.items():
        low = [round(v / allowance, 4) for v in bounds["low"]]
        wide = {"edges": bounds["edges"], "high": bounds["high"], "low": low}
        told[kind] = made[kind] if made[kind]["width"] <= WIDTH else wide
    return told


def kernel_of(work: FlashWork, tiles: FlashTiles, part: str) -> Kernel:
    """The kernel that a setting runs: its loop over whole tiles is the same for every length, group and window."""
    return Kernel(part, work.L > 1 and work.band.ahead == 0, work.E, replace(tiles, splits=1))


@lru_cache(maxsize=1024)
def compiled(kernel: Kernel) -> Compiled | None:
    """What the compiler makes of a kernel; None where it fails."""
    target, tiles, dtype = gpu_named(kernel.part).target, kernel.tiles, torch.bfloat16
    assert target is not None
    rule = AttentionRule.parse("score=0.125 * s" + ("; keep=j - i <= 0" if kernel.causal else ""))
    if tiles.pack:
        knobs = DecodeKnobs(tiles.block_m, tiles.block_n, 8, tiles.warps, tiles.stages)
        job = decode_jobs(rule, (), dtype, GROUP, kernel.width, kernel.width, knobs, target)[0]
    else:
        knobs = FlashKnobs(tiles.block_m, tiles.block_n, tiles.warps, tiles.stages)
        job = flash_job("flash_forward", rule, (), dtype, GROUP, kernel.width, kernel.width, knobs, target)
    made = compile_job(job)
    return made if isinstance(made, Compiled) else None

"""How far the tile model is off on devices that its fit has not seen, and the intervals that follow.

For each part, its rows are predicted with the coefficients of the other parts; only the constant of a table (launch and
what its libraries do beside the kernel) is the part's own, since the model does not predict that. Errors are split by
kind of call, by size (the launch's share of the prediction) and by whether the kernel was compiled. The class of matrix
instruction explains no more: leaving out the H100 leaves out all of wgmma.

Source: as benchmarks/fit_tiles.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from calibration import inside, interval, rounded_bounds

from attnc.codegen.compile_stats import Compiled, compile_job
from attnc.codegen.decode_jobs import decode_jobs
from attnc.codegen.flash_jobs import flash_job
from attnc.codegen.gpu_decode import DecodeKnobs
from attnc.codegen.gpu_flash import FlashKnobs
from attnc.cost_models.device import Gpu
from attnc.cost_models.tile_model import FlashTiles, FlashWork
from attnc.rule_attention import AttentionRule

REGIMES = (0.04, 0.12, 0.4)
CONSTANTS = np.exp(np.linspace(np.log(1e-6), np.log(4e-5), 300))  # seconds tried for a table's constant


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


def lowered(found: dict[str, dict], allowance: float) -> dict[str, dict]:
    """Bounds with an allowance on the low side, by kind of call."""
    return {
        kind: {**{k: bounds[k] for k in ("edges", "high")}, "low": [round(v / allowance, 4) for v in bounds["low"]]}
        for kind, bounds in found.items()
    }


def compiled(work: FlashWork, tiles: FlashTiles, gpu: Gpu) -> Compiled | None:
    """What the compiler makes of the forward with these knobs; None where it fails."""
    assert gpu.target is not None
    group, dtype = work.Hq // work.H, torch.bfloat16
    if tiles.pack:
        knobs = DecodeKnobs(tiles.block_m, tiles.block_n, tiles.splits, tiles.warps, tiles.stages)
        job = decode_jobs(_rule(work), (), dtype, group, work.E, work.Ev, knobs, gpu.target)[0]
    else:
        knobs = FlashKnobs(tiles.block_m, tiles.block_n, tiles.warps, tiles.stages)
        job = flash_job("flash_forward", _rule(work), (), dtype, group, work.E, work.Ev, knobs, gpu.target)
    made = compile_job(job)
    return made if isinstance(made, Compiled) else None


def _rule(work: FlashWork) -> AttentionRule:
    keep = [] if work.band.ahead is None or work.L == 1 else ["j - i <= 0"]
    keep += [] if work.band.back is None or work.L == 1 else [f"i - j <= {work.band.back}"]
    return AttentionRule.parse("score=0.125 * s" + (f"; keep={' and '.join(keep)}" if keep else ""))

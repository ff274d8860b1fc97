"""The time of the flash kernels with its interval, from errors on measured devices that the fit had not seen.

    flash_estimate(work, tiles, device)             by the closed form's errors
    flash_estimate(work, tiles, device, compiled)   by those of what the compiler refined

Bounds lie in tile_model.json by kind of call and size; benchmarks/fit_tiles.py finds them. A kernel that no table shows
(a backward, other types than bf16 and fp16 in memory or in products, tcgen05, mfma) gets the widest of all and an
allowance on either side.

The tables hold the best library of each shape and not our kernels, and of their Triton kernels not the tiles; so both
bounds hold between our best setting, by the share that Triton reaches of that library, and what the table measured.
Compiled, the four kernels of ours that most rows of a table and part would run take 1.27 of the closed form's time in
prefill on the A100 (mma.sync), 1.00 to 1.08 elsewhere. A part left out, their bounds hold 86% of 276 rows of encoders
at a median width of 1.39 and 86% of 745 of decoding at 1.77. Of prefill they hold 85% of 740 at 1.81, by part 98, 72
and 70%: there the closed form's stay, lower by the allowance on the low side.

Source: as `attnc.cost_models.tile_model`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from attnc.cost_models.device import Gpu
from attnc.cost_models.estimate import Bounds, Estimate
from attnc.cost_models.tile_kernels import ITEM, FlashTiles, matrix_class
from attnc.cost_models.tile_model import CompiledFigures, FlashWork, fitted_table, flash_seconds

MEASURED_TYPES = ("bf16", "fp16")


def flash_estimate(
    work: FlashWork,
    tiles: FlashTiles,
    device: Gpu,
    compiled: Mapping[str, CompiledFigures] | CompiledFigures | None = None,
    *,
    kernels: Sequence[str] | None = None,
) -> Estimate:
    """`flash_seconds` of the same arguments, and the interval that holds about 80% of measured times."""
    seconds = flash_seconds(work, tiles, device, compiled, kernels=kernels)
    forward = not work.training if kernels is None else tuple(kernels) == ("forward",)
    return predicted(seconds, work, tiles, device, compiled=bool(compiled), forward=forward)


def predicted(
    seconds: float, work: FlashWork, tiles: FlashTiles, device: Gpu, *, compiled: bool = False, forward: bool = True
) -> Estimate:
    """`seconds`, found by `flash_seconds` for these arguments, with their interval.

    compiled: refined by the compiler. forward: of the forward alone.
    """
    instruction, fitted = matrix_class(device.arch, tiles.block_m, tiles.warps), fitted_table()
    widens = work.stored is not None and min(work.stored) < ITEM[work.kind]
    if not forward or widens or work.kind not in MEASURED_TYPES or instruction in fitted["guessed"]:
        return unmeasured(seconds)
    bounds = fitted_bounds(kind_of(work, tiles), "compiled" if compiled else "closed")
    return bounds.around(seconds, fitted["classes"][instruction]["launch"] / seconds)


def kind_of(work: FlashWork, tiles: FlashTiles) -> str:
    """The table that shows such calls: few rows against a cache, a mask that skips tiles, or all pairs."""
    if tiles.pack:
        return "attn_decode"
    masked = work.counts is not None or work.band.back is not None or work.band.ahead is not None
    return "attn_prefill" if masked else "attn_encoder"


def unmeasured(seconds: float) -> Estimate:
    """The interval of a kernel of tiles that no table shows."""
    return widest_bounds().around(seconds)


@lru_cache(maxsize=16)
def fitted_bounds(kind: str, how: str) -> Bounds:
    """Bounds for a kind of call by the "closed" form or "compiled"."""
    return Bounds.of(fitted_table()["interval"][how][kind])


@lru_cache(maxsize=1)
def widest_bounds() -> Bounds:
    """The widest bounds of all, with the allowance."""
    stored = fitted_table()["interval"]
    every = [bounds for how in ("closed", "compiled") for bounds in stored[how].values()]
    low, high = min(min(b["low"]) for b in every), max(max(b["high"]) for b in every)
    return Bounds((), (low / stored["allowance"],), (high * stored["allowance"],))

"""What tuning found for a region, read back: the knobs of each kernel from its record, and the time they were kept for.

Source: shared vocabulary of DESIGN.md, section 2 (record).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path

from attnc.codegen import (
    derivative,
    gpu_decode,
    gpu_flash,
    gpu_tables,
    holes,
    launch,
    ranges,
    render,
    tiles,
    triton_text,
)
from attnc.codegen.render import skeleton_text, source_hash
from attnc.cost_models.device import Gpu
from attnc.cost_models.estimate import Estimate
from attnc.cost_models.tile_estimate import predicted
from attnc.errors import UsageError
from attnc.forms import parse_form
from attnc.forms.flash import KERNELS, TILES, Flash, default_for, skips
from attnc.forms.flash_decode import FlashDecode, decode_default
from attnc.forms.generated import Generated
from attnc.records import TIMES, RecordKey, Records, Timing
from attnc.region import AttentionRegion

SOURCES = (derivative, gpu_decode, gpu_flash, gpu_tables, holes, launch, ranges, render, tiles, triton_text)


@cache
def kernel_version() -> str:
    """Hash of all that the source of a flash kernel comes from."""
    written = [Path(str(module.__file__)).read_text(encoding="utf-8") for module in SOURCES]
    return source_hash("\n".join([skeleton_text("flash"), skeleton_text("flash_decode"), *written]))


def record_key(region: AttentionRegion, gpu: Gpu, kernel: str) -> RecordKey:
    """Where the record of one kernel ("forward", "dq", "dkv") of a region is kept."""
    return RecordKey(f"{region.key}-{kernel}", gpu.name, region.dtype, kernel_version())


def start_of(region: AttentionRegion, gpu: Gpu) -> Generated | None:
    """The setting that tuning begins with, its way to skip tiles predicted fastest; None where none fits."""
    bare = replace(region, path="", node="", choice=None, device="cuda")
    if gpu.target is None:
        return None
    if FlashDecode().refuse(bare) is None:
        return decode_default(bare, gpu)
    if Flash().refuse(bare) is not None:
        return None
    found = [form for skip in skips(region.rule.keep) if (form := default_for(bare, gpu, skip)) is not None]
    return min(found, key=lambda form: form.seconds(bare, gpu), default=None)


def kernels_of(start: Generated, region: AttentionRegion) -> tuple[str, ...]:
    """The kernels that are tuned apart."""
    if isinstance(start, FlashDecode):
        return ("decode",)
    return tuple(KERNELS) if region.training else ("forward",)


@lru_cache(maxsize=8)
def records_in(store: str) -> Records:
    """The records below a store's directory."""
    return Records(Path(store) / "records")


def tuned(region: AttentionRegion, gpu: Gpu, store: str) -> tuple[Generated, Estimate] | None:
    """The tuned setting and its time, at the dearest fidelity known of all; None where a kernel has no record.

    A measured time has the interval of its own repetitions, another that of such predictions.
    """
    try:
        stamp = records_in(store).directory.stat().st_mtime_ns  # a record that is written anew replaces a file here
    except OSError:
        stamp = 0
    return _tuned(replace(region, path="", node="", choice=None), gpu, store, stamp)


@lru_cache(maxsize=1024)
def _tuned(region: AttentionRegion, gpu: Gpu, store: str, stamp: int) -> tuple[Generated, Estimate] | None:
    form = start_of(region, gpu)
    if form is None:
        return None
    times: list[Timing] = []
    for kernel in kernels_of(form, region):
        record = records_in(store).find(record_key(region, gpu, kernel))
        if record is None or record.best is None:
            return None
        best = _setting(record.best)
        if best is None or type(best) is not type(form) or best.misfit(region, gpu) is not None:
            return None
        form = with_kernel(form, best, kernel) if isinstance(form, Flash) and isinstance(best, Flash) else best
        times.append(record.timings[record.best])
    for fidelity in reversed(TIMES):
        known = [timing.at(fidelity) for timing in times]
        if None in known:
            continue
        if fidelity == "measure":
            # What is measured for either kernel of the backward is the whole backward.
            return form, sum((timing.spread for timing in times[:1] + times[2:]), Estimate(0.0, 0.0, 0.0))
        made, forward = fidelity == "compile", not region.training
        total = sum(s for s in known if s is not None)
        return form, predicted(total, form.work(region), form.tiles, gpu, compiled=made, forward=forward)
    return None


def with_kernel(form: Flash, other: Flash, kernel: str) -> Flash:
    """`form` with the knobs of one kernel taken from `other`; with the forward's go skipping and order of heads."""
    names = [KERNELS[kernel] + name for name in TILES] + (["skip", "section", "xcds"] if kernel == "forward" else [])
    return replace(form, **{name: getattr(other, name) for name in names})


def _setting(spelling: str) -> Generated | None:
    try:
        form = parse_form(spelling)
    except UsageError:  # a record by hand: its key is right, its spelling is none
        return None
    return form if isinstance(form, Generated) else None

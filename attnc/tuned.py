"""What tuning found for a region, read back: the knobs of each kernel from its record, and the time they were kept for.

Source: shared vocabulary of DESIGN.md, section 2 (record).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import TypeVar

from attnc.codegen import (
    cpu_chunks,
    cpu_gates,
    cpu_recurrence,
    cpu_scan,
    derivative,
    gpu_decode,
    gpu_flash,
    gpu_recurrence,
    gpu_recurrence_backward,
    gpu_tables,
    holes,
    launch,
    ranges,
    render,
    tiles,
    triton_text,
)
from attnc.codegen.render import skeleton_text, source_hash
from attnc.cost_models.device import Device, Gpu
from attnc.cost_models.device_kinds import Cpu
from attnc.cost_models.estimate import Estimate
from attnc.cost_models.tile_estimate import predicted
from attnc.errors import UsageError
from attnc.forms import Form, parse_form
from attnc.forms.chunked import Chunked
from attnc.forms.flash import KERNELS, TILES, Flash, default_for, skips
from attnc.forms.flash_decode import FlashDecode, decode_default
from attnc.forms.generated import Generated
from attnc.forms.step import Step
from attnc.records import TIMES, RecordKey, Records, Timing
from attnc.region import AttentionRegion, Region

Kept = TypeVar("Kept", bound=Form)

# Skeletons and modules that kernels of a kind come from, by whether they are for a GPU.
SOURCES = {
    ("attention", True): (
        ("flash", "flash_decode"),
        (derivative, gpu_decode, gpu_flash, gpu_tables, holes, launch, ranges, render, tiles, triton_text),
    ),
    ("recurrence", True): (
        (*gpu_recurrence.KERNELS, *gpu_recurrence_backward.KERNELS),
        (gpu_recurrence, gpu_recurrence_backward, launch, render, tiles),
    ),
    ("recurrence", False): ((), (cpu_chunks, cpu_gates, cpu_recurrence, cpu_scan)),
}


@cache
def kernel_version(kind: str = "attention", *, gpu: bool = True) -> str:
    """Hash of all that the source of a kernel comes from; kind: of its regions."""
    skeletons, modules = SOURCES[kind, gpu]
    written = [Path(str(module.__file__)).read_text(encoding="utf-8") for module in modules]
    return source_hash("\n".join([*map(skeleton_text, skeletons), *written]))


def record_key(region: Region, device: Device, part: str) -> RecordKey:
    """Where the record of one kernel of an attention, or of a recurrence ("chunked"), is kept."""
    version = kernel_version(region.kind, gpu=isinstance(device, Gpu))
    threads = f"-by-{device.threads}" if isinstance(device, Cpu) else ""
    return RecordKey(f"{region.key}-{part}{threads}", device.name, region.dtype, version)


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


def chunks_of(region: Region, device: Device) -> Chunked | None:
    """The setting that tuning of a recurrence begins with; None where chunks do not apply, or single steps are faster.

    The kernels of a recurrence share their chunks and are tuned together.
    """
    bare = replace(region, path="", node="", choice=None, device="cuda" if isinstance(device, Gpu) else "cpu")
    start = next((form for form in Chunked().space(bare, device) if form.misfit(bare, device) is None), None)
    steps = Step().space(bare, device)
    if start is None or any(form.seconds(bare, device) <= start.seconds(bare, device) for form in steps):
        return None
    assert isinstance(start, Chunked)
    return start


def kernels_of(start: Generated, region: AttentionRegion) -> tuple[str, ...]:
    """The kernels that are tuned apart."""
    if isinstance(start, FlashDecode):
        return ("decode",)
    return tuple(KERNELS) if region.training else ("forward",)


@lru_cache(maxsize=8)
def records_in(store: str) -> Records:
    """The records below a store's directory."""
    return Records(Path(store) / "records")


def tuned(region: Region, device: Device, store: str) -> tuple[Form, Estimate] | None:
    """The tuned setting and its time, at the dearest fidelity known of all; None where a kernel has no record.

    A measured time has the interval of its own repetitions, another that of such predictions.
    """
    try:
        stamp = records_in(store).directory.stat().st_mtime_ns  # a record that is written anew replaces a file here
    except OSError:
        stamp = 0
    return _tuned(replace(region, path="", node="", choice=None), device, store, stamp)


@lru_cache(maxsize=1024)
def _tuned(region: Region, device: Device, store: str, stamp: int) -> tuple[Form, Estimate] | None:
    if not isinstance(region, AttentionRegion):
        return _tuned_chunks(region, device, store)
    return _tuned_kernels(region, device, store) if isinstance(device, Gpu) else None


def _tuned_chunks(region: Region, device: Device, store: str) -> tuple[Form, Estimate] | None:
    found = None if chunks_of(region, device) is None else _kept(Chunked, region, device, "chunked", store)
    if found is None:
        return None
    form, timing = found
    for fidelity in reversed(TIMES):
        seconds = timing.at(fidelity)
        if seconds is not None:
            return form, timing.spread if fidelity == "measure" else form.interval(seconds, region, device)
    return None


def _tuned_kernels(region: AttentionRegion, gpu: Gpu, store: str) -> tuple[Form, Estimate] | None:
    form = start_of(region, gpu)
    if form is None:
        return None
    times: list[Timing] = []
    for kernel in kernels_of(form, region):
        found = _kept(type(form), region, gpu, kernel, store)
        if found is None:
            return None
        best, timing = found
        form = with_kernel(form, best, kernel) if isinstance(form, Flash) and isinstance(best, Flash) else best
        times.append(timing)
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


def _kept(kind: type[Kept], region: Region, device: Device, part: str, store: str) -> tuple[Kept, Timing] | None:
    """The best setting of a record and its times; None where there is none of this form that runs on `device`."""
    record = records_in(store).find(record_key(region, device, part))
    if record is None or record.best is None:
        return None
    try:
        form = parse_form(record.best)
    except UsageError:  # a record by hand: its key is right, its spelling is none
        return None
    if type(form) is not kind or form.misfit(region, device) is not None:
        return None
    return form, record.timings[record.best]


def with_kernel(form: Flash, other: Flash, kernel: str) -> Flash:
    """`form` with the knobs of one kernel taken from `other`; with the forward's go skipping and order of heads."""
    names = [KERNELS[kernel] + name for name in TILES] + (["skip", "section", "xcds"] if kernel == "forward" else [])
    return replace(form, **{name: getattr(other, name) for name in names})

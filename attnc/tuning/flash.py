"""The kernels of an attention as problems to search: their knobs on one device.

Forward, dq, and dk with dv are searched apart: each has its own tile, warps and stages, and their times add up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from attnc.codegen.compile_stats import Failure, compile_job
from attnc.codegen.flash_jobs import KERNELS as COMPILED
from attnc.codegen.flash_jobs import flash_job
from attnc.codegen.gpu_flash import FlashKnobs
from attnc.codegen.triton_text import Slot
from attnc.cost_models.device import Gpu, gpu_named
from attnc.errors import LoweringError
from attnc.forms.base import Form
from attnc.forms.flash import KERNELS, Flash, kernel_seconds, work_of
from attnc.region import AttentionRegion, Region
from attnc.tuned import kernel_version, kernels_of, record_key, start_of
from attnc.tuning.measure import Bench
from attnc.tuning.problem import Outcome


@dataclass(frozen=True)
class FlashProblem:
    """One kernel ("forward", "dq", "dkv") of a region on a device. start: the setting that all others vary."""

    region: AttentionRegion
    gpu: Gpu
    part: str
    start: Flash

    @property
    def key(self) -> str:
        return record_key(self.region, self.gpu, self.part).region

    @property
    def device(self) -> str:
        return self.gpu.name

    @property
    def dtype(self) -> str:
        return self.region.dtype

    @property
    def kernel(self) -> str:
        return kernel_version()

    @property
    def shape(self) -> Mapping[str, int]:
        return self.region.shape.sizes()

    def space(self) -> Sequence[Form]:
        return self._space

    @cached_property
    def _space(self) -> tuple[Form, ...]:
        return self.start.settings(self.region, self.gpu, self.part)

    def predict(self, form: Form) -> float:
        assert isinstance(form, Flash)
        return kernel_seconds(form, work_of(self.region, form.skip), self.gpu, self.part)

    def compile(self, form: Form) -> Outcome:
        assert isinstance(form, Flash)
        if self.gpu.target is None:
            return Outcome(failure=f"compile for {self.gpu.name}: {self.gpu.no_target}")
        s, kernel = self.region.shape, COMPILED[list(KERNELS).index(self.part)]
        knobs, slots = FlashKnobs.parse(form.spell()), slots_of(self.region, self.part)
        dtype = getattr(torch, self.region.dtype)
        try:
            job = flash_job(kernel, self.region.rule, slots, dtype, s.group, s.E, s.Ev, knobs, self.gpu.target)
        except LoweringError as exc:
            return Outcome(failure=str(exc))
        made = compile_job(job)
        if isinstance(made, Failure):
            return Outcome(failure=made.sentence)
        return Outcome(kernel_seconds(form, work_of(self.region, form.skip), self.gpu, self.part, made))

    def measure(self, form: Form) -> Outcome:
        return self._bench.run(form)

    @cached_property
    def _bench(self) -> Bench:
        return Bench(self.region, self.gpu, self.part, self.start)


def slots_of(region: AttentionRegion, part: str) -> tuple[Slot, ...]:
    """The captured tensors of a region as its kernels see them; floats learn in the kernel of dq."""
    found = []
    for text in region.captured:
        match = re.fullmatch(r"(\w+)\[(.*)\]", text)
        assert match is not None, text
        dtype = getattr(torch, match[1])
        rank = len([size for size in match[2].split(",") if size.strip()])
        found.append(Slot(dtype, rank, needs_grad=part == "dq" and dtype.is_floating_point))
    return tuple(found)


def flash_problems(regions: Iterable[Region], devices: Iterable[str]) -> list[FlashProblem]:
    """What there is to tune: each kernel of each attention that Flash can compute, on each device."""
    problems = []
    for name in devices:
        gpu = gpu_named(name)
        for region in regions:
            if not isinstance(region, AttentionRegion) or region.rule.empty == "unknown":
                continue
            start = start_of(region, gpu)
            if start is not None:
                problems += [FlashProblem(region, gpu, part, start) for part in kernels_of(region)]
    return problems

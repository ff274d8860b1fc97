"""The kernels of an attention as problems to search: their knobs on one device.

Forward, dq, and dk with dv are searched apart: each has its own tile, warps and stages, and their times add up.
Decoding is one search, over the parts of the keys too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from attnc.codegen.compile_stats import Compiled, Failure, Job, compile_job, compiled_folder
from attnc.codegen.decode_jobs import decode_jobs
from attnc.codegen.flash_jobs import KERNELS as COMPILED
from attnc.codegen.flash_jobs import flash_job
from attnc.codegen.triton_text import Slot
from attnc.cost_models.device import Gpu
from attnc.cost_models.estimate import Estimate
from attnc.cost_models.tile_estimate import predicted
from attnc.cost_models.tile_model import flash_seconds
from attnc.errors import LoweringError
from attnc.forms.base import Form
from attnc.forms.flash import KERNELS, Flash, kernel_seconds
from attnc.forms.flash_decode import FlashDecode
from attnc.forms.generated import Generated
from attnc.region import AttentionRegion
from attnc.tuned import kernel_version, kernels_of, record_key, start_of
from attnc.tuning.measure import Bench, captured_types
from attnc.tuning.problem import Outcome


@dataclass(frozen=True)
class FlashProblem:
    """One kernel ("forward", "dq", "dkv", "decode") of a region on a device. start: the setting that others vary.

    store: where what is compiled is kept; None: in the user's own.
    """

    region: AttentionRegion
    gpu: Gpu
    part: str
    start: Generated
    store: str | None = None

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
        return self._seconds(form, None)

    def _seconds(self, form: Form, made: Compiled | None) -> float:
        if isinstance(form, FlashDecode):
            return flash_seconds(form.work(self.region), form.tiles, self.gpu, made)
        assert isinstance(form, Flash)
        return kernel_seconds(form, form.work(self.region), self.gpu, self.part, made)

    def estimate(self, form: Form, seconds: float, *, compiled: bool) -> Estimate:
        """`seconds` of a setting by closed form or compiled, with the interval of such predictions."""
        assert isinstance(form, Generated)
        forward = self.part in ("forward", "decode")
        return predicted(seconds, form.work(self.region), form.tiles, self.gpu, compiled=compiled, forward=forward)

    def compile(self, form: Form) -> Outcome:
        assert self.gpu.target is not None, self.gpu.name
        folder = None if self.store is None else compiled_folder(self.store)
        try:
            made = [compile_job(job, folder=folder) for job in self.jobs(form, self.gpu.target)]
        except LoweringError as exc:
            return Outcome(failure=str(exc))
        for one in made:
            if isinstance(one, Failure):
                return Outcome(failure=one.sentence)
        assert isinstance(made[0], Compiled)
        return Outcome(self._seconds(form, made[0]))

    def jobs(self, form: Form, target: str) -> list[Job]:
        """What is compiled ahead of time for a setting; the first decides its time."""
        s, slots = self.region.shape, slots_of(self.region, self.part)
        rule, (dtype, *held) = self.region.rule.core, (getattr(torch, name) for name in self.region.types)
        given = (rule, slots, dtype, s.group, s.E, s.Ev, form.schedule, target)  # type: ignore[attr-defined]
        if isinstance(form, FlashDecode):
            return decode_jobs(*given, held=tuple(held), value_in_key=form.value_in_key)
        assert isinstance(form, Flash)
        kernel = COMPILED[list(KERNELS).index(self.part)]
        return [flash_job(kernel, *given, held=tuple(held))]

    def measure(self, form: Form) -> Outcome:
        return self._bench.run(form)

    @cached_property
    def _bench(self) -> Bench:
        return Bench(self.region, self.gpu, self.part, self.store)


def slots_of(region: AttentionRegion, part: str) -> tuple[Slot, ...]:
    """The captured tensors of a region as its kernels see them; floats learn in the kernel of dq."""
    return tuple(
        Slot(dtype, len(sizes), needs_grad=part == "dq" and dtype.is_floating_point)
        for dtype, sizes in captured_types(region)
    )


def flash_problems(region: AttentionRegion, gpu: Gpu, store: str | None = None) -> list[FlashProblem]:
    """The kernels of an attention that Flash can compute on `gpu`, each a problem; none where it can not.

    store: where what is compiled and run is kept; None: in the user's own.
    """
    start = None if region.rule.empty == "unknown" else start_of(region, gpu)
    if start is None:
        return []
    return [FlashProblem(region, gpu, part, start, store) for part in kernels_of(start, region)]

"""The kernels of a linear recurrence as a problem to search: the size of its chunks, and on GPUs tiles and warps.

One search for all kernels, which share their chunks. On a GPU forward and backward are predicted by closed form and
refined by what the compiler makes of them; on this CPU chunks are measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from attnc.codegen.compile_stats import Compiled, Failure, Job, compile_job, compiled_folder
from attnc.codegen.gpu_recurrence_normalised import without_normaliser
from attnc.codegen.recurrence_backward_jobs import backward_jobs
from attnc.codegen.recurrence_jobs import recurrence_jobs
from attnc.cost_models.chunk_model import chunk_seconds
from attnc.cost_models.device import Device, Gpu
from attnc.cost_models.estimate import Estimate
from attnc.errors import LoweringError
from attnc.forms.base import Form
from attnc.forms.chunked import Chunked, work_of
from attnc.region import Region
from attnc.rule_recurrence import RecurrenceRule, RecurrenceShape
from attnc.tuned import chunks_of, kernel_version, record_key
from attnc.tuning.measure_recurrence import RecurrenceBench
from attnc.tuning.problem import Outcome

PART = "chunked"
# As the cost model names them; it knows nothing of the small ones, and of chunk_values_backward only that it must fit.
KERNELS = {"chunk_within": "within", "chunk_state": "state", "chunk_output": "output"}
KERNELS |= {f"{kernel}_backward": f"d{name}" for kernel, name in KERNELS.items()}


@dataclass(frozen=True)
class RecurrenceProblem:
    """A recurrence in chunks on a device. start: the setting that others vary.

    store: where what is compiled and run is kept; None: in the user's own.
    """

    region: Region
    on: Device
    start: Chunked
    store: str | None = None

    @property
    def key(self) -> str:
        return record_key(self.region, self.on, PART).region

    @property
    def device(self) -> str:
        return self.on.name

    @property
    def dtype(self) -> str:
        return self.region.dtype

    @property
    def kernel(self) -> str:
        return kernel_version(self.region.kind, gpu=isinstance(self.on, Gpu))

    @property
    def shape(self) -> Mapping[str, int]:
        return self.region.shape.sizes()

    def space(self) -> Sequence[Form]:
        return self._space

    @cached_property
    def _space(self) -> tuple[Form, ...]:
        return self.start.settings(self.region, self.on)

    def predict(self, form: Form) -> float:
        return form.seconds(self.region, self.on)

    def estimate(self, form: Form, seconds: float, *, compiled: bool) -> Estimate:
        """`seconds` of a setting by closed form or compiled, with the interval of such predictions."""
        assert isinstance(form, Chunked)
        return form.interval(seconds, self.region, self.on)

    def compile(self, form: Form) -> Outcome:
        """On a CPU nothing is compiled: what is predicted."""
        assert isinstance(form, Chunked)
        if not isinstance(self.on, Gpu):
            return Outcome(self.predict(form))
        folder = None if self.store is None else compiled_folder(self.store)
        made: dict[str, Compiled] = {}
        try:
            for job in self.jobs(form, self.on):
                one = compile_job(job, folder=folder)
                if isinstance(one, Failure):
                    return Outcome(failure=one.sentence)
                if job.kernel in KERNELS:
                    made[KERNELS[job.kernel]] = one
        except LoweringError as exc:
            return Outcome(failure=str(exc))
        seconds = chunk_seconds(work_of(self.region), form.schedule, self.on, made)
        if not math.isfinite(seconds):
            return Outcome(failure=self._unfit(form, made, self.on))
        return Outcome(seconds)

    def _unfit(self, form: Chunked, made: Mapping[str, Compiled], gpu: Gpu) -> str:
        work, knobs = work_of(self.region), form.schedule
        name = next(n for n, one in made.items() if math.isinf(chunk_seconds(work, knobs, gpu, {n: one}, kernels=(n,))))
        held = f"{made[name].registers} registers a thread and {made[name].shared_bytes} bytes of shared memory"
        return f"{form.spell()}: {name} was compiled to {held}, with which no block fits an SM of {gpu.name}."

    def jobs(self, form: Chunked, gpu: Gpu) -> list[Job]:
        """What is compiled ahead of time for a setting: the kernels of its forward, and in training of its backward."""
        rule, s = self.region.rule, self.region.shape
        assert isinstance(rule, RecurrenceRule) and isinstance(s, RecurrenceShape) and gpu.target is not None
        dtype, bonus = getattr(torch, self.region.dtype), rule.read == "before"
        jobs = recurrence_jobs(rule, dtype, s.group, s.K, s.V, form.kernels, gpu.target, bonus=bonus)
        if self.region.training:
            plain, V = without_normaliser(rule), s.V + (rule.normaliser != "none")
            jobs += backward_jobs(plain, dtype, s.group, s.K, V, form.kernels, gpu.target, bonus=bonus)
        return jobs

    def measure(self, form: Form) -> Outcome:
        return self._bench.run(form)

    @cached_property
    def _bench(self) -> RecurrenceBench:
        return RecurrenceBench(self.region, self.on, self.store)


def recurrence_problem(region: Region, device: Device, store: str | None = None) -> RecurrenceProblem | None:
    """The problem of a recurrence; None where it is not computed in chunks, or there is but one setting."""
    start = chunks_of(region, device)
    problem = None if start is None else RecurrenceProblem(region, device, start, store)
    return problem if problem is not None and len(problem.space()) > 1 else None

"""Times of a kernel three ways: measured on the device that is here, predicted, or replayed from a record.

Measuring: warm-up until the clocks of the device are up, then repeated runs with the L2 cache flushed before each,
timed by the device; the median, and how far it is to be trusted.

Source: Hoefler, Belli 2015, doi:10.1145/2807591.2807644 (medians and their spread); a flush as in Triton's `do_bench`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from attnc.errors import UsageError
from attnc.forms.base import Form
from attnc.records import Record
from attnc.tuning.problem import Outcome, Problem

WARM_S, MEASURED_S = 0.025, 0.1
FEWEST, MOST = 5, 1000  # runs that are timed
FLUSHED_BYTES = 256 << 20  # more than any L2
# The median of n times is off by about 1.25 s / sqrt(n), where s is their deviation, 1.48 times the median distance.
MEDIAN_ERROR, DEVIATION = 1.2533, 1.4826


class Clock(Protocol):
    """What times runs on a device."""

    def times(self, run: Callable[[], object], count: int) -> list[float]:
        """Seconds of `count` runs, each with a cold cache."""


class DeviceClock:
    """Times by events of the current CUDA or ROCm device. Raises: UsageError where there is none."""

    def __init__(self, flushed_bytes: int = FLUSHED_BYTES) -> None:
        if not torch.cuda.is_available():
            raise UsageError(
                "measure on a GPU: found none that torch can use; allowed are CUDA and ROCm devices. Tune with "
                "--fidelity compile, which needs no GPU."
            )
        self.flushed = torch.empty(flushed_bytes // 4, dtype=torch.int32, device="cuda")

    def times(self, run: Callable[[], object], count: int) -> list[float]:
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for start, end in pairs:
            self.flushed.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in pairs]


class WallClock:
    """Times by the wall, for what runs on this CPU."""

    def times(self, run: Callable[[], object], count: int) -> list[float]:
        found = []
        for _ in range(count):
            began = time.perf_counter()
            run()
            found.append(time.perf_counter() - began)
        return found


def measured(
    run: Callable[[], object], clock: Clock, *, warm_s: float = WARM_S, measured_s: float = MEASURED_S
) -> Outcome:
    """Median seconds of `run`, with the relative error of that median; `run` has been checked to be right.

    warm_s, measured_s: about how long to warm up and to measure, in seconds.
    """
    first = clock.times(run, 1)[0]  # compiles and loads: tells nothing
    warm, once = 0.0, first
    while warm < warm_s:
        once = statistics.median(clock.times(run, 3))
        warm += 3 * max(once, 1e-6)
    count = max(FEWEST, min(MOST, math.ceil(measured_s / max(once, 1e-9))))
    times = clock.times(run, count)
    middle = statistics.median(times)
    spread = DEVIATION * statistics.median(abs(t - middle) for t in times)
    return Outcome(middle, error=MEDIAN_ERROR * spread / math.sqrt(count) / middle)


@dataclass(frozen=True)
class Replay:
    """A `Problem` with times from a record in place of a compiler and a device: searches run again in no time.

    Its space is what the record tried, in the problem's order; the default first.
    """

    problem: Problem
    record: Record

    @property
    def key(self) -> str:
        return self.problem.key

    @property
    def device(self) -> str:
        return self.problem.device

    @property
    def dtype(self) -> str:
        return self.problem.dtype

    @property
    def kernel(self) -> str:
        return self.problem.kernel

    @property
    def shape(self) -> Mapping[str, int]:
        return self.problem.shape

    def space(self) -> Sequence[Form]:
        return [form for form in self.problem.space() if form.spell() in self.record.timings]

    def predict(self, form: Form) -> float:
        seconds = self.record.timings[form.spell()].predicted_s
        return self.problem.predict(form) if seconds is None else seconds

    def compile(self, form: Form) -> Outcome:
        return self._replayed(form, "compile")

    def measure(self, form: Form) -> Outcome:
        return self._replayed(form, "measure")

    def _replayed(self, form: Form, fidelity: str) -> Outcome:
        timing = self.record.timings[form.spell()]
        seconds = timing.at(fidelity)
        if seconds is None:
            said = timing.failure or f"replay {form.spell()}: the record has no time of fidelity {fidelity} for it."
            return Outcome(failure=said)
        return Outcome(seconds, error=timing.error if fidelity == "measure" else None)

"""Measuring warms up, takes a median and says how far it is to be trusted; replaying needs no device."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch

from attnc.errors import UsageError
from attnc.records import Record, Timing
from attnc.tuning.bench import DeviceClock, Replay, WallClock, measured
from attnc.tuning.search import Search, Settings
from attnc.tuning.tune import record_key
from tests.tuning.landscapes import Landscape
from tests.tuning.test_search import SMALL


@dataclass
class FakeClock:
    """A device that starts slow, then takes `seconds` give or take `noise`, with one hiccup in ten runs."""

    seconds: float
    noise: float = 0.0
    cold: int = 3
    asked: list[int] = field(default_factory=list)
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def times(self, run: Callable[[], object], count: int) -> list[float]:
        self.asked.append(count)
        found = []
        for _ in range(count):
            run()
            self.cold -= 1
            slow = 5.0 if self.cold > 0 or self.random.random() < 0.1 else 1.0
            found.append(self.seconds * slow * (1 + self.noise * self.random.gauss(0, 1)))
        return found


@pytest.mark.parametrize("seconds", [3e-6, 1e-3, 0.2])
def test_the_median_is_that_of_a_warm_device(seconds: float) -> None:
    runs: list[int] = []
    outcome = measured(lambda: runs.append(1), FakeClock(seconds, 0.02))
    assert outcome.seconds == pytest.approx(seconds, rel=0.03) and outcome.error is not None and outcome.error < 0.03
    assert 6 <= len(runs) < 12000


def test_more_noise_gives_a_greater_error() -> None:
    errors = [measured(lambda: None, FakeClock(1e-3, noise)).error for noise in (0.0, 0.01, 0.1)]
    assert errors == sorted(errors) and errors[0] == 0.0 and 0.003 < errors[2] < 0.05


def test_a_slow_kernel_is_run_a_few_times_and_a_fast_one_often() -> None:
    slow, fast = FakeClock(1.0, cold=0), FakeClock(1e-6, cold=0)
    measured(lambda: None, slow)
    measured(lambda: None, fast)
    assert slow.asked[-1] == 5 and fast.asked[-1] == 1000


def test_the_wall_times_what_runs_here() -> None:
    x = torch.ones(64, 64)
    outcome = measured(lambda: x @ x, WallClock(), warm_s=1e-3, measured_s=2e-3)
    assert outcome.seconds is not None and 1e-7 < outcome.seconds < 0.1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_measuring_is_refused_with_a_sentence() -> None:
    with pytest.raises(UsageError, match="found none that torch can use"):
        DeviceClock()


@pytest.mark.gpu
def test_a_gpu_times_a_copy_at_no_more_than_its_bandwidth() -> None:
    x = torch.empty(64 << 20, dtype=torch.int8, device="cuda")
    outcome = measured(lambda: x.clone(), DeviceClock())
    assert outcome.seconds is not None and 128e6 / 20e12 < outcome.seconds < 128e6 / 50e9


def test_a_replayed_search_is_the_search_itself() -> None:
    problem = Landscape(*SMALL, fail=0.2)
    settings = Settings(trials=None, fidelity="measure", sampler="exhaustive", storage="memory")
    found = Search(problem, settings).run()
    record = Record(record_key(problem), found.default, found.timings)
    replay = Replay(problem, record)
    assert list(replay.space()) == list(problem.space())
    compiled = len(problem.compiled)
    again = Search(replay, Settings(trials=20, storage="memory")).run()
    assert again == Search(problem, Settings(trials=20, storage="memory")).run()
    assert len(problem.compiled) == compiled + 20, "the replay compiled nothing"


def test_what_a_record_lacks_is_no_time() -> None:
    problem = Landscape(*SMALL)
    form = problem.space()[0]
    replay = Replay(problem, Record(record_key(problem), form.spell(), {form.spell(): Timing(1e-3)}))
    assert replay.predict(form) == 1e-3 and "no time of fidelity measure" in (replay.measure(form).failure or "")
    assert list(replay.space()) == [form] and replay.key == replace(problem).key

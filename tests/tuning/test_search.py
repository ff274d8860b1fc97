"""The search finds what the whole space holds, in the same order every time, whatever stops it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

from attnc.errors import UsageError
from attnc.records import Timing
from attnc.tuning.problem import Outcome
from attnc.tuning.samplers import SAMPLERS
from attnc.tuning.search import LEARNT, Found, Progress, Search, Settings
from attnc.tuning.workers import Workers
from tests.tuning.landscapes import CASES, CHIPS, Case, Chip, Landscape, Tiles


@pytest.fixture(autouse=True)
def no_sync(monkeypatch) -> None:
    """Tests of order need no disk that survives a power cut."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def search(problem: object, trials: int | None = 20, **given: object) -> Found:
    settings = Settings(**{"trials": trials, "storage": "memory", **given})  # type: ignore[arg-type]
    return Search(problem, settings, workers=Workers(1)).run()  # type: ignore[arg-type]


def best_of_space(problem: Landscape, fidelity: str) -> float:
    if fidelity == "predict":
        return min(problem.predict(form) for form in problem.space())
    return min(s for form in problem.space() if (s := getattr(problem, fidelity)(form).seconds) is not None)


SMALL = CASES[9], CHIPS[4]  # 128 valid settings
SAMPLE = [(CASES[6], CHIPS[1]), (CASES[10], CHIPS[4])]


@pytest.mark.parametrize(("case", "chip"), SAMPLE)
@pytest.mark.parametrize("fidelity", ["predict", "compile"])
def test_a_tenth_of_the_space_is_enough_for_two_percent(case: Case, chip: Chip, fidelity: str) -> None:
    problem = Landscape(case, chip)
    assert len(problem.space()) >= 300
    found = search(problem, len(problem.space()) // 10, fidelity=fidelity)
    assert found.best is not None
    assert found.timings[found.best].at(fidelity) <= 1.02 * best_of_space(problem, fidelity)
    assert found.evaluations[fidelity] <= len(problem.space()) / 10


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("fidelity", ["predict", "compile", "measure"])
def test_every_sampler_starts_at_the_default_and_offers_nothing_twice(sampler: str, fidelity: str) -> None:
    problem = Landscape(*SMALL, fail=0.2)
    found = search(problem, 15, sampler=sampler, fidelity=fidelity)
    assert found.order[0] == problem.space()[0].spell() == found.default
    assert len(set(found.order)) == len(found.order) == 15
    assert set(found.order) <= {form.spell() for form in problem.space()}
    best, default = found.timings[found.best or ""].at(fidelity), found.timings[found.default].at(fidelity)
    assert best is not None and (default is None or best <= default)
    assert found.evaluations[fidelity] <= 15


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_seed_gives_the_same_trials(sampler: str) -> None:
    problem = Landscape(*SMALL)
    runs = [search(problem, 14, sampler=sampler, seed=seed).order for seed in (3, 3, 4)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2] or sampler == "exhaustive"


def test_exhaustive_search_tries_everything() -> None:
    problem = Landscape(*SMALL)
    found = search(problem, None, sampler="exhaustive")
    assert found.complete and len(found.order) == len(problem.space())
    assert found.timings[found.best or ""].compiled_s == best_of_space(problem, "compile")


@dataclass(frozen=True)
class Flat(Landscape):
    """Every setting takes as long as every other."""

    def predict(self, form: Tiles) -> float:
        return 1e-3

    def compile(self, form: Tiles) -> Outcome:
        return Outcome(1e-3)


def test_ties_go_to_the_default() -> None:
    found = search(Flat(*SMALL), 12)
    assert found.best == found.default and len(found.order) == 12


@dataclass(frozen=True)
class Hostile(Landscape):
    """Compiles of most settings raise or give nonsense."""

    def compile(self, form: Tiles) -> Outcome:
        if form.stages > 2:
            raise ValueError("out of\nregisters.")
        return Outcome(1e9) if form.warps > 4 else super().compile(form)


def test_failures_are_kept_with_a_sentence_and_never_offered_again() -> None:
    problem = Hostile(CASES[0], CHIPS[0])
    found = search(problem, 40)
    failed = {name: t.failure for name, t in found.timings.items() if t.failure}
    assert failed and all(why.endswith(".") and why.isprintable() for why in failed.values())
    assert any("raised ValueError: out of registers" in why for why in failed.values())
    assert any("1 ns to a day" in why for why in failed.values())
    again = Search(problem, Settings(trials=40, storage="memory", seed=1), known=found.timings).run()
    assert not set(again.order) & (failed.keys() - {found.default})
    assert found.best not in failed


def test_known_times_are_not_found_again() -> None:
    problem = Landscape(*SMALL)
    found = search(problem, 10)
    again = Search(problem, Settings(trials=10, storage="memory"), known=found.timings).run()
    assert again.order == found.order and not again.evaluations.get("compile")
    assert again.timings == found.timings


def test_a_default_that_fails_gives_way() -> None:
    problem = Landscape(*SMALL)
    default = problem.space()[0].spell()
    known = {default: Timing(1e-3, failure="it gives wrong numbers.")}
    found = Search(problem, Settings(trials=10, storage="memory"), known=known).run()
    assert found.order[0] == default and found.best not in (default, None)


def test_only_settings_that_may_win_are_compiled_and_of_those_the_ones_in_the_race_measured() -> None:
    problem = Landscape(CASES[2], CHIPS[0])
    found = search(problem, 60, fidelity="measure", sampler="random")
    assert len(found.order) == 60 and LEARNT <= found.evaluations["compile"] < 60
    assert 4 <= found.evaluations["measure"] < found.evaluations["compile"]
    assert found.timings[found.best or ""].measured_s is not None


# Stopping and going on.


def test_a_time_limit_ends_a_search_after_its_default_at_least() -> None:
    ticks = itertools.count(0.0, 1.0)
    settings = Settings(trials=None, seconds=30.0, storage="memory")
    found = Search(Landscape(*SMALL), settings, clock=lambda: next(ticks)).run()
    assert 1 < len(found.order) < 30
    late = Search(Landscape(*SMALL), Settings(seconds=1e-9, storage="memory")).run()
    assert late.order == (late.default,) and late.best == late.default


@pytest.mark.parametrize(("sampler", "workers"), [("gp", 1), ("gp", 3), ("tpe", 2), ("random", 1)])
def test_a_search_stopped_at_any_write_goes_on_as_if_it_had_not_been(
    sampler: str, workers: int, tmp_path: Path, monkeypatch
) -> None:
    problem = Landscape(*SMALL)
    given = {"sampler": sampler, "workers": workers}
    whole = search(problem, 9, **given).order
    written = JournalFileBackend.append_logs
    for stop in range(2, 60, 9):
        writes = itertools.count()

        def append(self: JournalFileBackend, logs: list, writes: itertools.count = writes, stop: int = stop) -> None:
            if next(writes) == stop:
                raise KeyboardInterrupt
            written(self, logs)

        folder = tmp_path / str(stop)
        monkeypatch.setattr(JournalFileBackend, "append_logs", append)
        with contextlib.suppress(KeyboardInterrupt):
            search(problem, 9, storage=None, folder=folder, **given)
        monkeypatch.setattr(JournalFileBackend, "append_logs", written)
        assert search(problem, 9, storage=None, folder=folder, **given).order == whole, stop


def test_more_trials_go_on_where_fewer_ended(tmp_path: Path) -> None:
    problem = Landscape(*SMALL)
    first = search(problem, 6, storage=str(tmp_path / "trials.journal"))
    compiled = len(problem.compiled)
    second = search(problem, 12, storage=str(tmp_path / "trials.journal"))
    assert second.order[:6] == first.order and len(second.order) == 12
    assert len(problem.compiled) == compiled + 6


KILLED = """
from pathlib import Path
import sys
from attnc.tuning.search import Search, Settings
from tests.tuning.test_search import SMALL, Landscape
settings = Settings(trials=200, folder=Path(sys.argv[1]))
show = lambda step: print(step.trials, flush=True)
Search(Landscape(*SMALL, compile_s=0.02), settings, on_progress=show).run()
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_killed_search_loses_no_finished_trial_and_goes_on(tmp_path: Path, sent: signal.Signals) -> None:
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    finished = 0
    while finished < 8:
        finished = int(process.stdout.readline())
    process.send_signal(sent)
    rest = process.stdout.read().split()
    process.wait(30)
    finished = max([finished, *map(int, rest)])
    problem = Landscape(*SMALL)
    found = search(problem, finished + 4, storage=None, folder=tmp_path)
    assert found.order == search(problem, finished + 4).order
    assert found.evaluations.get("compile", 0) <= 4, "finished trials are not tried again"


def test_what_fails_beside_the_journal_is_not_laid_at_its_door(tmp_path: Path, caplog) -> None:
    class Gone(Landscape):
        def predict(self, form):
            if form.spell() == self.space()[3].spell():
                raise OSError("a table is gone")
            return super().predict(form)

    def closed(step: Progress) -> None:
        raise OSError(errno.EIO, "the terminal is gone")

    journal = str(tmp_path / "trials.journal")
    settings = Settings(trials=5, storage=journal)
    with pytest.raises(OSError, match="the terminal is gone"):
        Search(Landscape(*SMALL), settings, on_progress=closed).run()
    with pytest.raises(OSError, match="no process"):
        Search(Landscape(*SMALL), settings, workers=Unstarted()).run()
    assert len(search(Gone(*SMALL), 5, storage=journal).order) == 5
    assert "written" not in caplog.text


class Unstarted(Workers):
    def compile(self, problem, forms):
        raise OSError(errno.EAGAIN, "no process can be started")
        yield


def test_a_line_that_a_killed_writer_left_unfinished_is_cut_off(tmp_path: Path) -> None:
    problem, file = Landscape(*SMALL), tmp_path / "trials.journal"
    whole = search(problem, 8).order
    search(problem, 4, storage=str(file))
    with file.open("ab") as journal:
        journal.write(b'{"op_code":5,"worker_id":"x')
    assert search(problem, 8, storage=str(file)).order == whole


def test_a_file_that_is_no_journal_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("hello\nworld\n")
    with pytest.raises(UsageError, match="no journal of Optuna"):
        search(Landscape(*SMALL), 2, storage=str(tmp_path / "notes"))


def test_a_url_keeps_trials_in_a_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/trials.db"
    problem = Landscape(*SMALL)
    first = search(problem, 3, storage=url)
    assert search(problem, 5, storage=url).order[:3] == first.order
    study = optuna.load_study(study_name=None, storage=url)
    assert len(study.trials) == 5 and study.trials[1].user_attrs["timing"]["compiled_s"] == study.trials[1].value
    with pytest.raises(UsageError, match="cannot open"):
        search(problem, 1, storage="nosuch://user:secret@host/db")


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("")
    found = search(Landscape(*SMALL), 3, storage=None, folder=tmp_path / "file" / "studies")
    assert len(found.order) == 3 and "starts anew" in caplog.text


def test_a_disk_that_fills_up_costs_a_warning_and_no_trial(tmp_path: Path, caplog, monkeypatch) -> None:
    problem, writes = Landscape(*SMALL), itertools.count()
    written = JournalFileBackend.append_logs

    def append(self: JournalFileBackend, logs: list) -> None:
        if next(writes) > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(self, logs)

    monkeypatch.setattr(JournalFileBackend, "append_logs", append)
    found = search(problem, 9, storage=None, folder=tmp_path)
    assert found.order == search(Landscape(*SMALL), 9).order and "No space left" in caplog.text
    assert len(problem.compiled) == 9, "nothing is compiled twice"


def test_two_searches_at_once_share_their_trials(tmp_path: Path) -> None:
    problem = Landscape(*SMALL)
    found: list[Found] = []

    def join(step: Progress) -> None:
        if step.trials == 5 and not found:
            found.append(search(problem, 10, storage=str(tmp_path / "trials.journal")))

    settings = Settings(trials=12, storage=str(tmp_path / "trials.journal"))
    first = Search(problem, settings, on_progress=join).run()
    assert len(found[0].order) == 10 and set(found[0].order) < set(first.order) and len(first.order) == 12
    assert len(problem.compiled) == 12


# The rest.


@dataclass
class Seen:
    steps: list[Progress] = field(default_factory=list)

    def __call__(self, step: Progress) -> None:
        self.steps.append(step)


def test_progress_tells_the_best_so_far_and_the_time_left() -> None:
    ticks, seen = itertools.count(0.0, 0.5), Seen()
    settings = Settings(trials=10, seconds=1e6, storage="memory")
    Search(Landscape(*SMALL), settings, on_progress=seen, clock=lambda: next(ticks)).run()
    best = [step.best_s for step in seen.steps]
    assert [step.trials for step in seen.steps] == list(range(1, 11)) and best == sorted(best, reverse=True)
    assert seen.steps[-1].left_s == 0 < seen.steps[0].left_s and seen.steps[0].default_s == best[0]


@pytest.mark.parametrize(
    "given",
    [{"sampler": "gpp"}, {"fidelity": "guess"}, {"trials": 0}, {"workers": 0}, {"seed": -1}, {"seconds": 0.0}],
)
def test_a_wrong_setting_is_a_sentence(given: dict) -> None:
    with pytest.raises(UsageError, match=f"{'time' if 'seconds' in given else next(iter(given))} "):
        Settings(**given)


def test_an_empty_space_is_a_sentence(monkeypatch) -> None:
    empty: Callable[[Landscape], tuple] = lambda self: ()  # noqa: E731
    monkeypatch.setattr(Landscape, "space", empty)
    with pytest.raises(UsageError, match="no valid setting"):
        search(Landscape(*SMALL))

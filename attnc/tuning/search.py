"""Search over the settings of one problem: Optuna asks, three fidelities answer, the cheap ones prune for the dear one.

    predict   closed form, of every setting at once: the prior of the samplers, or the space they draw from
    compile   ahead of time, the default first; a failure is kept with its sentence and never offered again
    measure   on the device, of those settings only that their compile leaves in the race

An evaluation is one use of the dearest fidelity asked for. The same seed, sampler and number of workers give the same
trials, also where a run was stopped in between: every draw depends on the seed and the finished trials alone.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from attnc.errors import UsageError, did_you_mean
from attnc.forms.base import Form
from attnc.options import Options
from attnc.records import LONGEST, SHORTEST, Timing, best_of
from attnc.tuning.owners import JournalLost
from attnc.tuning.problem import FIDELITIES, Outcome, Problem
from attnc.tuning.samplers import DEFAULT, SAMPLERS, USES_PRIOR, Known
from attnc.tuning.storage import MEMORY, Opened, opened, quiet
from attnc.tuning.surrogate import features
from attnc.tuning.tree import tree_of
from attnc.tuning.trials import Trial, Trials
from attnc.tuning.workers import Workers, raised

log = logging.getLogger("attnc.tuning")

LEARNT = 20  # compiled settings from which on the closed form decides which others are worth a compile
PROMOTED = 3.0  # a sampler without a prior draws from settings predicted within this factor of the best
FEWEST = 64  # and from so many at least
IN_RACE = 1.3  # a compiled setting is measured where this factor of the best measured time is within its reach
CONFIRMED = 2  # settings measured again, with the default, before one of them is chosen


@dataclass(frozen=True)
class Settings:
    """How to search. trials: settings to try, those of earlier runs included; None is all of them.

    seconds: wall-clock time; None is no limit. fidelity: the dearest, "predict", "compile" or "measure".
    sampler: "gp", "tpe", "random" or "exhaustive". workers: processes that compile.
    storage: an Optuna URL, a journal file or folder, "memory"; None is a journal per search in `folder`.

    Raises: UsageError for a value out of range.
    """

    trials: int | None = 200
    seconds: float | None = None
    fidelity: str = "compile"
    sampler: str = DEFAULT
    seed: int = 0
    workers: int = 1
    storage: str | None = None
    folder: Path = field(default_factory=lambda: Path(Options().store) / "studies")

    def __post_init__(self) -> None:
        for name, known in (("fidelity", FIDELITIES), ("sampler", tuple(SAMPLERS))):
            value = getattr(self, name)
            if value not in known:
                raise UsageError(
                    f"{name} {value!r}: no such {name}; known are {', '.join(known)}."
                    + (did_you_mean(str(value), known) or f" Leave {name} out for the default.")
                )
        for name, low in (("trials", 1), ("workers", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not low <= value < 1 << 31):
                raise UsageError(f"{name} {value!r}: allowed is a whole number from {low} to 2^31. Give {name}={low}.")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise UsageError(f"time {self.seconds!r}: allowed is a time above 0 s. Give for instance 10m.")


@dataclass(frozen=True)
class Progress:
    """How a search stands, after each trial. left_s: seconds it will go on for, about.

    place: this problem's number among those of a run, and how many they are.
    """

    problem: Problem
    trials: int
    total: int
    best: str | None
    best_s: float | None
    default_s: float | None
    failures: int
    elapsed_s: float
    left_s: float
    place: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Found:
    """What a search found. order: spellings in the order of trials. evaluations: calls per fidelity in this run."""

    default: str
    timings: Mapping[str, Timing]
    order: tuple[str, ...]
    evaluations: Mapping[str, int]
    complete: bool

    @property
    def best(self) -> str | None:
        return best_of(self.timings, self.default)


@dataclass
class Search:
    """One search, from `run`. known: timings of earlier searches by spelling; what they hold is not found again."""

    problem: Problem
    settings: Settings
    known: Mapping[str, Timing] = field(default_factory=dict)
    workers: Workers = field(default_factory=Workers)
    on_progress: Callable[[Progress], None] | None = None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.began = self.clock()
        self.used: Counter[str] = Counter()
        self.timings: dict[str, Timing] = dict(self.known)
        self.tried: dict[str, Timing] = {}
        self.earlier: int | None = None
        given = {form.spell(): form for form in self.problem.space()}
        if not given:
            raise UsageError(
                f"tune {self.problem.key} on {self.problem.device}: found no valid setting; allowed is one at least. "
                "Leave the region as written."
            )
        self.default = next(iter(given))
        self.predicted: dict[str, Timing] = {}
        self.prior: np.ndarray | None = None
        self.forms = tuple(given[name] for name in self._promoted(given))
        self.names = [form.spell() for form in self.forms]
        self.rows = {form: row for row, form in enumerate(self.forms)}
        self.tree, self.points = tree_of(self.forms), features(self.forms)
        # What failed in an earlier search is not offered again, nor what has no time by closed form. The default is.
        failed = {name for times in (self.known, self.predicted) for name, t in times.items() if t.failure}
        self.sunk = {row for row, name in enumerate(self.names) if row and name in failed}

    def _promoted(self, given: Mapping[str, Form]) -> list[str]:
        """The settings to search: all, or those the closed form leaves where the sampler makes no use of it itself."""
        if self.settings.fidelity == "predict":
            return list(given)
        self.predicted = {name: self._predict(form) for name, form in given.items()}
        logs = {name: math.log(t.predicted_s or LONGEST) for name, t in self.predicted.items()}
        kept = list(given)
        if self.settings.sampler not in USES_PRIOR:
            order = sorted(logs.values())
            limit = max(order[0] + math.log(PROMOTED), order[min(FEWEST, len(order)) - 1])
            kept = [name for name in kept if name == self.default or logs[name] <= limit]
        self.prior = np.array([logs[name] for name in kept])
        return kept

    # Running.

    def run(self) -> Found:
        """Search until trials, time or settings are used up. Finished trials survive whatever ends it."""
        settings = self.settings
        with quiet():
            try:
                with opened(settings.storage, settings.folder, self.study) as storage:
                    self._run(storage)
            except JournalLost as exc:
                log.warning("trials can no longer be written (%s): the search goes on in memory", exc)
                # The same draws from the start; what is known already is not tried again.
                with opened(MEMORY, settings.folder, self.study) as storage:
                    self._run(storage)
        if settings.fidelity == "measure":
            self._confirm()
        return self.found()

    def _run(self, storage: Opened) -> None:
        trials = Trials(storage, self.study, self.tree, self.settings.fidelity)
        self._take_up(trials.all())
        self.earlier = len(self.tried)
        while not self._over():
            batch = self._batch(trials)
            if not batch:
                break
            self._try(trials, batch)
            self._take_up(trials.all())

    def found(self) -> Found:
        """What is known by now."""
        return Found(
            self.default, dict(self.timings), tuple(self.tried), dict(self.used), len(self.tried) >= self._total()
        )

    @property
    def study(self) -> str:
        """Name of the study: everything that trials depend on."""
        p, s = self.problem, self.settings
        spelled = "\0".join(self.names)
        parts = (p.key, p.device, p.dtype, p.kernel, s.fidelity, s.sampler, str(s.seed), spelled)
        return f"attnc-{p.device}-{sha256(chr(0).join(parts).encode('utf-8', 'replace')).hexdigest()[:24]}"

    def _total(self) -> int:
        return min(self.settings.trials or len(self.forms), len(self.forms) - len(self.sunk))

    def _over(self) -> bool:
        late = self.settings.seconds is not None and self.clock() - self.began >= self.settings.seconds
        if late and self.tried:  # without one trial there would be nothing to choose
            return True
        return len(self.tried) >= self._total()

    def _take_up(self, trials: list[Trial]) -> None:
        """Know what the finished trials know, those of other processes too, in the order they were begun."""
        self.tried = {}
        for trial in trials:
            if trial.timing is not None:
                self._know(trial.form.spell(), trial.timing)

    def _know(self, name: str, timing: Timing) -> None:
        self.tried[name] = timing
        self.timings[name] = self.timings.get(name, Timing()).merged(timing)

    def _batch(self, trials: Trials) -> list[Trial]:
        """The trials to try next, as many as workers; those that a stopped run left come first.

        The batches of a search that was stopped are the same: a begun one is filled up to its end.
        """
        size = self.settings.workers
        while True:
            standing = trials.all()
            waiting = [t for t in standing if t.state == "waiting"]
            if waiting and (len(standing) % size == 0 or len(standing) >= self._total()):
                return waiting
            known = self._known(standing)
            if not len(known.free) or len(standing) >= self._total():
                return waiting
            trials.ask(partial(self._draft, known))

    def _draft(self, known: Known, study: optuna.Study, trial: FrozenTrial) -> Form:
        if 0 in known.free:
            return self.forms[0]
        return self.forms[SAMPLERS[self.settings.sampler](study, trial, known)]

    def _known(self, standing: list[Trial]) -> Known:
        taken = {self.rows[t.form] for t in standing}
        logs, failed, bias, ratios = {}, set(), self._bias(), self._ratios()
        ratio = statistics.median(ratios) if ratios else None
        for trial in standing:
            if trial.timing is None:
                continue
            seconds = trial.timing.at(self.settings.fidelity)
            if seconds is None and not trial.timing.failure:
                seconds = _supposed(trial.timing, ratio, bias)  # was not worth its fidelity
            if seconds is None:
                failed.add(self.rows[trial.form])
            else:
                logs[self.rows[trial.form]] = math.log(seconds)
        free = np.array([row for row in range(len(self.forms)) if row not in taken and row not in self.sunk], dtype=int)
        return Known(
            self.rows, self.tree, self.points, self.prior, logs, frozenset(failed),
            frozenset(taken - logs.keys() - failed), free, self.settings.seed, len(standing),
        )  # fmt: skip

    def _ratios(self) -> list[float]:
        """Compiled times over those by closed form."""
        pairs = [(t.compiled_s, t.predicted_s) for t in self.timings.values()]
        return [c / p for c, p in pairs if c is not None and p is not None]

    def _bias(self) -> float:
        """How measured times compare with compiled ones."""
        pairs = [(t.measured_s, t.compiled_s) for t in self.timings.values()]
        ratios = [m / c for m, c in pairs if m is not None and c is not None]
        return statistics.median(ratios) if ratios else 1.0

    # Trying.

    def _try(self, trials: Trials, batch: list[Trial]) -> None:
        fidelity = self.settings.fidelity
        if fidelity == "predict":
            for trial in batch:
                self._tell(trials, trial, self._predict(trial.form))
            return
        for trial in [trial for trial in batch if not self._may_win(trial.form)]:
            batch.remove(trial)
            self._tell(trials, trial, self._timing(trial.form))
        byform = {trial.form: trial for trial in batch}
        timings = {form: self._timing(form) for form in byform}
        for form, timing in timings.items():
            if timing.compiled_s is not None or timing.failure:
                self._compiled(trials, byform[form], timing)
        needed = [form for form, t in timings.items() if t.compiled_s is None and not t.failure]
        for form, outcome in self.workers.compile(self.problem, needed):
            self.used["compile"] += 1
            self._compiled(trials, byform[form], _with(timings[form], "compiled_s", form, outcome))

    def _timing(self, form: Form) -> Timing:
        name = form.spell()
        return self.predicted.get(name, Timing()).merged(self.timings.get(name, Timing()))

    def _compiled(self, trials: Trials, trial: Trial, timing: Timing) -> None:
        """Tell a compiled trial, measured before where that is asked and worth it."""
        measured = self.settings.fidelity == "measure" and timing.measured_s is None and not timing.failure
        if measured and self._in_race(trial.form, timing):
            timing = self._measure(trial.form, timing)
        self._tell(trials, trial, timing)

    def _may_win(self, form: Form) -> bool:
        """Whether a setting is worth a compile: whether it wins if it beats its closed form as far as any one has."""
        timing, ratios = self._timing(form), self._ratios()
        if timing.compiled_s is not None or timing.predicted_s is None:
            return True
        if len(ratios) < LEARNT or self.settings.sampler == "exhaustive":
            return True
        times = [t.compiled_s for t in self.timings.values() if t.compiled_s is not None and not t.failure]
        return form == self.forms[0] or timing.predicted_s * min(ratios) <= min(times)

    def _in_race(self, form: Form, timing: Timing) -> bool:
        times = [t.measured_s for t in self.timings.values() if t.measured_s is not None]
        if form == self.forms[0] or len(times) < 4 or timing.compiled_s is None:
            return True
        return timing.compiled_s * self._bias() <= IN_RACE * min(times)

    def _predict(self, form: Form) -> Timing:
        self.used["predict"] += 1
        try:
            seconds = self.problem.predict(form)
        except Exception as exc:  # noqa: BLE001  # one setting must not end the search of the others
            return Timing(failure=raised("predicting", self.problem, form, exc).failure)
        if SHORTEST <= seconds <= LONGEST:
            return Timing(predicted_s=float(seconds))
        return Timing(failure=f"{form.spell()}: predicted {seconds} s, allowed is a finite time. Left out.")

    def _measure(self, form: Form, timing: Timing) -> Timing:
        self.used["measure"] += 1
        try:
            outcome = self.problem.measure(form)
        except UsageError:  # no fault of the setting: the device is not here
            raise
        except Exception as exc:  # noqa: BLE001  # one setting must not end the search of the others
            outcome = raised("measuring", self.problem, form, exc)
        return _with(timing, "measured_s", form, outcome)

    def _confirm(self) -> None:
        """Measure the default and the leaders once more, in turn: the luckiest of many measurements is no leader."""
        byname = dict(zip(self.names, self.forms, strict=True))
        times = {name: s for name, t in self.timings.items() if (s := t.at("measure")) and name in byname}
        leaders = sorted((s, name) for name, s in times.items() if name != self.default)[:CONFIRMED]
        again = [self.default, *(name for _, name in leaders)]
        for name in again if self.used["measure"] and times.get(self.default) else ():
            before, fresh = self.timings[name], self._measure(byname[name], self.timings[name])
            if before.measured_s is not None and fresh.measured_s is not None:
                spread = abs(fresh.measured_s - before.measured_s) / 2
                middle = (fresh.measured_s + before.measured_s) / 2
                error = max(spread / middle, before.error or 0.0, fresh.error or 0.0)
                fresh = replace(fresh, measured_s=middle, error=error)
            self.timings[name] = fresh

    def _tell(self, trials: Trials, trial: Trial, timing: Timing) -> None:
        self._know(trial.form.spell(), timing)
        trials.tell(trial, timing)
        if self.on_progress is not None:
            self.on_progress(self._progress())

    def _progress(self) -> Progress:
        fidelity, best = self.settings.fidelity, best_of(self.tried, self.default)
        elapsed, done, total = self.clock() - self.began, len(self.tried), self._total()
        pace = elapsed / max(1, done - (self.earlier or 0))
        budget = math.inf if self.settings.seconds is None else max(0.0, self.settings.seconds - elapsed)
        seconds = [None if name is None or name not in self.tried else self.tried[name].at(fidelity)
                   for name in (best, self.default)]  # fmt: skip
        failures = sum(t.failure is not None for t in self.tried.values())
        left = min(budget, pace * max(0, total - done))
        return Progress(self.problem, done, total, best, seconds[0], seconds[1], failures, elapsed, left)


def _supposed(timing: Timing, ratio: float | None, bias: float) -> float | None:
    """The time by a dearer fidelity. ratio: compiled times to closed forms; bias: measured times to compiled ones."""
    if timing.compiled_s is not None:
        return timing.compiled_s * bias
    return timing.predicted_s * ratio * bias if timing.predicted_s and ratio else None


def _with(timing: Timing, part: str, form: Form, outcome: Outcome) -> Timing:
    """`timing` with what an outcome says; a time that no kernel takes is a failure."""
    if outcome.seconds is not None and SHORTEST <= outcome.seconds <= LONGEST:
        extra = {"error": outcome.error} if part == "measured_s" else {}
        return replace(timing, **{part: outcome.seconds}, **extra)  # type: ignore[arg-type]
    said = outcome.failure or f"{form.spell()}: found a time of {outcome.seconds} s, allowed is 1 ns to a day."
    words = " ".join(said.split())[:2000]
    return replace(timing, failure="".join(c if c.isprintable() else "?" for c in words))

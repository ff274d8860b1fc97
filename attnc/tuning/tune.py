"""Tuning of many problems: each once, whatever the number of its regions, and each kept as a record."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from attnc.records import Record, RecordKey, Records
from attnc.tuning.problem import Problem
from attnc.tuning.search import Found, Progress, Search, Settings
from attnc.tuning.workers import Workers

log = logging.getLogger("attnc.tuning")

SAVED_EVERY = 10.0  # seconds between two saves of a record while its search runs


def record_key(problem: Problem) -> RecordKey:
    """Where the record of `problem` is kept."""
    return RecordKey(problem.key, problem.device, problem.dtype, problem.kernel)


def tune(
    problems: Sequence[Problem],
    settings: Settings | None = None,
    *,
    records: Records | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Record]:
    """The record of each problem, in order; problems of the same key share one.

    settings: of each search; `seconds` is for all of them, and what one leaves over is the next one's.
    records:  where earlier results are found and new ones kept; None keeps nothing.

    What was found survives Ctrl-C and anything else raised. Raises: UsageError for an empty space or a bad setting.
    """
    settings = settings or Settings()
    distinct: dict[RecordKey, Problem] = {}
    for problem in problems:
        distinct.setdefault(record_key(problem), problem)
    made: dict[RecordKey, Record] = {}
    end = None if settings.seconds is None else clock() + settings.seconds
    with Workers(settings.workers) as workers:
        for place, (key, problem) in enumerate(distinct.items(), start=1):
            left = len(distinct) - place + 1
            # The default of every problem is tried, even where the time is over.
            share = None if end is None else max((end - clock()) / left, 1e-3)
            one = _One(key, problem, replace(settings, seconds=share), records, (place, len(distinct)), clock)
            made[key] = one.run(workers, on_progress)
    return [made[record_key(problem)] for problem in problems]


class _One:
    """One problem of a run."""

    def __init__(
        self,
        key: RecordKey,
        problem: Problem,
        settings: Settings,
        records: Records | None,
        place: tuple[int, int],
        clock: Callable[[], float],
    ) -> None:
        self.key, self.records, self.place, self.clock = key, records, place, clock
        stored = records.find(key) if records is not None else None
        self.search = Search(problem, settings, stored.timings if stored else {}, clock=clock)
        self.saved = clock()

    def run(self, workers: Workers, on_progress: Callable[[Progress], None] | None) -> Record:
        def step(progress: Progress) -> None:
            if self.clock() - self.saved >= SAVED_EVERY:
                self.save()
            if on_progress is not None:
                on_progress(replace(progress, place=self.place))

        self.search.workers, self.search.on_progress = workers, step
        try:
            found = self.search.run()
        except BaseException:
            if self.search.tried:
                self.save()
            raise
        record = self.save()
        _check(record, found)
        return record

    def save(self) -> Record:
        """Keep what is known by now."""
        self.saved = self.clock()
        problem, found = self.search.problem, self.search.found()
        record = Record(self.key, found.default, found.timings, dict(problem.shape), self.search.settings.seed)
        return self.records.put(record) if self.records is not None else record


def _check(record: Record, found: Found) -> None:
    """The choice is not slower than the default, at any fidelity that both were tried at down to the dearest."""
    if record.best is None:
        log.warning("%s: every one of %d settings failed", record.key.what, len(found.order))
        return
    best, default = record.timings[record.best], record.timings.get(record.default)
    for fidelity in ("measure", "compile", "predict"):
        times = best.at(fidelity), default.at(fidelity) if default else None
        if times[0] is not None and times[1] is not None:
            if times[0] > times[1]:
                raise RuntimeError(f"{record.key.what}: chose {record.best}, {times[0]} s, slower than the default's")
            return

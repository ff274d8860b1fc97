"""Compiling settings side by side in processes of their own; what kills a worker is the failure of its setting."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType

from attnc.forms.base import Form
from attnc.tuning.problem import Outcome, Problem

log = logging.getLogger("attnc.tuning")


def compiled(problem: Problem, form: Form) -> Outcome:
    """`problem.compile(form)`; what it raises is a failure."""
    try:
        return problem.compile(form)
    except Exception as exc:  # noqa: BLE001  # one setting must not end the search of the others
        return raised("compiling", problem, form, exc)


def raised(doing: str, problem: Problem, form: Form, exc: Exception) -> Outcome:
    said = " ".join(str(exc).split())[:500] or "(no message)"
    log.debug("%s %s", doing, form.spell(), exc_info=exc)
    return Outcome(
        failure=f"{doing} {form.spell()} for {problem.device}: raised {type(exc).__name__}: {said.rstrip('.')}. "
        "The setting is left out."
    )


class Workers:
    """`count` processes that compile; with one, this process does it. To be closed, as a `with` block does."""

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        self._stop(kill=kind is not None)

    def compile(self, problem: Problem, forms: Sequence[Form]) -> Iterator[tuple[Form, Outcome]]:
        """Each form with its outcome, as they finish; with one worker in order."""
        if self.count == 1:
            for form in forms:
                yield form, compiled(problem, form)
            return
        lost = []
        asked = {self._submitted(problem, form, self.count): form for form in forms}
        for future in as_completed(asked):
            outcome = _outcome(future)
            if outcome is None:
                lost.append(asked[future])
            else:
                yield asked[future], outcome
        # A dead worker takes all others along: one after the other shows which setting killed it.
        if lost:
            self._stop(kill=True)
        for form in lost:
            outcome = _outcome(self._submitted(problem, form, 1))
            yield (
                form,
                outcome
                or Outcome(
                    failure=f"compiling {form.spell()} for {problem.device}: the compiler ended its process. "
                    "The setting is left out."
                ),
            )
        if lost:
            self._stop(kill=True)

    def _submitted(self, problem: Problem, form: Form, count: int) -> Future[Outcome]:
        try:
            return self._started(count).submit(compiled, problem, form)
        except BrokenProcessPool:  # a worker died since: of its settings none is waited for here
            self._stop(kill=True)
            return self._started(count).submit(compiled, problem, form)

    def _started(self, count: int) -> ProcessPoolExecutor:
        if self._pool is None:
            # Spawned, not forked: torch's threads do not survive a fork.
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(count, mp_context=spawn, initializer=_begin)
        return self._pool

    def _stop(self, kill: bool) -> None:
        pool, self._pool = self._pool, None
        if pool is None:
            return
        processes = list((getattr(pool, "_processes", None) or {}).values()) if kill else []
        pool.shutdown(wait=not kill, cancel_futures=True)
        for process in processes:
            with contextlib.suppress(OSError, ValueError):
                process.kill()


def _outcome(future: Future[Outcome]) -> Outcome | None:
    """What a worker found; None where its process died. Raises: what kept the setting from being sent."""
    broken = future.exception()
    if broken is None:
        return future.result()
    if isinstance(broken, BrokenProcessPool):
        return None
    raise broken


def _begin() -> None:
    """A worker leaves Ctrl-C to its parent, and ends when that one does, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)

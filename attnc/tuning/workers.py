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
        pool = self._started()
        asked: dict[Future[Outcome], Form] = {pool.submit(compiled, problem, form): form for form in forms}
        lost = []
        for future in as_completed(asked):
            broken = future.exception()
            if broken is None:
                yield asked[future], future.result()
            elif isinstance(broken, BrokenProcessPool):
                lost.append(asked[future])
            else:
                raise broken
        # A dead worker takes the others along: one after the other shows which setting it was.
        for form in lost:
            yield form, self._alone(problem, form)

    def _alone(self, problem: Problem, form: Form) -> Outcome:
        self._stop(kill=True)
        try:
            return self._started().submit(compiled, problem, form).result()
        except BrokenProcessPool:
            self._stop(kill=True)
            return Outcome(
                failure=f"compiling {form.spell()} for {problem.device}: the compiler ended its process. "
                "The setting is left out."
            )

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # Spawned, not forked: torch's threads do not survive a fork.
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count, mp_context=spawn, initializer=_begin)
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


def _begin() -> None:
    """A worker leaves Ctrl-C to its parent, and ends when that one does, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)

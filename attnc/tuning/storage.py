"""Where trials are kept: an Optuna journal per study by default, any Optuna URL, or memory.

A journal is one line per event, synced to disk. The system lets go of its lock when the holder dies, and a line that a
killed writer left unfinished is cut off before the next is written (Optuna itself could not read past it).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

from attnc.atomic_file import private_folder
from attnc.errors import UsageError
from attnc.tuning.owners import Owners, journal_files

log = logging.getLogger("attnc.tuning")

MEMORY = "memory"


@dataclass(frozen=True)
class Opened:
    """A storage. owners: whose its running trials are, where that can be told."""

    storage: BaseStorage
    owners: Owners | None = None


class _Journal(JournalFileBackend):
    """Optuna's file of events; what its file operations raise is a JournalLost."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with journal_files():
            super().append_logs(logs)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        with journal_files():
            found = list(super().read_logs(log_number_from))
        return iter(found)


class _JournalLock:
    """The lock of a journal, in Optuna's shape: acquire, release."""

    def __init__(self, journal: Path) -> None:
        self.journal, self.file = journal, journal.with_suffix(".flock")
        self.held: IO[bytes] | None = None

    def acquire(self) -> bool:
        self.held = self.file.open("a+b")
        fcntl.flock(self.held, fcntl.LOCK_EX)
        _cut_unfinished(self.journal)
        return True

    def release(self) -> None:
        if self.held is not None:
            self.held.close()
            self.held = None


def _cut_unfinished(journal: Path) -> None:
    """Drop what stands after the last end of line."""
    with journal.open("r+b") as file:
        size = end = file.seek(0, 2)
        while end:
            start = max(0, end - 4096)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            log.info("%s: cut off %d bytes that a killed process left unfinished", journal, size - end)
            file.truncate(end)


@contextlib.contextmanager
def opened(storage: str | None, folder: Path, study: str) -> Iterator[Opened]:
    """The storage that `storage` names: an Optuna URL, a file or folder for journals, "memory"; None is `folder`.

    A folder that cannot be written: one warning, and memory instead. Raises: UsageError for a URL that cannot be used.
    """
    if storage == MEMORY:
        yield Opened(InMemoryStorage())
    elif storage is not None and "://" in storage:
        yield Opened(_by_url(storage))
    else:
        journal = folder / f"{study}.journal" if storage is None else Path(storage)
        if storage is not None and (journal.is_dir() or storage.endswith("/")):
            journal = journal / f"{study}.journal"
        with contextlib.ExitStack() as stack:
            try:
                found = stack.enter_context(_journal(journal))
            except OSError as exc:
                log.warning("trials are not written to %s (%s): a run that is stopped starts anew", journal, exc)
                found = Opened(InMemoryStorage())
            yield found


@contextlib.contextmanager
def _journal(journal: Path) -> Iterator[Opened]:
    private_folder(journal.parent)
    journal.open("ab").close()
    if fcntl is None:
        yield Opened(JournalStorage(_Journal(str(journal), JournalFileOpenLock(str(journal)))))
        return
    with Owners(journal) as owners:
        lock: Any = _JournalLock(journal)
        lock.acquire()
        lock.release()
        try:
            storage = JournalStorage(_Journal(str(journal), lock))
        except (ValueError, KeyError) as exc:
            raise UsageError(
                f"storage {journal}: found no journal of Optuna ({' '.join(str(exc).split())}). Delete the file, or "
                "name another one with --storage."
            ) from exc
        yield Opened(storage, owners)


def _by_url(url: str) -> BaseStorage:
    try:
        return RDBStorage(url)
    except Exception as exc:
        raise UsageError(
            f"storage {url.partition('://')[0]}://...: Optuna cannot open it, {type(exc).__name__}: "
            f"{' '.join(str(exc).split())[:200]}. Use sqlite:///file.db, another URL that SQLAlchemy takes, or a file."
        ) from exc


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Optuna's own messages from warnings up only."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)

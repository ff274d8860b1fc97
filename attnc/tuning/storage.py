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

log = logging.getLogger("attnc.tuning")

MEMORY = "memory"


@dataclass(frozen=True)
class Opened:
    """A storage. alone: no other process of this machine uses it, so trials still running in it are of dead ones."""

    storage: BaseStorage
    alone: bool


class _JournalLock:
    """The lock of a journal, in Optuna's shape: acquire, release."""

    def __init__(self, journal: Path) -> None:
        self.journal, self.file = journal, journal.with_suffix(".flock")
        self.held: IO[bytes] | None = None

    def acquire(self) -> bool:
        held = self.file.open("a+b")
        fcntl.flock(held, fcntl.LOCK_EX)
        self.held = held
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
        yield Opened(InMemoryStorage(), alone=True)
    elif storage is not None and "://" in storage:
        yield Opened(_by_url(storage), alone=False)
    else:
        journal = folder / f"{study}.journal" if storage is None else Path(storage)
        if storage is not None and (journal.is_dir() or storage.endswith("/")):
            journal = journal / f"{study}.journal"
        with contextlib.ExitStack() as stack:
            try:
                found = stack.enter_context(_journal(journal))
            except OSError as exc:
                log.warning("trials are not written to %s (%s): a run that is stopped starts anew", journal, exc)
                found = Opened(InMemoryStorage(), alone=True)
            yield found


@contextlib.contextmanager
def _journal(journal: Path) -> Iterator[Opened]:
    private_folder(journal.parent)
    journal.open("ab").close()
    if fcntl is None:
        yield Opened(JournalStorage(JournalFileBackend(str(journal), JournalFileOpenLock(str(journal)))), alone=False)
        return
    with journal.with_suffix(".users").open("a+b") as users:
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
            _cut_unfinished(journal)
        except BlockingIOError:
            alone = False
        fcntl.flock(users, fcntl.LOCK_SH)
        lock: Any = _JournalLock(journal)
        try:
            storage = JournalStorage(JournalFileBackend(str(journal), lock))
        except (ValueError, KeyError) as exc:
            raise UsageError(
                f"storage {journal}: found no journal of Optuna ({' '.join(str(exc).split())}). Delete the file, or "
                "name another one with --storage."
            ) from exc
        yield Opened(storage, alone)


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

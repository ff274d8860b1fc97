"""Whose the running trials of a journal are: each process holds the lock of a file of its own for as long as it lives.

The system lets go of a lock when its holder dies, however it dies, so a trial whose owner's lock is free is nobody's
and may be taken over. Trials change hands under one lock that all processes share. Owners on other machines are not
judged: their locks may not be seen here.
"""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from attnc.records import locked

try:
    import fcntl
except ImportError:  # not a Unix: nobody is known to be dead
    fcntl = None  # type: ignore[assignment]

BOOT = Path("/proc/sys/kernel/random/boot_id")  # of this run of this machine: host names are not unique
NAME = re.compile(r"([\w.]{1,64})-(\d{1,10}-[0-9a-f]{16})")


class JournalLost(OSError):
    """An operation on the files of a journal failed."""


@contextlib.contextmanager
def journal_files() -> Iterator[None]:
    """What fails inside is the journal's files, and nothing else. Raises: JournalLost for an OSError."""
    try:
        yield
    except JournalLost:
        raise
    except OSError as exc:
        raise JournalLost(*exc.args) from exc


def _host() -> str:
    """This machine since it was started: its name and, where the system has one, the id of the start."""
    name = re.sub(r"[^\w.]", "_", platform.node())[:40] or "_"
    with contextlib.suppress(OSError):
        return f"{name}.{re.sub(r'[^0-9a-f]', '', BOOT.read_text())[:16]}"
    return name


class Owners:
    """The processes that try trials of `journal`; this one lives from `__enter__` to `__exit__` or its death."""

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.host = _host()
        self.name = f"{self.host}-{os.getpid()}-{secrets.token_hex(8)}"
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Owners:
        with self.settled(), journal_files():
            for file in self.journal.parent.glob(f"{glob.escape(self.journal.stem)}.owner-*"):
                self._is_held(file)  # removes what a killed process left
            own = self._file(self.name)
            self._held.enter_context(locked(own))
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._file(self.name).unlink()
        self._held.close()

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Nobody else begins a trial or takes one over meanwhile. Raises: JournalLost."""
        with contextlib.ExitStack() as stack:
            with journal_files():
                stack.enter_context(locked(self.journal.with_suffix(".users")))
            yield

    def is_dead(self, name: object) -> bool:
        """Whether the owner of this name is known to live no more; to be asked while `settled`. Raises: JournalLost.

        A trial without a name was left by a process that died while it began the trial.
        """
        match = NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None or name == self.name:
            return match is None
        with journal_files():
            return match[1] == self.host and not self._is_held(self._file(match[0]))

    def _file(self, name: str) -> Path:
        return self.journal.with_name(f"{self.journal.stem}.owner-{name}")

    def _is_held(self, file: Path) -> bool:
        """Whether a process holds the lock of `file`; where none does, the file is removed."""
        try:
            with file.open("r+b") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.unlink()
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

"""Files that are whole or not there: written beside their place, synced to disk, then moved there in one step."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO

UNFINISHED = ".attnc-"  # start of the names of unfinished files
LEFTOVER_S = 3600.0  # an unfinished file older than this has no writer any more


def replace_file(path: Path, content: bytes) -> None:
    """`path` holds `content`, or what it held before, at every moment.

    A failure leaves nothing behind, a kill one of `leftovers`. Raises: OSError.
    """
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=UNFINISHED, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            _write(file, content)
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(unfinished)
        raise


def private_folder(path: Path) -> Path:
    """`path`, made where it is missing, with its parents, for this user alone, without its `leftovers`.

    Leftovers are removed once in each process. Raises: OSError.
    """
    for folder in reversed([path, *path.parents]):
        if not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    _clear_leftovers(path)
    return path


@cache
def _clear_leftovers(folder: Path) -> None:
    with suppress(OSError):  # they do no harm but take space
        for path in leftovers(folder):
            path.unlink(missing_ok=True)


def leftovers(folder: Path) -> list[Path]:
    """What killed processes left unfinished in `folder`."""
    return [path for path in folder.glob(f"{UNFINISHED}*.tmp") if _age_s(path) > LEFTOVER_S]


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _write(file: IO[bytes], content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())  # a name must never outlive its content

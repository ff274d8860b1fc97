"""Rendered kernels on disk and as modules: a folder of files, each named after its content.

A file is written beside its place and moved there, so that a process that is killed, or another that writes the same
kernel, leaves no half of one. Kernels are code: the folder must be the user's own (`ownership`), and what lies there
must be what its name says; the module is made from the checked text, whatever becomes of the file.
Triton is reached through here alone, but for skeletons, which import it as the kernels they are.
"""

from __future__ import annotations

import atexit
import linecache
import logging
import re
import shutil
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

from attnc.atomic_file import leftovers, private_folder, replace_file
from attnc.codegen.ownership import Shared, check_owner
from attnc.codegen.render import source_hash
from attnc.errors import LoweringError, UsageError

log = logging.getLogger("attnc.codegen")

FILE = re.compile(r"([0-9a-f]{32})\.py")


@dataclass(frozen=True)
class Filed:
    """One kernel file: its hash, its size in bytes, when it was written (seconds since 1970), its first line."""

    hash: str
    bytes: int
    written_s: float
    title: str


def triton() -> ModuleType:
    """Triton. Raises: UsageError where it is not installed."""
    try:
        import triton
    except ImportError as exc:
        raise UsageError(
            "use Triton kernels: found no package triton, which attnc needs for kernels of its own. It comes with "
            "torch on Linux; run `pip install triton`."
        ) from exc
    return triton


def kernel_folder(store: str | Path) -> Path:
    """Where kernels lie in the user's store (`Options.store`)."""
    return Path(store) / "kernels"


@lru_cache(maxsize=4096)
def load(text: str, folder: str | Path) -> ModuleType:
    """The module that `text` is, kept in `folder`, or in a folder of this process where that will not do.

    Raises: LoweringError for a folder that others may write, a file that is not what its name says, or text that does
            not run; UsageError without Triton.
    """
    triton()
    name = source_hash(text)
    path = _filed(text, name, Path(folder))
    # Triton reads the source of a function through linecache: it sees the checked text, not the file.
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    module = module_from_spec(ModuleSpec(f"attnc_kernels_{name}", loader=None, origin=str(path)))
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        exec(compile(text, str(path), "exec"), module.__dict__)
    except Exception as exc:
        del sys.modules[module.__name__]
        raise LoweringError(
            f"load the kernels {name}: their file does not run, {type(exc).__name__}: {exc}. This is an error of "
            "attnc; please report it with `attnc kernels show`."
        ) from exc
    return module


def listing(folder: str | Path) -> list[Filed]:
    """The kernels in `folder`, the latest first."""
    found = []
    for path in _files(Path(folder)):
        with suppress(OSError):  # another process may clear the folder meanwhile
            info, first = path.stat(), path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
            found.append(Filed(path.stem, info.st_size, info.st_mtime, first.lstrip("# ")))
    return sorted(found, key=lambda file: (-file.written_s, file.hash))


def show(name: str, folder: str | Path) -> str:
    """The text of the kernels whose hash begins with `name`.

    Raises: UsageError where none or several do; LoweringError where the file is not what its name says.
    """
    found = [path for path in _files(Path(folder)) if path.stem.startswith(name)]
    if len(found) != 1 or not name:
        known = "none" if not found else f"{len(found)}: {', '.join(path.stem[:12] for path in found[:4])}"
        raise UsageError(
            f"show the kernels {name!r}: found {known} of this hash in {folder}, allowed is one. "
            "Run `attnc kernels` for a list."
        )
    text = found[0].read_text(encoding="utf-8", errors="replace")
    _check_content(text, found[0])
    return text


def clear(folder: str | Path) -> tuple[int, int]:
    """Remove all kernels, and what killed processes left; how many files and bytes that were."""
    files = size = 0
    for path in [*_files(Path(folder)), *leftovers(Path(folder))]:
        with suppress(OSError):
            size += path.stat().st_size
            path.unlink()
            files += 1
    load.cache_clear()
    return files, size


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.py") if FILE.fullmatch(path.name))


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------


def _filed(text: str, name: str, folder: Path) -> Path:
    """The file that holds `text`, written unless it is there."""
    try:
        check_owner(private_folder(folder))
        return _written(text, folder / f"{name}.py")
    except Shared as exc:
        why = str(exc)
    except OSError as exc:
        why = f"it cannot be written ({exc.strerror or exc})"
    private = _private_folder()
    _warn_once(str(folder), why, private)
    try:
        return _written(text, Path(private) / f"{name}.py")
    except OSError as exc:
        raise LoweringError(
            f"file the kernels {name}: found neither {folder} ({why}) nor the temporary folder {private} to take them "
            f"({exc.strerror or exc}). Free some space, or name another folder with the option store."
        ) from exc


def _written(text: str, path: Path) -> Path:
    with suppress(FileNotFoundError):
        _check_content(path.read_text(encoding="utf-8", errors="replace"), path)
        return path
    replace_file(path, text.encode())
    return path


def _check_content(text: str, path: Path) -> None:
    if source_hash(text) != path.stem:
        raise LoweringError(
            f"load the kernels {path}: found content of hash {source_hash(text)}, allowed is what the name says; the "
            "file was changed. Look at it, then remove it or run `attnc kernels clear`."
        )


@cache
def _private_folder() -> str:
    folder = tempfile.mkdtemp(prefix="attnc-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _warn_once(folder: str, why: str, private: str) -> None:
    log.warning("kernels are not kept in %s: %s; this process keeps them in %s", folder, why, private)

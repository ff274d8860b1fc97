"""Whether a folder of code is the user's own: nobody else may write it, or put another one in its place.

Checked are the folder, every folder above it, and every symbolic link on the way, as sshd checks those of its keys.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

try:
    import grp
    import pwd
except ImportError:  # not a Unix: no kernels there
    grp = pwd = None  # type: ignore[assignment]

from attnc.errors import LoweringError

MOST_LINKS = 40  # as Linux follows


class Shared(Exception):
    """A group other than the user's own may write a folder on the way: nobody's fault, and no place for kernels."""


def check_owner(folder: Path) -> None:
    """Raises: LoweringError where somebody else may write the folder, or put another one in its place.

    Shared where only a group may, in a folder above: shared homes and scratch disks are made like this.
    """
    info = folder.stat()
    ours, others = info.st_uid == os.geteuid(), stat.S_IMODE(info.st_mode) & 0o022
    if ours and not others:
        return _check_above(folder)
    found = f"mode {stat.S_IMODE(info.st_mode):o}" if ours else f"owner {info.st_uid}"
    raise LoweringError(
        f"keep kernels in {folder}: found {found}, allowed is a folder of user {os.geteuid()} that nobody else may "
        f"write, because kernels are run. Run `chmod go-w {folder}`, or name another folder with the option store."
    )


def _check_above(folder: Path) -> None:
    """Raises: LoweringError for a folder or link on the way that somebody else may replace, Shared for a group."""
    trusted, shared = {0, os.geteuid()}, ""
    with suppress(OSError):
        trusted.add(os.stat("/proc").st_uid)  # root, as a user namespace shows it
    for path in _way_to(folder):
        info = os.lstat(path)
        mode, found = stat.S_IMODE(info.st_mode), ""
        if info.st_uid not in trusted:
            found = f"owner {info.st_uid}"
        elif stat.S_ISDIR(info.st_mode) and not mode & stat.S_ISVTX and _others_write(mode, info.st_gid):
            if not mode & 0o002:
                shared = shared or f"found mode {mode:o} of {path}, whose group may replace it: run `chmod g-w {path}`"
                continue
            found = f"mode {mode:o}"
        if found:
            raise LoweringError(
                f"keep kernels in {folder}: found {found} of {path}, allowed are folders above it that belong to user "
                f"{os.geteuid()} or root and that nobody else may write, unless the sticky bit keeps what lies there, "
                "because who may write there can put another folder in its place. "
                f"Run `chmod go-w {path}`, or name another folder with the option store."
            )
    if shared:
        raise Shared(shared)


def _way_to(folder: Path) -> Iterator[Path]:
    """Every folder above `folder`, and every link on the way to it. Raises: OSError."""
    at, links = Path("/"), 0
    # Not os.path.abspath: it takes out `..` by its text, which after a link leads elsewhere.
    parts = list(reversed(Path(os.path.join(os.getcwd(), folder)).parts[1:]))
    yield at
    while parts:
        name = parts.pop()
        at = at.parent if name == ".." else at / name
        if not at.is_symlink():
            if parts:
                yield at
            continue
        yield at
        links += 1
        if links > MOST_LINKS:  # they changed since the folder was found
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(folder))
        target = Path(os.readlink(at))
        at = Path("/") if target.is_absolute() else at.parent
        parts += reversed(target.parts[target.is_absolute() :])


def _others_write(mode: int, group: int) -> bool:
    """Whether anybody else may write; a group that is the user's own, as many systems make one, is nobody else."""
    if not mode & 0o022 or mode & 0o002:
        return bool(mode & 0o002)
    try:
        name, known = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return True
    return known.gr_name != name or not set(known.gr_mem) <= {name}

"""The folder of kernels: content-addressed, safe under kills and parallel writers, closed to others."""

from __future__ import annotations

import errno
import grp
import logging
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from attnc import atomic_file
from attnc.codegen import load as loading
from attnc.codegen import ownership
from attnc.codegen.load import clear, listing, load, show
from attnc.codegen.render import source_hash
from attnc.errors import LoweringError, UsageError

TEXT = """# doubled
import triton
import triton.language as tl


@triton.jit
def run(p):
    tl.store(p, tl.load(p) * 2.0)
"""


@pytest.fixture(autouse=True)
def closed(tmp_path: Path) -> None:
    """The tests need a temporary folder that kernels may lie in."""
    try:
        ownership.check_owner(tmp_path)
    except (LoweringError, ownership.Shared) as exc:
        pytest.skip(f"TMPDIR lies below a folder that others may write: {exc}")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No test sees what another one loaded or warned about."""
    for cached in (load, loading._private_folder, loading._warn_once):
        cached.cache_clear()
    yield
    load.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store" / "kernels"


def runs(module) -> bool:
    x = torch.tensor([3.0])
    module.run[(1,)](x)
    return x.item() == 6.0


def test_a_module_is_loaded_and_filed_under_its_hash(folder: Path) -> None:
    assert runs(load(TEXT, folder))
    assert [p.name for p in folder.iterdir()] == [f"{source_hash(TEXT)}.py"]
    assert (folder.stat().st_mode & 0o777) == 0o700
    assert load(TEXT, folder) is load(TEXT, folder)


def test_a_file_that_is_there_is_not_written_again(folder: Path) -> None:
    load(TEXT, folder)
    written = (folder / f"{source_hash(TEXT)}.py").stat().st_mtime_ns
    load.cache_clear()
    load(TEXT, folder)
    assert (folder / f"{source_hash(TEXT)}.py").stat().st_mtime_ns == written


@pytest.mark.parametrize("change", ["x = 1\n", "", TEXT[:40]])
def test_content_that_is_not_what_its_name_says_is_refused(folder: Path, change: str) -> None:
    load(TEXT, folder)
    load.cache_clear()
    (folder / f"{source_hash(TEXT)}.py").write_text(change)
    with pytest.raises(LoweringError, match="allowed is what the name says"):
        load(TEXT, folder)
    with pytest.raises(LoweringError, match="the file was changed"):
        show(source_hash(TEXT), folder)


def test_a_file_changed_after_the_check_is_not_what_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = loading._written

    def then_changed(text: str, path: Path) -> Path:
        written(text, path).write_text(TEXT.replace("2.0", "5.0"))
        return path

    monkeypatch.setattr(loading, "_written", then_changed)
    assert runs(load(TEXT, folder))


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_may_write_is_refused(folder: Path, mode: int) -> None:
    folder.mkdir(parents=True)
    folder.chmod(mode)
    with pytest.raises(LoweringError, match=f"found mode {mode:o}"):
        load(TEXT, folder)


def test_a_folder_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(LoweringError, match=f"found owner {os.getuid()}"):
        load(TEXT, folder)


@pytest.mark.parametrize("mode", [0o777, 0o707])
@pytest.mark.parametrize("above", [1, 2])
def test_a_folder_below_one_that_others_may_write_is_refused(tmp_path: Path, mode: int, above: int) -> None:
    folder = tmp_path / "a" / "b" / "kernels"
    folder.mkdir(parents=True, mode=0o700)
    parent = folder.parents[above - 1]
    parent.chmod(mode)
    with pytest.raises(LoweringError, match=f"found mode {mode:o} of {parent}, .* sticky") as refused:
        load(TEXT, folder)
    assert f"chmod go-w {parent}" in str(refused.value)
    parent.chmod(mode | 0o1000)
    assert runs(load(TEXT, folder))


def test_a_folder_below_one_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True, mode=0o700)
    stat = os.lstat

    def foreign(path):
        found = list(stat(path))
        if Path(path) == folder.parent:
            found[4] = 4711
        return os.stat_result(found)

    monkeypatch.setattr(os, "lstat", foreign)
    with pytest.raises(LoweringError, match=f"found owner 4711 of {folder.parent}"):
        load(TEXT, folder)


def test_every_folder_on_the_way_through_links_counts(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "real" / "kernels").mkdir(parents=True, mode=0o700)
    (tmp_path / "open" / "link").symlink_to("../real")
    (tmp_path / "outer").symlink_to(tmp_path / "open" / "link")
    assert runs(load(TEXT, tmp_path / "outer" / "kernels"))
    (tmp_path / "open").chmod(0o777)
    load.cache_clear()
    with pytest.raises(LoweringError, match=f"found mode 777 of {tmp_path / 'open'}"):
        load(TEXT, tmp_path / "outer" / "kernels")
    (tmp_path / "outer").unlink()
    (tmp_path / "outer").symlink_to("outer")
    with pytest.raises(OSError, match="symbolic links"):
        list(ownership._way_to(tmp_path / "outer" / "kernels"))


def test_the_folder_that_is_checked_is_the_one_behind_links_and_dots(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "open" / "inner").mkdir(parents=True, mode=0o700)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "link").symlink_to(tmp_path / "open" / "inner")
    (tmp_path / "open").chmod(0o777)
    monkeypatch.chdir(tmp_path)
    for start in (tmp_path, Path()):
        with pytest.raises(LoweringError, match=f"found mode 777 of {tmp_path / 'open'}"):
            load(TEXT, start / "own" / "link" / ".." / "kernels")


def test_the_group_may_write_above_where_it_is_the_users_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True, mode=0o700)
    folder.parent.chmod(0o770)
    me, group = pwd.getpwuid(os.geteuid()), folder.parent.stat().st_gid
    for members, taken in (([], True), ([me.pw_name], True), ([me.pw_name, "other"], False)):
        load.cache_clear()
        known = grp.struct_group((me.pw_name, "x", group, members))
        monkeypatch.setattr(grp, "getgrgid", lambda _, known=known: known)
        module = load(TEXT, folder)
        assert runs(module) and Path(module.__file__).is_relative_to(folder) == taken


def test_a_folder_below_one_that_a_group_may_write_is_replaced_with_one_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    folder.mkdir(parents=True, mode=0o700)
    folder.parent.chmod(0o775)
    monkeypatch.setattr(grp, "getgrgid", lambda group: grp.struct_group(("staff", "x", group, [])))
    for text in (TEXT, TEXT + "\n"):
        module = load(text, folder)
        assert runs(module) and not Path(module.__file__).is_relative_to(folder)
    assert len(warned(caplog)) == 1 and f"chmod g-w {folder.parent}" in warned(caplog)[0]
    folder.chmod(0o775)
    load.cache_clear()
    with pytest.raises(LoweringError, match="found mode 775"):
        load(TEXT, folder)
    folder.chmod(0o700)
    folder.parent.parent.chmod(0o777)
    with pytest.raises(LoweringError, match="found mode 777"):
        load(TEXT, folder)


def test_what_is_made_is_for_the_user_alone_whatever_the_umask(folder: Path) -> None:
    before = os.umask(0)
    try:
        assert runs(load(TEXT, folder))
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent)] == [0o700, 0o700]


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_a_folder_that_cannot_be_made_is_replaced_with_one_warning(tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("")
    for text in (TEXT, TEXT + "\n"):
        module = load(text, tmp_path / "file" / "kernels")
        assert runs(module) and not Path(module.__file__).is_relative_to(tmp_path)
    assert len(warned(caplog)) == 1 and "cannot be written" in warned(caplog)[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_replaced_with_one_warning(folder: Path, caplog) -> None:
    folder.mkdir(parents=True, mode=0o500)
    assert runs(load(TEXT, folder)) and len(warned(caplog)) == 1


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the folder of an open file is read in /proc")
def test_a_full_disk_is_replaced_and_leaves_nothing_behind(folder: Path, caplog, monkeypatch) -> None:
    write = atomic_file._write

    def full_there(file, content: bytes) -> None:
        if not os.readlink(f"/proc/self/fd/{file.fileno()}").startswith(str(folder)):
            return write(file, content)
        file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic_file, "_write", full_there)
    assert runs(load(TEXT, folder))
    assert list(folder.iterdir()) == [] and "No space left" in warned(caplog)[0]


def test_no_space_anywhere_is_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic_file, "_write", full)
    with pytest.raises(LoweringError, match="found neither"):
        load(TEXT, folder)


def test_text_that_does_not_run_is_a_sentence(folder: Path) -> None:
    with pytest.raises(LoweringError, match="ZeroDivisionError"):
        load("x = 1 / 0\n", folder)


WRITER = """
import sys
from pathlib import Path
from attnc import atomic_file
from attnc.codegen import load as loading
write, signalled = atomic_file._write, Path(sys.argv[2])
def slowly(file, content):
    file.write(content[: len(content) // 2])
    file.flush()
    signalled.write_text("half")
    if sys.argv[3] == "hang":
        sys.stdin.read()
    file.seek(0)
    write(file, content)
atomic_file._write = slowly
for n in range(int(sys.argv[4])):
    loading._filed(TEXT, loading.source_hash(TEXT), Path(sys.argv[1]))
    if n + 1 < int(sys.argv[4]):
        (Path(sys.argv[1]) / (loading.source_hash(TEXT) + ".py")).unlink(missing_ok=True)
"""


def writer(folder: Path, mark: Path, manner: str, rounds: int) -> subprocess.Popen:
    code = f"TEXT = {TEXT!r}\n{WRITER}"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(mark), manner, str(rounds)], stdin=subprocess.PIPE
    )


def test_a_kill_while_writing_leaves_no_kernel_and_the_next_process_writes_it(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = writer(folder, mark, "hang", 1)
    while not mark.exists():
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert child.stdin is not None
    child.stdin.close()
    assert listing(folder) == [] and len(list(folder.glob(".*.tmp"))) == 1
    assert runs(load(TEXT, folder)) and len(listing(folder)) == 1
    leftover = next(folder.glob(".*.tmp"))
    assert clear(folder)[0] == 1 and leftover.exists()  # it may still have a writer
    os.utime(leftover, (0, 0))
    assert clear(folder)[0] == 1 and not leftover.exists()


def test_processes_that_write_the_same_kernel_do_not_disturb_each_other(folder: Path, tmp_path: Path) -> None:
    children = [writer(folder, tmp_path / f"mark{n}", "go", 25) for n in range(2)]
    for child in children:
        child.communicate()
    assert [child.returncode for child in children] == [0, 0]
    assert [file.hash for file in listing(folder)] == [source_hash(TEXT)]
    assert show(source_hash(TEXT)[:8], folder) == TEXT and not list(folder.glob(".*.tmp"))


def test_kernels_are_listed_shown_and_cleared(folder: Path) -> None:
    load(TEXT, folder)
    load("# second\n", folder)
    (folder / "notes.txt").write_text("mine")
    os.utime(folder / f"{source_hash(TEXT)}.py", (4e9, 4e9))  # a clock that was ahead
    assert [file.title for file in listing(folder)] == ["doubled", "second"]
    assert show(source_hash(TEXT)[:6], folder) == TEXT
    for name in ("", "zzz"):
        with pytest.raises(UsageError, match="allowed is one"):
            show(name, folder)
    assert clear(folder) == (2, len(TEXT) + len("# second\n"))
    assert listing(folder) == [] and [p.name for p in folder.iterdir()] == ["notes.txt"]
    assert listing(folder / "absent") == [] and clear(folder / "absent") == (0, 0)

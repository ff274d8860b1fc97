"""Files that are whole or not there, in every place that writes one."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from attnc import atomic_file
from attnc.atomic_file import private_folder, replace_file
from attnc.codegen import compile_stats
from attnc.codegen import load as loading
from attnc.records import Record, RecordKey, Records, Timing
from attnc.store import Store

RECORD = Record(RecordKey("attention-1", "h100", "bfloat16", "k" * 16), "flash", {"flash": Timing(1e-3)})


def test_a_file_is_replaced_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        replace_file(tmp_path / "file", content)
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", content)]


@pytest.mark.parametrize("raised", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch, raised) -> None:
    replace_file(tmp_path / "file", b"old")

    def half(file, content: bytes) -> None:
        file.write(content[:1])
        raise raised

    monkeypatch.setattr(atomic_file, "_write", half)
    with pytest.raises(type(raised)):
        replace_file(tmp_path / "file", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


def test_the_content_is_on_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    replace_file(tmp_path / "file", b"content")
    assert done == ["fsync", "replace"]


def test_a_folder_is_made_with_its_parents_for_the_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert private_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
        (tmp_path / "open").mkdir(mode=0o777)
        private_folder(tmp_path / "open")
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "a/b", "open")]
    assert modes == [0o700, 0o700, 0o777]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        private_folder(tmp_path / "file" / "a")


def files_kernels(folder: Path) -> None:
    loading._filed("x = 1\n", loading.source_hash("x = 1\n"), folder)


WRITERS: dict[str, Callable[[Path], object]] = {
    "verdicts": lambda folder: Store(str(folder)).put("key", {"verdict": True}),
    "records": lambda folder: Records(folder).put(RECORD),
    "kernels": files_kernels,
    "compiled": lambda folder: compile_stats._keep(folder / "key.json", {"failure": "none"}),
}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the folder of an open file is read in /proc")
@pytest.mark.parametrize("name", WRITERS)
def test_whatever_is_kept_is_synced_and_a_full_disk_leaves_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    written: list[Path] = []
    write = atomic_file._write

    def seen(file, content: bytes) -> None:
        written.append(Path(os.readlink(f"/proc/self/fd/{file.fileno()}")).parent)
        if written[-1] == tmp_path / "full":
            file.write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, content)

    monkeypatch.setattr(atomic_file, "_write", seen)
    WRITERS[name](tmp_path / "free")
    assert written == [tmp_path / "free"]
    monkeypatch.setattr(loading, "_private_folder", lambda: str(tmp_path / "free"))
    WRITERS[name](tmp_path / "full")
    assert written[1] == tmp_path / "full"
    assert [p.name for p in (tmp_path / "full").iterdir() if p.suffix != ".lock"] == []


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_removes_what_killed_ones_left_and_nothing_else(tmp_path: Path, name: str) -> None:
    kept = {".attnc-live.tmp", ".other.tmp"}
    for file in (*kept, ".attnc-killed.tmp"):
        (tmp_path / file).write_text("")
        os.utime(tmp_path / file, None if "live" in file else (0, 0))
    WRITERS[name](tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert kept < left and ".attnc-killed.tmp" not in left

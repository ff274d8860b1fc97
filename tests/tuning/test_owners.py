"""Running trials belong to live processes: what a killed one left is taken over, once."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from attnc.tuning import owners
from attnc.tuning.owners import Owners
from tests.tuning.landscapes import Landscape
from tests.tuning.test_search import SMALL, search

LIMIT_S = 300.0  # a search that hangs is killed, and fails its test

OWNER = """
from pathlib import Path
import sys
from attnc.tuning.search import Search, Settings
from tests.tuning.test_search import SMALL, Landscape
class Told(Landscape):
    def compile(self, form):
        print(form.spell(), flush=True)
        sys.stdin.readline()
        return super().compile(form)
Search(Told(*SMALL), Settings(trials=int(sys.argv[2]), storage=sys.argv[1])).run()
"""


class Process:
    """A search in a process of its own, that compiles a setting for each line sent to it."""

    def __init__(self, journal: Path, trials: int) -> None:
        command = [sys.executable, "-c", OWNER, str(journal), str(trials)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # for as long as the process
        pipes["stderr"] = self.errors
        self.process = subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes)
        self.watchdog = threading.Timer(LIMIT_S, self.process.kill)
        self.watchdog.daemon = True
        self.watchdog.start()

    def said(self) -> str:
        """What it wrote to its standard error."""
        self.errors.seek(0)
        return self.errors.read()

    def compiling(self) -> str:
        """The setting that it compiles now."""
        line = self.process.stdout.readline().strip()
        assert line, f"it ended: {self.said()}"
        return line

    def go_on(self) -> None:
        self.process.stdin.write("\n")

    def rest(self) -> list[str]:
        self.process.stdin.write("\n" * 100)
        told = [line.strip() for line in self.process.stdout]
        assert self.process.wait(LIMIT_S) == 0, self.said()
        self.watchdog.cancel()
        return told


def test_a_trial_is_taken_over_when_its_process_is_killed_and_not_before(tmp_path: Path) -> None:
    journal = tmp_path / "trials.journal"
    first, second = Process(journal, 6), Process(journal, 6)
    theirs = [first.compiling()]
    first.go_on()
    theirs.append(first.compiling())
    ours = [second.compiling()]
    for _ in range(2):
        second.go_on()
        ours.append(second.compiling())
    assert not set(ours) & set(theirs), "the first lives"
    first.process.kill()
    first.process.wait()
    ours += second.rest()
    assert ours.count(theirs[1]) == 1 and theirs[0] not in ours, "what it was compiling, and not what it had told"
    assert len({*ours, *theirs}) == 6 == len(search(Landscape(*SMALL), 6, storage=str(journal)).order)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["trials.flock", "trials.journal", "trials.users"]


@pytest.mark.slow
def test_of_many_processes_that_start_at_once_one_takes_over_what_a_killed_one_left(tmp_path: Path) -> None:
    journal = tmp_path / "trials.journal"
    killed = Process(journal, 12)
    left = killed.compiling()
    killed.process.kill()
    killed.process.wait()
    started = [Process(journal, 12) for _ in range(3)]
    first = [process.compiling() for process in started]
    assert first.count(left) == 1 and len(set(first)) == 3
    compiled = [*first, *(setting for process in started for setting in process.rest())]
    assert len(compiled) == len(set(compiled)) == 12


def test_a_name_is_of_one_start_of_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boot = tmp_path / "boot"
    monkeypatch.setattr(owners, "BOOT", boot)
    names = []
    for content in ("0123abcd-4567-89ab-cdef-0123456789ab\n", "1123abcd-4567-89ab-cdef-0123456789ab\n", None):
        boot.unlink(missing_ok=True)
        if content is not None:
            boot.write_text(content)
        names.append(Owners(tmp_path / "a.journal"))
    assert len({owner.host for owner in names}) == 3
    assert all(owners.NAME.fullmatch(owner.name)[1] == owner.host for owner in names)


def test_what_dead_owners_of_a_journal_left_is_removed_whatever_its_name(tmp_path: Path) -> None:
    journal = tmp_path / "a[1]*.journal"
    left = journal.with_name(f"{journal.stem}.owner-x-1-{'0' * 16}")
    other = journal.with_name(f"a1b.owner-x-1-{'0' * 16}")
    for file in (left, other):
        file.touch()
    with Owners(journal):
        assert not left.exists() and other.exists()


def test_owners_on_other_machines_are_not_judged(tmp_path: Path) -> None:
    with Owners(tmp_path / "a.journal") as one, Owners(tmp_path / "a.journal") as other, one.settled():
        assert not one.is_dead(other.name) and not one.is_dead(one.name) and not other.is_dead(one.name)
        assert not one.is_dead("elsewhere-1-" + "0" * 16)
        assert one.is_dead(f"{one.host}-1-" + "0" * 16) and one.is_dead(None) and one.is_dead("../../x")
    with Owners(tmp_path / "a.journal") as third, third.settled():
        assert third.is_dead(one.name)

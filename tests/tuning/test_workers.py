"""Workers compile in processes of their own, and one that dies takes nothing but its setting along."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from attnc.tuning.problem import Outcome
from attnc.tuning.search import Search, Settings
from attnc.tuning.workers import Workers
from tests.tuning.landscapes import Landscape, Tiles
from tests.tuning.test_search import SMALL

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Deadly(Landscape):
    """One setting takes its process along, one raises."""

    def compile(self, form: Tiles) -> Outcome:
        place = self.space().index(form)
        if place == 2:
            os._exit(3)
        if place == 3:
            raise MemoryError("no room")
        return Outcome(float(os.getpid()))


@pytest.mark.slow
def test_several_workers_find_what_one_finds_and_a_dead_one_is_the_failure_of_its_setting() -> None:
    problem, settings = Landscape(*SMALL), Settings(trials=8, workers=2, storage="memory")
    deadly = Deadly(*SMALL)
    forms = deadly.space()[:4]
    with Workers(2) as workers:
        found = Search(problem, settings, workers=workers).run()
        outcomes = dict(workers.compile(deadly, forms))
    assert not problem.compiled, "nothing is compiled in this process"
    assert found == Search(problem, settings, workers=Workers(1)).run()
    assert "ended its process" in (outcomes[forms[2]].failure or "")
    assert "raised MemoryError: no room" in (outcomes[forms[3]].failure or "")
    assert {outcomes[form].seconds for form in forms[:2]}.isdisjoint({None, float(os.getpid())})


PARENT = """
from attnc.tuning.workers import Workers
from tests.tuning.landscapes import Landscape
from tests.tuning.test_search import SMALL
from tests.tuning.test_workers import Deadly
if __name__ == "__main__":
    problem = Deadly(*SMALL)
    with Workers(2) as workers:
        for _, outcome in workers.compile(problem, problem.space()[:2]):
            print(int(outcome.seconds), flush=True)
        input()
"""


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    parent = subprocess.Popen(
        [sys.executable, str(script)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes
    )
    assert parent.stdout is not None
    pids = {int(parent.stdout.readline()) for _ in range(2)}
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/stat").exists() for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}/stat").exists() for pid in pids)

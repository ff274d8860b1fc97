"""Each problem is tuned once and kept, whatever ends the run."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from attnc.records import Records
from attnc.tuning.problem import Outcome
from attnc.tuning.search import Settings
from attnc.tuning.tune import record_key, tune
from tests.tuning.landscapes import CASES, CHIPS, Landscape, Tiles
from tests.tuning.test_search import SMALL

ASKED = Settings(trials=8, storage="memory")
OTHER = Landscape(CASES[6], CHIPS[4])


def test_identical_regions_are_tuned_once_on_each_device(tmp_path: Path) -> None:
    one, twin = Landscape(*SMALL), Landscape(*SMALL)
    abroad = Landscape(SMALL[0], CHIPS[2])
    found = tune([one, OTHER, twin, abroad], ASKED, records=Records(tmp_path))
    assert found[0] is found[2] and len(twin.compiled) == 0 and len(one.compiled) == 8
    assert [record.key.device for record in found] == ["mi300x", "mi300x", "mi300x", "l40s"]
    assert len(list(tmp_path.glob("*.json"))) == 3
    for record, problem in zip(found, [one, OTHER, twin, abroad], strict=True):
        assert Records(tmp_path).find(record_key(problem)) == record
        best, default = record.timings[record.best or ""], record.timings[record.default]
        assert (best.compiled_s or 0) <= (default.compiled_s or 0)
        assert len(record.timings) == 8 and record.shape == problem.shape


def test_a_second_run_adds_settings_and_compiles_only_those(tmp_path: Path) -> None:
    records, problem = Records(tmp_path), Landscape(*SMALL)
    tune([problem], ASKED, records=records)
    more = tune([problem], replace(ASKED, trials=12, seed=1), records=Records(tmp_path))[0]
    again = len(problem.compiled) - 8
    assert len(more.timings) == 8 + again and 0 < again < 12, "what both searches want is compiled once"
    assert len(set(problem.compiled)) == len(problem.compiled)


def test_another_kernel_is_tuned_anew(tmp_path: Path, caplog) -> None:
    tune([Landscape(*SMALL)], ASKED, records=Records(tmp_path))
    changed = Landscape(*SMALL, kernel="1" * 16)
    tune([changed], ASKED, records=Records(tmp_path))
    assert len(changed.compiled) == 8 and "not used" in caplog.text


def test_time_is_shared_and_every_default_is_tried() -> None:
    ticks = itertools.count(0.0, 1.0)
    problems = [Landscape(case, CHIPS[4]) for case in (CASES[9], CASES[6], CASES[7])]
    asked = replace(ASKED, trials=200, seconds=150.0)
    found = tune(problems, asked, clock=lambda: next(ticks))
    sizes = [len(record.timings) for record in found]
    assert all(5 < size < 60 for size in sizes) and max(sizes) < 2 * min(sizes)
    late = tune(problems, replace(asked, seconds=1e-6))
    assert [set(record.timings) for record in late] == [{record.default} for record in late]


@dataclass(frozen=True)
class Stopped(Landscape):
    """Ctrl-C at the sixth compile."""

    def compile(self, form: Tiles) -> Outcome:
        if len(self.compiled) == 5:
            self.compiled.append("stop")
            raise KeyboardInterrupt
        return super().compile(form)


def test_what_was_found_before_ctrl_c_is_kept(tmp_path: Path) -> None:
    problem, asked = Stopped(*SMALL), replace(ASKED, storage=None, folder=tmp_path / "studies")
    with pytest.raises(KeyboardInterrupt):
        tune([problem], asked, records=Records(tmp_path))
    kept = Records(tmp_path).find(record_key(problem))
    assert kept is not None and len(kept.timings) == 5
    whole = tune([problem], asked, records=Records(tmp_path))[0]
    assert len(whole.timings) == 8 and len(problem.compiled) == 9
    assert whole.timings == tune([Landscape(*SMALL)], ASKED)[0].timings

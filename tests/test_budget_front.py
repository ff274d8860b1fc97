"""Budgets on a model: the front of time and error is kept, what is taken holds on data that nothing was chosen by."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import attnc
from attnc.budget import Budget, held_out, within
from attnc.calibration import Calibration
from attnc.cli import app
from attnc.cost_models.attention import written_seconds
from attnc.cost_models.device import device_named
from attnc.errors import UsageError
from attnc.forms import parse_form
from attnc.graphs import Named, graphs_of, named_regions
from attnc.measuring import measuring, units_of
from attnc.options import Options
from attnc.passes.choose import pays_from
from attnc.plan import Plan
from attnc.region import AttentionRegion
from attnc.report import Report
from attnc.rule_attention import AttentionRule, AttentionShape
from tests.test_budget import E, Model

LENGTH, RANKS = 192, (8, 20, None)
FORMS = ("low_rank", "hierarchical")
OPTIONS = Options(allow=FORMS, device="cpu")


def build() -> tuple[Model, tuple[torch.Tensor]]:
    torch.manual_seed(0)
    return Model(*RANKS).eval(), (batches()[0],)


def batches(count: int = 3, seed: int = 1) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(1, LENGTH, E, generator=draws) for _ in range(count)]


@pytest.fixture(scope="module")
def regions() -> list[Named]:
    model, inputs = build()
    with torch.no_grad():
        graphs = graphs_of(model, inputs, {}, replace(OPTIONS, allow=()))
    return named_regions([(place, report.regions) for place, report in graphs])


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return attnc.calibrate(build()[0], batches()[:2], forms=FORMS, device="cpu", pairs=20)


def test_ten_random_budgets_hold_on_data_that_nothing_was_chosen_by(regions, calibration) -> None:
    model, _ = build()
    units, data = units_of(regions, OPTIONS, paying=True), [((x,), {}) for x in batches()]
    fresh = [((x,), {}) for x in batches(4, seed=2)]
    draws = random.Random(5)
    limits = sorted(10 ** draws.uniform(-2.5, -0.3) for _ in range(10))
    with torch.no_grad(), measuring(model, regions, units, OPTIONS, "autotune") as runs:
        budget = Budget(runs, regions, units, data, limits[-1])
        budget.calibrate(calibration, anew=False)
        assert list(budget.held) == [2] and budget.fresh
        times = []
        for budget.limit in limits:
            budget.settle()
            assert budget.verified is not None and budget.verified.margin >= 0
            assert max(runs.taken(x, 0).off(runs.written(x, 0)) for x in fresh) <= budget.limit
            times.append(budget.taken.seconds)
    points = budget.points
    assert times == sorted(times, reverse=True) and times[-1] < 0.8 * points[0].seconds  # a larger budget buys time
    assert points[0].error == 0 and not points[0].choices and len(points) > 4
    assert all(a.seconds > b.seconds and a.error < b.error for a, b in pairwise(points))
    single = [s.output for s in calibration.regions["layers.2"].settings.values() if s.runs]
    assert single and max(single) > limits[0]  # it is not that everything was within every budget


def test_a_calibration_of_another_model_or_of_other_forms_is_told(regions, calibration) -> None:
    other = replace(calibration, regions={"elsewhere": calibration.regions["layers.0"]})
    with pytest.raises(UsageError, match=r"found the regions 'elsewhere', allowed are those of this model, 'layers.0'"):
        within(build()[0], regions, [], OPTIONS, 0.1, other)
    region = calibration.regions["layers.0"]
    known = {form: found for form, found in region.settings.items() if not form.startswith("low_rank")}
    less = replace(calibration, regions={"layers.0": replace(region, settings=known)})
    with torch.no_grad():
        found = within(build()[0], regions[:1], [((x,), {}) for x in batches(2)], OPTIONS, 0.5, less).choices[0]
    assert found.refused["low_rank{rank=8}"].startswith("the calibration has not measured it here")
    assert not found.form.startswith("low_rank")


def test_the_last_third_is_held_out() -> None:
    assert [list(held_out(n)) for n in (1, 2, 3, 6, 7)] == [[0], [1], [2], [4, 5], [5, 6]]


def test_the_shell_calibrates_and_tunes_by_the_file(tmp_path: Path, regions, calibration) -> None:
    here, file, plan = "tests.test_budget_front", str(tmp_path / "errors.json"), tmp_path / "plan.json"
    shared = [f"{here}:build", "--data", f"{here}:batches", "--device", "cpu"]
    asked = ["calibrate", *shared, "--forms", ",".join(FORMS), "--batches", "2", "--pairs", "20", "--out", file]
    found = CliRunner().invoke(app, asked)
    assert found.exit_code == 0 and "2 batches, times for cpu" in found.stdout and "worst row" in found.stdout
    assert Calibration.load(file) == calibration
    tuned = ["tune", *shared, "--allow", FORMS[0], "--max-error", "0.2", "--calibration", file, "--plan", str(plan)]
    found = CliRunner().invoke(app, tuned)
    assert found.exit_code == 0, found.output
    assert "on batch 2, held out, allowed is 0.2, a margin of" in found.stdout and "front of" in found.stdout
    made = Plan.from_json(plan.read_text())
    assert made.verified.fresh and made.verified.calibrated == 2 and len(made.front) > 1
    taken = next(choice for choice in made.choices.values() if choice.rewrites)
    assert taken.row_error > taken.error and taken.pays_from < LENGTH
    told = Report((replace(regions[0].region, choice=taken),)).to_text(400)
    assert f"worst row {taken.row_error:.3g}" in told and f"pays from {taken.pays_from}" in told


@pytest.mark.parametrize("spelling", ["low_rank{rank=8}", "block_mixture{block=64,top_k=2}", "sliding_window"])
def test_a_form_pays_from_a_length_on(spelling: str) -> None:
    form, device = parse_form(spelling), device_named("cpu")
    shape = AttentionShape(1, 4, 4, 512, 512, 64, 64)
    rule = AttentionRule.parse("score=0.125 * s; keep=j <= i")
    region = AttentionRegion("", "", rule, shape, "float32", "cpu")
    least = pays_from(form, region, device)
    for length, pays in ((round(0.8 * least), False), (round(1.25 * least), True)):
        there = replace(region, shape=replace(shape, L=length, S=length))
        if least > 128:  # the shortest length that is asked about
            assert (form.seconds(there, device) < written_seconds(there, device)) == pays
    assert pays_from(parse_form("token_top_k"), region, device) is None


def test_mistakes_of_the_shell_are_sentences(tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    file.write_text('{"attnc_calibration": 1')
    shared = ["tests.test_budget_front:build", "--data", "tests.test_budget_front:batches", "--device", "cpu"]
    for more, says in (
        (["calibrate", *shared, "--forms", "low_rnk", "--out", str(file)], "Did you mean 'low_rank'"),
        (["calibrate", *shared, "--forms", "low_rank", "--out", str(file)], "found no JSON"),
        (["tune", *shared, "--allow", "low_rank", "--calibration", str(file)], "found no JSON"),
    ):
        found = CliRunner().invoke(app, more)
        assert found.exit_code == 2 and says in found.stderr

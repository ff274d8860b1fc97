"""`attnc tune` from its arguments to its records."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from attnc.commands.target import Call
from attnc.commands.tune import command, listed, spell_seconds
from attnc.errors import UsageError
from attnc.options import Options
from tests.tuning.landscapes import CASES, CHIPS, Landscape
from tests.tuning.test_tune import Stopped

RUN = CliRunner()
TARGET = "tests.commands.test_tune:build"


def build() -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
    return torch.nn.Linear(2, 2), (torch.ones(1, 2),)


def problems_of(call: Call, devices: Sequence[str], options: Options) -> list[Landscape]:
    assert isinstance(call.model, torch.nn.Linear) and not call.model.training
    chips = {chip.name: chip for chip in CHIPS}
    return [Landscape(CASES[9], chips[name]) for name in devices for _ in range(2)]


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("ATTNC_STORE", str(tmp_path))
    return tmp_path


def app(problems=problems_of) -> typer.Typer:
    made = typer.Typer()
    made.command()(command(problems))
    return made


def test_two_devices_are_tuned_in_one_run_and_shown_in_a_table(own_store: Path) -> None:
    found = RUN.invoke(app(), [TARGET, "--device", "mi300x,l40s", "--trials", "6", "--time", "5m"])
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    assert lines[0].split()[:4] == ["region", "device", "default", "tuned"]
    assert [" mi300x " in lines[1], " l40s " in lines[2]] == [True, True] and "x" in lines[1]
    assert lines[-1] == f"4 regions, 2 tuned by fidelity compile; records in {own_store / 'records'}."
    assert len(list((own_store / "records").glob("*.json"))) == 2
    assert len(list((own_store / "studies").glob("*.journal"))) == 2


def test_records_and_trials_go_to_the_store_that_is_named(own_store: Path, tmp_path_factory) -> None:
    store, asked = tmp_path_factory.mktemp("store"), []
    watched = app(lambda *call: asked.append(call[-1].store) or problems_of(*call))
    found = RUN.invoke(watched, [TARGET, "--device", "mi300x", "--trials", "2", "--store", str(store)])
    assert found.exit_code == 0 and asked == [str(store)] and str(store / "records") in found.stdout
    assert list((store / "records").glob("*.json")) and list((store / "studies").glob("*.journal"))
    assert not list(own_store.iterdir())


def test_json_holds_the_records_and_nothing_else() -> None:
    found = RUN.invoke(app(), [TARGET, "--device", "mi300x", "--trials", "3", "--json", "--sampler", "tpe"])
    records = json.loads(found.stdout)
    assert [record["key"]["device"] for record in records] == ["mi300x"] and len(records[0]["timings"]) == 3


def test_ctrl_c_ends_with_a_sentence_and_a_second_run_goes_on(own_store: Path) -> None:
    problem = Stopped(CASES[9], CHIPS[4])
    stopping = app(lambda call, devices, options: [problem])
    arguments = [TARGET, "--device", "mi300x", "--trials", "8"]
    found = RUN.invoke(stopping, arguments)
    assert found.exit_code == 130 and "goes on from there" in found.output
    assert RUN.invoke(stopping, arguments).exit_code == 0 and len(problem.compiled) == 9


def test_a_model_with_nothing_to_tune_says_so() -> None:
    found = RUN.invoke(app(lambda call, devices, options: []), [TARGET, "--device", "h100"])
    assert found.exit_code == 0 and found.stdout.startswith("Nothing to tune")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "h100,"], "empty name"),
        (["--device", "h100", "--time", "soon"], "duration 'soon'"),
        (["--device", "h100", "--sampler", "tpee"], "Did you mean 'tpe'"),
        (["--device", "h100", "--fidelity", "guess"], "no such fidelity"),
        (["--device", "h100", "--storage", "nosuch://x"], "cannot open"),
    ],
)
def test_a_mistake_is_a_sentence(arguments: list[str], says: str) -> None:
    found = RUN.invoke(app(lambda call, devices, options: [Landscape(CASES[9], CHIPS[4])]), [TARGET, *arguments])
    assert isinstance(found.exception, UsageError) and says in str(found.exception)


def test_listed_come_once() -> None:
    assert listed("a100, h200,a100") == ["a100", "h200"]


@pytest.mark.parametrize(("seconds", "text"), [(None, "-"), (2.0, "2 s"), (1.234e-3, "1.23 ms"), (5e-8, "50 ns")])
def test_a_time_is_spelled_in_a_unit_that_fits(seconds: float | None, text: str) -> None:
    assert spell_seconds(seconds) == text


def test_optuna_says_nothing(caplog) -> None:
    with caplog.at_level(logging.INFO, "optuna"):
        RUN.invoke(app(), [TARGET, "--device", "mi300x", "--trials", "2"])
    assert not [r for r in caplog.records if r.name.startswith("optuna")]

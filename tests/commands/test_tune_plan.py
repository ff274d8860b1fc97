"""`attnc tune --allow`: the plan that `attnc.autotune` makes, from the shell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from attnc.commands.tune import run as tune_command
from attnc.errors import UsageError
from attnc.plan import Plan
from tests.test_budget import L, autotuned, drawn, made


def build() -> tuple[nn.Module, tuple[torch.Tensor]]:
    model, x = made(12)
    return model, (x,)


def bare() -> nn.Module:
    """A model without inputs."""
    return made(12)[0]


def batches() -> list[torch.Tensor]:
    return drawn(L, L)


SHELL = [
    "tests.commands.test_tune_plan:build",
    "--device",
    "cpu",
    "--allow",
    "low_rank",
    "--data",
    "tests.commands.test_tune_plan:batches",
]


def shell(*arguments: str):
    app = typer.Typer()
    app.command()(tune_command)
    return CliRunner().invoke(app, [*arguments])


@pytest.mark.parametrize("factory", ["build", "bare"])
def test_the_shell_makes_the_same_plan_from_inputs_and_from_data_alone(factory: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    found = shell(f"tests.commands.test_tune_plan:{factory}", *SHELL[1:], "--plan", str(file), "--json")
    assert found.exit_code == 0, found.output
    plan = Plan.from_json(file.read_text())
    assert plan.choices == autotuned(*made(12), data=batches()).choices
    content = json.loads(found.stdout)
    assert content["records"] == [] and Plan.from_json(json.dumps(content["plan"])) == plan


def test_the_shell_tells_the_error_in_words() -> None:
    found = shell(*SHELL, "--max-error", "0.5")
    assert "plan for cpu:" in found.stdout and "on batch 1, held out, allowed is 0.5" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--max-error", "2"], "allowed is a number above 0"),
        (["--device", "h100,cpu"], "found 2 devices, a plan is made for one"),
        (
            ["--data", "tests.commands.test_tune_plan:batch"],
            "--data tests.commands.test_tune_plan:batch: found no 'batch'",
        ),
        (["--data", "batches"], "found no name of the form package.module:batches"),
        (["--allow", "low_rnk"], "Did you mean 'low_rank'"),
    ],
)
def test_a_mistake_in_the_shell_is_a_sentence(arguments: list[str], says: str) -> None:
    found = shell(*SHELL, *arguments)
    assert isinstance(found.exception, UsageError) and says in str(found.exception)

"""`attnc estimate`: figures of a config without weights, as text and JSON; sentences for what is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from attnc.commands.estimate import run
from attnc.errors import UsageError
from tests.cost_models.headlines import CONFIGS

app = typer.Typer()
app.command()(run)


def write(folder: Path, config: object) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return str(path)


def told(folder: Path, name: str, *options: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["--config", write(folder, CONFIGS[name]), "--json", *options])
    assert result.exception is None, result.exception
    return json.loads(result.stdout)


def refused(folder: Path, config: object, *options: str) -> str:
    result = CliRunner().invoke(app, ["--config", write(folder, config), *options])
    assert isinstance(result.exception, UsageError), (result.exception, result.output)
    return str(result.exception)


def test_the_figures_of_a_mixture_of_experts(tmp_path: Path) -> None:
    found = told(tmp_path, "Mixtral 8x7B", "--device", "h200", "--context", "32768")
    assert found["parameters"]["total"] / 1e9 == pytest.approx(46.70, rel=1e-3)
    assert found["parameters"]["active_with_both_embeddings"] / 1e9 == pytest.approx(12.88, rel=1e-3)
    assert found["cache"]["kv_bytes_per_token"] == 131072
    assert set(found["phases"]) == {"prefill", "decode", "train"}
    decode = found["phases"]["decode"]
    assert decode["memory"]["fits"] is True
    assert decode["memory"]["largest_batch"] == int(
        (0.9 * 141e9 - 2 * found["parameters"]["total"]) // (131072 * 32768)
    )
    assert found["phases"]["train"]["memory"]["fits"] is False


def test_text_names_the_conventions_the_counts_and_the_intervals(tmp_path: Path) -> None:
    config = write(tmp_path, CONFIGS["Kimi Linear"])
    result = CliRunner().invoke(app, ["--config", config, "--device", "h100", "--phase", "decode", "--context", "8192"])
    assert result.exception is None
    for word in (
        "active without embeddings",
        "active with both embeddings",
        "growing 8,064 B per token",
        "states",
        "does not fit",
        "half the square, MLA naive in prefill and training",
        "experts",
        "recurrence",
        " to ",
    ):
        assert word in result.stdout
    assert "prefill:" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 110


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_published_config_has_a_time_inside_its_interval(tmp_path: Path, name: str) -> None:
    found = told(tmp_path, name, "--batch", "2", "--context", "2048")
    for phase in found["phases"].values():
        assert 0 < phase["low"] <= phase["seconds"] <= phase["high"]
        assert sum(row["seconds"] for row in phase["rows"].values()) == pytest.approx(phase["seconds"])
        assert phase["flop_per_token"] > 0


def test_no_step_beats_the_peak_of_the_device(tmp_path: Path) -> None:
    """A decode step reads the weights once, a prompt does its products once."""
    found = told(tmp_path, "LLaMA-3.1-8B", "--device", "h100", "--context", "8192", "--batch", "4")["phases"]
    weights = found["decode"]["memory"]["weights_bytes"] - 2 * 128256 * 4096
    assert found["decode"]["seconds"] > weights / 3.35e12
    assert found["decode"]["seconds"] < 3 * weights / 3.35e12
    for phase in ("prefill", "train"):
        assert 0.3 < found[phase]["flop"] / 989.4e12 / found[phase]["seconds"] < 0.95


def test_longer_contexts_and_larger_batches_take_longer(tmp_path: Path) -> None:
    def seconds(*options: str) -> float:
        return told(tmp_path, "Qwen3-32B", "--device", "b200", "--phase", "decode", *options)["phases"]["decode"][
            "seconds"
        ]

    base = seconds("--context", "4096")
    assert base < seconds("--context", "131072")
    assert base < seconds("--context", "4096", "--batch", "256")


def test_fp8_weights_halve_the_memory_and_speed_up_a_small_batch(tmp_path: Path) -> None:
    wide, narrow = (
        told(tmp_path, "LLaMA-3.1-8B", "--device", "h100", "--phase", "decode", "--dtype", dtype)["phases"]["decode"]
        for dtype in ("bf16", "fp8")
    )
    assert narrow["memory"]["weights_bytes"] == wide["memory"]["weights_bytes"] / 2
    assert narrow["seconds"] < wide["seconds"]


@pytest.mark.parametrize("device", ["cpu", "v100", "a100", "l40s", "b200", "rtx5090", "mi300x"])
def test_every_kind_of_device_has_a_time(tmp_path: Path, device: str) -> None:
    dtype = {"v100": "fp16", "cpu": "fp32"}.get(device, "bf16")
    found = told(tmp_path, "Qwen3-1.7B", "--device", device, "--dtype", dtype, "--context", "1024")
    assert found["phases"]["prefill"]["seconds"] > 0
    assert (found["phases"]["decode"]["memory"]["fits"] is None) == (device == "cpu")


def test_a_folder_is_enough_and_a_zero_expert_model_has_a_range(tmp_path: Path) -> None:
    write(tmp_path, CONFIGS["LongCat-Flash"])
    result = CliRunner().invoke(app, ["--config", str(tmp_path), "--phase", "decode"])
    assert result.exception is None
    assert "active with output head least" in result.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--device", "h1000"), "device 'h1000': no such device.*Did you mean 'h100'"),
        (("--phase", "decod"), "--phase decod: allowed are prefill, decode, train. Did you mean 'decode'"),
        (("--dtype", "int3"), "dtype 'int3': allowed are bf16, fp16, fp8, fp32"),
        (("--kv", "fp3"), "kv 'fp3': allowed are"),
        (("--context", "0"), "context 0: allowed are 1 to"),
        (("--mla", "folded"), "mla='folded': allowed are phase, naive"),
        (("--causal", "third"), "causal='third': allowed are half, full"),
        (("--device", "v100"), "bf16 on v100: found no matrix rate for it; it has .*fp16"),
        (("--device", "a100", "--dtype", "fp8"), "fp8 on a100"),
        (("--device", "cpu", "--dtype", "fp8"), "fp8 on cpu"),
    ],
)
def test_a_wrong_option_is_refused_in_a_sentence(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    assert re.search(said, refused(tmp_path, CONFIGS["LLaMA-3.1-8B"], *options))


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "found no JSON"), ("[" * 100_000, "found no JSON"), ("[]", "allowed is the dict"), ("{}", "lacks")],
)
def test_a_file_that_is_no_config_is_refused_in_a_sentence(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content, encoding="utf-8")
    result = CliRunner().invoke(app, ["--config", str(path)])
    assert isinstance(result.exception, UsageError)
    assert said in str(result.exception)


def test_a_missing_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--config", str(tmp_path / "none.json")])
    assert isinstance(result.exception, UsageError)
    assert "cannot be read" in str(result.exception)

"""`attnc devices`: a table, a comparison, JSON, a user's file, a measurement."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from attnc.commands import devices, measure
from attnc.cost_models.cpu_probe import cpu_model, device_text, measure_cpu
from attnc.cost_models.device import device_named, gpu_named, load_devices, shipped
from attnc.errors import UsageError

MINE = """[mine]
title = "H100 at half its clock"
like = "h100"
clock_hz = 0.99e9
tensor_clock_hz = 0.915e9
fp32_flops = 33.45e12
unsure = ["power_w"]
source = { figures = "nvidia-smi" }
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    app = typer.Typer()
    app.command()(devices.run)

    def ran(*words: object) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words])

    return ran


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "measure_cpu", lambda: measure_cpu(0.002, 1 << 16, 32))


def said(result: Result) -> str:
    assert isinstance(result.exception, UsageError)
    return str(result.exception)


def test_without_a_name_every_device_has_a_row(run) -> None:
    result = run()
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert [line.split()[0] for line in lines if re.match(r" [a-z0-9-]+ +(sm|gfx|xe|cpu)", line)] == list(
        shipped().devices
    )
    b200 = next(line for line in lines if line.startswith(" b200 "))
    assert " ".join(b200.split()[1:]) == "sm100 148 1.965 2250 4500 75? 4.653 7.7? 180 126 1800 1000 292.2?"
    assert all(len(line) <= 120 for line in lines) and "?: unsure" in result.output


def test_named_devices_stand_side_by_side_with_ratios_and_sources(run) -> None:
    output = run("h100", "b200", "cpu").output
    assert re.search(r"bf16 tensor TFLOP/s +989\.4 +2250 \(2\.27x\) +-", output)
    assert re.search(r"DRAM TB/s +3\.35 +7\.7\? \(2\.30x\) +0\.0", output)
    assert re.search(r"ridge bf16 FLOP/byte +295\.3 +292\.2\? \(0\.99x\)", output)
    assert re.search(r"fp4 tensor TFLOP/s +- +9000 +-\n", output)
    assert "fp32 tensor" not in output and "L3 MiB" not in output
    assert "h100: H100 SXM5\n  figures: NVIDIA H100 datasheet" in output
    assert "unsure: fp32_flops, bandwidth" in output
    assert "no Triton target: Triton compiles for compute capability 8.0 and newer" in run("v100").output


def test_json_holds_every_figure_in_si_units(run) -> None:
    (h100, cpu) = json.loads(run("H100 SXM", "cpu", "--json").output)
    device = gpu_named("h100")
    assert (h100["kind"], h100["name"], h100["shared_per_block"]) == ("gpu", "h100", device.shared_per_block)
    assert h100["tensor"] == dict(device.tensor) and h100["ridge"]["bf16"] == device.ridge()
    assert h100["source"]["power"] == "gpus.json" and h100["unsure"] == []
    assert cpu["engines"]["flash"]["rate"] == device_named("cpu").engine("flash").rate
    assert [row["name"] for row in json.loads(run("--json").output)] == list(shipped().devices)


def test_a_file_adds_devices_of_ones_own(run, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINE)
    assert re.search(r"clock GHz +1\.98 +0\.99 \(0\.50x\)", run("h100", "mine", "--file", path).output)
    assert " mine " in run("--file", path).output
    assert "Did you mean 'mine'" in said(run("minee", "--file", path))
    path.write_text(MINE.replace("clock_hz = 0.99e9", "clock_hz = 0.99", 1))
    assert f"{path}: device mine: clock_hz: found 0.99, allowed is" in said(run("--file", path))


def test_an_unknown_device_is_a_sentence(run) -> None:
    assert "Did you mean 'h200'" in said(run("h2000"))


@pytest.mark.usefixtures("quick")
def test_what_is_measured_can_be_written_and_used(run, tmp_path: Path) -> None:
    path = tmp_path / "cpu.toml"
    result = run("--measure", "--write", path)
    assert result.exit_code == 0 and result.output == path.read_text()
    (cpu,) = load_devices(path).values()
    assert device_text(cpu) == path.read_text()
    assert cpu.name == "this-cpu" and device_named(str(path), 1) == device_named("this-cpu", 1, file=path) == cpu
    assert json.loads(run(path, "--json").output) == json.loads(run("this-cpu", "--file", path, "--json").output)
    assert json.loads(run("this-cpu", "--file", path, "--json").output)[0]["source"] == dict(cpu.source)
    assert "a file there, which is kept" in said(run("--measure", "--write", path))
    assert "cannot be written" in said(run("--measure", "--write", tmp_path / "no" / "cpu.toml"))
    assert json.loads(run("--measure", "--json").output)["kind"] == "cpu"


@pytest.mark.parametrize(
    ("words", "says"),
    [(("--measure", "h100"), "Leave them out"), (("--write", "x.toml"), "Add --measure")],
)
def test_options_that_contradict_each_other_are_a_sentence(run, words: tuple[str, ...], says: str) -> None:
    assert says in said(run(*words))


def test_a_measurement_leaves_the_threads_as_they_were_and_has_every_figure() -> None:
    before = torch.get_num_threads()
    cpu = measure_cpu(0.002, 1 << 16, 32)
    assert torch.get_num_threads() == before
    assert set(cpu.dtype_speed) == {"float64", "bfloat16", "float16"}
    assert 1 <= cpu.bandwidth_threads <= before and cpu.threads == 1
    assert [name for name, _ in cpu.engines] == [name for name, _ in device_named("cpu", 1).engines]
    assert cpu_model() in dict(cpu.source)["figures"]
    known = device_named("cpu", 1)
    share = cpu.engine("flash").rate / known.engine("flash").rate
    assert share == pytest.approx(cpu.matmul / known.matmul, rel=0.02)

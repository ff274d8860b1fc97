"""Estimates and bounds: what they print, how they add up, which bounds hold for which prediction."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from attnc.cost_models.cost import Cost, Work
from attnc.cost_models.cpu_probe import device_text
from attnc.cost_models.device import Cpu, device_named, gpu_named, load_devices
from attnc.cost_models.estimate import Bounds, Estimate
from attnc.cost_models.roofline import estimate, seconds
from attnc.cost_models.tile_estimate import fitted_bounds, flash_estimate, unmeasured, widest_bounds
from attnc.cost_models.tile_model import Band, FlashTiles, FlashWork, fitted_table, flash_seconds

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "cpu" / "cost_fit.json"
TILES, SPLIT = FlashTiles(128, 64, 8, 3), FlashTiles(16, 64, 4, 3, splits=4, pack=True)


def causal(L: int, **more) -> FlashWork:
    return FlashWork(4, 32, 8, L, L, 128, 128, **{"band": Band.causal(L, L), **more})


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (Estimate(1.23e-3, 0.98e-3, 1.55e-3), "1.23 ms (0.98 to 1.55)"),
        (Estimate(2.0, 1.5, 4.0), "2 s (1.5 to 4)"),
        (Estimate(4e-6, 4e-6, 4e-6), "4 us"),
        (Estimate(math.inf, math.inf, math.inf), "no time"),
    ],
)
def test_an_estimate_prints_its_interval(given: Estimate, text: str) -> None:
    assert str(given) == text


def test_estimates_add_up_and_scale_end_to_end() -> None:
    assert Estimate(1.0, 0.5, 2.0) + Estimate(2.0, 1.0, 3.0) * 2 == Estimate(5.0, 2.5, 8.0)


def test_bounds_go_by_the_share_of_the_launch() -> None:
    bounds = Bounds((0.2,), (0.9, 0.5), (1.1, 2.0))
    assert bounds.around(1.0, 0.1) == Estimate(1.0, 0.9, 1.1)
    assert bounds.around(1.0, 0.2) == bounds.around(1.0, 0.9) == Estimate(1.0, 0.5, 2.0)


# Tile model.


@pytest.mark.parametrize("how", ["closed", "compiled"])
def test_intervals_of_parts_left_out_hold_what_was_measured_and_are_narrow(how: str) -> None:
    stored = fitted_table()["interval"][how]
    assert set(stored) == {"attn_prefill", "attn_encoder", "attn_decode"}
    for kind, found in stored.items():
        if (how, kind) != ("compiled", "attn_prefill"):  # keeps the closed form's with an allowance
            assert 0.75 <= found["covered"] <= 0.88, kind
            assert found["width"] <= 1.8, kind
        assert len(found["low"]) == len(found["high"]) == len(found["edges"]) + 1
        assert all(low < 1 < high for low, high in zip(found["low"], found["high"], strict=True))


def test_the_estimate_of_a_kernel_is_its_prediction_inside_bounds() -> None:
    for name in ("a100", "h100", "h200", "l40s", "rtxpro6000"):
        for work, tiles in ((causal(4096), TILES), (causal(4096, band=Band()), TILES), (causal(1), SPLIT)):
            found = flash_estimate(work, tiles, gpu_named(name))
            assert found.seconds == flash_seconds(work, tiles, gpu_named(name))
            assert found.low < found.seconds < found.high < 5 * found.low


def test_kinds_of_calls_have_bounds_of_their_own() -> None:
    h100 = gpu_named("h100")
    for kind, work, tiles in (
        ("attn_prefill", causal(65536), TILES),
        ("attn_encoder", causal(65536, band=Band()), TILES),
        ("attn_decode", FlashWork(64, 32, 8, 1, 65536, 128, 128), SPLIT),
    ):
        found, bounds = flash_estimate(work, tiles, h100), fitted_bounds(kind, "closed")
        assert found.high / found.seconds == pytest.approx(bounds.high[0])


@pytest.mark.parametrize(
    ("name", "more"),
    [("b200", {}), ("mi300x", {}), ("h100", {"training": True}), ("h100", {"dtype": "fp8"})],
)
def test_kernels_that_no_table_shows_have_the_widest_interval_and_an_allowance(name: str, more: dict) -> None:
    tiles = FlashTiles(64, 32, 4, 2)
    found = flash_estimate(causal(4096, **more), tiles, gpu_named(name))
    assert found == unmeasured(found.seconds)
    stored = fitted_table()["interval"]
    every = [bounds for how in ("closed", "compiled") for bounds in stored[how].values()]
    assert widest_bounds().low[0] == pytest.approx(min(min(b["low"]) for b in every) / stored["allowance"])
    assert widest_bounds().high[0] == pytest.approx(max(max(b["high"]) for b in every) * stored["allowance"])


def test_what_does_not_fit_has_no_time() -> None:
    assert unmeasured(math.inf) == Estimate(math.inf, math.inf, math.inf)


# CPU.

COST = Cost((Work("flash", flops=1e10, bytes=1e6),))


def test_the_interval_of_the_cpu_is_that_of_its_measured_rows() -> None:
    cpu, kept = device_named("cpu", 2), json.loads(RESULTS.read_text())["interval"]
    assert isinstance(cpu, Cpu)
    assert dict(cpu.interval) == {"low": kept["low"], "high": kept["high"]}
    assert 0.75 <= kept["held"] <= 0.88 and kept["high"] / kept["low"] <= 1.8
    time = seconds(COST, cpu)
    assert estimate(COST, cpu) == Estimate(time, time * kept["low"], time * kept["high"])


def test_a_cpu_without_an_interval_is_trusted_to_a_factor_of_two(tmp_path: Path) -> None:
    lines = device_text(device_named("cpu", 1)).replace("[cpu", "[other").splitlines()
    (tmp_path / "cpu.toml").write_text("\n".join(line for line in lines if not line.startswith("interval")))
    other = load_devices(tmp_path / "cpu.toml")["other"]
    time = seconds(COST, other)
    assert estimate(COST, other) == Estimate(time, 0.5 * time, 2 * time)


def test_a_cpu_keeps_its_interval_at_any_number_of_threads_and_in_a_file(tmp_path: Path) -> None:
    cpu = device_named("cpu", 1)
    (tmp_path / "cpu.toml").write_text(device_text(cpu).replace("[cpu", "[other"))
    other = load_devices(tmp_path / "cpu.toml")["other"]
    assert isinstance(other, Cpu) and other.interval == cpu.interval == cpu.at(4).interval

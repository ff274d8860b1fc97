"""The token model: never faster than memory, never faster for more work, and small tiles for few channels."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnc.cost_models.device import gpu_named
from attnc.cost_models.token_model import MEMORY, ScanWork, TokenWork, scan_estimate, scan_seconds
from attnc.forms.scan import Scan
from attnc.region import Region
from attnc.rule_recurrence import RecurrenceRule, RecurrenceShape

GPUS = ("a100", "h100", "b200", "l40s", "mi300x")
MAMBA = TokenWork(4, 4096, 2048, 16, 1, 4 * 4096 * 2048 * 8.0, 4 * 4096 * 16 * 8.0, 16, 2048)


@pytest.mark.parametrize("name", GPUS)
def test_a_scan_is_not_faster_than_memory_and_exponentials(name: str) -> None:
    gpu = gpu_named(name)
    seconds = scan_seconds(ScanWork(MAMBA, 16, 32, 4), gpu)
    assert seconds > MAMBA.moved / (gpu.bandwidth * MEMORY) * 0.9
    assert seconds > 4 * 4096 * 2048 * 16 / gpu.exp2_rate
    assert scan_estimate(ScanWork(MAMBA, 16, 32, 4), gpu).low < seconds


@pytest.mark.parametrize("name", GPUS)
def test_more_tokens_and_training_take_longer(name: str) -> None:
    gpu, scan = gpu_named(name), ScanWork(MAMBA, 16, 32, 4)
    longer = replace(scan, work=replace(MAMBA, L=4096, moved=2 * MAMBA.moved))
    assert scan_seconds(longer, gpu) > scan_seconds(scan, gpu)
    assert scan_seconds(replace(scan, work=replace(MAMBA, training=True)), gpu) > 3 * scan_seconds(scan, gpu)
    assert scan_seconds(replace(scan, apart=True), gpu) > scan_seconds(scan, gpu)


def _picked(rule: RecurrenceRule, shape: RecurrenceShape) -> Scan:
    region = Region("", "", rule, shape, "bfloat16", "cuda")
    (form,) = Scan().space(region, gpu_named("h100"))
    assert isinstance(form, Scan) and form.misfit(region, gpu_named("h100")) is None
    return form


def test_tiles_picked_keep_a_threads_share_in_registers() -> None:
    mamba = _picked(RecurrenceRule(decay="state", gate="write"), RecurrenceShape(1, 4096, 2048, 16, 1, 1))
    assert mamba.block_t * mamba.block_h * 16 <= 64 * 32 * mamba.warps
    lru = _picked(RecurrenceRule(decay="token", factors=True), RecurrenceShape(1, 2560, 2048, 1, 1))
    assert lru.block_h <= 32 * lru.warps

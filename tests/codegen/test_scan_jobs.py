"""The scan and step kernels compile ahead of time for every target; the tiles that forms pick do not spill."""

from __future__ import annotations

import pytest
import torch

from attnc.codegen.compile_stats import TARGETS, Compiled, compile_job
from attnc.codegen.gpu_scan import ScanKnobs
from attnc.codegen.gpu_step import StepKnobs
from attnc.codegen.scan_jobs import scan_jobs, step_job
from attnc.rule_recurrence import RecurrenceRule as R
from attnc.rule_recurrence import RecurrenceShape

BF16, FP32 = torch.bfloat16, torch.float32
SCANS = {
    "mamba1": (R(decay="state", gate="write", state_in=True), (16, 1, 1)),
    "mamba1_packed": (R(decay="state", gate="write", packed=True), (16, 1, 1)),
    "rg_lru": (R(decay="token", factors=True), (1, 1, 0)),
    "hgrn": (R(decay="channel", factors=True, packed=True), (1, 1, 0)),
    "before": (R(decay="channel", factors=True, read="before", gate="write"), (16, 16, 2)),
    "rwkv4": (R(decay="token", gate="write", read="before"), (1, 2, 0)),
    "cumulative_sum": (R(decay="head"), (1, 64, 0)),
}
STEPS = {
    "gated_delta_rule": R(decay="token", delta=True, gate="write", qk_norm=1e-6, scale=0.125, state_in=True),
    "kda_packed": R(decay="channel", delta=True, gate="write", qk_norm=1e-6, packed=True),
    "rwkv7": R(decay="channel", low_rank=True, state_in=True),
    "mlstm": R(decay="token", gate="exp", normaliser="max1", eps=1e-6, state_in=True),
    "rwkv6": R(decay="channel", read="before", state_in=True),
}


def scans(name: str, dtype: torch.dtype, target: str, knobs: ScanKnobs, folder=None) -> list[Compiled]:
    rule, (K, V, Hk) = SCANS[name]
    shape = RecurrenceShape(1, 64, 2048, K, V, Hk)
    jobs = scan_jobs(rule, dtype, shape, knobs, target, bonus=name == "before")
    found = [compile_job(job, folder=folder, timeout_s=600) for job in jobs]
    assert all(isinstance(x, Compiled) for x in found), f"{name} {dtype} {target}: {found}"
    return found


@pytest.mark.parametrize(("name", "target"), [("mamba1", "cuda:90"), ("hgrn", "hip:gfx942")])
def test_a_sample_of_scans_compiles_without_spills(name: str, target: str, tmp_path) -> None:
    found = scans(name, BF16, target, ScanKnobs(4, 16, 2), tmp_path)
    assert [x.spill_bytes for x in found] == [0, 0]


@pytest.mark.parametrize(("name", "target"), [("gated_delta_rule", "cuda:80"), ("rwkv7", "hip:gfx942")])
def test_a_sample_of_steps_compiles(name: str, target: str, tmp_path) -> None:
    job = step_job(STEPS[name], BF16, RecurrenceShape(1, 4, 1, 32, 32, 2), StepKnobs(8, 1), target)
    found = compile_job(job, folder=tmp_path)
    assert isinstance(found, Compiled) and found.spill_bytes == 0, found


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SCANS)
def test_every_scan_compiles_for_every_target(name: str, target: str) -> None:
    wide = SCANS[name][1][0] > 1
    scans(name, BF16, target, ScanKnobs() if wide else ScanKnobs(16, 128, 4))
    scans(name, FP32, target, ScanKnobs(8, 16, 2) if wide else ScanKnobs(16, 32, 1))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", STEPS)
def test_every_step_compiles_for_every_target(name: str, target: str) -> None:
    for dtype, K, knobs in ((BF16, 128, StepKnobs(32, 4)), (FP32, 64, StepKnobs(8, 1))):
        shape = RecurrenceShape(1, 16, 1, K, K, 8)
        found = compile_job(step_job(STEPS[name], dtype, shape, knobs, target, bonus=name == "rwkv6"), timeout_s=600)
        assert isinstance(found, Compiled), f"{name} {dtype} {target}: {found}"

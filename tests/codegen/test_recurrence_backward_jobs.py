"""The backward kernels of chunked recurrences compile ahead of time for every target; their loops do not spill."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnc.codegen.compile_stats import TARGETS, Compiled, compile_job
from attnc.codegen.gpu_recurrence import BackwardKnobs, RecurrenceKnobs
from attnc.codegen.recurrence_backward_jobs import backward_jobs
from attnc.rule_recurrence import RecurrenceRule

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KNOBS, SMALL = RecurrenceKnobs(), BackwardKnobs(32, 32, stages=1, state_stages=1, output_stages=1)
RULES = {
    "linear": RecurrenceRule(scale=0.125),
    "lightning": RecurrenceRule(decay="head"),
    "mamba2_packed": RecurrenceRule(decay="token", gate="write", packed=True),
    "gated_delta": RecurrenceRule(decay="token", delta=True, gate="write", qk_norm=1e-6, scale=0.125),
    "rwkv6": RecurrenceRule(decay="channel", read="before"),
    "kda": RecurrenceRule(decay="channel", delta=True, gate="write", qk_norm=1e-6),
    "rwkv7": RecurrenceRule(decay="channel", low_rank=True),
    "low_rank_by_token": RecurrenceRule(decay="token", low_rank=True, gate="write", packed=True),
}


def compiled(name, dtype, target, *, only=None, K=64, V=64, knobs=KNOBS, schedule=None, folder=None) -> dict:
    rule = RULES[name]
    knobs = replace(knobs, backward=schedule)
    jobs = backward_jobs(rule, dtype, 2, K, V, knobs, target, bonus=name == "rwkv6")
    found = {job.kernel: compile_job(job, folder=folder, timeout_s=600) for job in jobs if only in (None, job.kernel)}
    for kernel, made in found.items():
        assert isinstance(made, Compiled), f"{kernel} {name} {dtype} {target}: {made}"
    return found


@pytest.mark.parametrize(
    ("name", "kernel", "target"),
    [("gated_delta", "chunk_state_backward", "cuda:90"), ("rwkv6", "chunk_values_backward", "hip:gfx942")],
)
def test_a_sample_compiles(name, kernel, target, tmp_path):
    (found,) = compiled(name, BF16, target, only=kernel, folder=tmp_path).values()
    assert {"mma", "wgmma", "mfma"} & found.instructions.keys()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", RULES)
def test_every_rule_compiles_for_every_target(name, target):
    compiled(name, BF16, target, schedule=SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_other_types_and_widths_compile_for_every_target(target):
    tiny = replace(SMALL, block_k=16, block_v=16, state_block_v=16, output_block_k=16, output_block_v=16)
    for name in ("linear", "kda", "low_rank_by_token"):
        compiled(name, FP32, target, K=32, V=32, knobs=replace(KNOBS, chunk_size=32), schedule=tiny)
        compiled(name, FP16, target, K=48, V=40, knobs=replace(KNOBS, chunk_size=32), schedule=tiny)


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", ["linear", "mamba2_packed", "gated_delta", "rwkv6", "kda"])
def test_no_loop_spills_on_an_h100(name, width):
    for kernel, made in compiled(name, BF16, "cuda:90", K=width, V=width).items():
        assert "local" not in made.instructions and made.spill_bytes <= 16, kernel


def test_a_job_says_what_a_launch_would_pass():
    knobs = replace(KNOBS, backward=SMALL)
    jobs = {job.kernel: job for job in backward_jobs(RULES["gated_delta"], FP16, 2, 80, 64, knobs, "cuda:80")}
    assert list(jobs) == ["chunk_within_backward", "chunk_state_backward", "chunk_output_backward"]
    made = jobs["chunk_output_backward"]
    assert (made.num_warps, made.constexprs["BLOCK_K"], made.constexprs["SOLVE"]) == (8, 32, 1)
    assert made.signature["p_q"] == "*fp16" and made.signature["p_dq"] == "*fp32" and made.constexprs["q_e"] == 1
    assert made.constexprs["p_a"] is None and made.constexprs["MID"] == "tl.float32"

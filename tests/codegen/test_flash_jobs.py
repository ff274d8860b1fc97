"""The flash kernels compile ahead of time for every target, and their loops do not spill on an H100."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnc.codegen.compile_stats import TARGETS, Compiled, compile_job
from attnc.codegen.flash_jobs import KERNELS, flash_job
from attnc.codegen.gpu_flash import FlashKnobs
from attnc.codegen.triton_text import slot_of
from attnc.errors import LoweringError
from attnc.rule_attention import AttentionRule
from tests.codegen.flash_cases import CASES, Shape

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CAUSAL = AttentionRule.parse(CASES["causal"].rule)
TILE = FlashKnobs(
    block_m=64, block_n=32, stages=2, dq_block_n=32, dq_stages=1, dkv_block_m=32, dkv_block_n=32, dkv_stages=1
)


def compiled(kernel, name, dtype, target, *, group=2, E=64, Ev=64, knobs=TILE, folder=None):
    case = CASES[name]
    slots = [slot_of(t, needs_grad=t.is_floating_point()) for t in case.captured(Shape())]
    job = flash_job(kernel, AttentionRule.parse(case.rule), slots, dtype, group, E, Ev, knobs, target)
    found = compile_job(job, folder=folder)
    assert isinstance(found, Compiled), f"{kernel} {name} {dtype} {target}: {found}"
    return found


@pytest.mark.parametrize(
    ("kernel", "name", "target"),
    [("flash_forward", "sink", "cuda:80"), ("flash_dq", "relative_table", "cuda:90"),
     ("flash_dkv", "documents", "hip:gfx942")],
)  # fmt: skip
def test_a_sample_compiles(kernel, name, target, tmp_path):
    found = compiled(kernel, name, BF16, target, folder=tmp_path)
    assert {"mma", "wgmma", "mfma"} & found.instructions.keys()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_every_rule_compiles_for_every_target(name, target):
    for kernel in KERNELS:
        for dtype, E, Ev, skip in ((BF16, 64, 64, "range"), (FP16, 80, 192, "table")):
            compiled(kernel, name, dtype, target, E=E, Ev=Ev, knobs=replace(TILE, skip=skip))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_other_types_and_widths_compile_for_every_target(target):
    small = replace(TILE, block_n=16, dq_block_m=32, dq_block_n=16, dkv_block_m=16)
    for kernel in KERNELS:
        compiled(kernel, "causal", FP32, target, E=32, Ev=32, knobs=small)
        compiled(kernel, "causal", BF16, target, E=256, Ev=256, knobs=replace(small, warps=8, dq_warps=8, dkv_warps=8))
    if target in ("cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx950"):
        compiled("flash_forward", "causal", torch.float8_e4m3fn, target)
    if target == "hip:gfx942":
        compiled("flash_forward", "causal", torch.float8_e4m3fnuz, target)


@pytest.mark.slow
@pytest.mark.parametrize(("E", "knobs"), [
    (64, FlashKnobs(block_m=128, block_n=64, warps=4)),
    (64, FlashKnobs(block_m=128, block_n=64, warps=8)),
    (128, FlashKnobs(block_m=128, block_n=64, warps=8, dkv_warps=8)),
])  # fmt: skip
def test_no_loop_spills_on_an_h100(E, knobs):
    for kernel in KERNELS:
        for group in (1, 4):  # dkv loops over the group: what it keeps across may leave the registers, outside of tiles
            found = compiled(kernel, "causal", BF16, "cuda:90", group=group, E=E, Ev=E, knobs=knobs)
            assert "local" not in found.instructions, kernel
            assert found.spill_bytes <= (128 if kernel == "flash_dkv" and group > 1 else 0), kernel


def test_a_job_says_what_a_launch_would_pass():
    job = flash_job("flash_dq", CAUSAL, [], FP16, 4, 80, 64, FlashKnobs(dq_block_m=32, dq_warps=8), "cuda:80")
    assert (job.num_warps, job.constexprs["BLOCK_M"], job.constexprs["GROUP"]) == (8, 32, 4)
    assert (job.constexprs["E_MAIN"], job.constexprs["E_TAIL"], job.constexprs["SCALE"]) == (64, 16, 0.25)
    assert job.signature["p_q"] == "*fp16" and job.constexprs["q_e"] == 1 and job.constexprs["p_list"] is None
    with pytest.raises(LoweringError, match="flash_forward, flash_dq, flash_dkv"):
        flash_job("flash", CAUSAL, [], FP16, 4, 80, 64, FlashKnobs(), "cuda:80")

"""The kernels of key lists compile ahead of time for every target, and their loops do not spill on an H100."""

from __future__ import annotations

import pytest
import torch

from attnc.codegen.compile_stats import TARGETS, Compiled, compile_job
from attnc.codegen.gpu_key_lists import KERNELS, ListKnobs
from attnc.codegen.key_list_jobs import list_job
from attnc.codegen.triton_text import slot_of
from attnc.errors import LoweringError
from attnc.rule_attention import AttentionRule
from tests.codegen.flash_cases import CASES, Shape

BF16, FP16 = torch.bfloat16, torch.float16
SMALL = ListKnobs(32, 32, 2, 2, 32, 32, 2, 1, 32, 32, 2, 1)
# Rows of a tile and keys of a block: rows sorted by block, a group with a list, single keys.
LAYOUTS = {"sorted": (128, 512), "grouped": (16, 64), "single": (8, 1)}


def compiled(kernel, name, layout, target, *, dtype=BF16, E=64, Ev=64, knobs=SMALL, folder=None, **more):
    case = CASES[name]
    slots = [slot_of(t, needs_grad=t.is_floating_point()) for t in case.captured(Shape())]
    rule = AttentionRule.parse(case.rule)
    found = compile_job(
        list_job(kernel, rule, slots, dtype, E, Ev, *LAYOUTS[layout], knobs, target, **more), folder=folder
    )
    assert isinstance(found, Compiled), f"{kernel} {name} {layout} {target}: {found}"
    return found


@pytest.mark.parametrize(
    ("kernel", "name", "layout", "target"),
    [("list_forward", "sink", "single", "cuda:90"), ("list_dkv", "causal", "grouped", "hip:gfx942")],
)
def test_a_sample_compiles(kernel, name, layout, target, tmp_path):
    found = compiled(kernel, name, layout, target, folder=tmp_path)
    assert {"mma", "wgmma", "mfma"} & found.instructions.keys()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_compiles_for_every_target(layout, target):
    for kernel in KERNELS:
        compiled(kernel, "causal", layout, target, final=layout != "sorted")
        compiled(kernel, "relative_table", layout, target, dtype=FP16, E=80, Ev=192)
        compiled(kernel, "softcap", layout, target, keeps="all", added=True)
        compiled(kernel, "documents", layout, target, keeps="diagonal")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_loop_of_the_forward_spills_on_an_h100(layout):
    found = compiled("list_forward", "causal", layout, "cuda:90", E=128, Ev=128, knobs=ListKnobs(warps=8))
    assert "local" not in found.instructions and not found.spill_bytes


def test_a_job_says_what_a_launch_would_pass():
    rule = AttentionRule.parse(CASES["causal"].rule)
    job = list_job("list_dq", rule, [], FP16, 80, 64, 8, 1, ListKnobs(dq_warps=8), "cuda:80", final=False)
    assert (job.num_warps, job.constexprs["BLOCK_M"], job.constexprs["SCATTER"]) == (8, 16, True)
    assert job.signature["p_rows"] == "*i64" and job.signature["p_dq"] == "*fp32" and job.constexprs["p_added"] is None
    with pytest.raises(LoweringError, match="list_forward, list_dq, list_dkv"):
        list_job("list", rule, [], FP16, 80, 64, 8, 1, ListKnobs(), "cuda:80")

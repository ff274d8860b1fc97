"""Operands of 8 bits in the flash and decode kernels: results, what compiles for which target, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnc.codegen.compile_stats import TARGETS, Compiled, compile_job
from attnc.codegen.decode_jobs import decode_jobs
from attnc.codegen.flash_jobs import flash_job
from attnc.codegen.float8 import FLOAT8, OCP, multiplies, name_of, reads, unread, wide_type
from attnc.codegen.gpu_decode import DecodeKnobs
from attnc.codegen.gpu_flash import FlashKnobs
from attnc.errors import UsageError
from attnc.forms import spell_attention
from attnc.forms.flash import Flash
from attnc.forms.flash_decode import FlashDecode
from attnc.op_decode import flash_decode
from attnc.op_flash import flash
from attnc.rule_attention import AttentionRule
from tests.codegen.flash_cases import CASES, SMALL, Shape, call_of, tolerance
from tests.codegen.interpreter import mend
from tests.tolerance import error

mend()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4, E5, E4Z, _ = FLOAT8
MIXES = [
    (BF16, E4, E4),
    (E4, E4, E4),
    (E5, E5, E5),
    (FP16, E5, E4),
    (FP32, E4, BF16),
    (E4, BF16, BF16),
]
DECODE = FlashDecode(block_m=16, block_n=16, splits=4)


def mixed(name: str, x: Shape, types: tuple[torch.dtype, ...]):
    """A case whose query, key and value have `types` of their own."""
    call = call_of(name, replace(x, dtype=FP32))
    query, key, value = (t.detach().to(kind) for t, kind in zip((call.query, call.key, call.value), types, strict=True))
    return replace(call, query=query, key=key, value=value, captured=[t.detach() for t in call.captured])


def check(name: str, x: Shape, types: tuple[torch.dtype, ...], knobs: Flash | FlashDecode) -> None:
    """Out and lse against float64 over the numbers that 8 bits stand for."""
    call = mixed(name, x, types)
    run = flash if isinstance(knobs, Flash) else flash_decode
    given = (call.query, call.key, call.value, call.captured, call.sizes)
    out, lse = run(*given, spell_attention(knobs, call.rule))
    want, want_lse = call.double().wanted()
    assert out.dtype == wide_type(types[0]) and lse.dtype == FP32
    assert error(out, want.detach()) <= tolerance(out.dtype)
    assert error(lse, want_lse) <= 1e-5  # products of widened operands are exact, as are their float32 sums nearly


@pytest.mark.parametrize("types", MIXES, ids=lambda types: "-".join(map(name_of, types)))
def test_flash_of_any_mix_is_that_of_the_widened_operands(types, poisoned_memory):
    check("causal_with_cache", Shape(33, 70, Hq=4, H=2, E=24, Ev=16), types, SMALL)


@pytest.mark.parametrize("types", MIXES, ids=lambda types: "-".join(map(name_of, types)))
def test_decode_of_any_mix_is_that_of_the_widened_operands(types, poisoned_memory):
    check("causal_with_cache", Shape(1, 70, Hq=4, H=2, E=24, Ev=16), types, DECODE)


@pytest.mark.parametrize(("name", "x"), [
    ("full", Shape(1, 200, Hq=4, H=1)),
    ("full", Shape(70, 1)),
    ("window", Shape(70, 70)),
    ("padded", Shape(33, 33, B=2, Hq=2, H=1)),
    ("sink", Shape(33, 33, Hq=4, H=2)),
    ("softcap", Shape(33, 33)),
    ("bias_of_keys", Shape(33, 33, B=2)),
    ("rows_without_keys", Shape(33, 33)),
], ids=str)  # fmt: skip
def test_masks_groups_and_sinks_over_a_cache_of_8_bits(name, x, poisoned_memory):
    check(name, x, (BF16, E4, E4), SMALL)
    if x.L * x.Hq // x.H <= 66:
        check(name, x, (BF16, E4, E5), DECODE)


@pytest.mark.slow
@pytest.mark.parametrize("types", MIXES, ids=lambda types: "-".join(map(name_of, types)))
@pytest.mark.parametrize("name", CASES)
def test_every_rule_over_operands_of_8_bits(name, types, poisoned_memory):
    for L, S in ((1, 1), (1, 200), (33, 33), (70, 70)):
        check(name, Shape(L, S, Hq=4, H=2, E=40, B=2), types, SMALL)
        check(name, Shape(min(L, 16), S, Hq=4, H=2, E=40, B=2), types, DECODE)


def test_a_value_inside_a_key_of_8_bits_is_read_once():
    key = torch.randn(1, 1, 70, 48).to(E4)
    given = (torch.randn(1, 8, 1, 48, dtype=BF16), key, key[..., :32], [], [])
    rule = AttentionRule.parse("score=0.125 * s")
    apart, within = (flash_decode(*given, spell_attention(DECODE, rule))[0] for DECODE in (
        FlashDecode(block_n=16, splits=3), FlashDecode(block_n=16, splits=3, value="in_key")))  # fmt: skip
    assert error(within, apart) <= tolerance(BF16)


def test_products_of_8_bits_need_both_operands_and_the_knob():
    assert multiplies(E4, E4) and not multiplies(BF16, E4) and not multiplies(E4, E5)
    check("causal", Shape(33, 33, E=32), (E4, E4, E4), replace(SMALL, dot8="on"))
    check("causal", Shape(33, 33, E=32), (BF16, E4, E4), replace(SMALL, dot8="on"))
    job = flash_job("flash_forward", AttentionRule.parse("score=s"), [], BF16, 1, 64, 64,
                    FlashKnobs(dot8=True), "cuda:90", held=(E4, E4))  # fmt: skip
    assert not job.constexprs["DOT8"] and (job.signature["p_q"], job.signature["p_k"]) == ("*bf16", "*fp8e4nv")
    job = flash_job("flash_forward", AttentionRule.parse("score=s"), [], E4, 1, 64, 64, FlashKnobs(), "cuda:90")
    assert not job.constexprs["DOT8"] and job.signature["p_out"] == "*bf16"


@pytest.mark.parametrize("narrow", range(3))
def test_operands_of_8_bits_are_not_differentiated(narrow):
    qkv = [torch.randn(1, 1, 17, 16).requires_grad_() for _ in range(3)]
    qkv[narrow] = qkv[narrow].detach().to(E4)
    with pytest.raises(UsageError, match="found operands of float8_e4m3fn, allowed are float32, float16 and bfloat16"):
        flash(*qkv, [], [], spell_attention(SMALL, AttentionRule.parse("score=s")))


def test_the_table_names_what_a_target_reads():
    assert reads("cuda:90") == reads("cuda:103") == reads("hip:gfx950") == OCP
    assert reads("cuda:86") == (E5,) and reads("hip:gfx90a") == ()
    assert unread([BF16, E4], "cuda:89") is None and unread([BF16, FP32], "hip:gfx90a") is None
    allowed = "allowed there are float8_e4m3fnuz, float8_e5m2fnuz and wider types"
    assert unread([BF16, E4], "hip:gfx942") == f"found operands of float8_e4m3fn on hip:gfx942, {allowed}"
    assert "allowed there are none of 8 bits" in unread([E4], "hip:gfx90a")


def jobs(types: tuple[torch.dtype, ...], target: str, *, dot8: bool = False, width: int = 64):
    query, *held = types
    rule, small = AttentionRule.parse(CASES["causal"].rule), FlashKnobs(width, width, 4, 2, dot8=dot8)
    knobs = DecodeKnobs(block_n=width, dot8=dot8)
    yield flash_job("flash_forward", rule, [], query, 2, width, width, small, target, held=tuple(held))
    yield decode_jobs(rule, [], query, 8, width, width, knobs, target, held=tuple(held))[0]


def compiles(types, target, folder: Path, **sizes) -> bool:
    found = [compile_job(job, folder=folder) for job in jobs(types, target, **sizes)]
    assert all(one.spill_bytes == 0 for one in found if isinstance(one, Compiled)), found
    return all(isinstance(one, Compiled) for one in found)


@pytest.mark.parametrize(("target", "kind"), [("cuda:90", E4), ("cuda:80", E4), ("hip:gfx942", E4Z)])
def test_a_sample_of_the_table_compiles_and_nothing_else(target, kind, tmp_path):
    assert compiles((BF16, kind, kind), target, tmp_path, width=32) == (kind in reads(target))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_table_is_what_compiles(target, tmp_path):
    for kind in FLOAT8:
        if kind in reads(target):
            assert compiles((BF16, kind, kind), target, tmp_path)
            assert compiles((FP16, kind, kind), target, tmp_path)
            assert compiles((kind, kind, kind), target, tmp_path)
            assert target in ("cuda:80", "cuda:86") or compiles((kind, kind, kind), target, tmp_path, dot8=True)
        elif target.startswith("cuda"):  # AMD's are converted in software
            assert not compiles((BF16, kind, kind), target, tmp_path)

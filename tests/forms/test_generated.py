"""Forms whose kernels are generated: right under Triton's interpreter, spaces that fit, defaults that stay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnc.cost_models.device import gpu_named
from attnc.cost_models.tile_model import fits
from attnc.forms import Dense, parse_form
from attnc.forms.flash import Flash, band_of, default_for, is_band, skips, work_of
from attnc.forms.flash_decode import FlashDecode, decode_default
from attnc.forms.masked import reference
from attnc.ops import spell_attention
from attnc.region import AttentionRegion
from attnc.rule_attention import AttentionRule, AttentionShape

GPUS = ("a100", "h100", "b200", "rtx5090", "l40s", "mi300x")
CAUSAL = "score=0.125 * s; keep=j - i <= 0"
WINDOW = "score=0.125 * s; keep=j - i <= 0 and i - j <= 511"
PREFIX = "score=0.125 * s; keep=j - i <= 0 or j <= 99"
DOCUMENTS = "score=0.125 * s; keep=t0[b, i] - t0[b, j] == 0"


def region(rule: str = CAUSAL, L: int = 4096, S: int | None = None, **facts) -> AttentionRegion:
    shape = AttentionShape(2, 16, 4, L, L if S is None else S, 128, 128)
    facts = {"written": "sdpa", "captured": ("int64[2, 4096]",) if "t0" in rule else (), **facts}
    return AttentionRegion("layer", "sdpa", AttentionRule.parse(rule), shape, "bfloat16", "cuda", **facts)


@pytest.mark.parametrize(
    ("form", "rule", "L", "S"),
    [
        ("flash{block_m=16,block_n=32}", CAUSAL, 33, 33),
        ("flash{block_m=32,block_n=16,skip=table}", "score=0.3 * s; keep=t0[b, i] - t0[b, j] == 0; empty=zero", 33, 33),
        ("flash{block_m=16,block_n=16}", "score=0.3 * s; keep=j - i <= -3; empty=mean", 17, 17),
        ("flash_decode{splits=4,block_n=16}", "score=20.0 * tanh(0.02 * s)", 1, 70),
        ("flash_decode{splits=2,block_n=32}", "score=0.3 * s; keep=j - i <= 66", 3, 70),
    ],
)
def test_a_generated_form_equals_its_reference(form: str, rule: str, L: int, S: int, poisoned_memory, tol) -> None:
    query, key, value = torch.randn(2, 4, L, 32), torch.randn(2, 2, S, 32), torch.randn(2, 2, S, 16)
    ids = (torch.arange(S) * 3 // S).expand(2, S).contiguous()
    parsed = AttentionRule.parse(rule)
    captured = [ids] if "t0" in rule else []
    out, lse = torch.ops.attnc.attention(query, key, value, captured, [], spell_attention(form, parsed))
    wide = [t.double() for t in (query, key, value)]
    want, want_lse = reference(*wide, captured, [], parsed)
    assert (out - want).abs().max() <= tol(torch.float32) * want.abs().max()
    finite = want_lse > -torch.inf
    assert (lse[finite] - want_lse[finite]).abs().max() <= 1e-4 and (lse[~finite] == -torch.inf).all()


def test_gradients_of_flash_equal_the_reference(poisoned_memory, tol) -> None:
    leaves = [torch.randn(1, heads, 33, 16, requires_grad=True) for heads in (2, 1, 1)]
    rule = AttentionRule.parse("score=0.25 * s; keep=j - i <= 0")
    spelled = spell_attention(
        "flash{block_m=16,block_n=16,dq_block_m=16,dq_block_n=16,dkv_block_m=16,dkv_block_n=16}", rule
    )
    out, _ = torch.ops.attnc.attention(*leaves, [], [], spelled)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, grad)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want = torch.autograd.grad(reference(*wide, [], [], rule)[0], wide, grad.double())
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= tol(torch.float32) * b.abs().max()


@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize("rule", ["score=0.125 * s", CAUSAL, WINDOW, PREFIX, DOCUMENTS])
def test_every_setting_of_a_space_fits_and_there_are_hundreds(device: str, rule: str) -> None:
    gpu, where = gpu_named(device), region(rule)
    start = default_for(where, gpu, skips(where.rule.keep)[0])
    assert start is not None
    space = start.settings(where, gpu)
    assert space[0] == start and len(space) == len(set(space)) >= 300
    work = work_of(where, start.skip)
    for form in space[:: len(space) // 20]:
        assert fits(work, form.tiles, gpu, kernels=("forward",)) is None
        assert parse_form(form.spell()) == form


def test_a_decode_space_fits_and_holds_hundreds() -> None:
    gpu, where = gpu_named("h100"), region("score=0.125 * s", L=1, S=4096)
    start = decode_default(where, gpu)
    assert start is not None and len(start.settings(where, gpu)) >= 300
    assert all(parse_form(form.spell()) == form for form in start.settings(where, gpu)[::50])


def test_defaults_are_deterministic() -> None:
    gpu = gpu_named("h200")
    first = default_for(region(WINDOW), gpu)
    default_for.cache_clear()
    work_of.cache_clear()
    assert default_for(region(WINDOW), gpu) == first


def test_masks_decide_how_tiles_are_skipped() -> None:
    for rule, expected in ((CAUSAL, ("range", "table")), ("score=s", ("range",)), (DOCUMENTS, ("table",))):
        assert skips(AttentionRule.parse(rule).keep) == expected
    assert is_band(AttentionRule.parse(WINDOW).keep) and not is_band(AttentionRule.parse(PREFIX).keep)
    band = band_of(AttentionRule.parse(WINDOW).keep)
    assert (band.back, band.ahead) == (511, 0)


def test_tables_visit_fewer_tiles_than_bounds_where_the_mask_is_no_band() -> None:
    by_bounds, by_table = (work_of(region(PREFIX), skip).tile_count(128, 128) for skip in ("range", "table"))
    assert by_table.visited < 0.6 * by_bounds.visited


@pytest.mark.parametrize(
    ("form", "facts", "says"),
    [
        (Flash(), {"device": "cpu"}, "Triton kernel for GPUs"),
        (Flash(), {"dtype": "float64"}, "bfloat16, float16, float32"),
        (Flash(), {"shape": AttentionShape(1, 1, 1, 8, 8, 512, 64)}, "heads of up to 256"),
        (Flash(), {"rule": AttentionRule(dropout=0.5)}, "dropout 0.5"),
        (FlashDecode(), {"training": True}, "no backward"),
        (FlashDecode(), {}, "at most 16 query rows"),
        (Dense(), {"rule": AttentionRule.parse("score=5.0 * tanh(s)")}, "not linear in the product"),
    ],
)
def test_a_refusal_on_a_gpu_is_a_true_sentence(form, facts: dict, says: str) -> None:
    refusal = form.refuse(replace(region(), **facts))
    assert refusal is not None and says in refusal and refusal.endswith(".")


def test_a_window_is_predicted_faster_than_the_mask_in_memory() -> None:
    gpu, where = gpu_named("h100"), region(WINDOW, L=16384)
    flash = default_for(where, gpu)
    assert flash is not None and flash.seconds(where, gpu) < 0.2 * Dense().seconds(where, gpu)

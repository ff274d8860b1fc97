"""Forms whose kernels are generated: right under Triton's interpreter, spaces that fit, defaults that stay."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from attnc.codegen.render import skeleton_text
from attnc.cost_models.device import gpu_named
from attnc.cost_models.tile_model import fits
from attnc.forms import Dense, parse_form
from attnc.forms.flash import Flash, band_of, default_for, is_band, skips, work_of
from attnc.forms.flash_decode import FlashDecode, decode_default
from attnc.forms.masked import reference
from attnc.operands import Operands
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
    facts = {
        "shape": shape,
        "dtype": "bfloat16",
        "device": "cuda",
        "written": "sdpa",
        "captured": ("int64[2, 4096]",) if "t0" in rule else (),
        **facts,
    }
    return AttentionRegion("layer", "sdpa", AttentionRule.parse(rule), **facts)


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
    want, want_lse = reference(Operands(*wide, captured, [], parsed))
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
    want = torch.autograd.grad(reference(Operands(*wide, [], [], rule))[0], wide, grad.double())
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


def test_keys_are_split_where_heads_alone_do_not_fill_the_device() -> None:
    gpu, splits = gpu_named("h100"), []
    for B in (1, 8, 512):
        few = region("score=0.125 * s", shape=AttentionShape(B, 64, 8, 1, 16384, 128, 128))
        start = decode_default(few, gpu)
        assert start is not None
        splits.append(start.splits)
    assert splits[0] >= 16 > splits[1] > splits[2] == 1


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


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("form", ["flash{block_m=16,block_n=16}", "flash_decode{block_n=16,splits=2}", "dense"])
@pytest.mark.parametrize("big", [1e4, 1e9, 3.389e38])
def test_a_score_is_not_rounded_away_beside_a_mask_of_the_run(form: str, big: float, tol) -> None:
    query, key, value = (torch.randn(1, 2, length, 16) for length in (7, 33, 33))
    mask = (torch.rand(1, 1, 1, 33) < 0.7).float()
    rule = AttentionRule.parse(f"score=0.25 * s + {big} * f0[b, 0, 0, j] - {big}")
    out, _ = torch.ops.attnc.attention(query, key, value, [mask], [], spell_attention(form, rule))
    want = ((query @ key.mT).double() * 0.25 + (mask.double() - 1) * big).softmax(-1) @ value.double()
    assert (out - want).abs().max() <= tol(torch.float32) * want.abs().max()


@pytest.mark.parametrize("form", ["flash{block_m=16,block_n=16}", "flash_decode{block_n=16,splits=2}"])
def test_a_row_of_the_lowest_numbers_is_the_mean_and_a_nan_stays_one(form: str, tol) -> None:
    query, key, value = (torch.randn(1, 2, length, 16) for length in (7, 33, 33))
    mask = torch.zeros(1, 1, 7, 33)
    mask[0, 0, 0] = LOWEST
    rule = AttentionRule.parse("score=0.25 * s + f0[0, 0, i, j]")
    out, _ = torch.ops.attnc.attention(query, key, value, [mask], [], spell_attention(form, rule))
    assert (out[:, :, 0] - value.mean(2)).abs().max() <= tol(torch.float32)
    query[0, 0, 1] = torch.nan
    out, _ = torch.ops.attnc.attention(query, key, value, [mask], [], spell_attention(form, rule))
    assert out[0, 0, 1].isnan().all() and not out[0, 1].isnan().any()


@pytest.mark.parametrize("form", ["flash{block_m=16,block_n=16}", "flash_decode{block_n=16,splits=2}"])
def test_a_row_of_minus_infinity_is_nan_where_the_rule_says_so(form: str) -> None:
    query, key, value = (torch.randn(1, 2, length, 16) for length in (7, 33, 33))
    mask = torch.zeros(1, 1, 7, 33)
    mask[0, 0, 2] = -torch.inf
    mask[0, 0, 4, 5:] = -torch.inf
    for empty, rows in (("nan", [2]), ("never", [])):
        rule = AttentionRule.parse(f"score=0.25 * s + f0[0, 0, i, j]; empty={empty}")
        out, _ = torch.ops.attnc.attention(query, key, value, [mask], [], spell_attention(form, rule))
        want, _ = reference(Operands(query, key, value, [mask], [], rule))
        assert out.isnan().any(-1).nonzero()[:, 2].unique().tolist() == rows
        torch.testing.assert_close(out, want, equal_nan=True, atol=1e-5, rtol=1e-5)


def test_softcap_is_as_exact_as_eager() -> None:
    query, key, value = (torch.randn(1, 2, 33, 16) for _ in range(3))
    rule = AttentionRule.parse("score=50.0 * tanh(0.005 * s)")
    out, _ = torch.ops.attnc.attention(query, key, value, [], [], spell_attention(Flash(16, 16), rule))

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (50.0 * torch.tanh(q @ k.mT * 0.25 / 50.0)).softmax(-1) @ v

    want = eager(query.double(), key.double(), value.double())
    own = (eager(query, key, value) - want).abs().max()
    assert (out - want).abs().max() <= max(1.5 * own, 1e-6 * want.abs().max())


@pytest.mark.parametrize("name", ["flash", "flash_decode"])
def test_constants_of_a_skeleton_can_be_written_out_again(name: str) -> None:
    # Inductor copies a kernel's global constants into its own file as the text of their values.
    source = skeleton_text(name)
    written = re.findall(r"^([A-Z]\w*) = tl\.constexpr\((.*)\)$", source, re.MULTILINE)
    assert written
    for constant, text in written:
        assert re.fullmatch(r"[-\d.e]+", text), constant


@pytest.mark.parametrize("device", ["v100", "t4"])
def test_a_device_without_a_target_gets_no_generated_form(device: str) -> None:
    gpu = gpu_named(device)
    for form in (Flash(), FlashDecode()):
        assert form.space(region(), gpu) == ()
    assert "has none" in (Flash().misfit(region(), gpu) or "")


def test_knobs_that_do_not_fit_are_a_misfit() -> None:
    wide = region(shape=AttentionShape(1, 8, 8, 512, 512, 256, 256), dtype="float32")
    assert "shared memory" in (Flash(block_m=256, block_n=256, stages=5).misfit(wide, gpu_named("rtx5090")) or "")

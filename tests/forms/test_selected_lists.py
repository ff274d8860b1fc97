"""What the selected family is predicted to take on a GPU: by its lists, or by the choice as a mask."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest
import torch

from attnc import op_selected
from attnc.codegen.gpu_key_lists import ListKnobs
from attnc.cost_models.device import device_named
from attnc.errors import UsageError
from attnc.forms import parse_form, selected
from attnc.forms.flash import Flash
from attnc.forms.selected_lists import knobs_of, text_of
from attnc.operands import Operands
from attnc.region import AttentionRegion
from attnc.rule_attention import AttentionRule, AttentionShape
from tests.forms.rules import Dims, inputs, rule_of

H100 = device_named("h100")
CAUSAL = AttentionRule.parse("score=0.125 * s; keep=j <= i; empty=never")
GROUPED = "compressed_selection{block=64,top_k=16,window=512}"
SORTED = "block_mixture{block=512,top_k=4}"


def region(L: int, Hq: int = 32, H: int = 8, E: int = 128, *, dtype: str = "bfloat16", training: bool = False):
    shape = AttentionShape(1, Hq, H, L, L, E, E)
    return AttentionRegion("", "", CAUSAL, shape, dtype, "cuda", training=training)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("spelling", "where"), [(SORTED, region(16384)), (GROUPED, region(32768, 64, 4))])
def test_lists_of_single_rows_are_walked_and_pay_beside_dense_flash(spelling, where, training):
    where = replace(where, training=training)
    form = parse_form(spelling)
    walked, masked = form.gpu_seconds(where, H100), replace(form, kernel="table").gpu_seconds(where, H100)
    dense = Flash().space(where, H100)[0].gpu_seconds(where, H100)
    assert walked < min(0.8 * dense, 0.6 * masked)


def test_the_lesser_of_both_is_predicted_and_taken():
    form, where = parse_form("token_top_k{top_k=2048,share=group}"), region(32768, 64, 4, training=True)
    seconds, kernel = form._on_gpu(where, H100)
    assert kernel == "table" and seconds == replace(form, kernel="table")._on_gpu(where, H100)[0]
    seconds, kernel = form._on_gpu(replace(where, training=False), H100)
    assert seconds == pytest.approx(replace(form, kernel=kernel)._on_gpu(replace(where, training=False), H100)[0])


def test_more_blocks_take_no_less_time():
    times = [parse_form(f"block_mixture{{block=512,top_k={n}}}").gpu_seconds(region(16384), H100) for n in (2, 3, 4, 8)]
    assert times == sorted(times)


def test_the_kernel_is_spelled_where_it_is_asked_for():
    text = "128x64x4x2/64x64x4x2/64x32x8x3"
    form = parse_form(f"block_mixture{{block=64,kernel={text}}}")
    assert parse_form(form.spell()) == form and text in form.spell()
    assert "kernel" not in parse_form("block_mixture{block=64}").spell()
    knobs = ListKnobs(128, 64, 4, 2, 64, 64, 4, 2, 64, 32, 8, 3)
    assert knobs_of(text) == knobs and text_of(knobs) == text and knobs_of("128x64x4x2").block_m == 128
    with pytest.raises(UsageError, match="kernel"):
        parse_form("block_mixture{kernel=128x64}")


def test_a_gpu_is_offered_kernels_to_try_and_a_cpu_none():
    form, where = parse_form(GROUPED), region(4096, 64, 4)
    first, *tried = form.space(where, H100)
    assert first == form and len(tried) == 9 and tried[-1].kernel == "table"
    times = [one.gpu_seconds(where, H100) for one in tried[:-1]]
    assert times == sorted(times) and times[-1] < inf
    assert form.space(replace(where, device="cpu"), device_named("cpu")) == (form,)


@pytest.mark.parametrize("where", [region(4096, dtype="float64"), region(4096, E=512)])
def test_what_the_kernels_do_not_take_stays_a_mask(where):
    assert parse_form(SORTED)._on_gpu(where, H100)[1] == "table"
    assert replace(parse_form(SORTED), kernel="128x64x4x2").gpu_seconds(where, H100) == inf


def test_a_run_on_a_gpu_takes_the_kernel_that_was_predicted(monkeypatch):
    form, dims = parse_form("block_mixture{block=8,top_k=2}"), Dims(20, 20)
    qkv, captured = inputs(dims, torch.float32, grad=False)
    given = Operands(*qkv, captured, [], rule_of("causal", dims))
    asked, called = [], []
    monkeypatch.setattr(selected, "gpu_here", lambda: H100)
    monkeypatch.setattr(selected.Selected, "_on_gpu", lambda self, *x: asked.append(x) or (1.0, "32x16x4x2"))
    monkeypatch.setattr(torch.ops.attnc, "selected", lambda *x: called.append(x[-1]) or op_selected.selected(*x))
    out, lse = form.gpu(given)
    assert asked[0][0].shape.L == 20 and "kernel=32x16x4x2" in called[0]
    assert all(torch.equal(one, two) for one, two in zip((out, lse), form.cpu(given), strict=True))


def test_tiles_that_only_a_choice_says_stay_a_mask():
    for spelling in ("vertical_slash", "hash_buckets{chunk=64}", "rectified"):
        assert parse_form(spelling)._on_gpu(region(4096), H100)[1] == "table"

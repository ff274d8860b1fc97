"""What every form keeps: spelling, refusals that are sentences, a space of settings that apply, costs that grow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnc.cost_models.device import device_named, gpu_named
from attnc.cost_models.roofline import seconds, written_cost
from attnc.errors import UsageError
from attnc.expr import TRUE
from attnc.expr_text import parse
from attnc.forms import FORMS, BlockSparse, Dense, form_named, parse_form
from attnc.forms.dense import causal_pairs, split_causal
from attnc.region import AttentionRegion
from attnc.rule_attention import AttentionRule, AttentionShape

CPU, H100 = device_named("cpu", 2), gpu_named("h100")


def region(
    keep: str = "j - i <= 0 and i - j <= 511", L: int = 4096, score: str = "0.125 * s", **facts
) -> AttentionRegion:
    rule = AttentionRule.parse(f"score={score}" + (f"; keep={keep}" if keep else ""))
    facts = {"written": "sdpa", "dtype": "float32", "device": "cpu", **facts}
    return AttentionRegion("layer", "sdpa", rule, AttentionShape(1, 8, 2, L, L, 64, 64), **facts)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
@pytest.mark.parametrize("device", [CPU, H100], ids=lambda d: d.name)
def test_every_setting_spells_and_parses(form, device) -> None:
    assert form_named(form.name) is form
    kind = "cpu" if device is CPU else "cuda"
    where = region(device=kind, L=512 if form.approximates else 4096, dtype="float32" if device is CPU else "bfloat16")
    for setting in (form(), *form().space(where, device)):
        assert parse_form(setting.spell()) == setting
    for setting in form().space(where, device):
        assert setting.refuse(where) is None and (form.approximates or setting.is_exact(where))
        assert 0 < setting.seconds(where, device) < 1


def test_each_device_has_forms_that_apply() -> None:
    for device, kind in ((CPU, "cpu"), (H100, "cuda")):
        where = region(device=kind, dtype="bfloat16")
        assert len([form for form in FORMS if form().space(where, device)]) >= 2


def test_left_out_knobs_keep_their_default() -> None:
    assert parse_form("block_sparse{block_m=64}") == BlockSparse(block_m=64)
    assert parse_form("dense{}") == parse_form("dense") == Dense()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("block_sparce", "Did you mean 'block_sparse'"),
        ("block_sparse{block_n=0}", "positive integer in keys"),
        ("block_sparse{provider=flux}", "flex, blocked"),
        ("block_sparse{block=8}", "known are provider, block_m, block_n"),
        ("dense(1)", "found no"),
    ],
)
def test_a_wrong_spelling_says_what_is_allowed(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_form(text)


@pytest.mark.parametrize(
    ("form", "where", "says"),
    [
        (BlockSparse("flex"), {"training": True}, "no backward"),
        (BlockSparse("flex"), {"dtype": "float64"}, "float32, bfloat16, float16"),
        (BlockSparse("flex"), {"keep": ""}, "use dense"),
        (BlockSparse("blocked"), {"keep": ""}, "use dense"),
        (
            BlockSparse("blocked"),
            {"shape": AttentionShape(1, 8, 2, 4096, 4096, 64, 64, symbols={"L": "s0"})},
            "dynamic=False",
        ),
        (
            BlockSparse("flex"),
            {"keep": "t0[b, j] == 1", "shape": AttentionShape(1, 8, 2, 64, 64, 64, 64, symbols={"S": "s0"})},
            "lookups by j",
        ),
        (BlockSparse("blocked"), {"device": "cuda"}, "lowered for the CPU"),
        (Dense(), {"rule": AttentionRule(dropout=0.1)}, "dropout 0.1"),
    ],
)
def test_a_refusal_is_a_true_sentence(form, where: dict, says: str) -> None:
    keep = where.pop("keep", "j - i <= 0 and i - j <= 511")
    base = region(keep)
    refusal = form.refuse(replace(base, **where))
    assert refusal is not None and says in refusal and refusal.endswith(".")


def test_an_unrefused_neighbour_shows_the_condition_is_true() -> None:
    assert BlockSparse("blocked").refuse(region(training=True)) is None
    assert BlockSparse("flex").refuse(region()) is None
    assert BlockSparse("blocked").refuse(region("j - i <= 0")) is None


def time(form, where: AttentionRegion) -> float:
    return seconds(form.cost(where, CPU), CPU)


def best(provider: str, where: AttentionRegion) -> float:
    return time(BlockSparse(provider).space(where, CPU)[0], where)


def test_costs_rank_as_measured() -> None:
    window, causal = region(), region("j - i <= 0")
    assert best("blocked", window) < best("flex", window) < time(Dense(), window)
    assert time(Dense(), causal) < seconds(written_cost(causal, CPU), CPU) / 1.3
    assert best("flex", causal) > time(Dense(), causal)
    flagged = replace(causal, written="sdpa_causal", shape=replace(causal.shape, H=8))
    assert time(Dense(), flagged) > 0.95 * seconds(written_cost(flagged, CPU), CPU)


def test_windowed_cost_grows_with_the_window_not_with_the_square() -> None:
    assert best("blocked", region(L=8192)) < 2.3 * best("blocked", region(L=4096))
    assert time(Dense(), region(L=8192)) > 3.5 * time(Dense(), region(L=4096))
    assert time(Dense(), region(training=True)) > 3 * time(Dense(), region())


@pytest.mark.parametrize(
    ("L", "S", "offset"), [(5, 5, 0), (4, 9, 5), (9, 4, -5), (3, 7, 2), (7, 3, 1), (4, 4, 9), (6, 4, -9)]
)
def test_causal_pairs_are_counted_exactly(L: int, S: int, offset: int) -> None:
    assert causal_pairs(L, S, offset) == sum(j <= i + offset for i in range(L) for j in range(S))


def test_the_causal_part_of_a_mask_is_found() -> None:
    assert split_causal(parse("j <= i")) == (0, TRUE)
    offset, rest = split_causal(parse("j <= i + 3 and t0[b, j] == 1"))
    assert offset == 3 and rest == parse("t0[b, j] == 1")
    assert split_causal(parse("j <= i + n0"))[0] == parse("n0")
    assert split_causal(parse("i <= j"))[0] is None
    assert split_causal(parse("j <= 2 * i"))[0] is None

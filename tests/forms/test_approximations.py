"""Approximations by name: equal to their own formula, exact at their limits, and never taken without a name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import attnc
from attnc.cost_models.device import device_named
from attnc.errors import UsageError
from attnc.forms import FORMS, parse_form
from attnc.forms.dense import Dense
from attnc.forms.hierarchical import Hierarchical
from attnc.forms.low_rank import LowRank
from attnc.forms.masked import reference
from attnc.operands import Operands
from attnc.options import Options
from attnc.passes.choose import checked_forms, choose
from attnc.plan import Plan
from attnc.region import AS_WRITTEN, AttentionRegion, Choice
from attnc.rule_attention import AttentionRule, AttentionShape
from tests.forms.rules import Dims, inputs, rule_of

LENGTHS = (1, 33, 70)
HEADS = ((2, 2), (4, 2), (4, 1))
RANKS = (LowRank(4), LowRank(15))
POOLED = (Hierarchical(8), Hierarchical(16, 2), Hierarchical(5))
SOFTCAP = AttentionRule.parse("score=2.0 * tanh(0.5 * s); keep=j - i <= 0")


def square(length: int, heads: tuple[int, int], Ev: int = 16) -> Dims:
    return Dims(length, length, *heads, 16, Ev)


def drawn(dims: Dims, dtype: torch.dtype = torch.float64) -> tuple[list, list]:
    torch.manual_seed(dims.L)
    return inputs(dims, dtype, grad=False)


def gap(form, rule: AttentionRule, dims: Dims, of=None, dtype: torch.dtype = torch.float64) -> float:
    """The error of `form` against its own reference, or `of`, relative to the largest value; out and lse."""
    qkv, captured = drawn(dims, dtype)
    given = Operands(*qkv, captured, [], rule)
    expected = (of or form.reference)(given.double())
    found = form.cpu(given)
    assert found[0].dtype == dtype and found[0].shape == expected[0].shape and found[1].shape == expected[1].shape
    return max(float((f.double() - e).abs().max() / e.abs().max()) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("length", LENGTHS)
def test_low_rank_equals_its_formula(length: int, heads: tuple[int, int]) -> None:
    for form in RANKS:
        for name in ("plain", "causal", "window", "bias", "sink"):
            dims = square(length, heads)
            assert gap(form, rule_of(name, dims), dims) < 1e-9, (form, name)
    assert gap(LowRank(4), SOFTCAP, square(length, heads)) < 1e-9


def test_low_rank_takes_as_many_keys_as_there_are() -> None:
    for dims in (Dims(1, 70, 4, 2), Dims(33, 70, 4, 2), Dims(70, 33, 2, 1)):
        assert gap(LowRank(4), rule_of("plain", dims), dims) < 1e-9


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("length", LENGTHS)
def test_hierarchical_equals_its_formula(length: int, heads: tuple[int, int]) -> None:
    dims = square(length, heads, Ev=8)
    for form in POOLED:
        for rule in (rule_of("plain", dims), rule_of("causal", dims), SOFTCAP):
            assert gap(form, rule, dims) < 1e-9, (form, rule)


@pytest.mark.parametrize("name", ["plain", "causal"])
@pytest.mark.parametrize("length", LENGTHS)
def test_at_their_limits_they_are_exact(length: int, name: str) -> None:
    dims = square(length, (4, 2))
    for form in (LowRank(16), LowRank(64), Hierarchical(1), Hierarchical(1, 3), Hierarchical(40)):
        assert gap(form, rule_of(name, dims), dims, reference) < 1e-9, form
        assert form.is_exact(region(length, 16, name)), form


@pytest.mark.parametrize("form", [LowRank(4), Hierarchical(8)], ids=lambda f: f.name)
def test_within_they_are_not(form) -> None:
    dims = square(70, (4, 2))
    assert gap(form, rule_of("causal", dims), dims, reference) > 1e-3
    assert not form.is_exact(region(70, 16))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_they_hold_in_every_type(dtype: torch.dtype, limit: float) -> None:
    dims = square(70, (4, 2))
    for form in (LowRank(15), Hierarchical(8)):
        qkv, _ = drawn(dims, dtype)
        rule = rule_of("causal", dims)
        given = Operands(*qkv, [], [], rule)
        expected, found = form.reference(given)[0], form.cpu(given)[0]
        assert found.dtype == dtype and float((found - expected).abs().max()) < limit * float(expected.abs().max())


def test_keys_of_low_rank_are_exact_at_that_rank() -> None:
    dims = square(70, (4, 2))
    (query, key, value), _ = drawn(dims)
    key = key[..., :3] @ torch.randn(3, 16, dtype=torch.float64)
    given = Operands(query, key, value, [], [], rule_of("causal", dims))
    torch.testing.assert_close(LowRank(3).cpu(given)[0], reference(given)[0])


def test_equal_blocks_are_pooled_without_error() -> None:
    (query, key, value), _ = drawn(square(40, (2, 2)))
    query, key = (x[:, :, ::8].repeat_interleave(8, 2) for x in (query, key))
    given = Operands(query, key, value, [], [], rule_of("causal", square(40, (2, 2))))
    torch.testing.assert_close(Hierarchical(8).cpu(given)[0], reference(given)[0])


def region(length: int = 512, E: int = 128, rule: str = "causal", **facts) -> AttentionRegion:
    facts = {"written": "sdpa", "dtype": "float32", "device": "cpu", **facts}
    shape = AttentionShape(1, 8, 2, length, length, E, E)
    return AttentionRegion("layer", "sdpa", rule_of(rule, Dims(length, length)), shape, **facts)


@pytest.mark.parametrize(
    ("form", "facts", "says"),
    [
        (LowRank(), {"training": True}, "no backward"),
        (LowRank(), {"device": "cuda"}, "lowered for the CPU only"),
        (Hierarchical(), {"training": True}, "for inference"),
        (Hierarchical(), {"device": "cuda"}, "lowered for the CPU only"),
        (Hierarchical(), {"rule": "window"}, "a causal mask or none"),
        (Hierarchical(), {"rule": "padding"}, "a causal mask or none"),
        (Hierarchical(), {"rule": "alibi"}, "scores the product alone"),
    ],
)
def test_a_refusal_is_a_sentence_and_its_neighbour_applies(form, facts: dict, says: str) -> None:
    why = form.refuse(region(**facts))
    assert why is not None and says in why and why.endswith(".")
    assert form.refuse(region()) is None


def test_hierarchical_refuses_a_cache_and_symbolic_lengths() -> None:
    shape = region().shape
    for changed in (replace(shape, L=1), replace(shape, symbols={"L": "s0", "S": "s0"})):
        why = Hierarchical().refuse(replace(region(), shape=changed))
        assert why is not None and "as many queries as keys" in why


@pytest.mark.parametrize("name", ["low_rank", "hierarchical"])
def test_without_a_name_they_are_not_taken(name: str) -> None:
    where = region()
    forced = choose(where, Options(force=name)).choice
    assert forced.form == AS_WRITTEN and "approximation by name" in forced.reason
    only = choose(where, Options(forms=(name,))).choice
    assert only.form == AS_WRITTEN and "approximation by name" in only.refused[parse_form(name).spell()]
    default = choose(where, Options()).choice
    assert not any(name in spelling for spelling in (*default.offers, *default.refused))
    plan = Plan({"layer": Choice(parse_form(name).spell(), "found")}, device=device_named("cpu").name)
    planned = choose(where, Options(plan=plan)).choice
    assert planned.form == AS_WRITTEN and "approximation by name" in planned.reason


@pytest.mark.parametrize("name", ["low_rank", "hierarchical"])
def test_by_name_they_are_taken_and_offered(name: str) -> None:
    where, spelling = region(), parse_form(name).spell()
    forced = choose(where, Options(force=name, allow=(name,))).choice
    assert forced.form == spelling and "approximation by name" in forced.reason
    assert spelling in choose(where, Options(allow=(name,))).choice.offers
    plan = Plan({"layer": Choice(spelling, "found")}, device=device_named("cpu").name)
    assert choose(where, Options(plan=plan, allow=(name,))).choice.form == spelling
    long = choose(region(16384), Options(forms=("hierarchical",), allow=("hierarchical",))).choice
    assert long.name == "hierarchical" and "approximation by name" in long.reason


def test_only_forms_of_attention_are_asked() -> None:
    found = choose(region(), Options()).choice
    assert {parse_form(spelling).kind for spelling in (*found.offers, *found.refused)} == {"attention"}
    none = choose(region(), Options(forms=("chunked",))).choice
    assert none.form == AS_WRITTEN and not none.refused and "no form of attention" in none.reason


def test_at_its_limit_a_form_needs_no_name() -> None:
    assert choose(region(), Options(force="low_rank{rank=128}")).choice.name == "low_rank"


def test_allow_knows_its_approximations() -> None:
    checked_forms(Options(allow=[form.name for form in FORMS if form.approximates]))
    with pytest.raises(UsageError, match="Did you mean 'low_rank'"):
        checked_forms(Options(allow=("low_rnk",)))
    with pytest.raises(UsageError, match="dense is exact"):
        checked_forms(Options(allow=("dense",)))


def attend(query, key, value):
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("form", [LowRank(4), Hierarchical(8)], ids=lambda f: f.name)
@pytest.mark.parametrize("length", LENGTHS)
def test_through_torch_compile(form, length: int) -> None:
    torch._dynamo.reset()
    dims = square(length, (4, 2))
    qkv, _ = drawn(dims, torch.float32)
    options = {"allow": [form.name], "force": form.spell(), "inner": "aot_eager", "strict": True}
    fast = torch.compile(attend, backend="attnc", options=options)
    with torch.no_grad():
        found = fast(*qkv)
    choice = attnc.last_report(fast).regions[0].choice
    assert choice.form == form.spell()
    if not form.is_exact(region(length, 16)):
        assert "approximate: error" in choice.reason and "of the largest value on random inputs" in choice.reason
    expected = form.reference(Operands(*qkv, [], [], rule_of("causal", dims)))[0]
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)


def test_a_long_region_is_measured_at_a_shorter_length() -> None:
    torch._dynamo.reset()
    qkv, _ = drawn(Dims(4201, 4201, 1, 1, 8, 8), torch.float32)
    options = {"allow": ("hierarchical",), "force": "hierarchical", "inner": "aot_eager", "strict": True}
    fast = torch.compile(attend, backend="attnc", options=options)
    with torch.no_grad():
        fast(*qkv)
    assert "on random inputs of length 517" in attnc.last_report(fast).regions[0].choice.reason


def test_a_wrong_lift_is_not_excused_by_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(Dense, "cpu", lambda self, given: (given.query * 2, given.query[..., 0]))
    qkv, _ = drawn(square(33, (4, 2)), torch.float32)
    options = {"allow": ("hierarchical",), "force": "hierarchical{block=4}", "inner": "aot_eager"}
    fast = torch.compile(attend, backend="attnc", options=options)
    with torch.no_grad():
        torch.testing.assert_close(fast(*qkv), attend(*qkv))
    assert "differs by" in attnc.last_report(fast).regions[0].choice.reason


def test_through_torch_compile_without_a_name_nothing_changes() -> None:
    torch._dynamo.reset()
    qkv, _ = drawn(square(33, (4, 2)), torch.float32)
    fast = torch.compile(attend, backend="attnc", options={"force": "low_rank{rank=4}", "inner": "aot_eager"})
    with torch.no_grad():
        torch.testing.assert_close(fast(*qkv), attend(*qkv))
    assert "approximation by name" in attnc.last_report(fast).regions[0].choice.reason

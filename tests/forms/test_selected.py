"""The selected family: equal to its own formula, exact when everything is kept, causal, and stable under budget."""

from __future__ import annotations

import pytest
import torch

from attnc import ops
from attnc.codegen.key_lists import kept_by
from attnc.forms import parse_form
from attnc.forms.masked import reference
from attnc.forms.selected import Selected
from attnc.operands import Operands
from attnc.rule_attention import AttentionRule
from tests.forms.rules import Dims, inputs, rule_of
from tests.forms.selections import SETTINGS, Setting

DIMS = (Dims(1, 1), Dims(33, 33, 4, 2), Dims(70, 70, 4, 1, 16, 8), Dims(200, 200, 2, 2, 8, 16), Dims(1, 70, 4, 2))
CASES = [(setting, rule) for setting in SETTINGS for rule in setting.rules]
named = pytest.mark.parametrize(("setting", "rule"), CASES, ids=lambda x: x if isinstance(x, str) else x.spelling)
each = pytest.mark.parametrize("setting", SETTINGS, ids=lambda x: x.spelling)

# The first setting of each form, and of each that takes other tensors: graphs differ in nothing else.
TRACED = {(s.spelling.partition("{")[0], s.weights): s for s in reversed(SETTINGS)}.values()


def form_of(spelling: str) -> Selected:
    form = parse_form(spelling)
    assert isinstance(form, Selected)
    return form


def dims_of(setting: Setting) -> list[Dims]:
    phases = form_of(setting.spelling).phases
    return [d for d in DIMS if (d.L < d.S and "decode" in phases) or (d.L == d.S and "prefill" in phases)]


def operands(
    setting: Setting, dims: Dims, rule: str, dtype: torch.dtype = torch.float64, *, grad: bool = False
) -> Operands:
    torch.manual_seed(dims.L + dims.S)
    qkv, captured = inputs(dims, dtype, grad=grad)
    weights = {name: torch.randn(shape, dtype=dtype) for name, shape in setting.weights(dims).items()}
    captured += form_of(setting.spelling).tensors(dims.E, weights)
    return Operands(*qkv, captured, [], rule_of(rule, dims))


def run(spelling: str, given: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    *tensors, rule = given
    return ops.attention(*tensors, f"{spelling} | {rule.spell()}")


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double(), expected.double()
    same = torch.isclose(found, expected, 0.0, 0.0)  # equal infinities
    return float(torch.where(same, 0.0, (found - expected).abs()).max() / expected[expected.isfinite()].abs().max())


@named
def test_it_equals_its_own_formula_and_gradients(setting: Setting, rule: str) -> None:
    form = form_of(setting.spelling)
    for dims in dims_of(setting):
        given = operands(setting, dims, rule, grad=setting.trains)
        out, lse = run(setting.spelling, given)
        expected, height = form.reference(given)
        assert off(out, expected) < 1e-12 and off(lse, height) < 1e-12, dims
        if not setting.trains:
            continue
        leaves = [t for t in (*given[:3], *given.captured) if t.requires_grad]
        slope = torch.randn_like(expected)
        found, wanted = (torch.autograd.grad(o, leaves, slope, allow_unused=True) for o in (out, expected))
        for one, other in zip(found, wanted, strict=True):
            zero = torch.zeros(())
            assert (zero if one is None else one).sub(zero if other is None else other).abs().max() < 1e-11, dims


@each
def test_half_types_round_as_the_dense_form_does(setting: Setting) -> None:
    form = form_of(setting.spelling)
    for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, 3e-2)):
        given = operands(setting, dims_of(setting)[-1], "causal" if "causal" in setting.rules else "plain", dtype)
        chosen = form.choose(given)
        expected, _ = reference(form.narrowed(chosen, given).double())
        out, lse = torch.ops.attnc.selected(*given[:5], f"{setting.spelling} | {given.rule.spell()}")[:2]
        assert out.dtype == dtype and lse.dtype == torch.float32
        assert off(out, expected) < bound


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.whole], ids=lambda s: s.whole)
def test_knobs_that_keep_everything_give_the_dense_result(setting: Setting) -> None:
    for dims in dims_of(setting):
        for rule in setting.rules:
            given = operands(setting, dims, rule)
            assert off(run(setting.whole, given)[0], reference(given)[0]) < 1e-12, (dims, rule)


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.wider], ids=lambda s: s.wider)
def test_more_budget_never_removes_a_key(setting: Setting) -> None:
    for dims in dims_of(setting):
        given = operands(setting, dims, "causal")
        few, many = (kept(form_of(s), given) for s in (setting.spelling, setting.wider))
        assert not bool((few & ~many).any()), dims


def kept(form: Selected, given: Operands) -> torch.Tensor:
    narrowed = form.narrowed(form.choose(given), given)
    keep = narrowed.tensor(narrowed.rule.keep).expand(*given.query.shape[:3], narrowed.key.shape[2])
    return keep[..., : given.key.shape[2]]  # behind them stand keys that a form adds


@each
def test_tiles_hold_the_chosen_pairs_once(setting: Setting) -> None:
    form = form_of(setting.spelling)
    for dims in dims_of(setting):
        given = operands(setting, dims, "causal" if "causal" in setting.rules else "plain")
        laid, every = form.laid(form.choose(given), given)
        shape = (dims.B, dims.Hq, dims.H, dims.L)
        pieces = [kept_by(lists, shape, dims.S) for lists in every]
        keep = laid.tensor(laid.rule.keep)[..., : dims.S]
        assert setting.repeats or int(sum(p.long() for p in pieces).max()) <= 1
        assert torch.equal(sum(pieces).bool() & keep, kept(form, given))
        assert all(int(lists.rows[lists.rows >= 0].bincount().max()) == 1 for lists in every if len(lists))


@pytest.mark.parametrize("setting", [s for s in SETTINGS if "causal" in s.rules], ids=lambda s: s.spelling)
def test_a_later_token_never_changes_an_earlier_output(setting: Setting) -> None:
    if "prefill" not in form_of(setting.spelling).phases:
        pytest.skip("serves decoding alone: there is one token")
    if setting.looks_ahead:
        pytest.skip("its choice reads later rows, as published")
    given = operands(setting, Dims(70, 70, 4, 2), "causal")
    before = run(setting.spelling, given)[0]
    for at in (15, 16, 40, 69):
        changed = [t.clone() for t in given[:3]]
        for t in changed:
            t[:, :, at:] = torch.randn_like(t[:, :, at:])
        after = run(setting.spelling, given._replace(query=changed[0], key=changed[1], value=changed[2]))[0]
        torch.testing.assert_close(after[:, :, :at], before[:, :, :at], rtol=1e-12, atol=1e-12)


@each
def test_the_choice_has_the_shape_that_compilers_are_told_and_is_the_same_each_time(setting: Setting) -> None:
    form = form_of(setting.spelling)
    for dims in dims_of(setting):
        given = operands(setting, dims, "causal" if "causal" in setting.rules else "plain")
        tied = given._replace(key=torch.zeros_like(given.key))
        for one in (given, tied):
            chosen = form.choose(one)
            assert tuple(chosen.shape) == tuple(form.chosen_shape(one)) and chosen.dtype == torch.int64
            assert torch.equal(chosen, form.choose(one))


@pytest.mark.parametrize("setting", TRACED, ids=lambda setting: setting.spelling)
def test_it_runs_compiled_with_gradients(setting: Setting) -> None:
    given = operands(setting, dims_of(setting)[-1], setting.rules[0], torch.float32, grad=setting.trains)
    compiled = torch.compile(lambda *t: run(setting.spelling, given._replace(query=t[0]))[0], backend="aot_eager")
    out, expected = compiled(given.query), run(setting.spelling, given)[0]
    torch.testing.assert_close(out, expected)
    if setting.trains:
        one, other = (torch.autograd.grad(o.sum(), given.query)[0] for o in (out, expected))
        torch.testing.assert_close(one, other)


def test_rows_that_the_mask_leaves_without_keys_give_what_the_rule_says() -> None:
    for empty, value in (("zero", 0.0), ("nan", float("nan"))):
        given = operands(SETTINGS[0], Dims(33, 33), "causal")
        rule = AttentionRule.parse(f"score=0.25 * s; keep=j - i <= -4; empty={empty}")
        out = run("block_mixture{block=8,top_k=2}", given._replace(rule=rule))[0]
        assert torch.equal(out[:, :, :4], torch.full_like(out[:, :, :4], value)) or (
            empty == "nan" and out[:, :, :4].isnan().all()
        )
        assert out[:, :, 4:].isfinite().all()


def test_tensors_of_its_own_lie_where_the_queries_do_whatever_the_default_device() -> None:
    x = torch.randn(1, 2, 40, 8)
    spelling = "block_mixture{block=8,top_k=2} | score=0.3 * s; keep=j - i <= 0"
    out, _ = ops.attention(x, x, x, [], [], spelling)
    with torch.device("meta"):
        again, _ = ops.attention(x, x, x, [], [], spelling)
    assert torch.equal(again, out)

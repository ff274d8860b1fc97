"""Approximations inside an error budget: real inputs decide, region by region and end to end."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnc
from attnc.batches import batches_of
from attnc.errors import UsageError
from attnc.forms.low_rank import LowRank
from attnc.operands import Operands
from attnc.options import Options
from attnc.passes.choose import approximations, choose
from attnc.plan import Plan
from attnc.probes import relative
from attnc.region import AS_WRITTEN, AttentionRegion, Choice
from attnc.rule_attention import AttentionRule, AttentionShape

E, EV, H, L = 64, 8, 2, 384
LOW = ("low_rank",)


class Attention(nn.Module):
    """Attention whose keys lie in `rank` directions of E, whichever those are; None: in all of them."""

    def __init__(self, rank: int | None, sharp: float = 8.0) -> None:
        super().__init__()
        self.query, self.key = (nn.Linear(E, H * E, bias=False) for _ in range(2))
        self.value, self.out = nn.Linear(E, H * EV), nn.Linear(H * EV, E)
        with torch.no_grad():
            self.query.weight.mul_(sharp)  # a softmax that is not flat
            if rank is not None:
                heads = self.key.weight.view(H, E, E)
                basis = torch.linalg.qr(torch.randn(H, E, E)).Q[..., :rank]  # a rotation, then the first directions
                heads.copy_(basis @ basis.mT @ heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (H, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, *ranks: int | None, broken: bool = False) -> None:
        super().__init__()
        self.layers, self.broken = nn.ModuleList(map(Attention, ranks)), broken

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        for layer in self.layers:
            x = x + scale * layer(x)
            if self.broken:
                torch._dynamo.graph_break()
        return x


def drawn(*lengths: int) -> list[torch.Tensor]:
    torch.manual_seed(7)
    return [torch.randn(1, length, E) for length in lengths]


def made(*ranks: int | None, broken: bool = False) -> tuple[Model, torch.Tensor]:
    torch.manual_seed(0)
    return Model(*ranks, broken=broken).eval(), drawn(L)[0]


def autotuned(model, x, **given) -> Plan:
    with torch.no_grad():
        return attnc.autotune(model, x, device="cpu", **{"allow": LOW, **given})


def run(model, x, plan: Plan, **options) -> tuple[torch.Tensor, list[Choice]]:
    torch._dynamo.reset()
    fast = torch.compile(model, backend="attnc", options={"inner": "eager", "plan": plan, **options})
    with torch.no_grad():
        found = fast(x)
    return found, [region.choice for region in attnc.last_report(fast).regions]


# Which regions.


def test_low_rank_keys_are_accepted_and_random_ones_refused() -> None:
    model, x = made(8, None)
    plan = autotuned(model, x, data=drawn(L, 360, L))
    low, full = plan.choices["layers.0"], plan.choices["layers.1"]
    assert low.form == "low_rank{rank=8}" and low.error is not None and low.error < 1e-5
    assert "measured error" in low.reason and "on 2 batches; the model's output is off by" in low.reason
    assert "on batch 2, held out, allowed is 0.02, a margin of 0.02" in low.reason
    assert full.form == AS_WRITTEN and full.error is None
    assert "on 2 batches, but with it the model's output is" in full.reason and "allowed is 0.02" in full.reason
    assert full.refused["low_rank{rank=8}"].startswith("measured error 0.") and low.predicted_s < full.predicted_s
    assert not any(name.startswith("low_rank") for name in full.offers)
    assert low.offers["low_rank{rank=16}"] > low.offers["low_rank{rank=8}"]
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.choices["layers.0"].error == low.error


def test_the_compiled_model_keeps_the_error_that_was_measured() -> None:
    model, x = made(8, None)
    plan = autotuned(model, x)
    found, choices = run(model, x, plan, allow=LOW)
    assert [c.form for c in choices] == ["low_rank{rank=8}", AS_WRITTEN]
    assert choices[0].error == plan.choices["layers.0"].error
    with torch.no_grad():
        torch.testing.assert_close(found, model(x), atol=1e-4, rtol=1e-4)


def test_the_budget_decides_which_setting_is_taken() -> None:
    model, x = made(12)
    forms = {limit: autotuned(model, x, max_error=limit).choices["layers.0"] for limit in (1e-3, 1.0)}
    assert forms[1e-3].form == "low_rank{rank=16}" and forms[1.0].form == "low_rank{rank=8}"
    assert forms[1.0].error > 1e-3 > forms[1e-3].error


def test_the_error_is_that_of_the_region_in_float64() -> None:
    model, x = made(12)
    choice = autotuned(model, x, max_error=1.0).choices["layers.0"]
    layer = model.layers[0]
    with torch.no_grad():
        qkv = [f(x).unflatten(-1, (H, -1)).transpose(1, 2).double() for f in (layer.query, layer.key, layer.value)]
        exact = F.scaled_dot_product_attention(*qkv)
        found = LowRank(8).reference(Operands(*qkv, [], [], AttentionRule.parse("score=0.125 * s")))[0]
    assert choice.error == pytest.approx(float((found - exact).norm() / exact.norm()), rel=1e-6)


def test_a_batch_decides_that_is_worse_than_the_inputs() -> None:
    model, x = made(None)
    flat = x[:, :1].expand(1, L, E) + 1e-4 * x  # keys nearly alike: any rank does
    assert autotuned(model, flat).choices["layers.0"].name == "low_rank"
    assert autotuned(model, flat, data=[flat, x]).choices["layers.0"].form == AS_WRITTEN


def test_without_leave_nothing_is_approximated() -> None:
    model, x = made(8)
    choice = autotuned(model, x, allow=()).choices["layers.0"]
    assert choice.form == AS_WRITTEN and choice.error is None and "low_rank" not in choice.reason


def test_allow_of_the_options_counts_too() -> None:
    model, x = made(8)
    plan = autotuned(model, x, allow=(), options={"allow": LOW})
    assert plan.choices["layers.0"].form == "low_rank{rank=8}"


def test_several_approximations_compete_for_a_region() -> None:
    model, x = made(8)
    choice = autotuned(model, x, allow=("low_rank", "hierarchical")).choices["layers.0"]
    assert choice.name == "low_rank" and choice.refused["hierarchical{block=16,near=1}"].startswith("measured error")


def test_a_region_in_training_stays_exact_and_says_why() -> None:
    model, x = made(8)
    choice = attnc.autotune(model, x, device="cpu", allow=LOW).choices["layers.0"]
    assert choice.form == AS_WRITTEN and choice.error is None
    assert "low_rank has no backward" in choice.reason and "found a region in training" in choice.reason


def test_a_gpu_that_the_form_is_not_lowered_for_says_so() -> None:
    model, x = made(8)
    with torch.no_grad():
        plan = attnc.autotune(model, x, device="h100", allow=LOW, trials=0)
    (choice,) = plan.choices.values()
    assert plan.device == "h100" and choice.error is None and "low_rank is lowered for the CPU only" in choice.reason


def test_settings_that_do_not_pay_are_not_measured() -> None:
    shape = AttentionShape(1, 2, 2, 33, 33, E, E)
    region = AttentionRegion("x", "sdpa", AttentionRule.parse("score=0.1 * s"), shape, "float32", "cpu", "sdpa")
    offers, refused = approximations(region, Options(allow=LOW))
    chosen = choose(region, Options()).choice
    assert offers and not refused and chosen is not None
    assert all(seconds > chosen.predicted_s for seconds, _ in offers)
    assert LowRank(64) not in [form for _, form in offers]  # it equals the region
    model, _ = made(8)
    choice = autotuned(model, drawn(33)[0]).choices["layers.0"]
    assert "not predicted to pay" in choice.refused["low_rank{rank=8}"] and "measured" not in choice.reason


# The whole model.


def test_the_output_of_the_model_is_within_the_budget_too() -> None:
    class Magnified(Model):
        def forward(self, x):
            out = self.layers[0](x)
            return (out - out.mean(1, keepdim=True)) ** 3  # what is off is magnified

    torch.manual_seed(0)
    model, x = Magnified(12).eval(), drawn(L)[0]
    alone = autotuned(model, x, max_error=1.0).choices["layers.0"]
    assert alone.form == "low_rank{rank=8}"
    choice = autotuned(model, x, max_error=alone.error * 1.01).choices["layers.0"]
    assert choice.form == "low_rank{rank=16}"
    why = choice.refused["low_rank{rank=8}"]
    assert why.startswith("measured error") and "but with it the model's output is off by" in why


def test_an_output_that_no_approximation_serves_keeps_the_exact_plan() -> None:
    class Picky(Model):
        def forward(self, x):
            out = self.layers[0](x) * 1e3
            return out - out.round()  # the digits that any approximation moves

    torch.manual_seed(0)
    choice = autotuned(Picky(None).eval(), drawn(L)[0], max_error=1.0).choices["layers.0"]
    assert choice.form == AS_WRITTEN and choice.error is None and "the model's output is off by" in choice.reason
    measured = [why for form, why in choice.refused.items() if form.startswith("low_rank") and "measured" in why]
    assert len(measured) > 1 and all("but with it the model's output is off by" in why for why in measured)


def test_layers_between_graph_breaks_share_their_choice_and_the_backend_finds_it() -> None:
    model, x = made(8, 8, broken=True)
    plan = autotuned(model, x)
    _, choices = run(model, x, plan, allow=LOW)
    assert choices and {c.form for c in choices} == {"low_rank{rank=8}"}
    model, x = made(8, None, broken=True)
    assert {c.form for c in autotuned(model, x).choices.values()} == {AS_WRITTEN}


def test_inputs_that_the_model_changes_are_given_anew() -> None:
    class Filling(Model):
        def forward(self, x, cache):
            cache.append(x)
            return super().forward(x) + len(cache)

    torch.manual_seed(0)
    model, cache = Filling(8).eval(), []
    plan = autotuned(model, drawn(L)[0], cache=[], data=[(drawn(L)[0], cache)] * 2)
    assert cache == [] and plan.choices["layers.0"].form == "low_rank{rank=8}"


def test_the_model_the_random_streams_and_the_records_are_as_before() -> None:
    model, x = made(8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    autotuned(model, x)
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_chosen_approximation_has_an_interval_and_prints_its_error() -> None:
    model, x = made(8)
    plan = autotuned(model, x)
    choice = plan.choices["layers.0"]
    assert choice.low_s <= choice.predicted_s <= choice.high_s
    with torch.no_grad():
        told = attnc.explain(model, x, options={"plan": plan, "allow": LOW}).to_text(200)
    assert f"error {choice.error:.3g}" in told


# A plan in use.


def region(path: str, length: int = 2048) -> AttentionRegion:
    shape = AttentionShape(1, H, H, length, length, 4 * E, EV)
    return AttentionRegion(path, "sdpa", AttentionRule.parse("score=0.1 * s"), shape, "float32", "cpu", "sdpa")


def test_an_approximation_of_a_plan_needs_its_name_in_allow() -> None:
    plan = Plan({"here": Choice("low_rank{rank=16}", "measured", error=0.01)}, "cpu")
    without = choose(region("here"), Options(plan=plan)).choice
    assert without.form == AS_WRITTEN and "add 'low_rank' to the option allow" in without.reason
    assert choose(region("here"), Options(plan=plan, allow=("hierarchical",))).choice.form == AS_WRITTEN
    named = choose(region("here"), Options(plan=plan, allow=LOW)).choice
    assert (named.form, named.error) == ("low_rank{rank=16}", 0.01)


def test_what_a_plan_does_not_name_gets_no_approximation() -> None:
    plan = Plan({"here": Choice("low_rank{rank=16}", "measured", error=0.01)}, "cpu")
    assert choose(region("elsewhere"), Options(allow=LOW)).choice.name == "low_rank"
    assert choose(region("elsewhere"), Options(plan=plan, allow=LOW)).choice.form == AS_WRITTEN
    elsewhere = replace(plan, device="h100")  # a plan for another device says nothing here
    assert choose(region("elsewhere"), Options(plan=elsewhere, allow=LOW)).choice.name == "low_rank"


# Norms.


def test_a_relative_error_is_a_ratio_of_norms() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert relative([exact + torch.tensor([0.0, 0.5])], [exact]) == pytest.approx(0.1)
    assert relative([exact, exact * 2], [exact, exact]) == pytest.approx(1.0)
    assert relative([torch.zeros(2)], [torch.zeros(2)]) == 0.0
    assert relative([exact], [torch.zeros(2)]) == math.inf
    assert relative([exact[:1]], [exact]) == math.inf


def test_what_is_not_finite_agrees_only_with_itself() -> None:
    lost = torch.tensor([math.nan, -math.inf, 1.0])
    assert relative([lost], [lost]) == 0.0
    assert relative([torch.tensor([0.0, -math.inf, 1.0])], [lost]) == math.inf
    assert relative([torch.tensor([math.nan, 0.0, 1.0])], [lost]) == math.inf


# Mistakes of the caller.


@pytest.mark.parametrize("limit", [0, -0.1, 1.5, math.nan, math.inf, "0.02", None, True])
def test_a_budget_is_above_0_and_at_most_1(limit) -> None:
    with pytest.raises(UsageError, match=r"autotune max_error=.*allowed is a number above 0 and at most 1"):
        autotuned(*made(8), max_error=limit)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (torch.ones(2), "found Tensor, allowed is an iterable of inputs"),
        ({"x": torch.ones(2)}, "found dict, allowed is an iterable of inputs"),
        ("text", "found str, allowed is an iterable"),
        (3, "found int, allowed is an iterable"),
        ([], "found no inputs in it"),
        (iter(()), "found no inputs in it"),
        ([torch.ones(2), 3], "found int as input 1, allowed is a tensor, a tuple of arguments, or a dict"),
        ([{3: torch.ones(2)}], "found dict as input 0"),
    ],
)
def test_data_that_is_none_is_a_sentence(data, says: str) -> None:
    with pytest.raises(UsageError, match=f"autotune data: {says}"):
        autotuned(*made(8), data=data)


def test_inputs_are_tensors_arguments_or_keywords() -> None:
    x = torch.ones(1)
    assert batches_of(iter([x, (x, 2), [x], {"x": x}])) == [((x,), {}), ((x, 2), {}), ((x,), {}), ((), {"x": x})]


def test_a_batch_that_the_model_refuses_is_named() -> None:
    with pytest.raises(UsageError, match=r"autotune Model on batch 1 of data: found that running it raises"):
        autotuned(*made(8), data=[drawn(L)[0], torch.randn(1, L, E + 1)])


def test_data_without_an_approximation_is_refused() -> None:
    with pytest.raises(UsageError, match="found no approximation in allow"):
        autotuned(*made(8), allow=(), data=drawn(L))


@pytest.mark.parametrize(("allow", "says"), [("low_rank", "allowed is a tuple or list"), (["dense"], "dense is exact")])
def test_allow_holds_names_of_approximations(allow, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        autotuned(*made(8), allow=allow)


def test_a_forced_form_and_an_exported_program_are_refused() -> None:
    model, x = made(8)
    with pytest.raises(UsageError, match="the settings are searched"):
        autotuned(model, x, options={"force": "low_rank"})
    with pytest.raises(UsageError, match="Pass the module that was exported"):
        autotuned(torch.export.export(model, (x,)), x)


def test_an_output_without_numbers_is_refused() -> None:
    class Tokens(Model):
        def forward(self, x):
            return super().forward(x).argmax(-1)

    torch.manual_seed(0)
    with pytest.raises(UsageError, match="found Tensor without floating-point tensors as its output"):
        autotuned(Tokens(8).eval(), drawn(L)[0])

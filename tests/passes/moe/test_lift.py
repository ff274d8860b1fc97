"""Mixtures of experts: every spelling lifts to its facts, compiled, exported and at symbolic lengths; others do not."""
from __future__ import annotations

import pytest
import torch
from torch import nn

import attnc
from attnc.rule_moe import MoERule, MoEShape
from tests.gallery_moe import SPELLINGS
from tests.gallery_moe_entry import B, D, L, N, W
from tests.gallery_moe_negative import LOOKALIKES
from tests.gallery_run import assert_same, attnc_compiled, run

BY_NAME = {spelling.name: spelling for spelling in SPELLINGS}
QUICK = ("mixtral", "deepseek", "every_expert", "llama4", "rows_loop")
SLOW = {name: pytest.mark.slow for name in BY_NAME if name not in QUICK}


def experts(report) -> list:
    return [region for region in report.regions if region.kind == "moe"]


def the_one(report):
    found = experts(report)
    reasons = [f"{item.anchor}: {item.reason}" for item in report.unmatched]
    assert len(found) == 1, f"{len(found)} regions; {reasons}; {report.problems}"
    return found[0]


def disagreements(spelling, region) -> dict:
    return {name: (region.facts[name], value) for name, value in spelling.facts.items() if region.facts[name] != value}


def by_name(entries, **marks):
    return [pytest.param(e, id=e.name, marks=marks.get(e.name, ())) for e in entries]


def compiled_report(spelling, dynamic: bool | None = None):
    """The report of a run through attnc, which gives what eager gives."""
    module, inputs = spelling.build()
    want = run(module, inputs)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=spelling.eager):
        compiled = torch.compile(module, backend="attnc", options={"inner": "eager"}, dynamic=dynamic)
        got = run(compiled, inputs, named=module)
    assert_same(got, want)
    return attnc.last_report(compiled)


@pytest.mark.parametrize("spelling", by_name(SPELLINGS))
def test_spelling_lifts_to_its_facts(spelling):
    report = compiled_report(spelling)
    assert report.graphs == 1
    assert not disagreements(spelling, the_one(report))
    assert [region.kind for region in report.regions] == ["moe"]


@pytest.mark.parametrize("spelling", by_name(SPELLINGS))
def test_exported_program_lifts_to_the_same_facts(spelling):
    module, inputs = spelling.build()
    region = the_one(attnc.explain(torch.export.export(module, inputs)))
    assert not disagreements(spelling, region)


@pytest.mark.parametrize("spelling", by_name(SPELLINGS, **SLOW))
def test_symbolic_lengths_lift_to_the_same_facts(spelling):
    region = the_one(compiled_report(spelling, dynamic=True))
    assert not disagreements(spelling, region)
    assert spelling.eager or "tokens" in region.shape.symbols


@pytest.mark.parametrize("name", ["llama4", "deepseek"])
def test_length_alone_may_be_symbolic(name):
    module, (x,) = BY_NAME[name].build()
    torch._dynamo.mark_dynamic(x, 1)
    compiled = torch.compile(module, backend="attnc", options={"inner": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))
    region = the_one(attnc.last_report(compiled))
    assert not disagreements(BY_NAME[name], region)
    assert region.shape.symbols["tokens"].startswith("2*")


@pytest.mark.parametrize("spelling", by_name(LOOKALIKES))
def test_lookalike_is_no_mixture_of_experts(spelling):
    module, inputs = spelling.build()
    assert not experts(attnc.explain(module, *inputs))


@pytest.mark.parametrize(("name", "said"), [
    ("RoutedProjection", "one product with weights picked by ids"),
    ("NotRestored", "another token"),
    ("OtherExpert", "weights of different experts"),
    ("Linear", "no activation"),
])
def test_refusal_names_its_condition(name, said):
    module, inputs = next(s for s in LOOKALIKES if s.name == name).build()
    reasons = [item.reason for item in attnc.explain(module, *inputs).unmatched]
    assert any(said in reason for reason in reasons), reasons


def test_training_is_told():
    module, inputs = BY_NAME["mixtral"].build()
    compiled = attnc_compiled(module)
    assert_same(run(compiled, inputs, backward=True, named=module), run(module, inputs, backward=True))
    assert the_one(attnc.last_report(compiled)).training


def test_one_block_is_one_region_in_a_stack_of_blocks():
    blocks = nn.Sequential(*(BY_NAME[name].build()[0] for name in ("mixtral", "deepseek", "static_loop", "mixtral")))
    found = experts(attnc.explain(blocks, torch.randn(B, L, D)))
    assert [region.path for region in found] == ["0", "1", "2", "3"]


def test_residual_is_no_term_of_the_block():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.block = nn.LayerNorm(D), BY_NAME["longcat"].build()[0]

        def forward(self, x):
            return x + self.block(self.norm(x))

    region = the_one(attnc.explain(Residual(), torch.randn(B, L, D)))
    assert region.rule.zero == "identity"
    assert region.path == "block"


def test_softmax_of_a_router_is_no_failed_attention():
    module, inputs = BY_NAME["mixtral"].build()
    assert not attnc.explain(module, *inputs).unmatched


def test_loop_that_breaks_the_graph_is_refused_with_the_way_out():
    class Hit(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = BY_NAME["rows_loop"].build()[0]
            self.into = nn.Linear(D, D)

        def route(self, x):
            return self.block.router(x).softmax(-1).topk(2, dim=-1)

        def forward(self, x):
            x = self.into(x)
            w, ids = self.route(x)
            return self.hit(x, w, ids)

        def hit(self, x, w, ids):
            out = torch.zeros_like(x)
            for number, expert in enumerate(self.block.experts):
                slot, token = torch.where(number == ids.T)
                out.index_add_(0, token, expert(x[token]) * w[token, slot, None])
            return out

    reasons = [item.reason for item in attnc.explain(Hit(), torch.randn(7, D)).unmatched]
    assert any("loop over all experts by number" in reason for reason in reasons), reasons


def test_flop_counts_the_chosen_experts_only():
    rule, shape = MoERule(gated=True), MoEShape(tokens=10, d_model=4, d_ff=8, num_experts=6, top_k=2)
    assert rule.flops(shape) == 2 * 10 * (4 * 6 + 2 * 3 * 4 * 8)
    assert rule.elements(shape) == 2 * 10 * 4 + 4 * 6 + 6 * 3 * 4 * 8


def test_few_tokens_reach_few_experts():
    shape = MoEShape(tokens=1, d_model=4, d_ff=8, num_experts=64, top_k=2)
    assert MoERule(gated=False).elements(shape) == 2 * 4 + 4 * 64 + 2 * 2 * 4 * 8


def test_rule_spells_and_parses_back():
    module, inputs = BY_NAME["deepseek"].build()
    rule = the_one(attnc.explain(module, *inputs)).rule
    assert MoERule.parse(rule.spell()) == rule


def test_summary_is_short():
    rule = MoERule(score="sigmoid", over="each", choice_bias=True, groups=8, top_groups=4, shared=1)
    shape = MoEShape(tokens=B * L, d_model=D, d_ff=W, num_experts=N, top_k=2, shared_d_ff=W)
    assert rule.summary(shape) == [
        "22 tokens", "2 of 6 experts", "d 16 x 24", "silu gated", "sigmoid", "bias of choice", "groups 4/8",
        "shared 24",
    ]

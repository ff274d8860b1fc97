"""Feed-forwards are recognised by what they compute, whatever their spelling; what only looks like one is not."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnc
from attnc.options import Options
from attnc.passes.ffn import lift as lift_ffn
from attnc.passes.pipeline import analyse
from attnc.rule_ffn import FFNRule, FFNShape
from tests.gallery_ffn import DOWN, FF, SPELLINGS, UP, B, Body, D, L
from tests.gallery_ffn_negative import LOOKALIKES


def explained(entry):
    model = entry.build().train(entry.training)
    with torch.set_grad_enabled(entry.training):
        return attnc.explain(model, *(torch.randn(shape) for shape in entry.inputs))


def ffn(report):
    return [region for region in report.regions if region.kind == "ffn"]


def the_only(model, *args, **kwargs):
    report = attnc.explain(model, *args, **kwargs)
    (region,) = ffn(report)
    return region


@pytest.mark.parametrize("entry", SPELLINGS, ids=lambda entry: entry.name)
def test_a_spelling_has_its_facts(entry):
    report = explained(entry)
    regions = ffn(report)
    assert len(regions) == len(entry.facts), (report.unmatched, report.problems)
    for region, facts in zip(regions, entry.facts, strict=True):
        assert {name: region.facts[name] for name in facts} == facts
        assert region.training == entry.training
        assert FFNRule.parse(region.rule.spell()) == region.rule
    assert not report.problems


@pytest.mark.parametrize("entry", LOOKALIKES, ids=lambda entry: entry.name)
def test_a_lookalike_is_none_and_a_refusal_says_why(entry):
    report = explained(entry)
    assert not ffn(report), [region.rule.spell() for region in ffn(report)]
    reasons = [item.reason for item in report.unmatched]
    assert any(entry.refusal in reason for reason in reasons) if entry.refusal else not reasons, reasons


class Activated(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, FF), act, nn.Linear(FF, D)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


ACT2FN = {
    "gelu": "gelu", "gelu_10": "gelu", "gelu_fast": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "gelu_accurate": "gelu_tanh",
    "hardswish": "hardswish", "laplace": "laplace", "leaky_relu": "leaky_relu(0.01)", "mish": "mish",
    "quick_gelu": "quick_gelu", "relu": "relu", "relu2": "relu2", "relu6": "relu6", "sigmoid": "sigmoid",
    "silu": "silu", "sqrtsoftplus": "sqrtsoftplus", "swish": "silu", "tanh": "tanh", "prelu": "prelu", "xielu": "xielu",
}


@pytest.mark.parametrize("name", ACT2FN)
def test_each_activation_of_transformers_has_its_name(name):
    activations = pytest.importorskip("transformers.activations", reason="needs transformers: pip install attnc[dev]")
    region = the_only(Activated(activations.ACT2FN[name]), torch.randn(B, L, D))
    assert region.rule.activation == ACT2FN[name]


def test_every_activation_of_transformers_is_in_the_table():
    activations = pytest.importorskip("transformers.activations", reason="needs transformers: pip install attnc[dev]")
    assert set(activations.ACT2CLS) - set(ACT2FN) == {"linear"}


def test_no_activation_is_no_feed_forward():
    assert not ffn(attnc.explain(Activated(nn.Identity()), torch.randn(B, L, D)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_encoder_layer_of_torch_has_one(training, activation):
    layer = nn.TransformerEncoderLayer(D, 2, FF, activation=activation, batch_first=True).train(training)
    with torch.set_grad_enabled(training):
        region = the_only(layer, torch.randn(B, L, D))
    assert (region.rule.activation, region.shape) == (activation, FFNShape(B * L, D, FF, D))
    assert region.rule.dropout == (0.1 if training else 0.0) and region.training == training


class SwinBlock(nn.Module):
    """Windows of 2 x 2 out of 4 x 4 tokens around an attention, then a feed-forward on all of them."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, FF), nn.GELU(), nn.Dropout(0.1), nn.Linear(FF, D))

    def forward(self, x):
        windows = self.norm(x).view(B, 2, 2, 2, 2, D).transpose(2, 3).reshape(-1, 4, D)
        q, k, v = (t.unflatten(-1, (2, D // 2)).transpose(1, 2) for t in self.qkv(windows).chunk(3, -1))
        mixed = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + mixed.view(B, 2, 2, 2, 2, D).transpose(2, 3).reshape(B, 16, D)
        return x + self.mlp(x)


class PerceiverBlock(nn.Module):
    """Latents attend to data, then a gated feed-forward on the latents."""

    def __init__(self):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(5, D))
        self.q, self.kv = nn.Linear(D, D), nn.Linear(D, 2 * D)
        self.up, self.down = nn.Linear(D, 2 * FF), nn.Linear(FF, D)

    def forward(self, x):
        k, v = self.kv(x).chunk(2, -1)
        mixed = self.latents + F.scaled_dot_product_attention(self.q(self.latents).expand(B, -1, -1), k, v)
        value, gate = self.up(mixed).chunk(2, -1)
        return mixed + self.down(value * F.gelu(gate))


@pytest.mark.parametrize(("model", "length", "tokens", "gated"),
                         [(SwinBlock, 16, 16, False), (PerceiverBlock, L, 5, True)])
def test_blocks_of_torch_modules_have_one(model, length, tokens, gated):
    region = the_only(model().eval(), torch.randn(B, length, D))
    assert (region.shape.tokens, region.rule.gated, region.rule.activation) == (B * tokens, gated, "gelu")
    assert not region.rule.parallel


def test_paths_are_those_of_the_module_that_holds_both_products():
    assert the_only(SwinBlock().eval(), torch.randn(B, 16, D)).path == "mlp"


def test_an_exported_program_has_the_same_region():
    model, x = SwinBlock().eval(), torch.randn(B, 16, D)
    exported = the_only(torch.export.export(model, (x,)))
    assert (exported.rule, exported.shape) == (the_only(model, x).rule, the_only(model, x).shape)


def test_reports_come_back_from_json():
    report = attnc.explain(SwinBlock().eval(), torch.randn(B, 16, D))
    again = attnc.Report.from_json(report.to_json())
    assert again.regions == report.regions and [r.kind for r in again.regions] == ["attention", "ffn"]


def test_symbolic_lengths_are_named():
    x = torch.randn(B, L, D)
    torch._dynamo.mark_dynamic(x, 1)
    shape = the_only(Activated(nn.ReLU()), x).shape
    assert shape.tokens == B * L and list(shape.symbols) == ["tokens"] and shape.symbols["tokens"].startswith("2*s")


class Conv1D(nn.Module):
    """addmm on views, as in GPT-2, where the length may be symbolic."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(D, FF)), nn.Parameter(torch.randn(FF, D))
        self.bias = nn.Parameter(torch.randn(FF))

    def forward(self, x):
        h = torch.addmm(self.bias, x.view(-1, D), self.up).view(*x.shape[:-1], FF)
        return x + torch.mm(F.gelu(h).view(-1, FF), self.down).view(x.shape)


def test_symbolic_lengths_pass_views():
    x = torch.randn(B, L, D)
    torch._dynamo.mark_dynamic(x, 1)
    region = the_only(Conv1D(), x)
    assert (region.rule.activation, region.shape.tokens) == ("gelu", B * L) and not region.shape.is_static


def test_weights_are_told_from_data_without_gradients():
    model = Conv1D().requires_grad_(False)
    assert the_only(model, torch.randn(B, L, D)).rule.role == "block"


def test_a_gate_of_a_recomputed_block_is_found():
    model = Activated(nn.SiLU())

    def run(x):
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    assert the_only(run, torch.randn(B, L, D, requires_grad=True)).rule.activation == "silu"


def test_equal_layers_are_named_once(monkeypatch):
    calls, unit_of = [], lift_ffn.unit_of
    monkeypatch.setattr(lift_ffn, "unit_of", lambda formula: calls.append(formula) or unit_of(formula))
    model = nn.Sequential(*(Activated(nn.GELU()) for _ in range(5)), Activated(nn.ReLU()))
    report = attnc.explain(model, torch.randn(B, L, D))
    assert [r.rule.activation for r in ffn(report)] == ["gelu"] * 5 + ["relu"] and len(calls) == 2


def test_costs_count_each_product_and_weight():
    plain, gated = FFNRule("relu"), FFNRule("silu", gated=True, layout="separate")
    shape = FFNShape(tokens=10, d_model=8, d_ff=32, d_out=8)
    assert plain.flops(shape) == 2 * 10 * 32 * 16 and gated.flops(shape) == 2 * 10 * 32 * 24
    assert FFNRule("relu", chained=True).flops(shape) == 2 * 10 * 32 * 8
    assert plain.elements(shape) == 10 * 16 + 32 * 16 and gated.elements(shape) == 10 * 16 + 32 * 24


def test_the_match_holds_what_a_rewrite_needs():
    entry = next(entry for entry in SPELLINGS if entry.name == "interleaved_and_clamped")
    found = []

    def backend(gm, inputs):
        analysis = analyse(gm, inputs, Options())
        found.extend((f, analysis.gm) for f in analysis.found)
        return gm.forward

    torch.compile(entry.build(), backend=backend)(torch.randn(B, L, D))
    ((region, graph),) = found
    match = region.match
    assert match.input.op == "placeholder" and match.up.node is match.gate.node
    assert [(p.offset, p.step) for p in (match.gate, match.up, match.down)] == [(0, 2), (1, 2), (0, 1)]
    assert match.up.bias is not None and match.down.bias is None and match.hidden in match.inner
    assert match.out is match.down.node and {*match.inner, match.up.node, match.out} == region.nodes
    order = {node: at for at, node in enumerate(graph.graph.nodes)}
    assert list(match.inner) == sorted(match.inner, key=order.__getitem__)


def test_a_product_that_ends_no_region_is_left_alone():
    report = attnc.explain(Body(lambda p, x: F.linear(F.linear(x, p.up), p.down), {"up": UP, "down": DOWN}),
                           torch.randn(B, L, D))
    assert not ffn(report) and not report.unmatched

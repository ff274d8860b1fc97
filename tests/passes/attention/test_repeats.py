"""Equal layers are lifted once, and layers that are not equal are each lifted on their own."""
from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from attnc.options import Options
from attnc.passes import pipeline
from attnc.passes.pipeline import analyse
from tests.gallery import BY_NAME
from tests.gallery_mutations import mutants, trace
from tests.tiny import Net, tokens


class Layer(nn.Module):
    def __init__(self, scale=0.25, window=None, capped=False, dim=-1, read=False):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.scale, self.window, self.capped, self.dim, self.read = scale, window, capped, dim, read

    def forward(self, x, mask):
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.mT * self.scale
        scores = scores.tanh() if self.capped else scores
        if self.window:
            at = torch.arange(x.shape[1])
            mask = mask & (at[:, None] - at < self.window)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(self.dim)
        out = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return out + weights.mean() if self.read else out


class Stack(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        for layer in self.layers:
            x = layer(x, mask)
        return x


@pytest.fixture
def lifted(monkeypatch):
    """Names of the anchors that were lifted from scratch."""
    names, lift = [], pipeline.lift
    monkeypatch.setattr(pipeline, "lift", lambda facts, anchor: names.append(anchor.name) or lift(facts, anchor))
    return names


def analysed(model, *args):
    graph = make_fx(model, pre_dispatch=True, tracing_mode="fake", _allow_non_fake_inputs=True)(*args)
    return analyse(graph, args, Options(), captured=True)


def test_equal_layers_are_lifted_once_and_each_has_its_own_operands(lifted):
    found = analysed(Stack(*(Layer() for _ in range(5))), torch.randn(2, 33, 32)).found
    assert len(found) == 5 and len(lifted) == 1
    assert len({f.match.query.source for f in found}) == len({f.match.out for f in found}) == 5
    assert len({f.region.rule for f in found}) == 1


def test_layers_of_two_kinds_are_lifted_twice(lifted):
    layers = [Layer(window=8 if at % 2 else None) for at in range(6)]
    regions = analysed(Stack(*layers), torch.randn(2, 33, 32)).regions
    assert [r.mask for r in regions[:2]] * 3 == [r.mask for r in regions] and len(lifted) == 2


@pytest.mark.parametrize("other", [{"scale": 0.5}, {"window": 8}, {"capped": True}, {"dim": -2}, {"read": True}],
                         ids=lambda other: next(iter(other)))
def test_a_layer_that_differs_is_lifted_by_itself(lifted, other):
    analysis = analysed(Stack(Layer(), Layer(**other), Layer()), torch.randn(2, 33, 32))
    alone = analysed(Stack(Layer(**other)), torch.randn(2, 33, 32))
    assert len(lifted) == 3
    assert [r.rule for r in alone.regions] == [f.region.rule for f in analysis.found[1:-1]]
    assert [n.reason for n in alone.unmatched] == [n.reason for n in analysis.unmatched]


def test_layers_of_a_compiled_model_are_lifted_once(lifted):
    model = torch.compile(Net(4), backend="attnc", options={"inner": "eager"})
    model(tokens(64, 2))
    assert len(lifted) == 1


@pytest.mark.parametrize("name", ["product_matmul", "means_window", "gqa_expand_reshape"])
def test_a_mutant_beside_its_original_is_lifted_as_it_is_alone(name):
    original, inputs = trace(BY_NAME[name], square=True)
    for mutation, mutant, _ in mutants(BY_NAME[name]):

        def both(*values, mutant=mutant):
            return original(*values), mutant(*values)

        beside, alone = analysed(both, *inputs), analysed(mutant, *inputs)
        got = [f.region.rule for f in beside.found[1:]], [n.reason for n in beside.unmatched]
        assert got == ([f.region.rule for f in alone.found], [n.reason for n in alone.unmatched]), mutation

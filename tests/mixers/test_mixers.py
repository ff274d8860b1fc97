"""Named mixers against their formulas written out, on ragged lengths; the table of systems against all of them."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attnc.codegen import feature_maps
from attnc.forms.systems import SYSTEMS, System
from attnc.mixers import linear, log_linear
from attnc.rule_recurrence import RecurrenceRule
from tests.conftest import GOLDEN

LENGTHS = (1, 33, 70, 200)


def randn(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.name)
def test_a_row_names_a_rule_a_paper_and_what_stands_around_it(system: System) -> None:
    RecurrenceRule.parse(system.rule)
    assert "arXiv:" in system.source
    if system.around.startswith(("mixers.", "codegen.")):
        module, _, function = system.around.split()[0].rpartition(".")
        assert callable(getattr(importlib.import_module(f"attnc.{module}"), function))
    if system.golden and GOLDEN.is_dir():
        assert (GOLDEN / system.golden).is_dir()
        tests = "".join(p.read_text() for p in Path(__file__).parent.parent.rglob("test_*golden*.py"))
        assert f'"{system.golden}/' in tests, "no test reads its vectors"


@pytest.mark.parametrize("length", LENGTHS)
def test_log_linear_attention_is_its_sum_over_levels(length: int) -> None:
    levels = max(1, (length - 1).bit_length()) + 1
    q, k, v, scales = (
        randn(2, 2, length, 8),
        randn(2, 2, length, 8),
        randn(2, 2, length, 6),
        randn(2, 2, length, levels),
    )
    g = -torch.rand(2, 2, length, dtype=torch.float64) * 3
    level = torch.tensor([[(i ^ j).bit_length() if j <= i else 0 for j in range(length)] for i in range(length)])
    sums = g.cumsum(-1)
    decays = (sums[..., :, None] - sums[..., None, :]).exp().tril()
    want = (q @ k.mT * decays * scales.gather(-1, level.expand(2, 2, -1, -1))) @ v
    torch.testing.assert_close(log_linear.log_linear_attention(q, k, v, g, scales), want)


@pytest.mark.parametrize("length", LENGTHS)
def test_maps_of_products_are_the_functions_they_stand_for(length: int) -> None:
    q, k = randn(1, 2, length, 7), randn(1, 2, length, 7)
    s = 0.3 * q @ k.mT
    torch.testing.assert_close(feature_maps.squares(q, 0.3) @ feature_maps.squares(k, 0.3).mT, s * s)
    torch.testing.assert_close(feature_maps.taylor(q, 0.3) @ feature_maps.taylor(k, 0.3).mT, 1 + s + s * s / 2)


def test_positive_random_features_approach_the_exponential() -> None:
    torch.manual_seed(0)
    q, k, omega = randn(1, 1, 20, 4) / 4, randn(1, 1, 20, 4) / 4, randn(20000, 4)
    weights = feature_maps.favor(q, omega, is_query=True) @ feature_maps.favor(k, omega, is_query=False).mT
    want = (q @ k.mT).softmax(-1)
    assert (weights / weights.sum(-1, keepdim=True) - want).abs().max() < 0.01


@pytest.mark.parametrize("length", LENGTHS)
def test_a_mixture_of_memories_is_a_recurrence_over_the_tokens_of_each(length: int) -> None:
    B, H, K, V, memories, k = 2, 2, 4, 3, 4, 2
    q, key, v = randn(B, H, length, K), randn(B, H, length, K), randn(B, H, length, V)
    g = -torch.rand(B, H, length, dtype=torch.float64)
    beta = torch.rand(B, H, length, dtype=torch.float64)
    rule = RecurrenceRule(decay="token", delta=True, gate="write", chunk=16)
    memory = torch.rand(B, length, memories).argsort(-1)[..., :k]
    weight = torch.rand(B, length, k, dtype=torch.float64)
    want = torch.zeros(B, H, length, V, dtype=torch.float64)
    for b in range(B):
        for m in range(memories):
            at = (memory[b] == m).any(-1).nonzero()[:, 0]
            if len(at):
                part = [x[b : b + 1, :, at] for x in (q, key, v, g, beta)]
                out, _ = linear.mix(rule, *part[:3], decay=part[3], beta=part[4])
                share = (weight[b] * (memory[b] == m)).sum(-1)[at]
                want[b, :, at] += out[0] * share[:, None]
    got = linear.mixture_of_memories(q, key, v, memory, weight, memories, rule, g, beta)
    torch.testing.assert_close(got, want)


def test_a_dynamic_convolution_is_causal_and_has_taps_of_each_token() -> None:
    value, kernel = randn(2, 9, 3), randn(2, 9, 3, 4)
    want = sum(
        torch.cat([torch.zeros(2, lag, 3, dtype=torch.float64), value[:, : 9 - lag]], 1) * kernel[..., 3 - lag]
        for lag in range(4)
    )
    torch.testing.assert_close(linear.dynamic_convolution(value, kernel), want)


def test_gated_slots_and_products_compile_into_one_graph_and_train() -> None:
    torch._dynamo.reset()
    sizes = {"q": 4, "k": 4, "v": 3, "s": 5}
    given = [randn(1, 2, 20, n).float().requires_grad_() for n in sizes.values()]
    g = -torch.rand(1, 2, 20, 5)

    def run(*x: Tensor) -> Tensor:
        return linear.gated_slots(*x, g, scale=0.5)[0]

    want = torch.autograd.grad(run(*given).square().sum(), given)
    got = torch.autograd.grad(torch.compile(run, backend="aot_eager", fullgraph=True)(*given).square().sum(), given)
    torch.testing.assert_close(got, want)

"""The blocked provider at few calls: rounded-up groups, ragged ends, wide windows in two parts, no key at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnc.codegen import cpu_blocked, cpu_scores
from attnc.codegen.cpu_blocked import blocked
from attnc.codegen.cpu_flash import Part, flash
from attnc.forms.masked import reference
from attnc.operands import Operands
from attnc.rule_attention import AttentionRule
from tests.tolerance import error

RULES = (
    "score=0.25 * s; keep=j <= i; empty=zero",
    "score=0.25 * s; keep=(j <= 5) or (i // 16 == j // 16) or (i % 32 <= 15 and j > 60); empty=zero",
    "score=0.25 * s; keep=(i // 16) % 3 == (j // 16) % 2 or j >= 64; empty=zero",
    "score=9.0 * tanh(0.1 * s); keep=(i // 16) % 3 == (j // 16) % 2 or (i <= 20 and j >= 64); empty=zero",
)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def agree(rule: AttentionRule, qkv: list[torch.Tensor], **schedule: int) -> None:
    given = Operands(*qkv, [], [], rule)
    want, want_lse = reference(given)
    got, lse = blocked(given, **schedule)
    cotangent = torch.randn_like(want)
    assert error(got, want) < 1e-12 and error(lse, want_lse) < 1e-12
    for one, two in zip(
        torch.autograd.grad(got, qkv, cotangent), torch.autograd.grad(want, qkv, cotangent), strict=True
    ):
        assert error(one, two) < 1e-12


@pytest.mark.parametrize("limit", [1, 2, 16])
@pytest.mark.parametrize("text", RULES)
def test_few_calls_compute_the_same(text: str, limit: int) -> None:
    qkv = [draw(2, 4, 90, 16), draw(2, 2, 70, 16), draw(2, 2, 70, 16)]
    agree(AttentionRule.parse(text), qkv, block_m=16, block_n=16, limit=limit)


@pytest.mark.parametrize("score", ["0.25 * s; sink=0.3", "9.0 * tanh(0.1 * s)", "0.25 * s - 0.01 * j"])
def test_first_keys_and_a_band_compute_the_same_for_every_score(score: str) -> None:
    rule = AttentionRule.parse(f"score={score}; keep=((j <= 19) or (i - j <= 20)) and j <= i")
    agree(rule, [draw(2, 4, 150, 8), draw(2, 2, 150, 8), draw(2, 2, 150, 8)], block_m=16, block_n=8)


def test_the_mask_of_a_band_behind_first_keys_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = AttentionRule.parse("score=0.25 * s; keep=((j <= 3) or (i - j <= 20)) and j <= i")
    read = []

    def additive(keep: torch.Tensor, *rest: Any) -> torch.Tensor:
        read.append(keep.numel())
        return cpu_scores.additive(keep, *rest)

    monkeypatch.setattr(cpu_blocked, "additive", additive)
    query, key, value = draw(1, 2, 4096, 8), draw(1, 1, 4096, 8), draw(1, 1, 4096, 8)
    blocked(Operands(query, key, value, [], [], rule), block_m=16, block_n=8)
    assert sum(read) <= 64 * 48 + 16 * 40  # the rows whose band begins among the first keys, and a tile of the others


def test_a_wide_window_runs_in_two_parts() -> None:
    qkv = [draw(1, 2, 2600, 8), draw(1, 1, 2600, 8), draw(1, 1, 2600, 8)]
    rule = AttentionRule.parse("score=0.25 * s; keep=j <= i and i - j <= 1500")
    agree(rule, qkv, block_m=256, block_n=128)


def test_parts_and_a_sink_share_one_normaliser() -> None:
    query, key, value, sink = draw(1, 2, 6, 8), draw(1, 1, 9, 8), draw(1, 1, 9, 8), draw(1, 2, 1)
    mask = torch.zeros(1, 1, 6, 4, dtype=torch.float64)
    mask[..., 2, :] = -torch.inf
    parts = [Part(key[:, :, :4], value[:, :, :4], mask), Part(key[:, :, 4:], value[:, :, 4:])]
    out, lse = flash(query, parts, 0.5, sink=sink)
    scores = (query @ key.mT) * 0.5 + torch.cat([mask.expand(1, 1, 6, 4), torch.zeros(1, 1, 6, 5)], -1)
    scores = torch.cat([scores, sink.unsqueeze(-1).expand(1, 2, 6, 1)], -1)
    want = scores.softmax(-1)[..., :9] @ value
    assert error(out, want) < 1e-12 and error(lse, scores.logsumexp(-1)) < 1e-12
    leaves, cotangent = (query, key, value, sink), torch.randn_like(want)
    for one, two in zip(
        torch.autograd.grad(out, leaves, cotangent), torch.autograd.grad(want, leaves, cotangent), strict=True
    ):
        assert error(one, two) < 1e-12

"""How far gradients of masked pairs come is read off the spelling, and says what a row without keys is in training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnc
from tests.tiny import compiled
from tests.tolerance import assert_close, error

LOW = torch.finfo(torch.float32).min
LENGTH = 24


def added(s: Tensor, keep: Tensor) -> Tensor:
    return (s + torch.where(keep, 0.0, LOW)).softmax(-1)


def chosen(s: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, s, LOW).softmax(-1)


def filled(s: Tensor, keep: Tensor) -> Tensor:
    return s.masked_fill(~keep, LOW).softmax(-1)


def filled_then_biased(s: Tensor, keep: Tensor) -> Tensor:
    return (s.masked_fill(~keep, LOW) + torch.arange(LENGTH).sin()).softmax(-1)


def added_then_clamped(s: Tensor, keep: Tensor) -> Tensor:
    return torch.clamp(s + torch.where(keep, 0.0, LOW), min=LOW).softmax(-1)


def infinite_then_zeroed(s: Tensor, keep: Tensor) -> Tensor:
    return s.masked_fill(~keep, -torch.inf).softmax(-1).masked_fill(~keep, 0.0)


EMPTY = {
    added: "mean_added",
    chosen: "mean",
    filled: "mean",
    filled_then_biased: "unknown",
    added_then_clamped: "unknown",
    infinite_then_zeroed: "zero",
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("weights", EMPTY, ids=lambda f: f.__name__)
def test_rows_without_keys_and_their_gradients(weights, training: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, present: Tensor) -> Tensor:
        at = torch.arange(LENGTH)
        keep = (at[None, :] <= at[:, None]) & present[:, None, None, :]
        return weights(q @ k.mT * 0.3, keep) @ v

    qkv = [torch.randn(2, 2, LENGTH, 8, requires_grad=training) for _ in range(3)]
    present = torch.arange(LENGTH)[None] >= torch.tensor([[0], [7]])  # padded on the left: 7 rows without keys
    fast = compiled(attend)
    with torch.set_grad_enabled(training):
        got, want = fast(*qkv, present), attend(*qkv, present)
    assert_close(got, want)
    (region,) = attnc.last_report(fast).regions
    empty = EMPTY[weights] if training or EMPTY[weights] == "zero" else "mean"
    assert region.rule.empty == empty and region.choice.rewrites == (empty != "unknown")
    if training:
        cotangent = torch.randn_like(want)
        for one, two in zip(*(torch.autograd.grad(out, qkv, cotangent) for out in (got, want)), strict=True):
            assert error(one, two) < 1e-5

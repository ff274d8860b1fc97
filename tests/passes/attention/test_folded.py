"""A matrix that all heads share is folded into the projection before it; what stands between forbids it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import attnc
from attnc.passes import check, pipeline
from attnc.passes.attention.folded import fold_heads
from attnc.passes.check import Orders, Trial, trial_of
from attnc.store import Store
from tests.gallery_family_a import KnockingHeads
from tests.gallery_run import assert_same, attention, attnc_compiled, run

MANY, FEW = 70, 16  # tokens of each of two rows, beside 64 channels


@pytest.fixture
def folds(monkeypatch) -> list[int]:
    """How many matrices each analysed graph folds."""
    counted: list[int] = []
    fold = pipeline.fold_heads

    def counting(graph: fx.Graph, trial: Trial) -> Orders:
        orders = fold(graph, trial)
        counted.append(len(orders.done))
        assert not orders.rejected
        return orders

    monkeypatch.setattr(pipeline, "fold_heads", counting)
    return counted


def same(model: nn.Module, tokens: int) -> None:
    x = torch.randn(2, tokens, 64)
    want = run(model, (x,), True)
    model.zero_grad()
    compiled = attnc_compiled(model, inner="eager")
    assert_same(run(compiled, (x,), True, named=model), want)
    assert attention(attnc.last_report(compiled))


class Between(KnockingHeads):
    """Something stands between the projection and the shared matrix."""

    def __init__(self, between) -> None:
        super().__init__()
        self.between = between

    def heads(self, x: Tensor, width: int = 16) -> Tensor:
        return self.between(super().heads(x, width))


def test_linear_knocking_disappears_into_three_projections(folds) -> None:
    same(KnockingHeads(), MANY)
    assert folds == [3]


def test_fewer_tokens_than_channels_keep_the_matrix(folds) -> None:
    same(KnockingHeads(), FEW)
    assert folds == [0]


def test_nonlinear_values_keep_what_follows_the_fold(folds) -> None:
    same(KnockingHeads(mlp=True), MANY)
    assert folds in ([3], [2])  # the linear part of the values folds as well; its gate and up-projection stay


@pytest.mark.parametrize(
    "between",
    [torch.tanh, lambda x: x + 1.0, lambda x: x.cumsum(2), lambda x: torch.nn.functional.normalize(x, dim=-1)],
    ids=["tanh", "shift", "sum_over_tokens", "norm"],
)
def test_what_stands_between_forbids_the_fold(folds, between) -> None:
    same(Between(between), MANY)
    assert folds == [0]


def test_weights_updated_after_compile_are_used(folds) -> None:
    model, x = KnockingHeads(), torch.randn(2, MANY, 64)
    compiled = attnc_compiled(model)
    with torch.no_grad():
        compiled(x)
        model.knock_k.mul_(1.5)
        model.q.weight.mul_(0.5)
        assert (compiled(x) - model(x)).abs().max() < 1e-5
    assert folds[0] == 3


def knocked(length: int, heads: int, width: int, channels: int) -> fx.Graph:
    """Heads of a projection of two rows of tokens, times a matrix that they share."""

    def heads_of(x: Tensor, weight: Tensor, matrix: Tensor) -> Tensor:
        return nn.functional.linear(x, weight).view(2, length, heads, width).transpose(1, 2) @ matrix

    inputs = (torch.randn(2, length, channels), torch.randn(heads * width, channels), torch.randn(width, width))
    return make_fx(heads_of, tracing_mode="fake", pre_dispatch=True)(*inputs).graph


@pytest.fixture
def lengths(monkeypatch) -> list[dict[int, int] | str]:
    """The smaller lengths that checks run at, where none is affordable at its own size."""
    tried: list[dict[int, int] | str] = []
    shorter = check._shorter
    monkeypatch.setattr(check, "_shorter", lambda *given: tried.append(shorter(*given)) or tried[-1])
    monkeypatch.setattr(check, "QUICK", 0)
    monkeypatch.setattr(check, "PATIENT", 0)
    return tried


@pytest.mark.parametrize(("heads", "width", "channels"), [(6, 16, 96), (6, 16, 40), (6, 96, 96)])
def test_tokens_as_many_as_channels_are_checked_at_a_smaller_length(heads, width, channels, lengths, tmp_path) -> None:
    graph = knocked(96, heads, width, channels)
    orders = fold_heads(graph, trial_of(Store(str(tmp_path))))
    if width < 96:
        assert len(orders.done) == 1 and not orders.rejected and not orders.left and lengths[0][96] < 96
        return
    assert not orders.done and not orders.rejected, "one view names the tokens and the width: left, which is no fault"
    assert "cannot be told from another size" in orders.left[0]


def test_equal_infinities_are_no_difference() -> None:
    written = fx.symbolic_trace(lambda x: x.log() + 1.0)
    changed = fx.symbolic_trace(lambda x: 1.0 + x.log())
    moved = fx.symbolic_trace(lambda x: -x.log())
    x = [torch.tensor([0.0, 1.0, -1.0])]
    assert check._compare(written, changed, x, False, 1e-6).passed
    assert not check._compare(written, moved, x, False, 1e-6).passed

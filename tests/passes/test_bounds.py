"""Ids are bounded by what they were picked from; masks and clamps beyond the bound are gone, all others stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from attnc.passes.graph import op_name
from attnc.passes.normalize import normalize

EXPERTS = 6
X = torch.randn(7, EXPERTS)


def left(f) -> set[str]:
    """Names of the operators that remain, once the graph computes what it did."""
    gm = make_fx(f, pre_dispatch=True, tracing_mode="fake")(X)
    normalize(gm)
    gm.recompile()
    torch.testing.assert_close(gm(X), f(X))
    return {op_name(node) for node in gm.graph.nodes}


def masked(x: Tensor, ids: Tensor, limit: int) -> Tensor:
    return x.masked_fill((ids >= limit)[:, :1], 0.0)


@pytest.mark.parametrize(
    "pick",
    [
        lambda x: x.topk(2).indices,
        lambda x: x.topk(2, dim=-1).indices.reshape(-1).sort()[0].view(7, 2),
        lambda x: x.argmax(1, keepdim=True),
        lambda x: x.argsort(1)[:, 1:],
        lambda x: (x * 100).long().clamp(0, EXPERTS - 1),
        lambda x: torch.sort(x, 1)[1].gather(1, x.argmax(1, keepdim=True)),
    ],
)
def test_a_mask_beyond_all_ids_goes_and_one_that_may_hold_stays(pick) -> None:
    assert "masked_fill" not in left(lambda x: masked(x, pick(x), EXPERTS))
    assert "masked_fill" in left(lambda x: masked(x, pick(x), EXPERTS - 1))


@pytest.mark.parametrize(
    "pick",
    [
        lambda x: (x * 100).long(),
        lambda x: x.topk(2).indices + 1,
        lambda x: x.argmax().view(1, 1).expand(7, 1),
        lambda x: x.topk(2, dim=0).indices.mT[:1].expand(7, 2),
    ],
)
def test_unknown_bounds_keep_the_mask(pick) -> None:
    assert "masked_fill" in left(lambda x: masked(x, pick(x), EXPERTS))


def test_an_in_place_clamp_above_all_values_is_no_write() -> None:
    def clamped(x: Tensor) -> Tensor:
        ids = x.topk(2).indices
        before = ids * 2
        ids.clamp_(max=EXPERTS - 1)
        return before + ids

    def cut(x: Tensor) -> Tensor:
        ids = x.topk(2).indices
        before = ids * 2
        ids.clamp_(max=2)
        return before + ids

    assert not left(clamped) & {"clamp", "clamp_"}
    assert left(cut) & {"clamp", "clamp_"}


@pytest.mark.parametrize(
    "change",
    [
        lambda ids: ids.view(-1).add_(4),
        lambda ids: ids[0].fill_(99),
        lambda ids: ids.add_(6),
        lambda ids: ids.clamp_(min=7),
    ],
)
def test_written_ids_keep_the_mask(change) -> None:
    def f(x: Tensor) -> Tensor:
        ids = x.topk(2).indices
        change(ids)
        return masked(x, ids, EXPERTS)

    assert "masked_fill" in left(f)


@pytest.mark.parametrize(
    "pick",
    [
        lambda x: (x.topk(2).indices - 5).clamp(max=5).to(torch.uint8),
        lambda x: x.topk(2).indices.clamp(min=10),
        lambda x: x.topk(2).indices.clamp(9, 20),
    ],
)
def test_bounds_are_read_through_no_narrow_cast_and_a_least_value_counts(pick) -> None:
    assert "masked_fill" in left(lambda x: masked(x, pick(x), EXPERTS))


def test_what_stands_for_a_fill_is_a_tensor_of_its_own() -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        z = masked(y, x.topk(2).indices, EXPERTS)
        z[0] = 5.0
        return y * 1, z

    gm = make_fx(f, pre_dispatch=True, tracing_mode="fake")(X)
    normalize(gm)
    gm.recompile()
    assert "masked_fill" not in {op_name(node) for node in gm.graph.nodes}
    for got, want in zip(gm(X), f(X), strict=True):
        torch.testing.assert_close(got, want)

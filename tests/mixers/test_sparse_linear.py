"""Sparse-linear attention against its formula, every pair in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnc.mixers.sparse_linear import sparse_linear

ROWS, BLOCK, SCALE = 8, 4, 0.3


def written(query: Tensor, key: Tensor, value: Tensor, proj: Tensor, critical: int, negligible: int) -> Tensor:
    """The same with the whole matrices; as many key heads as query heads."""
    means = [torch.stack([p.mean(2) for p in x.split(n, 2)], 2) for x, n in ((query, ROWS), (key, BLOCK))]
    order = (means[0] @ means[1].mT).argsort(dim=-1, descending=True)
    rank = order.argsort(dim=-1).repeat_interleave(ROWS, 2)[:, :, : query.shape[2]]
    rank = rank.repeat_interleave(BLOCK, 3)[..., : key.shape[2]]
    blocks = order.shape[-1]
    near, far = rank < critical, rank >= blocks - negligible
    soft = (query @ key.mT * SCALE).masked_fill(~near, -torch.inf).softmax(-1) @ value
    weights = (query.softmax(-1) @ key.softmax(-1).mT).masked_fill(near | far, 0.0)
    return soft + weights @ value / weights.sum(-1, keepdim=True).clamp(min=1e-300) @ proj


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("length", [33, 64])
def test_it_equals_its_formula_and_gradients(heads: tuple[int, int], length: int) -> None:
    Hq, H = heads
    tensors = [torch.randn(2, h, length, n, dtype=torch.float64) for h, n in ((Hq, 6), (H, 6), (H, 5))]
    tensors = [t.requires_grad_() for t in (*tensors, torch.randn(Hq, 5, 5, dtype=torch.float64))]
    query, key, value, proj = tensors
    blocks = -(-length // BLOCK)
    out = sparse_linear(query, key, value, proj, rows=ROWS, block=BLOCK, critical=30, negligible=25, scale=SCALE)
    wide = (t.repeat_interleave(Hq // H, 1) for t in (key, value))
    expected = written(query, *wide, proj, blocks * 30 // 100, blocks * 25 // 100)
    torch.testing.assert_close(out, expected)
    slope = torch.randn_like(out)
    for one, other in zip(*(torch.autograd.grad(o, tensors, slope) for o in (out, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_a_tile_without_marginal_blocks_has_the_chosen_ones_alone() -> None:
    query, key, value = (torch.randn(1, 2, 16, 4, requires_grad=True) for _ in range(3))
    out = sparse_linear(query, key, value, torch.eye(4), rows=8, block=8, critical=100)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(query, key, value))
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (query, key, value)))

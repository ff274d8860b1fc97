"""Cauchy attention: equal to its formula with gradients, and blind to later tokens."""

from __future__ import annotations

import torch

from attnc.mixers.cauchy import cauchy


def drawn(L: int = 50) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((2, 4, L, 3), (2, 2, L, 3), (2, 2, L, 8), (4,))
    return [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]


def test_with_every_key_it_is_its_formula_with_gradients() -> None:
    query, key, value, gamma = leaves = drawn()
    wide_key, wide_value = (t.repeat_interleave(2, 1) for t in (key, value))
    weight = 1.0 / (torch.cdist(query, wide_key).square() + gamma.square()[:, None, None])
    weight = weight.tril()
    expected = weight @ wide_value / weight.sum(-1, keepdim=True)
    out = cauchy(*leaves, top_k=64, chunk=8, window=8)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    for one, other in zip(*(torch.autograd.grad(o.sin().sum(), leaves) for o in (out, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


def test_a_later_token_changes_nothing_and_fewer_keys_give_another_result() -> None:
    leaves = [t.detach() for t in drawn()]
    first = cauchy(*leaves, top_k=6, chunk=8, window=4)
    for t in leaves[:3]:
        t[:, :, 31:] += 1.0
    torch.testing.assert_close(cauchy(*leaves, top_k=6, chunk=8, window=4)[:, :, :31], first[:, :, :31])
    assert not torch.allclose(cauchy(*leaves, top_k=64, chunk=8, window=8)[:, :, :31], first[:, :, :31])

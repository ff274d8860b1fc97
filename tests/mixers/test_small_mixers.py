"""Landmarks, sorted blocks and a memory: each equal to its formula, with gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnc.errors import UsageError
from attnc.mixers.landmarks import landmark_experts
from attnc.mixers.memorizing import memorizing
from attnc.mixers.sorted_blocks import sorted_blocks


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def agree(out: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(o.sin().sum(), leaves) for o in (out, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def attend(score: Tensor, keep: Tensor, value: Tensor) -> Tensor:
    return score.masked_fill(~keep, -torch.inf).softmax(-1) @ value


def test_landmarks_gather_keys_and_stand_beside_them() -> None:
    torch.manual_seed(0)
    q, k, v, r = leaves = [drawn(1, 2, n, 4) for n in (9, 12, 12, 3)]
    gathered = torch.zeros(1, 2, 3, 12, dtype=torch.bool).scatter(-1, (r @ k.mT).topk(5, -1).indices, True)
    routed = torch.zeros(1, 2, 9, 3, dtype=torch.bool).scatter(-1, (q @ r.mT).topk(2, -1).indices, True)
    keep = torch.cat([(routed.double() @ gathered.double()) > 0, torch.ones_like(routed)], -1)
    score = torch.cat([0.5 * q @ k.mT, 0.25 * q @ r.mT], -1)
    summed = (0.5 * r @ k.mT).softmax(-1) @ v
    agree(landmark_experts(q, k, v, r, top_k=5, experts=2), attend(score, keep, torch.cat([v, summed], 2)), leaves)


@pytest.mark.parametrize("is_causal", [False, True])
def test_blocks_attend_to_their_own_and_to_what_the_sorting_mixes(is_causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = leaves = [drawn(1, 2, 12, 4) for _ in range(3)]
    sort = torch.rand(1, 2, 3, 3, dtype=torch.float64)
    sort = sort.tril(-1) if is_causal else sort
    parts = []
    for b in range(3):
        own = slice(4 * b, 4 * b + 4)
        mixed = [sum(sort[:, :, b, c, None, None] * t[:, :, 4 * c : 4 * c + 4] for c in range(3)) for t in (k, v)]
        key, value = (torch.cat([m, t[:, :, own]], 2) for m, t in zip(mixed, (k, v), strict=True))
        keep = torch.ones(4, 8, dtype=torch.bool)
        if is_causal:
            keep[:, 4:], keep[:, :4] = torch.ones(4, 4).tril().bool(), b > 0
        parts.append(attend(0.5 * q[:, :, own] @ key.mT, keep, value))
    agree(sorted_blocks(q, k, v, sort, is_causal=is_causal), torch.cat(parts, 2), leaves)


def test_blocks_that_do_not_divide_the_tokens_are_an_error() -> None:
    x = torch.zeros(1, 1, 10, 4)
    with pytest.raises(UsageError, match="multiple of 3"):
        sorted_blocks(x, x, x, torch.zeros(1, 1, 3, 3))


def test_a_memory_is_read_beside_the_local_keys_under_a_gate() -> None:
    torch.manual_seed(0)
    q, k, v = (drawn(1, 2, n, 4) for n in (5, 8, 8))
    past, gate = [drawn(1, 2, 20, 4).detach() for _ in range(2)], drawn(2)
    raw = q @ past[0].mT
    keep = torch.zeros_like(raw, dtype=torch.bool).scatter(-1, raw.topk(6, -1).indices, True)
    local = torch.ones(5, 8).tril(3).bool()
    share = gate.sigmoid().view(2, 1, 1)
    expected = share * attend(0.5 * raw, keep, past[1]) + (1 - share) * attend(0.5 * q @ k.mT, local, v)
    agree(memorizing(q, k, v, (past[0], past[1]), gate, top_k=6), expected, [q, k, v, gate])

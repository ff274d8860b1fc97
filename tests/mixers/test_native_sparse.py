"""Native sparse attention at lengths and in types that the golden vectors do not have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnc.mixers.native_sparse import native_sparse, selected_blocks

BLOCK = 8


def drawn(length: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    qkv = [torch.randn(2, heads, length, 6, dtype=dtype) for heads in (4, 2, 2)]
    return qkv, tuple(torch.rand(2, 4, length, dtype=dtype) for _ in range(3))


def written(qkv: list[Tensor], gates: tuple[Tensor, ...], chosen: Tensor, window: int) -> Tensor:
    """The same with every pair in memory, given the choice."""
    query, (key, value) = qkv[0], (t.repeat_interleave(2, 1) for t in qkv[1:])
    L, whole = query.shape[2], query.shape[2] // BLOCK * BLOCK
    i, j = torch.arange(L).unsqueeze(-1), torch.arange(L)
    means = [t[:, :, :whole].unflatten(2, (-1, BLOCK)).mean(3) for t in (key, value)]
    ended = torch.arange(whole // BLOCK) * BLOCK + BLOCK - 1 <= i
    in_chosen = (chosen.unsqueeze(-1) == j // BLOCK).any(3).repeat_interleave(2, 1)
    masks = ((*means, ended), (key, value, in_chosen & (j <= i)), (key, value, (j <= i) & (i - j < window)))
    parts = []
    for k, v, keep in masks:
        score = (query @ k.mT * 6**-0.5).masked_fill(~keep, -torch.inf)
        parts.append(score.softmax(-1).nan_to_num(0.0) @ v)
    return sum(gate.unsqueeze(-1) * part for gate, part in zip(gates, parts, strict=True))


@pytest.mark.parametrize("length", [1, 5, 8, 33])
def test_it_equals_its_formula_where_blocks_are_missing_or_short(length: int) -> None:
    qkv, gates = drawn(length)
    knobs = {"block": BLOCK, "top_k": 2}
    found = native_sparse(*qkv, gates, window=12, **knobs)
    expected = written(qkv, gates, selected_blocks(*qkv[:2], **knobs), 12)
    torch.testing.assert_close(found, expected)


def test_the_first_blocks_and_those_near_a_row_are_chosen() -> None:
    qkv, _ = drawn(40)
    chosen = selected_blocks(*qkv[:2], block=BLOCK, top_k=3, sinks=1, near=BLOCK + 1)
    assert chosen[:, :, 39].sort(-1).values.eq(torch.tensor([0, 3, 4])).all()


def test_half_types_round_as_single_parts_do() -> None:
    qkv, gates = drawn(33, torch.bfloat16)
    found = native_sparse(*qkv, gates, block=BLOCK, top_k=9, window=12)  # all blocks: the choice cannot differ
    wide = native_sparse(*(t.double() for t in qkv), tuple(g.double() for g in gates), block=BLOCK, top_k=9, window=12)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wide, atol=3e-2, rtol=3e-2)

"""Scores of blocks against their definitions, written with every pair in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.codegen.key_lists import NONE, kept_by, listed, ragged
from attnc.codegen.selectors import top_blocks
from attnc.codegen.selectors_blocks import (
    antidiagonal_shares,
    bounds,
    compressed_shares,
    gate_shares,
    last_shares,
    mean_shares,
    of_tiles,
    representatives,
)

B, HQ, H, L, E, ROWS, BLOCK = 2, 4, 2, 37, 6, 8, 4
LAST = torch.arange(L).view(1, 1, L)


def drawn() -> tuple[Tensor, Tensor]:
    return torch.randn(B, HQ, L, E, dtype=torch.float64), torch.randn(B, H, L, E, dtype=torch.float64)


def pairs(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.repeat_interleave(HQ // H, 1).mT


def pooled(x: Tensor, width: int) -> Tensor:
    return torch.stack([part.mean(2) for part in x.split(width, 2)], 2)


def summed(share: Tensor, width: int) -> Tensor:
    return torch.stack([part.sum(-1) for part in share.split(width, -1)], -1)


def test_means_of_tiles_and_blocks() -> None:
    query, key = drawn()
    score = pairs(pooled(query, ROWS), pooled(key, BLOCK)) * 0.3
    begun = torch.arange(score.shape[-1]) * BLOCK <= of_tiles(LAST, ROWS).unsqueeze(-1)
    found = mean_shares(query, key, of_tiles(LAST, ROWS), ROWS, BLOCK, 0.3)
    torch.testing.assert_close(found, score.masked_fill(~begun, -torch.inf).softmax(-1))


def test_antidiagonals_of_squares() -> None:
    query, key = (torch.nn.functional.pad(t, (0, 0, 0, 3)) for t in drawn())
    s = 4
    squares = pairs(query, key).unflatten(2, (-1, s)).unflatten(4, (-1, s))  # (B, Hq, a, s, c, s)
    score = squares.flip(5).diagonal(dim1=3, dim2=5).sum(-1) * 0.3 / s
    share = score.masked_fill(torch.ones_like(score, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    wanted = summed(torch.stack([part.sum(2) for part in share.split(ROWS // s, 2)], 2), BLOCK // s)
    found = antidiagonal_shares(query[:, :, :L], key[:, :, :L], LAST, ROWS, BLOCK, 0.3, s)
    torch.testing.assert_close(found, wanted)


def test_the_last_rows_weigh_blocks() -> None:
    query, key = drawn()
    score = pairs(query, key).masked_fill(torch.ones(L, L).triu(1).bool(), -torch.inf) * 0.3
    wanted = summed(score.softmax(-1)[:, :, -ROWS:].mean(2, keepdim=True), BLOCK)
    torch.testing.assert_close(last_shares(query, key, LAST, ROWS, BLOCK, 0.3), wanted)


def test_a_gate_sees_whole_blocks() -> None:
    query, key = drawn()
    to_query, to_key = torch.randn(HQ, E, 3, dtype=torch.float64), torch.randn(H, 3 * E, 3, dtype=torch.float64)
    parts = key.split(BLOCK, 2)
    many = torch.stack([torch.cat([p.amax(2), p.amin(2), p.mean(2)], -1) for p in parts], 2) @ to_key
    score = pairs(pooled(query, ROWS) @ to_query, many) / 3**0.5
    ended = (torch.arange(score.shape[-1]) + 1).mul(BLOCK).clamp(max=L) - 1 <= of_tiles(LAST, ROWS).unsqueeze(-1)
    for joint in (False, True):
        logits = score.unflatten(1, (H, -1)).sum(2) if joint else score
        found = gate_shares(query, key, of_tiles(LAST, ROWS), ROWS, BLOCK, (to_query, to_key), joint=joint)
        torch.testing.assert_close(found, logits.masked_fill(~ended, -torch.inf).softmax(-1))


def test_bounds_are_those_of_the_keys_that_a_row_may_keep() -> None:
    query, key = drawn()
    found, every = bounds(query, key, LAST, BLOCK), key.repeat_interleave(HQ // H, 1)
    for i in (0, 5, 36):
        for c in range(i // BLOCK + 1):
            page = every[:, :, c * BLOCK : min((c + 1) * BLOCK, i + 1)]
            q = query[:, :, i]
            wanted = torch.maximum(q * page.amax(2), q * page.amin(2)).sum(-1)
            torch.testing.assert_close(found[:, :, i, c], wanted)
        assert bool((found[:, :, i, i // BLOCK + 1 :] == -torch.inf).all())


def test_representatives_are_attended_to_by_the_queries_behind_them() -> None:
    query, key = drawn()
    joint = query.unflatten(1, (H, -1)).sum(2)
    rank = torch.stack([(joint[:, :, m + 1 : m + 6] @ key[:, :, m, :, None]).sum((2, 3)) for m in range(L)], -1)
    found = representatives(query, key, BLOCK, 2, 5)
    for c in range(L // BLOCK):
        part = slice(c * BLOCK, (c + 1) * BLOCK)
        best = rank[..., part].topk(2).indices.unsqueeze(-1).expand(-1, -1, -1, E)
        torch.testing.assert_close(found[:, :, c], key[:, :, part].gather(2, best).sum(2))


def test_compressed_keys_count_for_the_blocks_that_they_overlap() -> None:
    query, key = drawn()
    block, length, stride = 8, 4, 2
    starts = range(0, L - length + 1, stride)
    means = torch.stack([key[:, :, s : s + length].mean(2) for s in starts], 2)
    ended = torch.tensor([s + length - 1 for s in starts]) <= torch.arange(L).unsqueeze(-1)
    share = (pairs(query, means) * 0.3).masked_fill(~ended, -torch.inf).softmax(-1).nan_to_num(0.0)
    share = share.unflatten(1, (H, -1)).sum(2)
    wanted = torch.zeros(B, H, L, -(-L // block), dtype=torch.float64)
    for n, s in enumerate(starts):
        for cell in range(s, s + length, stride):
            wanted[..., cell // block] += share[..., n]
    torch.testing.assert_close(compressed_shares(query, key, LAST, block, length, stride, 0.3), wanted)


def test_a_mass_ends_a_list_and_one_of_a_head_is_shared_by_its_rows() -> None:
    share = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.06, 0.04]]).view(1, 1, 2, 3)
    far = torch.tensor([99, 99]).view(1, 1, 2)
    found = top_blocks(share, far, far, 1, 3, window=0, mass=65)
    assert found.tolist() == [[[[0, 1, NONE], [0, NONE, NONE]]]]
    joint = top_blocks(share, far, far, 1, 3, window=0, mass=65, together=True)  # 0.9 + 0.5 are 70 percent of 2
    assert joint.tolist() == [[[[0, NONE, NONE], [0, NONE, NONE]]]]
    least = top_blocks(share, far, far, 1, 3, window=0, least=2500)
    assert least.tolist() == [[[[0, 1, NONE], [0, NONE, NONE]]]]


def test_lists_of_like_length_together_hold_the_same_pairs() -> None:
    index = torch.tensor([[0, NONE, 3], [NONE, NONE, NONE], [2, 1, 4]]).view(1, 1, 3, 3)
    lists, shape = listed(index, (1, 2, 1, 6), 2, 4), (1, 2, 1, 6)
    parts = ragged(lists)
    assert [tuple(p.blocks.shape) for p in parts] == [(1, 2), (1, 3)]
    assert torch.equal(sum(kept_by(p, shape, 20).long() for p in parts), kept_by(lists, shape, 20).long())

"""Scores of blocks of keys for tiles of query rows, or for single rows, from which `top_blocks` chooses.

    means          softmax over blocks of scale * mean of the tile's queries . mean of the block's keys
    antidiagonals  sum over the block of the softmax of scale / s * sum_n q_{as+n} . k_{cs+s-1-n}
    last rows      sum over the block of the softmax of the last rows, their mean
    bounds         sum_c max(q_c * largest k_c, q_c * smallest k_c), which no product with a key of the block exceeds
    representatives  q . sum of the block's keys that the queries behind them attend to most
    compressed     softmax over means of keys that are complete, summed over those that overlap the block

Source: Lai et al. 2025, arXiv:2502.20766, section 3 (means); Xu et al. 2025, arXiv:2503.16428, section 2
(antidiagonals); Tang et al. 2024, arXiv:2406.10774, section 3 (bounds); Xiao et al. 2024, arXiv:2402.04617, section 2
(representatives); Yuan et al. 2025, arXiv:2502.11089, equations 8 and 9 (compressed).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from attnc.codegen.selectors import allowed_blocks, begun, block_means, block_shares, is_known

SCORES = {"cpu": 1 << 19}  # numbers of a map at a time: what stays in a cache
ELSEWHERE = 1 << 26


def wide(x: Tensor) -> Tensor:
    """In float32, float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def at_a_time(each: int, device: torch.device) -> int:
    """How many rows of `each` numbers are formed together."""
    return max(1, SCORES.get(device.type, ELSEWHERE) // max(each, 1))


def of_tiles(positions: Tensor, rows: int) -> Tensor:
    """The largest of each tile of rows: (b, h, L) -> (b, h, tiles)."""
    return F.pad(positions, (0, -positions.shape[-1] % rows), value=-1).unflatten(-1, (-1, rows)).amax(-1)


def products(query: Tensor, key: Tensor) -> Tensor:
    """(B, Hq, T, E) x (B, H, n, E) -> (B, Hq, T, n), query head h with key head h // (Hq / H)."""
    H = key.shape[1]
    return (query.unflatten(1, (H, -1)).flatten(2, 3) @ key.mT).unflatten(2, (-1, query.shape[2])).flatten(1, 2)


def mean_shares(query: Tensor, key: Tensor, last: Tensor, rows: int, block: int, scale: float) -> Tensor:
    """(B, Hq, tiles, blocks); last: of the tiles."""
    score = products(block_means(query, rows), block_means(key, block)) * scale
    return block_shares(score, last, block)


def antidiagonal_shares(
    query: Tensor, key: Tensor, last: Tensor, rows: int, block: int, scale: float, stride: int
) -> Tensor:
    """(B, Hq, tiles, blocks); last: of the rows; stride: a divisor of rows and block."""
    S, Hq = key.shape[2], query.shape[1]
    key, query = (F.pad(wide(x), (0, 0, 0, -x.shape[2] % stride)) for x in (key, query))
    key = key.unflatten(2, (-1, stride)).flip(3).flatten(3)
    query = query.unflatten(2, (-1, stride)).flatten(3)
    last = of_tiles(last, stride)
    groups, each = query.shape[2], rows // stride
    step = each * at_a_time(query.shape[0] * Hq * key.shape[2] * each, query.device)
    found = []
    for n in range(0, groups, step):
        score = products(query[:, :, n : n + step], key) * (scale / stride)
        share = block_shares(score, last[..., n : n + step], stride)
        share = F.pad(share, (0, -share.shape[-1] % (block // stride))).unflatten(-1, (-1, block // stride)).sum(-1)
        found.append(_tile_sums(share, each))
    return torch.cat(found, 2)[..., : -(-S // block)]


def _tile_sums(share: Tensor, each: int) -> Tensor:
    return F.pad(share, (0, 0, 0, -share.shape[2] % each)).unflatten(2, (-1, each)).sum(3)


def last_shares(query: Tensor, key: Tensor, last: Tensor, rows: int, block: int, scale: float) -> Tensor:
    """(B, Hq, 1, blocks), of the last `rows` rows; last: of all rows."""
    rows = min(rows, query.shape[2])
    query, last = wide(query[:, :, -rows:]), last[..., -rows:]
    H = key.shape[1]
    heads = [
        block_shares(
            products(query.unflatten(1, (H, -1))[:, h], wide(key[:, h : h + 1])) * scale,
            last if last.shape[1] == 1 else last.unflatten(1, (H, -1))[:, h],
            1,
        ).mean(2, keepdim=True)
        for h in range(H)
    ]
    share = torch.cat(heads, 1)
    return F.pad(share, (0, -share.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


def gate_shares(
    query: Tensor, key: Tensor, last: Tensor, rows: int, block: int, weights: tuple[Tensor, Tensor], *, joint: bool
) -> Tensor:
    """(B, Hq or H, tiles, blocks): softmax of means of queries and largest, smallest and mean keys through `weights`,
    (Hq, E, G) and (H, 3 E, G), over blocks that a tile's last row may keep whole.

    joint: the queries of a key head give one score, their sum.
    """
    to_query, to_key = (wide(w) for w in weights)
    filled = wide(key)
    missing = -filled.shape[2] % block
    largest, smallest = (
        F.pad(filled * sign, (0, 0, 0, missing), value=-torch.inf).unflatten(2, (-1, block)).amax(3) * sign
        for sign in (1, -1)
    )
    pooled = torch.cat([largest, smallest, block_means(key, block)], -1)
    gate_q, gate_k = block_means(query, rows) @ to_query.to(pooled.dtype), pooled @ to_key.to(pooled.dtype)
    if joint:
        gate_q = gate_q.unflatten(1, (key.shape[1], -1)).sum(2)
    return block_shares(products(gate_q, gate_k) / math.sqrt(to_query.shape[-1]), last, block, key.shape[2])


def bounds(query: Tensor, key: Tensor, last: Tensor, block: int) -> Tensor:
    """(B, Hq, T, blocks), of the keys up to `last` of each row alone; -inf for a block without one."""
    B, Hq, T, _ = query.shape
    query, key = wide(query), wide(key)
    blocks = -(-key.shape[2] // block)
    paged = F.pad(key, (0, 0, 0, blocks * block - key.shape[2])).unflatten(2, (blocks, block))
    up, down = query.clamp(min=0.0), query.clamp(max=0.0)
    score = products(up, paged.amax(3)) + products(down, paged.amin(3))
    # The block that holds the last key of a row has the bounds of its keys up to there.
    last = last.expand(B, Hq, T)
    at = last.clamp(min=0) // block
    head = torch.arange(Hq, device=key.device).view(-1, 1) * key.shape[1] // Hq
    own = paged[torch.arange(B, device=key.device).view(-1, 1, 1), head, at]  # (B, Hq, T, block, E)
    there = (at.unsqueeze(-1) * block + torch.arange(block, device=key.device) <= last.unsqueeze(-1)).unsqueeze(-1)
    most, fewest = own.masked_fill(~there, -torch.inf).amax(3), own.masked_fill(~there, torch.inf).amin(3)
    exact = (up * most).nan_to_num(0.0).sum(-1) + (down * fewest).nan_to_num(0.0).sum(-1)
    score = score.scatter(-1, at.unsqueeze(-1), exact.unsqueeze(-1))
    return score.masked_fill(~allowed_blocks(blocks, last, block), -torch.inf)


def representatives(query: Tensor, key: Tensor, block: int, count: int, behind: int) -> Tensor:
    """Sum of the `count` keys of each block with the largest mean product with the `behind` queries after them.

    Shapes: query (B, Hq, L, E), key (B, H, L, E) -> (B, H, blocks, E). Queries of a key head count alike.
    """
    query, key = wide(query), wide(key)
    L = key.shape[2]
    sums = F.pad(query.unflatten(1, (key.shape[1], -1)).sum(2).cumsum(2), (0, 0, 1, 0))  # of the queries before
    first = torch.arange(1, L + 1, device=key.device)
    end = (first + behind).clamp(max=L)
    rank = ((sums[:, :, end] - sums[:, :, first]) * key).sum(-1)
    spare = -L % block
    rank = F.pad(rank, (0, spare), value=-torch.inf).unflatten(-1, (-1, block))
    chosen = torch.zeros_like(rank).scatter(-1, rank.topk(min(count, block), -1).indices, 1.0)
    return (F.pad(key, (0, 0, 0, spare)).unflatten(2, (-1, block)) * chosen.unsqueeze(-1)).sum(3)


def compressed_shares(
    query: Tensor, key: Tensor, last: Tensor, block: int, length: int, stride: int, scale: float
) -> Tensor:
    """(B, H, T, blocks), summed over the queries of a key head; last: of the rows.

    length, stride: keys in a mean, and from one to the next, where both divide into whole strides; 0: the blocks.
    """
    (B, Hq, T, _), (H, S) = query.shape, key.shape[1:3]
    length, stride = length or block, stride or length or block
    blocks, count = -(-S // block), max(0, (S - length) // stride + 1)
    if not count:
        return wide(query).new_zeros(B, H, T, blocks)
    cells = block_means(key[:, :, : (count - 1) * stride + length], stride)
    per = length // stride
    pooled = cells.unfold(2, per, 1).mean(-1) * scale if per > 1 else cells * scale  # (B, H, count, E)
    last = last.expand(*last.shape[:-1], T) - length + 1
    step = at_a_time(B * Hq * count, query.device)
    found = wide(query).new_zeros(B, H, T, blocks)
    for n in range(0, T, step):
        at = slice(n, n + step)
        seen, whole = _reached(last[..., at], stride, count)
        share = _shares(products(wide(query[:, :, at]), pooled[:, :, :seen]), last[..., at], stride, whole, H)
        if per > 1 or stride < block:  # of each stride of keys, then of each block
            share = F.pad(share, (per - 1, per - 1)).unfold(-1, per, 1).sum(-1)
            share = F.pad(share, (0, -share.shape[-1] % (block // stride))).unflatten(-1, (-1, block // stride)).sum(-1)
        found[:, :, at, : share.shape[-1]] = share[..., :blocks]
    return found


def _reached(last: Tensor, stride: int, count: int) -> tuple[int, int]:
    """How many of `count` means any of the rows may keep, and how many all; all and none where that is not known."""
    if not is_known(last):
        return count, 0
    return begun(last, stride, count), max(0, min(count, int(last.min()) // stride + 1))


def _shares(score: Tensor, last: Tensor, stride: int, whole: int, heads: int) -> Tensor:
    """Softmax of scores (B, Hq, T, n) over what each row may keep, of which it keeps the first `whole`, summed over the
    rows of each of `heads`; 0 for a row that keeps nothing."""
    rest = score[..., whole:]
    rest.masked_fill_(~allowed_blocks(score.shape[-1], last, stride)[..., whole:], -torch.inf)
    share = score.softmax(-1).unflatten(1, (heads, -1))
    total = share.sum(2)
    if whole and not bool(total.isnan().any()):
        return total
    return share.nan_to_num(0.0).sum(2)

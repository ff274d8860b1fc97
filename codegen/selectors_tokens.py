"""What chooses single keys: scores of keys for rows of queries, in pieces of rows, and the best of them.

    exact     the rule's own score of a row and a key
    indexer   I_ts = sum_j w_tj relu(a_tj . b_s)    a: index queries of heads j, b: index keys, w: weights of the heads

Ties go to the earlier key, so that a choice depends neither on how many keys follow nor on how many are taken.

Source: DeepSeek-AI 2025, "DeepSeek-V3.2", arXiv:2512.02556, section 2 (indexer); Xu et al. 2026, "HISA",
arXiv:2603.28458 (blocks first, keys inside them); Zhou et al. 2026, "MISA", arXiv:2605.07363 (a few of its heads).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from attnc.codegen.key_lists import NONE
from attnc.codegen.selectors import block_means, joined, top_blocks
from attnc.codegen.selectors_blocks import at_a_time, products, wide
from attnc.expr import Expr
from attnc.operands import Operands
from attnc.reading import as_tensor, picked, read, span


def pieces(rows: int, each: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """First and last + 1 of rows at a time, `each` numbers being formed of a row."""
    step = at_a_time(each, device)
    return ((n, min(n + step, rows)) for n in range(0, rows, step))


def at_pairs(
    given: Operands, e: Expr, first: int, last: int, keys: Tensor | None = None, score: Tensor | None = None
) -> Tensor:
    """`e` of rows first .. last - 1 and all keys, or the positions `keys`; broadcastable to (B, Hq, rows, n)."""
    (B, Hq, _, _), device = given.query.shape, given.query.device
    axes = {"b": span("b", 0, B, device), "h": span("h", 0, Hq, device), "i": span("i", first, last - first, device)}
    axes["j"] = span("j", 0, given.key.shape[2], device) if keys is None else picked("j", keys)
    found = read(e, axes, given.captured, given.sizes, score=score)
    return as_tensor(found, given.query if score is None else score)


def exact_scores(given: Operands, first: int, last: int, heads: int) -> tuple[Tensor, Tensor]:
    """Score of each key and whether it may be kept, (B, heads, rows, S): the rule's, or summed weights of heads that
    choose together."""
    raw = products(wide(given.query[:, :, first:last]), wide(given.key))
    keep = at_pairs(given, given.rule.keep, first, last)
    score = at_pairs(given, given.rule.score, first, last, score=raw).expand(raw.shape)
    if heads < raw.shape[1]:
        score = joined(score.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num(0.0), heads, "sum")
    return score, joined(keep, heads, "any")


def index_scores(query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    """I (B, T, n) of index queries (B, T, HI, DI), index keys (B, n, DI) or (B, T, n, DI), weights (B, T, HI)."""
    if key.dim() == 3:
        score = (query.flatten(1, 2) @ key.mT).unflatten(1, query.shape[1:3])
    else:
        score = query @ key.mT
    return (weight.unsqueeze(2) @ score.relu()).squeeze(2)


def routed_heads(
    query: Tensor, pooled: Tensor, weight: Tensor, last: Tensor, block: int, S: int, count: int
) -> tuple[Tensor, Tensor]:
    """Index queries (B, T, count, DI) and weights (B, T, count) of the heads with the largest |w_tj| mean_c relu(a_tj .
    mean_c b) over blocks c that end at or before the last key of a row. last: (B or 1, T)."""
    score = (query.flatten(1, 2) @ pooled.mT).unflatten(1, query.shape[1:3]).relu()
    end = ((torch.arange(pooled.shape[1], device=last.device) + 1) * block).clamp(max=S)
    whole = (end <= last.unsqueeze(-1) + 1).unsqueeze(2)
    share = weight.abs() * (score * whole).sum(-1)  # a mean: the same number of blocks for all heads
    at = share.topk(min(count, query.shape[2]), -1).indices
    return query.gather(2, at.unsqueeze(-1).expand(*at.shape, query.shape[-1])), weight.gather(2, at)


def index_candidates(
    query: Tensor, key: Tensor, weight: Tensor, own: Tensor, last: Tensor, block: int, blocks: int, *,
    sinks: int, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Positions (B, 1, T, n) of the keys in the `blocks` blocks whose mean index key scores highest, NONE for none, and
    their scores; a row's own block is among them. own, last: (B or 1, 1, T)."""
    B, S = key.shape[:2]
    pooled = block_means(key.unsqueeze(1), block).squeeze(1)
    coarse = index_scores(query, pooled, weight).unsqueeze(1)
    best = top_blocks(coarse, own, last, block, blocks, sinks=sinks, window=max(window, 1))  # (B, 1, T, blocks)
    at = (best.unsqueeze(-1) * block + torch.arange(block, device=key.device)).flatten(-2)
    at = torch.where((best.unsqueeze(-1).expand(*best.shape, block).flatten(-2) < 0) | (at >= S), NONE, at)
    inside = key[torch.arange(B, device=key.device).view(B, 1, 1), at.clamp(min=0).squeeze(1)]
    return at, index_scores(query, inside, weight).unsqueeze(1)


def best_keys(
    score: Tensor, keep: Tensor, count: int, *, own: Tensor, sinks: int = 0, window: int = 0, at: Tensor | None = None
) -> Tensor:
    """Positions of the `count` best keys of each row that it may keep, ascending, NONE where there are fewer.

    score: (B, heads, T, n); keep broadcasts to it; at: positions of the n keys, ascending, None: 0 .. n - 1, NONE for
    none. own: position of the rows, (.., T). The first `sinks` keys and the last `window` up to a row's own come first.
    """
    place = torch.arange(score.shape[-1], device=score.device) if at is None else at
    score = score.nan_to_num(-torch.inf, torch.inf, -torch.inf).masked_fill(~keep, -torch.inf)
    if at is not None:
        score = score.masked_fill(at < 0, -torch.inf)
    if sinks or window:
        own = own.unsqueeze(-1)
        forced = (place < sinks) | ((place <= own) & (place > own - window))
        score = torch.where(forced & (score > -torch.inf), torch.inf, score)
    n = score.shape[-1]
    if count < n:
        least = score.topk(count, -1).values[..., -1:]
        above, level = score > least, score == least
        spare = count - above.sum(-1, keepdim=True)
        found = (above | (level & (level.cumsum(-1) <= spare))).nonzero()[:, -1].view(*score.shape[:-1], count)
    else:
        found = torch.arange(n, device=score.device).expand(score.shape)
    chosen = found if at is None else at.expand(score.shape).gather(-1, found)
    chosen = chosen.masked_fill(score.gather(-1, found) == -torch.inf, NONE)
    return chosen if count <= n else F.pad(chosen, (0, count - n), value=NONE)

"""Groups of tokens: which each token belongs to, and the tiles that bring the rows and the keys of a group together.

    groups of a token: the `count` with the largest score, ties to the earlier one

Source: Yao et al. 2026, "Why Attend to Everything? Focus is the Key", arXiv:2604.03260 (top groups of a token).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnc.codegen.key_lists import NONE, KeyLists, ragged, sorted_by_block
from attnc.codegen.selectors_blocks import wide

ROWS = 64  # of a tile


def top_groups(score: Tensor, count: int) -> Tensor:
    """(..., G) -> (..., count) int64, the best first; more of them begin with the same ones."""
    return score.argsort(dim=-1, descending=True, stable=True)[..., :count]


def key_groups(key: Tensor, centroids: Tensor, count: int) -> Tensor:
    """Groups of keys (B, H, S, E) by their products with centroids (H, G, E): (B, H, S, count)."""
    key = wide(key)
    return top_groups(key @ centroids.to(key.dtype).mT, count)


def members(groups: Tensor, heads: int, total: int) -> Tensor:
    """Positions of the keys of each group, ascending, NONE behind them: (B, 1 or H, S, n) -> (B * H * total, most).

    A negative number is no group.
    """
    B, _, S, n = groups.shape
    device = groups.device
    place = torch.arange(B * heads, device=device).view(B, heads, 1, 1)
    there = torch.where(groups < 0, B * heads * total, place * total + groups)
    bucket, order = there.flatten().sort(stable=True)
    count = torch.bincount(bucket, minlength=B * heads * total + 1)
    within = torch.arange(len(bucket), device=device) - (count.cumsum(0) - count)[bucket]
    within[bucket == len(count) - 1] = 0
    found = torch.full((len(count), int(count[:-1].max())), NONE, device=device)
    found[bucket, within] = order // n % S
    return found[:-1]


def group_lists(
    rows: Tensor, keys: Tensor, position: Tensor, shape: tuple[int, int, int, int], total: int, *, is_causal: bool
) -> list[KeyLists]:
    """Tiles of the rows of a group and its keys, as many times as a row and a key share groups.

    rows: groups (B, 1 or H or Hq, L, n) of `total`, negative for none; keys: the same, (B, 1 or H, S, n); position: of
    the rows among the keys, (1 or B, L); shape: B, Hq, H, L. is_causal: no row keeps a key behind its position.
    """
    B, Hq, H, L = shape
    table = members(keys, H, total)
    spread = rows if rows.shape[1] == Hq else rows.expand(B, H, *rows.shape[2:]).repeat_interleave(Hq // H, 1)
    position = position.expand(B, L)
    found = []
    for lists in (x for one in spread.split(1, -1) for x in sorted_by_block(one, shape, total, 1, tile=ROWS)):
        at = table[lists.place * total + lists.blocks.squeeze(-1)]
        if is_causal:
            last = torch.where(
                lists.rows < 0, NONE, position[lists.rows.clamp(min=0) // (Hq * L), lists.rows.clamp(min=0) % L]
            )
            at = torch.where(at <= last.amax(-1, keepdim=True), at, NONE)
        found += ragged(replace(lists, blocks=at))
    return found

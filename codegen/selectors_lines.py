"""What chooses columns and diagonals of the scores: how much the last rows attend to each.

    column j: sum_i A_ij      diagonal n: sum_{i - j + S - 1 = n} A_ij      A = softmax of the last rows

Source: Jiang et al. 2024, "MInference 1.0", arXiv:2407.02490, algorithm 2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attnc.codegen.key_lists import NONE
from attnc.codegen.selectors import block_shares
from attnc.codegen.selectors_blocks import products, wide


def line_shares(query: Tensor, key: Tensor, last: Tensor, rows: int, scale: float) -> tuple[Tensor, Tensor]:
    """Sums of the weights of the last `rows` rows, columns (B, Hq, S) and diagonals (B, Hq, L + S - 1).

    last: last key of every row, broadcastable to (B, Hq, L).
    """
    (L, H), rows = (query.shape[2], key.shape[1]), min(rows, query.shape[2])
    query, last = wide(query[:, :, -rows:]).unflatten(1, (H, -1)), last[..., -rows:]
    found = []
    for h in range(H):  # the weights of one key head at a time
        own = last if last.shape[1] == 1 else last.unflatten(1, (H, -1))[:, h]
        share = block_shares(products(query[:, h], wide(key[:, h : h + 1])) * scale, own, 1)
        found.append((share.sum(2), F.pad(diagonal_sums(share), (L - rows, 0))))
    columns, diagonals = zip(*found, strict=True)
    return torch.cat(columns, 1), torch.cat(diagonals, 1)


def diagonal_sums(share: Tensor) -> Tensor:
    """Sums over r - j + S - 1 = n: (..., R, S) -> (..., R + S - 1)."""
    R, S = share.shape[-2:]
    # Filled up by R, a row of one number less begins one place further on in each line.
    skewed = F.pad(share.flip(-1), (0, R)).flatten(-2)[..., :-R]
    return skewed.unflatten(-1, (R, R + S - 1)).sum(-2)


def top_lines(share: Tensor, allowed: Tensor, forced: Tensor, count: int) -> Tensor:
    """Numbers of the `count` lines of the largest shares, forced ones first, NONE where fewer are allowed.

    Shapes: share (B, heads, n), allowed and forced (n,).
    """
    share = share.masked_fill(forced, torch.inf).masked_fill(~allowed, -torch.inf)
    best, at = share.topk(count, -1)
    return at.masked_fill(best == -torch.inf, NONE)


def blocks_on_diagonals(kept: Tensor, L: int, S: int, rows: int, width: int) -> Tensor:
    """Which blocks of keys a kept diagonal crosses in each tile of rows: (B, heads, L + S - 1) -> (..., tiles, n)."""
    before = F.pad(kept.long().cumsum(-1), (1, 0))
    first, start = (torch.arange(0, n, step, device=kept.device) for n, step in ((L, rows), (S, width)))
    end, stop = (first + rows).clamp(max=L) - 1, (start + width).clamp(max=S) - 1
    least, most = first.unsqueeze(-1) - stop + S - 1, end.unsqueeze(-1) - start + S - 1
    return before[..., most + 1] > before[..., least]

"""What chooses blocks of keys: a score of each block for each row, and the best of them beside those always kept.

    mean_c = mean of the keys of block c

Source: Lu et al. 2025, "MoBA", arXiv:2502.13189, equations 4 to 6.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attnc.codegen.key_lists import NONE
from attnc.expr import TRUE
from attnc.operands import Operands
from attnc.predicate import distances
from attnc.reading import as_tensor, picked, read

READ = 1 << 24  # pairs of a mask read at a time


def last_keys(given: Operands) -> Tensor:
    """Position of the last key that each row may keep, broadcastable to (B, Hq, L); -1 where it keeps none."""
    L, S, device = given.query.shape[2], given.key.shape[2], given.query.device
    rows = torch.arange(L, device=device).view(1, 1, L)
    keep = given.rule.keep
    if keep == TRUE:
        return torch.full_like(rows, S - 1)
    least = distances(keep)[0]
    if least is not None:  # i - j >= least
        return (rows - least).clamp(max=S - 1)
    step = max(1, READ // (S * given.query.shape[0] * given.query.shape[1]))
    return torch.cat([_last_of(given, rows[..., n : n + step], S) for n in range(0, L, step)], 2)


def _last_of(given: Operands, rows: Tensor, S: int) -> Tensor:
    B, Hq, device = given.query.shape[0], given.query.shape[1], rows.device
    positions = torch.arange(S, device=device)
    at = {
        "b": torch.arange(B, device=device).view(B, 1, 1, 1),
        "h": torch.arange(Hq, device=device).view(Hq, 1, 1),
        "i": rows.unsqueeze(-1),
        "j": positions,
    }
    keep = read(given.rule.keep, {n: picked(n, x) for n, x in at.items()}, given.captured, given.sizes)
    keep = as_tensor(keep, given.query)
    found = torch.where(keep, positions, -1).amax(-1)
    return found.expand(*found.shape[:2], rows.shape[-1])


def positions_of(given: Operands, last: Tensor) -> Tensor:
    """Position among the keys of each row itself, broadcastable to (B, Hq, L): the last it keeps, or its own number."""
    L, S = given.query.shape[2], given.key.shape[2]
    if distances(given.rule.keep)[0] is not None or L == 1:
        return last
    rows = torch.arange(L, device=last.device).view(1, 1, L) + (S - L if S > L else 0)
    return torch.minimum(rows, last)


def block_means(key: Tensor, block: int) -> Tensor:
    """Mean of the keys of each block: (B, H, S, E) -> (B, H, blocks, E), float32 or float64; the last may be short."""
    key = key if key.dtype == torch.float64 else key.float()
    S = key.shape[2]
    filled = F.pad(key, (0, 0, 0, -S % block)).unflatten(2, (-1, block))
    first = torch.arange(filled.shape[2], device=key.device) * block
    return filled.sum(3) / (S - first).clamp(max=block).unsqueeze(-1)


def top_blocks(
    score: Tensor, own: Tensor, last: Tensor, block: int, count: int, *, sinks: int = 0, window: int = 1
) -> Tensor:
    """The `count` best blocks of each row, those always kept among them, NONE where fewer may be kept.

    score: (B, heads, T, blocks). own, last: positions of the row and of the last key it may keep, broadcastable to
    (B, heads, T). sinks, window: keys from the start, and up to `own`, whose blocks are always kept.
    """
    blocks = score.shape[-1]
    place = torch.arange(blocks, device=score.device)
    own, last = own.unsqueeze(-1), last.unsqueeze(-1)
    forced = (place * block < sinks) | ((place >= (own - window + 1).clamp(min=0) // block) & (place <= own // block))
    score = torch.where(forced, torch.inf, score.nan_to_num(0.0)).masked_fill(place * block > last, -torch.inf)
    best, at = score.topk(min(count, blocks), -1)
    at = at.masked_fill(best == -torch.inf, NONE)
    return at if count <= blocks else F.pad(at, (0, count - blocks), value=NONE)

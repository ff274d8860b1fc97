"""Policies of heads: how much of the attention of a prompt's last rows each of a few nested sets of keys holds.

Source: Ge et al. 2023, "Model Tells You What to Discard", arXiv:2310.01801, section 3 (recovered attention, policies).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnc.codegen.selectors_tokens import exact_scores, pieces
from attnc.operands import Operands

SINKS, NEAR, HEAVY, FULL = range(4)


def last_weights(given: Operands, rows: int) -> Iterator[tuple[int, Tensor]]:
    """First row and weights (B, Hq, n, S) of the last `rows` rows, in pieces."""
    B, Hq, L, _ = given.query.shape
    start = max(0, L - rows)
    for first, end in pieces(L - start, B * Hq * given.key.shape[2], given.query.device):
        score, keep = exact_scores(given, start + first, start + end, Hq)
        yield start + first, score.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num(0.0)


def heavy_columns(given: Operands, rows: int, count: int, heads: int) -> Tensor:
    """Keys with the largest sum of weights over rows and the query heads of one that chooses, (B, heads, count)."""
    total = sum(weights.sum(2) for _, weights in last_weights(given, rows))
    assert isinstance(total, Tensor)
    total = total.unflatten(1, (heads, -1)).sum(2)
    return total.argsort(dim=-1, descending=True, stable=True)[..., :count]


def cheapest(
    given: Operands, position: Tensor, heavy: Tensor, rows: int, *, percent: int, sinks: int, window: int
) -> Tensor:
    """The first policy of each head that chooses that holds `percent` of the weights of the rows, (B, heads).

    position: of the rows, (1 or B, L); heavy: (B, heads, n).
    """
    B, heads, _ = heavy.shape
    if percent >= 100:
        return torch.full((B, heads), FULL, device=heavy.device)
    place = torch.arange(given.key.shape[2], device=heavy.device)
    column = torch.zeros(B, heads, len(place), dtype=torch.bool, device=heavy.device).scatter(-1, heavy, True)
    column = column.repeat_interleave(given.query.shape[1] // heads, 1).unsqueeze(2)
    held, whole = [], []
    for first, weights in last_weights(given, rows):
        apart = (position[:, first : first + weights.shape[2], None] - place).abs().unsqueeze(1)
        own, near = (place < sinks) | (apart < 1), (place < sinks) | (apart < max(window, 1))
        held.append(torch.stack([(weights * kept).sum((2, 3)) for kept in (own, near, near | column)], -1))
        whole.append(weights.sum((2, 3)))
    share = torch.stack(held).sum(0).unflatten(1, (heads, -1)).sum(2)  # (B, heads, 3)
    enough = share >= percent / 100 * torch.stack(whole).sum(0).unflatten(1, (heads, -1)).sum(2).unsqueeze(-1)
    return torch.where(enough.any(-1), enough.long().argmax(-1), FULL)

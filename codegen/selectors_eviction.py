"""Caches of a bounded size that drop keys for good: which keys each row of a sequence still finds, step by step.

    p_t = weights of row t over the cache of its key head, its own key among them
    heavy hitters   a_j += p_tj, the least a_j leaves beside the `recent` last keys    (H2O)
    last attended   the least mean over all heads of p_tj leaves                       (TOVA)

Row t reads rows and keys up to t alone.

Source: Zhang et al. 2023, "H2O", arXiv:2306.14048, algorithm 1; Oren et al. 2024, "Transformers are Multi-State RNNs",
arXiv:2401.06104, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attnc.codegen.key_lists import NONE
from attnc.codegen.selectors_blocks import wide
from attnc.codegen.selectors_tokens import at_pairs, pieces
from attnc.operands import Operands


def row_weights(given: Operands, t: int, at: Tensor) -> Tensor:
    """Weights of row t over the keys at positions (B, H or 1, n), with the rule's sink: (B, Hq, n); 0 for no key."""
    B, Hq, _, E = given.query.shape
    H = given.key.shape[1]
    key = wide(given.key).gather(2, at.expand(B, H, -1).unsqueeze(-1).expand(B, H, at.shape[-1], E))
    raw = (wide(given.query[:, :, t]).unflatten(1, (H, -1)) @ key.mT).flatten(1, 2).unsqueeze(2)
    keys = at.expand(B, H, -1).repeat_interleave(Hq // H, 1).unsqueeze(2)
    return _weights(given, t, t + 1, raw, keys).squeeze(2)


def _weights(given: Operands, first: int, last: int, raw: Tensor, keys: Tensor | None) -> Tensor:
    keep = at_pairs(given, given.rule.keep, first, last, keys)
    score = at_pairs(given, given.rule.score, first, last, keys, raw).expand(raw.shape).masked_fill(~keep, -torch.inf)
    if given.rule.sink is None:
        return score.softmax(-1).nan_to_num(0.0)
    sink = at_pairs(given, given.rule.sink, first, last, keys)[..., :1].to(score.dtype).expand(*score.shape[:-1], 1)
    return torch.cat([score, sink], -1).softmax(-1)[..., :-1]


def evicted(given: Operands, size: int, recent: int, *, together: bool, summed: bool) -> Tensor:
    """Keys in a cache of `size` at each row, its own added: (B, H, L, size + 1), NONE for none.

    together: all heads have one cache, weights are means, (B, 1, L, size + 1). summed: weights add up over rows.
    """
    (B, _, L, _), H = given.query.shape, given.key.shape[1]
    heads, device = (1 if together else H), given.query.device
    at = torch.zeros(B, heads, 0, dtype=torch.int64, device=device)
    score = wide(given.query).new_zeros(B, heads, 0)
    chosen = at.new_full((B, heads, L, size + 1), NONE)
    for t in range(L):
        at, score = F.pad(at, (0, 1), value=t), F.pad(score, (0, 1))
        n = at.shape[-1]
        chosen[:, :, t, :n] = at
        weight = row_weights(given, t, at)
        weight = weight.mean(1, keepdim=True) if together else weight.unflatten(1, (H, -1)).sum(2)
        score = score + weight if summed else weight
        if n > size:
            out = score[..., : n - recent].argmin(-1, keepdim=True)
            stays = torch.arange(n - 1, device=device).expand(B, heads, -1)
            stays = stays + (stays >= out)
            at, score = at.gather(-1, stays), score.gather(-1, stays)
    return chosen


def local_hitters(given: Operands, heavy: int, recent: int) -> Tensor:
    """Keys of rows whose weights are those over all keys, as in H2O's evaluation: (B, H, L, heavy + recent + 1).

    The first `heavy` keys are held; from then on each row puts its own in place of the one with the least sum of
    weights, counted while it is held. The `recent` keys before a row are kept beside them.
    """
    (B, Hq, L, _), (H, S) = given.query.shape, given.key.shape[1:3]
    device = given.query.device
    held = torch.arange(min(heavy, L), device=device).expand(B, H, -1).clone()
    score = wide(given.query).new_zeros(B, H, held.shape[-1])
    chosen = held.new_full((B, H, L, heavy + recent + 1), NONE)
    for first, last in pieces(L, B * Hq * S, device):
        raw = (wide(given.query[:, :, first:last]).unflatten(1, (H, -1)) @ wide(given.key).mT.unsqueeze(2)).flatten(
            1, 2
        )
        weights = _weights(given, first, last, raw, None).unflatten(1, (H, -1)).sum(2)
        for t in range(first, last):
            if t >= heavy:
                out = score.argmin(-1, keepdim=True)
                held, score = held.scatter(-1, out, t), score.scatter(-1, out, 0.0)
            score = score + weights[:, :, t - first].gather(-1, held)
            chosen[:, :, t, : held.shape[-1]] = torch.where(held < t - recent, held, NONE)
            near = torch.arange(t - recent, t + 1, device=device)
            chosen[:, :, t, heavy:] = torch.where(near >= 0, near, NONE)
    return chosen

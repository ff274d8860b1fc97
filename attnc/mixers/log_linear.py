"""Log-linear attention: states of halves of growing blocks, each read with a weight of its own.

    o_i = sum_{j<=i} lambda_{i, l(i,j)} exp(G_i - G_j) (q_i . k_j) v_j,   l(i, j) = bits of (i xor j)

A level l >= 1 is one product: rows of the second half of a block of 2^l tokens read the state of its first half. Levels
inside a chunk are one masked product together; those above it cost O(K V) a token each, log2(L / chunk) of them.

Shapes: q, k (B, H, L, K), v (B, H, L, V), decay (B, H, L) as logarithms, level_scales (B, H, L, ceil(log2 L) + 1).
Source: Guo et al. 2025, arXiv:2506.04761, section 3 (Fenwick tree).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def log_linear_attention(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, level_scales: Tensor) -> Tensor:
    """out (B, H, L, V)."""
    L = query.shape[2]
    chunks = 1 << max(0, (-(-L // CHUNK) - 1).bit_length())
    missing = chunks * CHUNK - L
    q, k, v, scales = (
        F.pad(x, (0, 0, 0, missing)).unflatten(2, (chunks, CHUNK)) for x in (query, key, value, level_scales)
    )
    # Differences of sums over the whole length are taken: in float64 they are exact enough.
    sums = F.pad(decay.double(), (0, missing)).cumsum(-1).unflatten(2, (chunks, CHUNK))
    ends, top = sums[..., -1], scales.shape[-1] - 1
    out = _within(q, k, sums, scales, top) @ v
    state = (k * (ends[..., None] - sums).exp().to(k.dtype)[..., None]).mT @ v
    size, level = 1, CHUNK.bit_length()
    while size < chunks:
        halves = (chunks // (2 * size), 2)
        left, right = (state.unflatten(2, halves)[:, :, :, n] for n in (0, 1))
        before, behind = (ends[:, :, size - 1 :: size].unflatten(2, halves)[..., n] for n in (0, 1))
        q_right, scale_right, sums_right = (
            x.unflatten(2, (*halves, size))[:, :, :, 1].flatten(3, 4) for x in (q, scales[..., min(level, top)], sums)
        )
        weight = scale_right * (sums_right - before[..., None]).exp().to(q.dtype)
        read = (q_right * weight[..., None]) @ left
        both = torch.stack([torch.zeros_like(read), read], 3)
        out = out + both.unflatten(4, (size, CHUNK)).flatten(2, 4)
        state = right + left * (behind - before).exp().to(q.dtype)[..., None, None]
        size, level = 2 * size, level + 1
    return out.flatten(2, 3)[:, :, :L]


def _within(q: Tensor, k: Tensor, sums: Tensor, scales: Tensor, top: int) -> Tensor:
    """Weights of the pairs of a chunk."""
    at = torch.arange(CHUNK, device=q.device)
    apart = at[:, None] ^ at
    level = sum((apart >= 1 << bit).long() for bit in range(CHUNK.bit_length() - 1))
    above = at[:, None] < at
    scale = scales.gather(-1, torch.as_tensor(level).clamp(max=top).expand(*scales.shape[:-1], CHUNK))
    decays = (sums[..., :, None] - sums[..., None, :]).masked_fill(above, float("-inf")).exp()
    return q @ k.mT * decays.to(q.dtype) * scale

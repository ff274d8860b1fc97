"""Buckets of vectors by locality-sensitive hashing, and the order that sorts them.

    rotation  argmax of [x R, -x R], R a random (E, buckets / 2)
    bits      the place in Gray order of the signs of x R, R a random (E, log2 buckets): neighbours differ in one sign

Source: Kitaev et al. 2020, "Reformer", arXiv:2001.04451, section 2 (rotation); Han et al. 2023, "HyperAttention",
arXiv:2310.05869, definition 1 (bits).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.codegen.selectors_blocks import wide


def buckets_of(x: Tensor, kind: str, buckets: int, rounds: int, seed: int) -> Tensor:
    """Bucket of each vector in each round, (B, heads, n, E) -> (B, heads, rounds, n); the same numbers for a seed."""
    columns = buckets // 2 if kind == "rotation" else buckets.bit_length() - 1
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rounds, x.shape[-1], columns, generator=generator, dtype=torch.float64)
    x = wide(x)
    turned = x.unsqueeze(2) @ drawn.to(x.device, x.dtype)
    if kind == "rotation":
        return torch.cat([turned, -turned], -1).argmax(-1)
    binary = (turned > 0).long().cumsum(-1) % 2  # a Gray code read as the number of its place
    return (binary << torch.arange(columns - 1, -1, -1, device=x.device)).sum(-1)


def ranks(bucket: Tensor) -> Tensor:
    """Place of each element of the last axis when sorted by bucket, then by position."""
    order = bucket.argsort(dim=-1, stable=True)
    place = torch.arange(bucket.shape[-1], device=bucket.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, place)


def sampled_columns(S: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Which of S keys are a sample of `count`, (S,) boolean; a larger sample holds a smaller one."""
    order = torch.randperm(S, generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(S, dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen.to(device)


def logs_of_counts(most: int, like: Tensor) -> Tensor:
    """Logarithms of 1 .. most behind one of 0, which stands for 1; float64 where `like` is."""
    counts = torch.arange(most + 1, device=like.device, dtype=torch.float64).clamp(min=1.0)
    return counts.log().to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def halves_of(bucket: Tensor, buckets: int, half: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Chunk of each token as a row and as a key of the halves of segments of 2 * half tokens, -1 and -2 for none.

    bucket: (..., L). Keys are those of first halves, all complete, sorted by bucket and cut into chunks; rows those of
    the second halves behind them, sorted and spread over as many chunks.
    """
    L, device = bucket.shape[-1], bucket.device
    at = torch.arange(L, device=device)
    own, segment = at // half, at // (2 * half)
    rank = ranks(own * buckets + bucket) - own * half
    chunks, rows = -(-half // chunk), (L - own * half).clamp(max=half)
    second = own % 2 == 1
    behind = ~second & ((own + 1) * half < L)
    of_rows = torch.where(second, segment * chunks + rank * chunks // rows, -1)
    return of_rows, torch.where(behind, segment * chunks + rank // chunk, -2)

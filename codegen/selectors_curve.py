"""Keys near queries on a Z-order curve: vectors of few channels as one number each, sorted once, searched for each row.

    z(x) = bits of floor(2^bits u(x_c)) of all channels c, interleaved, highest first;   u(t) = (1 + t / (1 + |t|)) / 2

u is the same for all vectors, so that a code depends on its token alone.

Source: Zeng et al. 2025, "ZETA: Leveraging Z-order Curves for Efficient Top-k Attention", arXiv:2501.14577, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.codegen.key_lists import NONE
from attnc.codegen.selectors_blocks import wide

BITS = 60  # of a code


def thin(x: Tensor, width: int, seed: int) -> Tensor:
    """(..., E) -> (..., width) by a random projection, the same for a seed; as it is where it is no wider."""
    if x.shape[-1] <= width:
        return wide(x)
    drawn = torch.randn(x.shape[-1], width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = wide(x)
    return x @ (drawn / x.shape[-1] ** 0.5).to(x.device, x.dtype)


def codes(x: Tensor) -> Tensor:
    """(..., n) -> (...) int64."""
    n = x.shape[-1]
    bits = min(20, BITS // n)
    level = ((0.5 + x / (2.0 + 2.0 * x.abs())) * (1 << bits)).long().clamp(0, (1 << bits) - 1)
    found = torch.zeros_like(level[..., 0])
    for bit in range(bits - 1, -1, -1):
        for channel in range(n):
            found = found << 1 | (level[..., channel] >> bit & 1)
    return found


def nearest_codes(query: Tensor, key: Tensor, ends: Tensor, count: int) -> Tensor:
    """Positions of the keys around each query's place among the sorted codes of the keys before `ends`, ascending.

    query: codes (B, Hq, L); key: (B, H, S); ends: (L,). -> (B, Hq, L, count), NONE where there are fewer. Keys of one
    code stand in their order.
    """
    B, Hq, L = query.shape
    H = key.shape[1]
    value, order = key.sort(dim=-1, stable=True)
    found = torch.full((B, Hq, L, count), NONE, device=query.device)
    for end in ends.unique().tolist():
        if end <= 0:
            continue
        rows = (ends == end).nonzero().squeeze(-1)
        inside = order < end
        few, place = value[inside].view(B, H, end), order[inside].view(B, H, end)
        wanted = query[:, :, rows].unflatten(1, (H, -1)).flatten(2)
        at = torch.searchsorted(few, wanted.contiguous())
        n = min(count, end)
        start = (at - n // 2).clamp(0, end - n)
        taken = start.unsqueeze(-1) + torch.arange(n, device=start.device)
        keys = place.gather(2, taken.flatten(2)).view(B, H, -1, len(rows), n).flatten(1, 2)
        found[:, :, rows, :n] = keys.sort(-1).values
    return found

"""Sparse Sinkhorn attention: each block of rows attends to its own block of keys and to a block that a sorting mixes.

    K'_b = sum_c R_bc K_c,  V'_b = sum_c R_bc V_c;   out of block b = softmax over [K'_b, K_b] of its rows' scores

R (B, H, blocks, blocks) comes from the model's sorting network and Sinkhorn's steps, made lower triangular without its
diagonal where the model is causal; a block whose row of R is 0 attends to its own alone.

Source: Tay et al. 2020, "Sparse Sinkhorn Attention", arXiv:2002.11296, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.errors import UsageError
from attnc.ops import ATTENTION


def sorted_blocks(query: Tensor, key: Tensor, value: Tensor, sort: Tensor, *, is_causal: bool = False) -> Tensor:
    """out (B, H, L, Ev).

    Shapes: query and key (B, H, L, E), value (B, H, L, Ev), sort (B, H, n, n), n blocks of L / n tokens.
    Raises: UsageError where n does not divide L.
    """
    B, H, L, E = query.shape
    n = sort.shape[-1]
    if L % n:
        raise UsageError(f"sorted_blocks of {n} blocks: found {L} tokens, allowed is a multiple of {n}. Pad them.")
    size = L // n
    rows = query.view(B, H * n, size, E)
    both = []
    for t in (key, value):
        own = t.unflatten(2, (n, size))
        both.append(torch.cat([(sort @ own.flatten(3)).view_as(own), own], 3).flatten(1, 2))
    there = (sort != 0).any(-1).flatten(1)
    form = "dense" if query.device.type == "cpu" else "flash"
    keep = f"(j >= {size} or t0[b, h])" + (f" and j - i <= {size}" if is_causal else "")
    out, _ = ATTENTION(rows, *both, [there], [], f"{form} | score={E**-0.5!r} * s; keep={keep}")
    return out.view(B, H, L, -1)

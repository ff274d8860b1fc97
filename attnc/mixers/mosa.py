"""Mixture of sparse attention: each head chooses the tokens that it attends among, by a router of its own.

    r = sigmoid(x W_r^T);   T_e = the k tokens with the largest r_te;   q, k, v = rope(x_T W_e) for the tokens of T_e
    out_t = sum over heads e with t in T_e of r_te softmax_{j in T_e, j <= t}(q_t . k_j / sqrt(D)) v_j  O_e

What a token attends to lies at or before it; whether a head chooses a token depends on all tokens of the sequence, as
published: the layer is not causal in what it chooses. The choice has no gradient, r has one.

Source: Piekos et al. 2025, "Mixture of Sparse Attention: Content-Based Learnable Sparse Attention via Expert-Choice
Routing", arXiv:2505.00315, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.ops import ATTENTION


def mixture_of_sparse(
    x: Tensor, router: Tensor, qkv: Tensor, out: Tensor, *,
    tokens: int, rotated: int = 0, first: bool = False, base: float = 10000.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The layer's output (B, L, C) and the tokens that each head chose, (B, E, tokens), ascending.

    Shapes: x (B, L, C), router (E, C), qkv (E, C, 3 D), out (E, D, C). rotated: channels of queries and keys that carry
    the position, at the angles t / base^(2 n / rotated). first: token 0 is always among the tokens.
    """
    B, L, C = x.shape
    weights = (x @ router.mT).sigmoid().mT  # (B, E, L)
    with torch.no_grad():
        rank = weights.index_fill(-1, torch.zeros(1, dtype=torch.long, device=x.device), 2.0) if first else weights
        chosen = rank.topk(min(tokens, L), -1).indices.sort(-1).values
    heads = torch.arange(B, device=x.device).view(B, 1, 1)
    query, key, value = (x[heads, chosen] @ qkv).chunk(3, -1)
    if rotated:
        query, key = (_turned(t, chosen, rotated, base) for t in (query, key))
    scale = query.shape[-1] ** -0.5
    form = "dense" if x.device.type == "cpu" else "flash"
    # the tokens are in order, so that a causal mask of their ranks is one of their positions
    part, _ = ATTENTION(query, key, value, [], [], f"{form} | score={scale!r} * s; keep=j - i <= 0")
    part = (part * weights.gather(-1, chosen).unsqueeze(-1)) @ out
    at = chosen.flatten(1).unsqueeze(-1).expand(-1, -1, C)
    return torch.zeros_like(x, dtype=part.dtype).scatter_add(1, at, part.flatten(1, 2)), chosen


def _turned(x: Tensor, positions: Tensor, rotated: int, base: float) -> Tensor:
    """The first `rotated` channels turned by their positions, halves being pairs."""
    power = torch.arange(0, rotated, 2, device=x.device, dtype=torch.float64) / rotated
    angle = positions.unsqueeze(-1) * base**-power
    cos, sin = (f(angle).to(x.dtype) for f in (torch.cos, torch.sin))
    one, two, rest = x.split([rotated // 2, rotated - rotated // 2, x.shape[-1] - rotated], -1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], -1)

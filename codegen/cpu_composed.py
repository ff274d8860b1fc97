"""Attention spelled out in ATen for scores no kernel offers: any score of the product, gradients of everything.

    e_ij = exp(score_ij - m_i) where kept,  out_i = sum_j e_ij v_j / z_i,  z_i = exp(sink_i - m_i) + sum_j e_ij

Heads that share keys are rows of one product, never copies. The L x S tensors exist; callers hand in tiles.

Source: Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, section 3.2.1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def composed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score: Callable[[torch.Tensor], torch.Tensor],
    keep: torch.Tensor | bool = True,
    *,
    sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Attend with `score(raw product)`.

    Shapes: query (B, Hq, L, E), key (B, H, S, E), value (B, H, S, Ev); keep broadcasts to (B, Hq, L, S), sink to
            (B, Hq, L) -> out (B, Hq, L, Ev), lse (B, Hq, L), alive (B, Hq, L) or None where every row keeps a key.
    A row that keeps nothing gives 0. Half types are exponentiated and summed in float32; lse is not differentiable.
    """
    B, Hq, L, E = query.shape
    H, Ev = key.shape[1], value.shape[-1]
    raw = (query.reshape(B, H, Hq // H * L, E) @ key.mT).view(B, Hq, L, -1)
    raw = raw.float() if raw.dtype in (torch.bfloat16, torch.float16) else raw
    scores = score(raw)
    mask = keep if isinstance(keep, torch.Tensor) else None
    if keep is False:
        mask = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=query.device)
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf)
    top = scores.detach().amax(-1)
    if sink is not None:
        top = torch.maximum(top, sink.detach().to(top.dtype))
    if mask is not None:
        top = torch.where(top == -torch.inf, 0.0, top)
    e = (scores - top.unsqueeze(-1)).exp()
    z = e.sum(-1)
    alive = (z > 0) if mask is not None else None
    if sink is not None:
        z = z + (sink.to(z.dtype) - top).exp()
    elif alive is not None:
        z = torch.where(alive, z, 1.0)
    out = (e.to(value.dtype).view(B, H, Hq // H * L, -1) @ value).view(B, Hq, L, Ev)
    out = (out / z.unsqueeze(-1)).to(query.dtype)
    lse = (top + z.log()).detach()
    if alive is not None and sink is None:
        lse = torch.where(alive, lse, -torch.inf)
    return out, lse, alive

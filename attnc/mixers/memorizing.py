"""Memorizing attention: what each query finds in a memory of past keys, and what it finds near, under a gate of a head.

    out_i = g_h softmax over the top_k keys of the memory with the largest q_i . k_m
          + (1 - g_h) softmax over the local keys up to row i,        g = sigmoid(gate)

The memory has no gradient, as published; queries, local keys and the gate have one. Filling the memory stands outside.

Source: Wu et al. 2022, "Memorizing Transformers", arXiv:2203.08913, section 3.
"""

from __future__ import annotations

from torch import Tensor

from attnc.forms.token_top_k import TokenTopK
from attnc.ops import ATTENTION


def memorizing(
    query: Tensor, key: Tensor, value: Tensor, memory: tuple[Tensor, Tensor], gate: Tensor, *,
    top_k: int = 32, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """out (B, Hq, L, Ev).

    Shapes: query (B, Hq, L, E), local key (B, H, S, E) and value (B, H, S, Ev) that end with the rows' own; memory:
    keys (B, H, M, E) and values (B, H, M, Ev); gate (Hq,).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    near_form = "dense" if query.device.type == "cpu" else "flash"
    ahead = key.shape[2] - query.shape[2]
    near, _ = ATTENTION(query, key, value, [], [], f"{near_form} | score={scale!r} * s; keep=j - i <= {ahead}")
    past = [t.detach() for t in memory]
    far, _ = ATTENTION(query, *past, [], [], f"{TokenTopK(top_k=top_k).spell()} | score={scale!r} * s")
    share = gate.sigmoid().view(-1, 1, 1).to(near.dtype)
    return share * far + (1 - share) * near

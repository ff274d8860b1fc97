"""Cauchy attention: keys weigh by their distance from the query, those next to it on a Z-order curve alone.

    w_ij = 1 / (|q_i - k_j|^2 + gamma_h^2),   out_i = sum_{j in I_i} w_ij v_j / sum_{j in I_i} w_ij

A softmax of -log(|q|^2 + |k|^2 - 2 q . k + gamma^2): gradients reach queries, keys, values and gamma. The mean of the
past, which the paper adds as one more key, is left to the caller.

Source: Zeng et al. 2025, "ZETA: Leveraging Z-order Curves for Efficient Top-k Attention", arXiv:2501.14577, section 3.
"""

from __future__ import annotations

from torch import Tensor

from attnc.forms.z_order import ZOrder
from attnc.ops import ATTENTION


def cauchy(
    query: Tensor, key: Tensor, value: Tensor, gamma: Tensor, *,
    is_causal: bool = True, top_k: int = 32, chunk: int = 64, window: int = 64,
) -> Tensor:  # fmt: skip
    """out (B, Hq, L, Ev).

    Shapes: query (B, Hq, L, E), key (B, H, L, E), value (B, H, L, Ev), gamma (Hq,), not 0. top_k, chunk, window: as the
    form z_order has them, over as many channels as there are.
    """
    group = query.shape[1] // key.shape[1]
    form = ZOrder(top_k=top_k, chunk=chunk, width=query.shape[-1], window=window)
    head = "h" if group == 1 else f"h // {group}"
    distance = f"f0[b, h, i] + f1[b, {head}, j] + f2[h] - 2.0 * s"
    keep = "; keep=j - i <= 0" if is_causal else ""
    captured = [query.square().sum(-1), key.square().sum(-1), gamma.square()]
    out, _ = ATTENTION(query, key, value, captured, [], f"{form.spell()} | score=-log({distance}){keep}")
    return out

"""Mixture of top-k attention: landmarks gather keys that suit them, and each query goes to the landmarks that suit it.

    r_m: landmarks, means of queries;   T_m = the top_k keys with the largest r_m . k_j
    u_m = sum_j softmax_j(s r_m . k_j) v_j
    E_i = the `experts` landmarks with the largest q_i . r_m
    out_i = softmax over the keys of T_m, m in E_i, with scores s q_i . k_j, and over all landmarks m with scores
            s^2 q_i . r_m and values u_m

s = 1 / sqrt(E). Choices have no gradient; landmarks and what they gather have one. A key that two landmarks of a query
gather counts once, where the authors' kernel counts it twice. Not causal: landmarks and their keys are those of all
tokens.

Source: Wen et al. 2026, "MiTA Attention: Efficient Fast-Weight Scaling via a Mixture of Top-k Activations",
arXiv:2602.01219.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.ops import ATTENTION


def landmark_experts(
    query: Tensor, key: Tensor, value: Tensor, landmarks: Tensor, *, top_k: int = 25, experts: int = 1
) -> Tensor:
    """out (B, H, L, Ev).

    Shapes: query (B, H, L, E), key (B, H, S, E), value (B, H, S, Ev), landmarks (B, H, M, E).
    """
    S, scale, on_cpu = key.shape[2], query.shape[-1] ** -0.5, query.device.type == "cpu"
    summed, _ = ATTENTION(landmarks, key, value, [], [], f"{'dense' if on_cpu else 'flash'} | score={scale!r} * s")
    with torch.no_grad():
        gathered = (landmarks @ key.mT).topk(min(top_k, S), -1).indices  # (B, H, M, k)
        routed = (query @ landmarks.mT).topk(min(experts, landmarks.shape[2]), -1).indices  # (B, H, L, n)
        batch, head = (torch.arange(n, device=key.device) for n in query.shape[:2])
        lists = gathered[batch[:, None, None, None], head[:, None, None], routed].flatten(3)
        every = torch.arange(S, S + landmarks.shape[2], device=key.device).expand(*lists.shape[:3], -1)
        lists = torch.cat([lists, every], -1)
    keys, values = torch.cat([key, scale * landmarks], 2), torch.cat([value, summed], 2)
    rule = f"score={scale!r} * s; keep=j in t0[b, h, i, :{lists.shape[-1]}]"
    return ATTENTION(query, keys, values, [lists], [], f"listed | {rule}")[0]

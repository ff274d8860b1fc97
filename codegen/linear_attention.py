"""Linear attention of mapped queries and keys, alone and behind a window of softmax, on `attnc::recurrence`.

The operator is reached by its name: `attnc.op_recurrence`, which defines it, lies above.

Source: Katharopoulos et al. 2020, arXiv:2006.16236; Zhang et al. 2024, arXiv:2410.10254 (LoLCATs).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnc.rule_recurrence import RecurrenceRule


def mix(
    rule: RecurrenceRule, query: Tensor | None, key: Tensor | None, value: Tensor, **rest: Any
) -> tuple[Tensor, Tensor]:
    """`attnc::recurrence` by the names of its operands; arithmetic in float64 where the value is."""
    rule = replace(rule, state="float64" if value.dtype == torch.float64 else "float32")
    given = [rest.pop(name, None) for name in ("decay", "rates", "beta", "bonus", "initial_state")]
    out, state = torch.ops.attnc.recurrence.default(query, key, value, *given, rule.spell(), **rest)
    return out, state


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float = 1.0,
    normalise: bool = True,
    eps: float = 1e-6,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o_t = sum_{j<=t} (phi_q . phi_k) v_j over the sum of the weights, of mapped q and k (B, H, L, F).

    With normalise, states are (B, H, F, V + 1): the last column is the sum of the keys.
    """
    divided: dict[str, Any] = {"normaliser": "sum", "eps": eps} if normalise else {}
    return mix(RecurrenceRule(scale=scale, chunk=64, **divided), query, key, value, initial_state=initial_state)


def window_and_linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mapped_query: Tensor,
    mapped_key: Tensor,
    window_factor: Tensor,
    linear_factor: Tensor,
    *,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """LoLCATs: softmax over the last `window` keys and linear attention over those before, under one sum of weights.

    mapped_*: (B, H, L, F), positive. The factors are (1, H, 1, 1). Returns: out, and the sums (B, H, L, 1).
    """
    L = query.shape[2]
    blocks = -(-L // window)
    pad = (0, 0, 0, blocks * window - L)
    q = F.pad(query, pad).unflatten(2, (blocks, window))
    k, v = (F.pad(x, (0, 0, window, pad[3])).unfold(2, 2 * window, window).mT for x in (key, value))
    row, column = torch.arange(window, device=q.device)[:, None], torch.arange(2 * window, device=q.device)
    seen = (column > row) & (column <= row + window)
    first = torch.arange(blocks, device=q.device)[:, None, None] > 0
    logits = (q @ k.mT * scale).masked_fill(~(seen & (first | (column >= window))), float("-inf"))
    weights = window_factor[..., None] * torch.exp(logits - logits.amax(-1, keepdim=True))
    near = torch.cat([weights @ v, weights.sum(-1, keepdim=True)], -1).flatten(2, 3)[:, :, :L]
    late_key, late_value = (F.pad(x, (0, 0, window, 0))[:, :, :L] for x in (mapped_key, value))
    ones = torch.ones_like(late_value[..., :1])
    far, _ = mix(RecurrenceRule(chunk=64), mapped_query, late_key, torch.cat([late_value, ones], -1))
    total = near + linear_factor * far
    return total[..., :-1] / total[..., -1:], total[..., -1:]

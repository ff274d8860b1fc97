"""torch's scaled_dot_product_attention under a rule: the kernel with a flag for causal, or with one mask in memory.

    out_i = sum_j softmax_j(factor * q_i . k_j + bias_ij where keep_ij) v_j

Heads that share keys are the kernel's own where it has no mask; with a mask torch 2.11 to 2.15 would take its slow path
for them, so they are repeated. lse is computed apart, for who asks: unused, tracing drops it.

Source: Dao 2023, arXiv:2307.08691; torch.nn.functional.scaled_dot_product_attention (choice of kernels).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from attnc.codegen.cpu_scores import additive, factor_of, is_zero
from attnc.expr import TRUE, Expr
from attnc.operands import Operands
from attnc.rule_attention import linear_score


def sdpa(given: Operands, *, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend; rows that keep no key give 0 and lse -inf. causal: the mask is j <= i and nothing else.

    Shapes: query (B, Hq, L, E), key (B, H, S, E), value (B, H, S, Ev) -> out (B, Hq, L, Ev), lse (B, Hq, L).
    """
    query, key, value, _, _, rule = given
    mask, group = None if causal else _mask(given), given.group
    copied = group > 1 and mask is not None
    k, v = (t.repeat_interleave(group, 1) if copied else t for t in (key, value))
    out = F.scaled_dot_product_attention(
        query, k, v, attn_mask=mask, is_causal=causal, scale=factor_of(rule), enable_gqa=group > 1 and not copied
    )
    return out, _lse(query, key, mask, factor_of(rule), causal=causal)


def _mask(given: Operands) -> torch.Tensor | None:
    rule, dtype = given.rule, given.query.dtype
    parts = linear_score(rule.score)
    assert parts is not None, rule
    bias: Expr = parts[1]
    keep = given.tensor(rule.keep)
    if is_zero(bias):
        return None if rule.keep == TRUE else keep
    added = given.tensor(bias)
    return added.to(dtype) if rule.keep == TRUE else additive(keep, added, dtype)


@torch.no_grad()
def _lse(query, key, mask: torch.Tensor | None, factor: float, *, causal: bool) -> torch.Tensor:
    """log-sum-exp of the scores, (B, Hq, L), float32 (float64 for float64)."""
    B, Hq, L, E = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    rows = query.reshape(B, key.shape[1], -1, E)
    scores = (rows @ key.mT).view(B, Hq, L, -1).to(wide) * factor
    if causal:
        mask = torch.ones(L, key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.logsumexp(-1)

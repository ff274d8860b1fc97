"""Scores as what a kernel can take: a factor of the product, plus an additive constant mask.

Source: the rule of `attnc.region`; scaled_dot_product_attention's additive float mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attnc.expr import Expr
from attnc.region import AttentionRule, linear_score


def constant_bias(rule: AttentionRule, captured: Sequence[torch.Tensor]) -> Expr | None:
    """What is added to `factor * s`, where a kernel can add it: the score is linear and no gradient goes into it."""
    linear = linear_score(rule.score)
    if linear is None:
        return None
    rest = linear[1]
    if torch.is_grad_enabled():
        slots = {x.args[0] for x in rest.walk() if x.op == "load"}
        if any(captured[slot].requires_grad for slot in slots):
            return None
    return rest


def additive(keep: torch.Tensor | bool, bias: torch.Tensor | float | None, dtype: torch.dtype) -> torch.Tensor:
    """`bias` where kept, -inf elsewhere, broadcast no further than the two need."""
    if bias is None:
        zero = torch.zeros((), dtype=dtype, device=keep.device)
        return torch.where(keep, zero, -torch.inf)
    bias = bias.to(dtype)
    return bias if keep is True else torch.where(keep, bias, -torch.inf)

"""Gates of a recurrence: exponential gates under a running maximum, normalisers, where documents start.

An exponential gate exp(beta) is held down to at most 1: the state and the normaliser are kept times exp(-m), m being
the largest exponent so far.

Source: Beck et al. 2024, arXiv:2405.04517, appendix (running maximum); Peng et al. 2023, arXiv:2305.13048 (RWKV-4).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attnc.rule_recurrence import RecurrenceRule

NEVER = -1e38  # the maximum of no exponents


def starts_of(documents: Tensor) -> Tensor:
    """Where a document starts behind another one, (B, L)."""
    return F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=False)


def stopped(
    decay: Tensor | None, starts: Tensor, v: Tensor, rule: RecurrenceRule
) -> tuple[Tensor | None, RecurrenceRule]:
    """The decay with nothing left of the state where a document starts, and the rule that it follows then."""
    if rule.decay == "state":  # steps times rates: its factors are cut off later
        return decay, rule
    B, H, L, _ = v.shape
    gone = 0.0 if rule.factors else -math.inf
    if decay is None:
        decay, rule = v.new_zeros(()), replace(rule, decay="token")
    if rule.decay == "head":
        decay, rule = decay.view(1, H, 1), replace(rule, decay="token")
    if rule.decay == "token":
        return decay.expand(B, H, L).masked_fill(starts[:, None], gone), rule
    return decay.masked_fill(starts[:, None, :, None], gone), rule


def divided(out: Tensor, maximum: Tensor | None, rule: RecurrenceRule) -> Tensor:
    """The last column of `out` is the normaliser; both are scaled by exp(-maximum)."""
    numerator, denominator = out[..., :-1], out[..., -1:]
    if rule.normaliser == "max1":
        least = torch.ones_like(denominator) if maximum is None else torch.exp(-maximum)
        denominator = torch.maximum(denominator.abs(), least)
    return numerator / (denominator + rule.eps)


def running_maximum(f: Tensor, i: Tensor, start: Tensor, fresh: float, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """m_t = max(f_t + m_{t-1}, i_t) and m_{t-1}, all (B, H, L); `fresh` before the first token of later documents."""
    total = f.cumsum(-1)
    first = start[..., None]
    if starts is None:
        m = total + torch.maximum(first, (i - total).cummax(-1).values)
        return m, torch.cat([first, m[..., :-1]], -1)
    number = starts.cumsum(-1)[:, None]
    inside = torch.where(starts[:, None], total - f, 0.0).cummin(-1).values  # sums of logarithms only fall
    total = total - torch.where(number > 0, inside, 0.0)
    first = torch.where(number > 0, fresh, first)
    largest, apart = i - total, 1
    while apart < i.shape[-1]:  # the largest so far of each document
        same = F.pad(number[..., apart:] == number[..., :-apart], (apart, 0), value=False)
        largest = torch.where(same, torch.maximum(largest, F.pad(largest[..., :-apart], (apart, 0))), largest)
        apart *= 2
    m = total + torch.maximum(first, largest)
    before = torch.cat([first[..., :1], m[..., :-1]], -1)
    return m, torch.where(starts[:, None], first, before)

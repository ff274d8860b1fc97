"""Recurrences on GPUs: documents counted, and an exponential gate held down by its running maximum, in plain torch.

    m_t = max(g_t + m_{t-1}, beta_t);    decay g_t + m_{t-1} - m_t <= 0,    gate exp(beta_t - m_t) <= 1

so that kernels meet a decay by token and a gate like any other, the state times exp(-m). Scans over (B, H, L), small
beside the state.

Source: Beck et al. 2024, arXiv:2405.04517, section 2.3 and appendix (stabilised gates).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.rule_recurrence import RecurrenceRule

LEAST = -1e4  # a logarithm whose exponential is 0, in sums of float64


def segments_of(documents: Tensor) -> Tensor:
    """Documents counted along each row: two of the same number with another between them are two."""
    starts = documents[:, 1:] != documents[:, :-1]
    return torch.nn.functional.pad(starts.cumsum(1, dtype=torch.int32), (1, 0)).contiguous()


def held_down(
    decay: Tensor | None, beta: Tensor, initial: Tensor | None, segments: Tensor | None, rule: RecurrenceRule
) -> tuple[Tensor, Tensor, Tensor]:
    """Decay, gate and running maximum m (B, H, L): the state is kept times exp(-m). Sums over tokens in float64."""
    B, H, L = beta.shape
    g = torch.zeros_like(beta) if decay is None else decay.view(1, H, 1) if decay.dim() == 1 else decay
    f, i = g.double().clamp(min=LEAST).expand(B, H, L), beta.double()
    start = start_maximum(beta, initial, rule).double()[..., None].expand(B, H, L)
    total, lift = f.cumsum(-1), torch.zeros((), dtype=torch.float64, device=beta.device)
    if segments is not None:  # sums from the document's first token; later documents lie above all earlier ones
        first = torch.nn.functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)[:, None]
        total = total - torch.where(first, total - f, torch.inf).cummin(-1).values
        start = torch.where(segments[:, None] == 0, start, start_maximum(beta, None, rule).double()[..., None])
        lift = segments[:, None] * ((i - total).amax(-1, True) - (i - total).amin(-1, True) + 1.0)
    m = total + torch.maximum(start, (i - total + lift).cummax(-1).values - lift)
    before = torch.cat([start[..., :1], m[..., :-1]], -1)
    if segments is not None:
        before = torch.where(first, start, before)
    return (f + before - m).float(), torch.exp(i - m).float(), m.float().contiguous()


def start_maximum(like: Tensor, initial: Tensor | None, rule: RecurrenceRule) -> Tensor:
    """The maximum before the first token, (B, H)."""
    if initial is not None:
        return initial[..., 0, -1]
    return like.new_full(like.shape[:2], 0.0 if rule.normaliser == "max1" else -1e38, dtype=torch.float32)


def last_maximum(maximum: Tensor, initial: Tensor | None, rule: RecurrenceRule) -> Tensor:
    """The maximum after the last token, (B, H)."""
    return maximum[..., -1] if maximum.shape[2] else start_maximum(maximum, initial, rule)

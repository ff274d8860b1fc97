"""Linear recurrences element by element of the state: one token, or all of a segment at once, as blocks of a scan.

Source: Gu and Dao 2023, arXiv:2312.00752 (selective scan); Blelloch 1990, "Prefix sums and their applications".
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attnc.rule_recurrence import RecurrenceRule


def scanned(q, k, v, decay, rates, write, state, starts, rule: RecurrenceRule) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, L, V) and the last state. q, k: (B, Hk, L, K) or None; starts: (B, L) or None."""
    q, k = (None if x is None else _for_heads(x, v.shape[1]) for x in (q, k))
    factors = _factors(decay, rates, rule)
    if starts is not None and factors is not None:
        factors = factors.masked_fill(starts[:, None, :, None, None], 0.0)
    update = v[:, :, :, None] if k is None else k[..., None] * v[:, :, :, None]
    if write is not None:
        update = update * write[..., None, None]
    states = _scan(factors, update, state)
    read = torch.cat([state[:, :, None], states[:, :, :-1]], 2) if rule.read == "before" else states
    if starts is not None and rule.read == "before":
        read = read.masked_fill(starts[:, None, :, None, None], 0.0)
    out = read.sum(3) if q is None else (read * q[..., None]).sum(3)
    return out, states[:, :, -1]


def stepped(q, k, v, decay, rates, write, a, b, state, starts, rule: RecurrenceRule) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, 1, V) and the state after one token; operands as `scanned` has them, a and b as q and k."""
    H = v.shape[1]
    q, k, a, b = (None if x is None else _for_heads(x, H) for x in (q, k, a, b))
    before = state if starts is None else state.masked_fill(starts[:, None, :, None], 0.0)
    factors = _factors(decay, rates, rule)
    left = before if factors is None else before * factors.squeeze(2)
    if rule.delta:
        v = v - k @ left
    if write is not None:
        v = v * write[..., None]
    last = left + v if k is None else torch.addcmul(left, k.mT, v)
    if a is not None:
        last = last + b.mT * (a @ before)
    read = before if rule.read == "before" else last
    return read.sum(2, keepdim=True) if q is None else q @ read, last


def _for_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], 1)


def _factors(decay: Tensor | None, rates: Tensor | None, rule: RecurrenceRule) -> Tensor | None:
    """Factors of the state's elements, (B, H, L, K, 1) with sizes of 1 where they are equal."""
    if decay is None:
        return None
    if rule.decay == "head":
        decay = decay[None, :, None]
    decay = decay[..., None] if rule.decay != "channel" else decay
    decay = decay if rates is None else decay * rates[:, None]
    return (decay if rule.factors else decay.exp())[..., None]


def _scan(a: Tensor | None, x: Tensor, state: Tensor) -> Tensor:
    """All states s_t = a_t s_{t-1} + x_t: blocks of sqrt(L) tokens side by side, then from block to block."""
    if a is None:
        return x.cumsum(2) + state[:, :, None]
    length = x.shape[2]
    block = math.isqrt(length - 1) + 1 if length > 16 else length
    a, x = a.expand(*x.shape[:3], *a.shape[3:]), cut_blocks(x, block)
    missing = -length % block
    if missing:
        a = torch.cat([a, torch.ones_like(a[:, :, :1]).expand(-1, -1, missing, -1, -1)], 2)
    a = cut_blocks(a, block)
    sums, products = [x[:, :, :, 0]], [a[:, :, :, 0]]
    for i in range(1, block):
        sums.append(a[:, :, :, i] * sums[-1] + x[:, :, :, i])
        products.append(products[-1] * a[:, :, :, i])
    entries = []
    for n in range(x.shape[2]):
        entries.append(state)
        state = products[-1][:, :, n] * state + sums[-1][:, :, n]
    states = torch.stack(sums, 3) + torch.stack(products, 3) * torch.stack(entries, 2)[:, :, :, None]
    return states.flatten(2, 3)[:, :, :length]


def cut_blocks(x: Tensor, chunk: int) -> Tensor:
    """(B, H, L, ...) as (B, H, N, chunk, ...), filled up with zeros: no decay, nothing written."""
    B, H, L = x.shape[:3]
    missing = -L % chunk
    if missing:
        x = F.pad(x, (*(0, 0) * (x.dim() - 3), 0, missing))
    return x.reshape(B, H, (L + missing) // chunk, chunk, *x.shape[3:])

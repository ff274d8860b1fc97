"""Mixers made of several linear recurrences, or of one with more around it.

Source: Zhang et al. 2024, arXiv:2409.07146 (gated slots); Siems et al. 2025, arXiv:2502.10297 (DeltaProduct); Hu et al.
2025, arXiv:2506.02475 (Comba); Du et al. 2025, arXiv:2502.13685 (MoM); Wu et al. 2022, arXiv:2202.06258 (Flowformer).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attnc.codegen.linear_attention import mix
from attnc.rule_recurrence import RecurrenceRule


def gated_slots(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    decay: Tensor,
    *,
    scale: float,
    initial_key: Tensor | None = None,
    initial_value: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """GSA: softmax over M slots between two recurrences; slots, decay (B, H, L, M).

    A slot of the first recurrence decays by itself, so each is a head of one value that shares the query and key.
    Returns: out, and the states (B, H, K, M) and (B, H, M, V).
    """
    B, H, L, M = slots.shape
    by_slot = [x.transpose(2, 3).reshape(B, H * M, L) for x in (slots, decay)]
    first = None if initial_key is None else initial_key.transpose(2, 3).reshape(B, H * M, -1, 1)
    rule = RecurrenceRule(decay="token", scale=scale, chunk=64)
    logits, last = mix(rule, query, key, by_slot[0][..., None], decay=by_slot[1], initial_state=first)
    weights = logits.reshape(B, H, M, L).transpose(2, 3).softmax(-1)
    out, last_value = mix(
        RecurrenceRule(decay="channel", chunk=64), weights, slots, value, decay=decay, initial_state=initial_value
    )
    return out, last.reshape(B, H, M, -1).transpose(2, 3), last_value


def delta_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    beta: Tensor,
    steps: int,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(Gated) DeltaProduct: `steps` delta updates for each token, of which the first decays and the last is read.

    key, value, beta: of L * steps updates; query, decay: of L tokens.
    """
    B, H, L, K = query.shape
    spread = F.pad(query[:, :, :, None], (0, 0, steps - 1, 0)).reshape(B, H, L * steps, K)
    rule = RecurrenceRule(delta=True, gate="write", scale=scale, decay="none" if decay is None else "token", chunk=64)
    once = None if decay is None else F.pad(decay[..., None], (0, steps - 1)).flatten(2)
    out, state = mix(rule, spread, key, value, decay=once, beta=beta, initial_state=initial_state)
    return out[:, :, steps - 1 :: steps], state


def comba(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prediction_key: Tensor,
    decay: Tensor,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Comba: the delta rule whose prediction is read by a key of its own."""
    back = -(beta * decay.exp())[..., None] * key
    rule = RecurrenceRule(decay="token", low_rank=True, gate="write", scale=scale, chunk=64)
    return mix(rule, query, key, value, decay=decay, beta=beta, initial_state=initial_state, a=prediction_key, b=back)


def mixture_of_memories(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: Tensor,
    weight: Tensor,
    count: int,
    rule: RecurrenceRule,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """MoM: each token goes to k of `count` memories, each a recurrence over the tokens it got; out (B, H, L, V).

    memory, weight (B, L, k): which, and their shares of the output. decay, beta (B, H, L, ...): as `rule` has them.
    The tokens of a memory are brought together, in their order, and the memories follow each other as documents do.
    """
    B, H, L, _ = value.shape
    k = memory.shape[-1]
    order = (memory.flatten(1) * L + torch.arange(L, device=memory.device).repeat_interleave(k)).argsort(1)
    token = order // k
    packed = [None if x is None else _taken(x, token) for x in (query, key, value, decay, beta)]
    rule = replace(rule, packed=True)
    assert packed[2] is not None
    owner = memory.flatten(1).gather(1, order)
    out, _ = mix(rule, packed[0], packed[1], packed[2], decay=packed[3], beta=packed[4], documents=owner)
    share = weight.flatten(1).gather(1, order)[:, None, :, None].to(out.dtype)
    where = token[:, None, :, None].expand_as(out)
    return out.new_zeros(B, H, L, out.shape[-1]).scatter_add(2, where, out * share)


def _taken(x: Tensor, token: Tensor) -> Tensor:
    """Tokens of (B, H, L, ...) by their numbers (B, N)."""
    index = token[:, None].expand(-1, x.shape[1], -1)
    return x.gather(2, index if x.dim() == 3 else index[..., None].expand(-1, -1, -1, x.shape[3]))


def flow_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, eps: float = 1e-6) -> Tensor:
    """Flow-Attention: flows into queries and out of keys are conserved; q (B, H, L, K), k (B, H, S, K)."""
    q, k = query.sigmoid(), key.sigmoid()

    def against(x: Tensor, y: Tensor) -> Tensor:
        total = y.cumsum(2) if causal else y.sum(2, keepdim=True)
        return ((x + eps) * (total + eps)).sum(-1, keepdim=True)

    L, S = q.shape[2], k.shape[2]
    n = torch.arange(1, L + 1, device=q.device, dtype=q.dtype)[:, None] if causal else q.new_ones(1, 1)
    into, out_of = against(q, k), against(k, q)
    kept, given = against(q, k * (n / out_of)) / n, (against(k, q * (n / into)) / n).clamp(-1.0, 1.0)
    if causal:
        share = given.exp()
        competing = share / share.cumsum(2) * n
        mixed, _ = mix(RecurrenceRule(chunk=64), q / into, k, value * competing)
        return mixed * kept.sigmoid()
    competing = given.softmax(2) * S
    return (q / into) @ (k.mT @ (value * competing)) * (kept * (L / S)).sigmoid()


def dynamic_convolution(value: Tensor, kernel: Tensor) -> Tensor:
    """JetBlock's convolution with taps made from the input: y_t = sum_i kernel_{t,i} value_{t-n+1+i}, causal.

    value (B, L, C); kernel (B, L, C, n).
    """
    taps = kernel.shape[-1]
    return (F.pad(value, (0, 0, taps - 1, 0)).unfold(1, taps, 1) * kernel).sum(-1)

"""Memories that learn while they read: a matrix takes gradient steps on how well it maps keys to values.

The gradients of a mini-batch are all taken at the memory of its start, so that a mini-batch is a few products and the
memory goes from one to the next. With a mini-batch of one token and no norm this is the delta rule.

Shapes: q, k, v (B, H, L, D); states (B, H, D, D); w, b (H, D), of the layer norm; gates (B, H, L, 1) unless said.
Source: Sun et al. 2024, arXiv:2407.04620, section 2.5 (TTT-Linear, dual form); Behrouz et al. 2024, arXiv:2501.00663,
equations 13 and 14 (Titans).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ttt_linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w: Tensor,
    b: Tensor,
    eta: Tensor,
    *,
    mini_batch: int,
    scale: float,
    eps: float = 1e-6,
    initial_state: Tensor | None = None,
    initial_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """TTT-Linear: out, and the last weight (B, H, D, D) and bias (B, H, 1, D). eta: step sizes.

    The step size of a mini-batch's update is that of its last token; a short last one is filled with zeros.
    """
    B, H, L, D = key.shape
    missing = -L % mini_batch
    q, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (query * scale, key, value))
    rate = torch.cat([eta, eta[:, :, -1:].expand(-1, -1, missing, -1)], 2) if missing else eta
    w, b = w[:, None], b[:, None]
    state = value.new_zeros(B, H, D, D) if initial_state is None else initial_state
    bias = value.new_zeros(B, H, 1, D) if initial_bias is None else initial_bias
    outs = []
    for start in range(0, L, mini_batch):
        qn, kn, vn, step = (x[:, :, start : start + mini_batch] for x in (q, k, v, rate))
        gradient = _exact(*_normed(kn @ state + bias, eps), w, b, vn - kn)
        seen = torch.tril(qn @ kn.mT + 1.0)  # the bias is a key of one
        outs.append(qn @ state + bias - step * (seen @ gradient))
        last = step[:, :, -1:]
        state = state - last * (kn.mT @ gradient)
        bias = bias - last * gradient.sum(2, keepdim=True)
    out = torch.cat(outs, 2)[:, :, :L]
    return out + _normed(out, eps)[0] * w + b, state, bias


def titans_linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w: Tensor,
    b: Tensor,
    theta: Tensor,
    alpha: Tensor,
    eta: Tensor,
    *,
    chunk: int,
    eps: float = 1e-6,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Titans with a linear memory, momentum and forgetting, as flash-linear-attention writes it: out and the memory.

    theta: step sizes; alpha: what is forgotten; eta: what the momentum keeps. The first term of the gradient is not
    divided by the norm and width, as in that code.
    """
    B, H, L, D = key.shape
    w, b = w[:, None], b[:, None]
    memory = value.new_zeros(B, H, D, D) if initial_state is None else initial_state
    momentum = torch.zeros_like(memory)
    outs = []
    for start in range(0, L, chunk):
        part = slice(start, start + chunk)
        qn, kn, vn = (x[:, :, part] for x in (query, key, value))
        hat, deviation = _normed(kn @ memory, eps)
        loss = (w * hat + b - (vn - kn)) * w
        gradient = _as_in_fla(loss, hat, deviation)
        kept, momentum_kept = _products(1 - alpha[:, :, part, 0]), _products(eta[:, :, part, 0])
        both = kept[..., 1:] @ momentum_kept  # from an update, or the momentum before, to each token
        update = -2 * theta[:, :, part] * kn
        weights = (qn @ update.mT) * both[..., 1:]
        outs.append(kept[..., :1] * (qn @ memory) + both[..., :1] * (qn @ momentum) + weights @ gradient)
        memory = (
            kept[..., -1:, :1] * memory
            + both[..., -1:, :1] * momentum
            + (update * both[..., -1, 1:, None]).mT @ gradient
        )
        last = momentum_kept[..., -1, :]
        momentum = last[..., :1, None] * momentum + (update * last[..., 1:, None]).mT @ gradient
    out = torch.cat(outs, 2)
    return out + _normed(out, eps)[0] * w + b, memory


def neural_memory(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rate: Tensor,
    momentum: Tensor,
    forget: Tensor,
    memory: Tensor,
    *,
    chunk: int,
) -> Tensor:
    """Titans' memory of one matrix, a step for each chunk, read behind the chunks that a token completes.

    rate (B, H, L, 1): the weight of a token's squared error; momentum, forget (B, H, chunks): of each chunk;
    memory (H, D, D): the first one.
    """
    B, H, L, D = key.shape
    state = memory.expand(B, H, D, D)
    moving = torch.zeros_like(state)
    outs = [query[:, :, : chunk - 1] @ state]
    for n, start in enumerate(range(0, L, chunk)):
        kn, vn, step = (x[:, :, start : start + chunk] for x in (key, value, rate))
        moving = momentum[..., n, None, None] * moving - kn.mT @ (2.0 / D * step * (kn @ state - vn))
        state = (1 - forget[..., n, None, None]) * state + moving
        outs.append(query[:, :, start + chunk - 1 : start + 2 * chunk - 1] @ state)
    return torch.cat(outs, 2)


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x with mean 0 and variance 1 over the last axis, and its deviation."""
    deviation = (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
    return (x - x.mean(-1, keepdim=True)) / deviation, deviation


def _exact(hat: Tensor, deviation: Tensor, w: Tensor, b: Tensor, target: Tensor) -> Tensor:
    """Gradient of half the squared error of a layer norm, by what goes into the norm."""
    loss = (w * hat + b - target) * w
    width = hat.shape[-1]
    return (loss - (loss.sum(-1, keepdim=True) + hat * (loss * hat).sum(-1, keepdim=True)) / width) / deviation


def _as_in_fla(loss: Tensor, hat: Tensor, deviation: Tensor) -> Tensor:
    over = deviation * hat.shape[-1]
    return hat.shape[-1] * loss - (loss.sum(-1, keepdim=True) + hat * (loss * hat).sum(-1, keepdim=True)) / over


def _products(factors: Tensor) -> Tensor:
    """(..., C) as (..., C, C + 1): the product of the factors behind a token up to each, first of all that of all.

    Column 0 is what is left of the state at entry; column 1 + s of what token s wrote. Above the diagonal: 0.
    """
    C = factors.shape[-1]
    sums = F.pad(factors.double().clamp(min=1e-300).log().cumsum(-1), (1, 0))
    above = torch.arange(C, device=factors.device)[:, None] + 1 < torch.arange(C + 1, device=factors.device)
    return (sums[..., 1:, None] - sums[..., None, :]).masked_fill(above, float("-inf")).exp().to(factors.dtype)

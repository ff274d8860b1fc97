"""The CPU flash kernel of ATen as a building block: several key parts, a sink, differing head widths, gradients.

    out_i = sum_p sum_j exp(s_pij - lse_i) v_pj,   lse_i = log(exp(sink_i) + sum_p sum_j exp(s_pij))

Parts are merged by their log-sum-exp. The backward of every part is the kernel's own, called with the merged out and
lse: d s_pij = exp(s_pij - lse_i) (d out_i . v_pj - d out_i . out_i) holds for each part alone, and for a sink too.

Source: Dao 2023, "FlashAttention-2", arXiv:2307.08691, section 3.1; merging as in Liu et al. 2023, "Ring Attention",
arXiv:2310.01889; ATen/native/cpu/FlashAttentionKernel.cpp (grouped heads, causal together with a mask).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True)
class Part:
    """Keys and values that every query row may see, with what is added to their scores.

    mask:   additive, of the query's dtype, broadcastable to (B, Hq, L, S of the part); None adds nothing.
    causal: keep only j <= i, both counted from the start of the part.
    """

    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None = None
    causal: bool = False


def flash(
    query: torch.Tensor,
    parts: Sequence[Part],
    scale: float,
    *,
    sink: torch.Tensor | None = None,
    never_empty: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend `query` to all `parts` under one normaliser.

    Shapes: query (B, Hq, L, E), key (B, H, S, E), value (B, H, S, Ev) -> out (B, Hq, L, Ev), lse (B, Hq, L).
            sink broadcasts to (B, Hq, L).
    A row that keeps no key gives 0 and lse -inf (or the sink); `never_empty` promises that there is none.
    lse is natural, float32 (float64 for float64), holds the sink, and is not differentiable; masks are constants.
    """
    width, L = parts[0].value.shape[-1], query.shape[2]
    alive = None
    if not never_empty and sink is None and all(part.mask is not None for part in parts):
        for part in parts:
            assert part.mask is not None
            kept = kept_rows(part.mask, part.causal, L)
            alive = kept if alive is None else alive | kept
    query, parts = _one_width(query, parts)
    query, parts = _rows(query), [Part(_rows(p.key), _rows(p.value), p.mask, p.causal) for p in parts]
    if len(parts) == 1 and sink is None:
        part = parts[0]
        out, lse = _flash(query, part.key, part.value, 0.0, part.causal, attn_mask=part.mask, scale=scale)
        lse = lse.detach()
    else:
        flat = [t for part in parts for t in (part.key, part.value, part.mask)]
        causal = tuple(part.causal for part in parts)
        out, lse = _Merged.apply(scale, causal, query, sink, alive, *flat)
    if alive is not None and sink is None:
        lse = torch.where(alive, lse, -torch.inf)
    return (out if out.shape[-1] == width else out[..., :width]), lse


def kept_rows(mask: torch.Tensor, causal: bool, L) -> torch.Tensor:
    """Rows that keep a key under an additive mask, (B or 1, Hq or 1, L or 1)."""
    kept = mask > -torch.inf
    if not causal:
        return kept.any(-1)
    if kept.shape[2] == 1:  # one row for all: row i keeps a key if any of the first i + 1 is kept
        S = kept.shape[3]
        seen = kept[:, :, 0].cumsum(-1) > 0
        return seen.index_select(-1, torch.arange(L, device=mask.device).clamp(max=S - 1))
    rows = torch.arange(L, device=mask.device)
    return (kept & (torch.arange(kept.shape[3], device=mask.device) <= rows[:, None])).any(-1)


def _one_width(query: torch.Tensor, parts: Sequence[Part]) -> tuple[torch.Tensor, Sequence[Part]]:
    """Pad the narrower of query/key and value with zeros: the kernel has one head width."""
    E, Ev = query.shape[-1], parts[0].value.shape[-1]
    if Ev > E:
        pad = (0, Ev - E)
        return F.pad(query, pad), [Part(F.pad(p.key, pad), p.value, p.mask, p.causal) for p in parts]
    if Ev < E:
        return query, [Part(p.key, F.pad(p.value, (0, E - Ev)), p.mask, p.causal) for p in parts]
    return query, parts


def _rows(x: torch.Tensor) -> torch.Tensor:
    """`x` with contiguous rows, which the kernel takes for granted: a transposed operand would be read wrongly."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(scale, causal, query, sink, alive, parts):
    outs, lses = [], []
    for (key, value, mask), diagonal in zip(parts, causal, strict=True):
        out, lse = _flash(query, key, value, 0.0, diagonal, attn_mask=mask, scale=scale)
        if mask is not None:
            # A row that keeps nothing of this part: the kernel gives lse 0.
            lse = torch.where(kept_rows(mask, diagonal, query.shape[2]), lse, -torch.inf)
        outs.append(out)
        lses.append(lse)
    total = lses[0] if len(lses) == 1 else torch.stack(lses).logsumexp(0)
    if sink is not None:
        total = torch.logaddexp(total, sink.to(total.dtype))
    elif alive is not None:
        total = torch.where(alive, total, 0.0)
    weights = [(lse - total).exp().unsqueeze(-1) for lse in lses]
    merged = sum(out.to(w.dtype) * w for out, w in zip(outs, weights, strict=True))
    return merged.to(query.dtype), total


class _Merged(torch.autograd.Function):
    """Flash attention over several parts and a sink under one normaliser."""

    @staticmethod
    def forward(scale, causal, query, sink, alive, *flat):
        parts = [flat[n : n + 3] for n in range(0, len(flat), 3)]
        return _forward(scale, causal, query, sink, alive, parts)

    @staticmethod
    def setup_context(ctx, inputs, output):
        scale, causal, query, sink, _, *flat = inputs
        out, lse = output
        ctx.scale, ctx.causal, ctx.masked = scale, causal, [t is not None for t in flat]
        ctx.has_sink = sink is not None
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(query, sink, out, lse, *flat)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _grad_lse):
        query, sink, out, lse, *flat = ctx.saved_tensors
        grad_query, grads = None, []
        for n, diagonal in enumerate(ctx.causal):
            key, value, mask = flat[3 * n : 3 * n + 3]
            dq, dk, dv = _flash_backward(
                grad, query, key, value, out, lse, 0.0, diagonal, attn_mask=mask, scale=ctx.scale
            )
            grad_query = dq if grad_query is None else grad_query + dq
            grads += [dk, dv, None]
        grad_sink = None
        if ctx.has_sink and ctx.needs_input_grad[3]:
            share = (sink.to(lse.dtype) - lse).exp()
            inner = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
            grad_sink = (-share * inner).sum_to_size(sink.shape).to(sink.dtype)
        return None, None, grad_query, grad_sink, None, *grads

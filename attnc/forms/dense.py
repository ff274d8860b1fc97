"""Dense attention: every key in one kernel call, the mask as a rank-minimal tensor or not at all.

    o_i = softmax_j(score_ij where keep_ij) v_j  over all j < S

"j <= i" becomes the kernel's causal flag, also beside a mask of padded keys; "j <= i + n" (a cache of n keys) a part
without mask and a causal one under one normaliser. Heads that share keys are never copied, E != Ev is padded, scores
that are not linear in the product run composed.

Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1; Dao 2023, arXiv:2307.08691.
Exact:  always, for regions without active dropout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from attnc.codegen.cpu_composed import composed
from attnc.codegen.cpu_flash import Part, flash
from attnc.codegen.cpu_scores import additive, constant_bias, factor_of, is_zero
from attnc.codegen.gpu_sdpa import sdpa
from attnc.cost_models.attention import library_estimate
from attnc.cost_models.cost import Cost
from attnc.cost_models.device import Device, Gpu
from attnc.cost_models.estimate import Estimate
from attnc.cost_models.roofline import attention_cost
from attnc.expr import TRUE, Expr, I, J, sub, terms_of
from attnc.forms.base import AttentionForm, Form
from attnc.forms.masked import SETTLED, alive_rows, settle_empty, sink_of
from attnc.operands import Operands
from attnc.predicate import conjunction
from attnc.reading import as_tensor, read
from attnc.region import AttentionRegion
from attnc.rule_attention import linear_score


@dataclass(frozen=True)
class Dense(AttentionForm):
    """All keys for all queries; no knobs."""

    name: ClassVar[str] = "dense"

    def refuse(self, region: AttentionRegion) -> str | None:
        if region.kind != "attention":
            return f"dense computes attention, found a region of kind {region.kind}; leave it as written."
        if region.device not in ("cpu", "cuda"):
            return f"dense is lowered for CPU and GPU, found a region on {region.device}; leave it as written."
        if region.device == "cuda" and (linear_score(region.rule.score) is None or region.rule.sink is not None):
            return (
                "dense is SDPA on a GPU, found a score that is not linear in the product, or a sink; use flash or "
                "block_sparse{provider=flex}."
            )
        if region.rule.dropout:
            return (
                f"dense keeps no random stream, found dropout {region.rule.dropout:g} active; "
                "use model.eval() or dropout 0."
            )
        return None

    def is_exact(self, region: AttentionRegion) -> bool:
        return self.refuse(region) is None

    def cost(self, region: AttentionRegion, device: Device) -> Cost:
        rule, s = region.rule, region.shape
        if linear_score(rule.score) is None:
            return attention_cost(region, "composed", s.L * s.S)
        causal, rest = split_causal(rule.keep)
        if causal is None:
            return attention_cost(region, "flash", s.L * s.S, mask=rule.keep != TRUE or rule.bias is not None)
        offset = causal if isinstance(causal, int) else s.S - s.L
        pairs = causal_pairs(s.L, s.S, offset)
        if rule.bias is not None or not _is_narrow(rest):
            pairs = s.L * s.S if offset else pairs
            return attention_cost(region, "flash", pairs, mask=True)
        return attention_cost(region, "flash", pairs)

    def gpu_seconds(self, region: AttentionRegion, gpu: Gpu) -> float:
        return self.gpu_estimate(region, gpu).seconds

    def gpu_estimate(self, region: AttentionRegion, gpu: Gpu) -> Estimate:
        causal, rest = split_causal(region.rule.keep)
        plain = rest == TRUE and region.rule.bias is None
        by_flag = causal == 0 or (causal is not None and region.shape.L == 1 and causal == region.shape.S - 1)
        masked = not plain or (causal is not None and not by_flag)
        return library_estimate(region, gpu, causal=by_flag and not masked, masked=masked)

    def gpu(self, given: Operands) -> tuple[torch.Tensor, torch.Tensor]:
        rule = given.rule
        causal, rest = split_causal(rule.keep)
        out, lse = sdpa(given, causal=causal == 0 and rest == TRUE and rule.bias is None)
        if rule.empty in SETTLED:  # by the mask: the lse would cost all scores again
            out = settle_empty(out, alive_rows(given), given)
        return out, lse

    def cpu(self, given: Operands) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value, captured, _, rule = given
        sink = sink_of(given)
        bias = constant_bias(rule, captured)
        if bias is None:
            out, lse, alive = composed(
                query,
                key,
                value,
                lambda raw: given.tensor(rule.score, raw).expand(raw.shape),
                _mask(given, rule.keep),
                sink=sink,
            )
            return (out if alive is None else settle_empty(out, alive, given)), lse
        out, lse = flash(query, _parts(given, bias), factor_of(rule), sink=sink, never_empty=rule.empty == "never")
        if rule.empty in SETTLED:
            out = settle_empty(out, lse > -torch.inf, given)
        return out, lse

    def space(self, region: AttentionRegion, device: Device) -> tuple[Form, ...]:
        return () if self.refuse(region) else (self,)


def split_causal(keep: Expr) -> tuple[int | Expr | None, Expr]:
    """Split `j <= i + offset and rest`: the offset, a number or an expression of sizes, and the rest; None: none."""
    conditions = keep.args if keep.op == "and" else (keep,)
    for n, condition in enumerate(conditions):
        if condition.op != "le":
            continue
        offset = sub(sub(J, I), condition.args[0])
        if offset.names() or offset.has("load"):
            continue
        constant, terms = terms_of(offset)
        rest = conjunction(*conditions[:n], *conditions[n + 1 :])
        return (offset if terms else int(constant)), rest
    return None, keep


def causal_pairs(L: int, S: int, offset: int) -> int:
    """Number of pairs with j <= i + offset."""

    def below(rows: int) -> int:  # sum of max(i + offset + 1, 0) over the first `rows` rows
        seen = max(rows + offset, 0)
        before = max(offset, 0)
        return seen * (seen + 1) // 2 - before * (before + 1) // 2

    rising = min(max(S - offset, 0), L)  # rows that do not see all S keys yet
    return below(rising) + (L - rising) * S


def _is_narrow(e: Expr) -> bool:
    """Whether a mask read from `e` has one row for all queries."""
    return "i" not in e.names()


def _parts(given: Operands, bias: Expr) -> list[Part]:
    """The kernel calls: causal by flag where that holds, a mask for what is left."""
    query, key, value, _, sizes, rule = given
    causal, rest = split_causal(rule.keep)
    L, S = query.shape[2], key.shape[2]
    offset = None if causal is None else read(causal, {}, (), sizes) if isinstance(causal, Expr) else causal
    if offset is not None and not isinstance(offset, int):
        offset = None  # known at run time only: a mask
    if offset is None:
        return [_part(given, rule.keep, bias)]
    if offset >= S - 1:
        return [_part(given, rest, bias)]
    if offset == 0:
        return [_part(given, rest, bias, causal=True)]
    if offset > 0 and rest == TRUE and is_zero(bias) and isinstance(L, int):
        seen = Part(key.narrow(2, 0, offset), value.narrow(2, 0, offset))
        return [seen, Part(key.narrow(2, offset, S - offset), value.narrow(2, offset, S - offset), causal=True)]
    return [_part(given, rule.keep, bias)]


def _part(given: Operands, keep: Expr, bias: Expr, *, causal: bool = False) -> Part:
    query, key, value, *_ = given
    mask = _mask(given, keep)
    if mask is True and is_zero(bias):
        return Part(key, value, None, causal)
    added = None if is_zero(bias) else given.tensor(bias)
    return Part(key, value, additive(as_tensor(mask, query), added, query.dtype), causal)


def _mask(given: Operands, keep: Expr) -> torch.Tensor | bool:
    kept = given.read(keep)
    return kept if isinstance(kept, torch.Tensor) else bool(kept)

"""The masked family: softmax attention under a score rule and a mask rule, and what its forms share.

    o_i = sum_{j kept} exp(score_ij - lse_i) v_j,   lse_i = log(exp(sink_i) + sum_{j kept} exp(score_ij))

A row that keeps no key gives what `rule.empty` says: 0 (also under a sink, which then holds all weight), NaN, or the
mean of the values of all S keys. Where its mask was added to the scores, they still have the gradient of a softmax
there: d score_ij = (do_i . (v_j - mean v)) / S. lse is natural, holds the sink, is -inf for such a row without a sink,
and is not differentiable. Query head h reads key head h // (Hq / H).

Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1; sinks: Xiao et al. 2023, arXiv:2309.17453, and gpt-oss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from attnc.codegen.cpu_scores import as_tensor
from attnc.expr import BOOL, TRUE, load, scale, terms_of
from attnc.predicate import logical_not
from attnc.reading import Axis, read, span
from attnc.rule_attention import AttentionRule, linear_score, lone_run_mask, lowered

# A row with this, or less, added to all of its scores is uniform: float32 keeps nothing of a score below 32 beside it.
LOST = -1e9
SETTLED = ("nan", "mean", "mean_added")  # where a row without keys is not what the kernels give it, 0


def axes_of(query: torch.Tensor, key: torch.Tensor) -> dict[str, Axis]:
    """The coordinates of all scores, laid out for (B, Hq, L, S)."""
    B, Hq, L, _ = query.shape
    lengths = {"b": B, "h": Hq, "i": L, "j": key.shape[2]}
    return {name: span(name, 0, length, query.device) for name, length in lengths.items()}


def sink_of(
    query: torch.Tensor, key: torch.Tensor, captured: Sequence[torch.Tensor], sizes: Sequence, rule: AttentionRule
) -> torch.Tensor | None:
    """The sink's logits, broadcastable to (B, Hq, L); None where the rule has no sink."""
    if rule.sink is None:
        return None
    found = read(rule.sink, axes_of(query, key), captured, sizes)
    found = as_tensor(found, query)
    return found.expand(*found.shape[:-1], 1)[..., 0]


def scaled_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    captured: Sequence[torch.Tensor],
    sizes: Sequence[int],
    rule: AttentionRule,
) -> tuple[torch.Tensor, AttentionRule]:
    """The query times the rule's row factor, and the rule without it: done once, so no form knows of it."""
    if rule.row is None:
        return query, rule
    factor = as_tensor(read(rule.row, axes_of(query, key), captured, sizes), query)
    return (query * factor).to(query.dtype), replace(rule, row=None)


def without_lost_rows(
    key: torch.Tensor, captured: Sequence[torch.Tensor], rule: AttentionRule
) -> tuple[Sequence[torch.Tensor], AttentionRule]:
    """Under autograd: rows to which a mask of the run adds the same low number at every key are rows without keys.

    Their softmax is uniform. Kernels that rebuild the weights in the backward as exp(score - lse) find 1 there and not
    1/S, because lse = low + log S is low again; torch's CPU kernel is one.
    """
    if not torch.is_grad_enabled() or rule.keep != TRUE or rule.sink is not None:
        return captured, rule
    added = lone_run_mask(rule.score, lambda slot: captured[slot].requires_grad)
    if added is None:
        return captured, rule
    slot, *index = added.args
    mask = captured[slot][..., : key.shape[2]]
    least, most = mask.aminmax(dim=-1)
    lost = (least == most) & (most <= LOST) & (most > -torch.inf)
    keep = logical_not(load(len(captured), tuple(index[:-1]), BOOL))
    changed = [*captured, lost]
    changed[slot] = mask.masked_fill(lost.unsqueeze(-1), 0.0)
    return changed, replace(rule, keep=keep, empty="mean_added")


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    captured: Sequence[torch.Tensor],
    sizes: Sequence[int],
    rule: AttentionRule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend as the rule reads, with every score in memory: the oracle of the family.

    Shapes: query (B, Hq, L, E), key (B, H, S, E), value (B, H, S, Ev) -> out (B, Hq, L, Ev), lse (B, Hq, L).
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    query, rule = scaled_rows(query, key, captured, sizes, rule)
    axes = axes_of(query, key)
    raw = query @ key.mT
    score = read(rule.score, axes, captured, sizes, score=raw)
    keep = torch.as_tensor(read(rule.keep, axes, captured, sizes)).expand(raw.shape)
    written = as_tensor(score, raw).expand(raw.shape)
    score = written.masked_fill(~keep, -torch.inf)
    sink = sink_of(query, key, captured, sizes, rule)
    if sink is not None:
        score = torch.cat([score, sink.expand(raw.shape[:-1]).unsqueeze(-1).to(score.dtype)], -1)
    alive = (score > -torch.inf).any(-1, keepdim=True)
    weights = torch.where(alive, score, 0.0).softmax(-1)[..., : keep.shape[-1]] * keep
    lse = score.logsumexp(-1).detach()
    out = weights @ value
    if sink is None and rule.empty == "nan":
        out = torch.where(alive, out, torch.nan)
    elif sink is None and rule.empty in SETTLED:
        level = (written - written.detach() if rule.empty == "mean_added" else torch.zeros_like(raw)).softmax(-1)
        out = torch.where(keep.any(-1, keepdim=True), out, level @ value)
    return out, lse


def as_float64(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Floating tensors in float64, others as they are: the precision of references."""
    return [x.double() if x.is_floating_point() else x for x in tensors]


def alive_rows(
    query: torch.Tensor, key: torch.Tensor, captured: Sequence[torch.Tensor], sizes: Sequence, rule: AttentionRule
) -> torch.Tensor:
    """Rows that keep a key, with a score above -inf where others are NaN; broadcasts to (B, Hq, L)."""
    axes = axes_of(query, key)
    kept = as_tensor(read(rule.keep, axes, captured, sizes), query)
    if rule.empty == "nan" and (added := lowered(rule.score)) is not None:
        kept = kept & (as_tensor(read(added, axes, captured, sizes), query) > -torch.inf)
    return kept.any(-1)


def settle_empty(
    out: torch.Tensor,
    alive: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    captured: Sequence[torch.Tensor],
    sizes: Sequence,
    rule: AttentionRule,
) -> torch.Tensor:
    """Give rows that keep no key what the rule says; `out` holds 0 there. alive broadcasts to (B, Hq, L)."""
    if rule.sink is not None or rule.empty not in SETTLED:
        return out
    alive = alive.unsqueeze(-1)
    if rule.empty == "nan":
        return torch.where(alive, out, torch.nan)
    mean = value.mean(2, keepdim=True)
    group = out.shape[1] // value.shape[1]
    given = mean.repeat_interleave(group, 1)
    if rule.empty == "mean_added" and torch.is_grad_enabled():
        spread = (value.detach() - mean.detach()) / value.shape[2]
        slope = _scores_times(spread, query, key, captured, sizes, rule)
        given = given + (slope - slope.detach()).to(given.dtype)
    return torch.where(alive, out, given)


def _scores_times(
    spread: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    captured: Sequence[torch.Tensor],
    sizes: Sequence,
    rule: AttentionRule,
) -> torch.Tensor:
    """The scores without mask, times `spread` (B, H, S, Ev): without the scores where only query and key learn."""
    B, Hq, L, E = query.shape
    H = key.shape[1]
    rows = query.reshape(B, H, Hq // H * L, E)
    shape, axes = (B, Hq, L, key.shape[2]), axes_of(query, key)
    parts = linear_score(rule.score)
    if parts is None:
        raw = (rows @ key.mT).view(shape)
        score = as_tensor(read(rule.score, axes, captured, sizes, score=raw), raw).expand(shape)
        return (score.to(spread.dtype).reshape(B, H, Hq // H * L, -1) @ spread).view(B, Hq, L, -1)
    found = (rows @ (key.mT @ spread)).view(B, Hq, L, -1) * parts[0]
    for atom, coef in terms_of(parts[1])[1]:  # what does not learn may be a mask, whose products would not be finite
        if any(x.op == "load" and captured[x.args[0]].requires_grad for x in atom.walk()):
            bias = as_tensor(read(scale(atom, coef), axes, captured, sizes), query).expand(shape)
            found = found + (bias.to(spread.dtype).reshape(B, H, Hq // H * L, -1) @ spread).view(B, Hq, L, -1)
    return found

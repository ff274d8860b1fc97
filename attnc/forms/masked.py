"""The masked family: softmax attention under a score rule and a mask rule, and what its forms share.

    o_i = sum_{j kept} exp(score_ij - lse_i) v_j,   lse_i = log(exp(sink_i) + sum_{j kept} exp(score_ij))

A row that keeps no key gives what `rule.empty` says: 0 (also under a sink, which then holds all weight), NaN, or the
mean of the values of all S keys. Where its mask was added to the scores, they still have the gradient of a softmax
there: d score_ij = (do_i . (v_j - mean v)) / S. lse is natural, holds the sink, is -inf for such a row without a sink,
and is not differentiable. Query head h reads key head h // (Hq / H).

Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1; sinks: Xiao et al. 2023, arXiv:2309.17453, and gpt-oss.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from attnc.codegen.float8 import FLOAT8, wide_type
from attnc.expr import BOOL, TRUE, load, scale, terms_of
from attnc.operands import Operands
from attnc.predicate import logical_not
from attnc.rule_attention import linear_score, lone_run_mask, lowered

# A row with this, or less, added to all of its scores is uniform: float32 keeps nothing of a score below 32 beside it.
LOST = -1e9
SETTLED = ("nan", "mean", "mean_added")  # where a row without keys is not what the kernels give it, 0


def sink_of(given: Operands) -> torch.Tensor | None:
    """The sink's logits, broadcastable to (B, Hq, L); None where the rule has no sink."""
    if given.rule.sink is None:
        return None
    found = given.tensor(given.rule.sink)
    return found.expand(*found.shape[:-1], 1)[..., 0]


def scaled_rows(given: Operands) -> Operands:
    """The query times the rule's row factor, and the rule without it: done once, so no form knows of it."""
    rule = given.rule
    if rule.row is None:
        return given
    given = given._replace(query=given.query.to(wide_type(given.query.dtype)))
    scaled = (given.query * given.tensor(rule.row)).to(given.query.dtype)
    return given._replace(query=scaled, rule=replace(rule, row=None))


def widened(given: Operands) -> Operands:
    """The operands with those of 8 bits in the type of the output, and its factor in the value: what all forms take but
    generated kernels."""
    wide, rule = wide_type(given.query.dtype), given.rule
    query, key, value = (t.to(wide) if t.dtype in FLOAT8 else t for t in given[:3])
    given = given._replace(query=query, key=key, value=value)
    if rule.gain is None:
        return given
    gain = given.tensor(rule.gain)
    gain = gain[:, :: given.group] if gain.dim() == 4 and gain.shape[1] > 1 else gain
    return given._replace(value=(value * gain).to(value.dtype), rule=replace(rule, gain=None))


def without_lost_rows(given: Operands) -> Operands:
    """Under autograd: rows to which a mask of the run adds the same low number at every key are rows without keys.

    Their softmax is uniform. Kernels that rebuild the weights in the backward as exp(score - lse) find 1 there and not
    1/S, because lse = low + log S is low again; torch's CPU kernel is one.
    """
    captured, rule = given.captured, given.rule
    if not torch.is_grad_enabled() or rule.keep != TRUE or rule.sink is not None:
        return given
    added = lone_run_mask(rule.score, lambda slot: captured[slot].requires_grad)
    if added is None:
        return given
    slot, *index = added.args
    mask = captured[slot][..., : given.key.shape[2]]
    least, most = mask.aminmax(dim=-1)
    lost = (least == most) & (most <= LOST) & (most > -torch.inf)
    keep = logical_not(load(len(captured), tuple(index[:-1]), BOOL))
    changed = [*captured, lost]
    changed[slot] = mask.masked_fill(lost.unsqueeze(-1), 0.0)
    return given._replace(captured=changed, rule=replace(rule, keep=keep, empty="mean_added"))


def reference(given: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend as the rule reads, with every score in memory: the oracle of the family.

    Shapes: as `Operands` -> out (B, Hq, L, Ev), lse (B, Hq, L).
    """
    key, value = (t.repeat_interleave(given.group, 1) for t in (given.key, given.value))
    given = widened(scaled_rows(given)._replace(key=key, value=value))
    value, rule, raw = given.value, given.rule, given.query @ given.key.mT
    keep = torch.as_tensor(given.read(rule.keep)).expand(raw.shape)
    written = given.tensor(rule.score, raw).expand(raw.shape)
    score = written.masked_fill(~keep, -torch.inf)
    sink = sink_of(given)
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


def alive_rows(given: Operands) -> torch.Tensor:
    """Rows that keep a key, with a score above -inf where others are NaN; broadcasts to (B, Hq, L)."""
    rule = given.rule
    kept = given.tensor(rule.keep)
    if rule.empty == "nan" and (added := lowered(rule.score)) is not None:
        kept = kept & (given.tensor(added) > -torch.inf)
    return kept.any(-1)


def settle_empty(out: torch.Tensor, alive: torch.Tensor, given: Operands) -> torch.Tensor:
    """Give rows that keep no key what the rule says; `out` holds 0 there. alive broadcasts to (B, Hq, L)."""
    rule, value = given.rule, given.value
    if rule.sink is not None or rule.empty not in SETTLED:
        return out
    alive = alive.unsqueeze(-1)
    if rule.empty == "nan":
        return torch.where(alive, out, torch.nan)
    mean = value.mean(2, keepdim=True)
    settled = mean.repeat_interleave(given.group, 1)
    if rule.empty == "mean_added" and torch.is_grad_enabled():
        slope = _scores_times((value.detach() - mean.detach()) / value.shape[2], given)
        settled = settled + (slope - slope.detach()).to(settled.dtype)
    return torch.where(alive, out, settled)


def _scores_times(spread: torch.Tensor, given: Operands) -> torch.Tensor:
    """The scores without mask, times `spread` (B, H, S, Ev): without the scores where only query and key learn."""
    query, key, _, captured, _, rule = given
    (B, Hq, L, E), H = query.shape, key.shape[1]
    rows, shape = query.reshape(B, H, Hq // H * L, E), (B, Hq, L, key.shape[2])
    parts = linear_score(rule.score)
    if parts is None:
        score = given.tensor(rule.score, (rows @ key.mT).view(shape)).expand(shape)
        return (score.to(spread.dtype).reshape(B, H, Hq // H * L, -1) @ spread).view(B, Hq, L, -1)
    found = (rows @ (key.mT @ spread)).view(B, Hq, L, -1) * parts[0]
    for atom, coef in terms_of(parts[1])[1]:  # what does not learn may be a mask, whose products would not be finite
        if any(x.op == "load" and captured[x.args[0]].requires_grad for x in atom.walk()):
            bias = given.tensor(scale(atom, coef)).expand(shape)
            found = found + (bias.to(spread.dtype).reshape(B, H, Hq // H * L, -1) @ spread).view(B, Hq, L, -1)
    return found

"""Recurrences token by token in float64, and one case per rule: what the operator and its lifts are compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnc.op_recurrence import RECURRENCE
from attnc.rule_recurrence import RecurrenceRule

INPUTS = ("query", "key", "value", "decay", "rates", "beta", "bonus", "initial_state", "a", "b", "documents")


@dataclass(frozen=True)
class Case:
    """A rule and sizes. Hk: heads of q and k, 0 for none. norm: columns of the state beyond V."""

    name: str
    rule: RecurrenceRule
    H: int = 4
    K: int = 8
    V: int = 6
    Hk: int = 4
    bonus: bool = False

    def inputs(self, length: int, dtype: torch.dtype = torch.float64, *, state: bool = False, batch: int = 2) -> list:
        """Random operands in the order of INPUTS; None where the rule has none. Documents are short and ragged."""
        B, H, K, V, L = batch, self.H, self.K, self.V, length
        rule = self.rule
        log_decay = {"none": None, "head": (H,), "token": (B, H, L), "channel": (B, H, L, K), "state": (B, H, L)}
        shape = log_decay[rule.decay]
        q = torch.randn(B, self.Hk, L, K) if self.Hk else None
        k = torch.randn(B, self.Hk, L, K) / K**0.5 if self.Hk else None
        if rule.normaliser == "sum" and q is not None:  # what is divided by must keep away from zero
            q, k = q.abs(), k.abs()
        decay = None if shape is None else torch.rand(shape) * 0.9 + 0.05
        if decay is not None and not rule.factors and rule.decay != "state":
            decay = decay.log()
        rates = -torch.rand(H, K) - 0.1 if rule.decay == "state" else None
        beta = {"none": None, "write": torch.rand(B, H, L), "exp": torch.randn(B, H, L) * 3}[rule.gate]
        bonus = (torch.randn(H) if rule.gate == "exp" else torch.randn(H, K)) if self.bonus else None
        initial = torch.randn(B, H, K, V + rule.columns) if state else None
        low_rank = [torch.randn(B, self.Hk, L, K) / K for _ in "ab"] if rule.low_rank else [None, None]
        given = [q, k, torch.randn(B, H, L, V), decay, rates, beta, bonus, initial, *low_rank]
        documents = (torch.rand(B, L) < 0.1).cumsum(-1) if rule.packed else None
        return [*(x if x is None else x.to(dtype) for x in given), documents]


R = RecurrenceRule
CASES = [
    Case("linear_attention", R(scale=0.5, chunk=16), Hk=2),
    Case("retention", R(decay="head", chunk=16)),
    Case("lightning_by_token", R(decay="head")),
    Case("mamba2", R(decay="token", gate="write", chunk=16), Hk=2),
    Case("mamba1", R(decay="state", gate="write"), H=12, V=1, Hk=1),
    Case("gla", R(decay="channel", scale=0.25, chunk=16)),
    Case("rwkv6", R(decay="channel", read="before", chunk=16), bonus=True),
    Case("simple_gla_before", R(decay="token", read="before", chunk=16)),
    Case("delta_rule", R(delta=True, gate="write", qk_norm=1e-6, chunk=16), Hk=2),
    Case("gated_delta_rule", R(decay="token", delta=True, gate="write", qk_norm=1e-6, scale=0.35, chunk=16), Hk=2),
    Case("kda", R(decay="channel", delta=True, gate="write", qk_norm=1e-6, chunk=64)),
    Case("rg_lru", R(decay="token", factors=True), H=16, K=1, V=1, Hk=0),
    Case("mlstm", R(decay="token", gate="exp", normaliser="max1", eps=1e-6, scale=0.35, chunk=16)),
    Case("rwkv4", R(decay="head", gate="exp", normaliser="sum", read="before"), H=16, K=1, V=1, Hk=0, bonus=True),
    Case("normalised_linear_attention", R(normaliser="sum", eps=1e-6, chunk=16)),
    Case("cumulative_sum", R(), H=3, K=1, V=5, Hk=0),
    Case("rwkv7", R(decay="channel", low_rank=True, chunk=16)),
    Case("low_rank_by_token", R(decay="token", low_rank=True, gate="write", scale=0.5, chunk=16), Hk=2),
    Case("low_rank_before", R(low_rank=True, read="before", chunk=16), Hk=2, bonus=True),
]
CASES += [
    replace(case, name=f"{case.name}_packed", rule=replace(case.rule, packed=True))
    for case in CASES
    if case.name not in ("lightning_by_token", "simple_gla_before", "delta_rule", "low_rank_by_token")
]


def apply(inputs: list[Tensor | None], rule: RecurrenceRule) -> tuple[Tensor, Tensor]:
    """The operator on inputs in the order of INPUTS."""
    return RECURRENCE(*inputs[:8], rule.spell(), *inputs[8:])


def in_float64(case: Case) -> RecurrenceRule:
    return replace(case.rule, state="float64")


def token_loop(inputs: list[Tensor | None], rule: RecurrenceRule) -> tuple[Tensor, Tensor]:
    """The definition: one token after the other, in the dtype of the inputs, differentiable."""
    q, k, v, decay, rates, beta, bonus, initial, a, b, documents = inputs
    H, L = v.shape[1:3]
    q, k, a, b = (
        torch.ones_like(v[..., :1]) if x is None else x.repeat_interleave(H // x.shape[1], 1) for x in (q, k, a, b)
    )
    if rule.qk_norm is not None:
        q, k = (x / ((x * x).sum(-1, keepdim=True) + rule.qk_norm).sqrt() for x in (q, k))
    q = q * rule.scale
    S, n, m = _start(initial, v, k.shape[-1], rule)
    outs = []
    for t in range(L):
        d, log_i = _decay_at(decay, rates, t, rule), None if beta is None else beta[:, :, t]
        w = torch.ones(()) if log_i is None else log_i
        kt, vt, qt = k[:, :, t], v[:, :, t], q[:, :, t]
        if rule.packed and t > 0:
            new = documents[:, t] != documents[:, t - 1]
            fresh = _start(None, v, k.shape[-1], rule)
            S, n, m = (
                torch.where(new.reshape(-1, *[1] * (x.dim() - 1)), y, x) for x, y in zip((S, n, m), fresh, strict=True)
            )
        before = S, n, m
        if rule.gate == "exp":
            f = d[..., 0].log()
            m = torch.maximum(f + m, log_i)
            d, w = (f + before[2] - m).exp()[..., None], (log_i - m).exp()
        S, n = d[..., None] * S, d * n
        vt = vt - torch.einsum("bhkv,bhk->bhv", S, kt) if rule.delta else vt
        write = kt * w[..., None]
        S, n = S + write[..., None] * vt[:, :, None], n + write
        if rule.low_rank:
            at, bt = a[:, :, t], b[:, :, t]
            S = S + bt[..., None] * torch.einsum("bhkv,bhk->bhv", before[0], at)[:, :, None]
            n = n + bt * (before[1] * at).sum(-1, keepdim=True)
        outs.append(_read(qt, kt, vt, log_i, bonus, before if rule.read == "before" else (S, n, m), rule))
    columns = [n[..., None]] * (rule.normaliser != "none") + [m[..., None, None].expand_as(n[..., None])] * (
        rule.gate == "exp"
    )
    return torch.stack(outs, 2), torch.cat([S, *columns], -1)


def _start(initial, v, K, rule):
    B, H, _, V = v.shape
    m = v.new_full((B, H), 0.0 if rule.normaliser == "max1" else -1e38)
    if initial is None:
        return v.new_zeros(B, H, K, V), v.new_zeros(B, H, K), m
    n = initial[..., V] if rule.normaliser != "none" else v.new_zeros(B, H, K)
    return initial[..., :V], n, initial[..., 0, -1] if rule.gate == "exp" else m


def _decay_at(decay, rates, t, rule):
    """Factors (B or 1, H, K or 1) of token t."""
    if decay is None:
        return torch.ones(1, 1, 1, dtype=torch.float64)
    at = decay[None] if rule.decay == "head" else decay[:, :, t]
    at = at if rule.decay == "channel" else at[..., None]
    at = at if rates is None else at * rates
    return at if rule.factors else at.exp()


def _read(qt, kt, vt, log_i, bonus, state, rule):
    S, n, m = state
    if rule.read == "before" and rule.gate == "exp":
        own = log_i + (0 if bonus is None else bonus)
        top = torch.maximum(m, own)
        S, n = (x * (m - top).exp().reshape(*m.shape, *[1] * (x.dim() - 2)) for x in (S, n))
        w = (own - top).exp()[..., None]
        S, n, m = S + (kt * w)[..., None] * vt[:, :, None], n + kt * w, top
    elif bonus is not None:
        own = kt * bonus if log_i is None else kt * bonus * log_i[..., None]
        S = S + own[..., None] * vt[:, :, None]
    out, norm = torch.einsum("bhkv,bhk->bhv", S, qt), (n * qt).sum(-1, keepdim=True)
    if rule.normaliser == "none":
        return out
    if rule.normaliser == "max1":
        norm = torch.maximum(norm.abs(), (-m).exp()[..., None])
    return out / (norm + rule.eps)

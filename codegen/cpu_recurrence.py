"""Linear recurrences in plain torch: chunks of matrix products where the decay allows it, blocks of a scan elsewhere.

In a chunk, row i of the output is (q_i D_{0..i}) S + sum_{j<=i} (q_i D_{j+1..i} k_j) v_j, and the state moves on by one
product per chunk. Sums of logarithms are taken in float64, so that they stay exact where decays differ by orders of
magnitude. Under the delta rule the values of a chunk come from one unit triangular system.

Source: Yang et al. 2024, arXiv:2412.06464, section 3.3 (gated delta rule in chunks); Dao and Gu 2024, arXiv:2405.21060,
section 6 (block decomposition); Beck et al. 2024, arXiv:2405.04517, appendix (running maximum).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnc.rule_recurrence import RecurrenceRule

DTYPES = {"float32": torch.float32, "float64": torch.float64}
CHUNK = 64  # where it is written token by token
CHUNK_BY_CHANNEL = 16  # a decay by channel costs C * K, not C, per pair of a token and a key
LEAST = -1e4  # a logarithm whose exponential is 0
SEGMENT = 256  # tokens whose states a scan holds at once


class Given(NamedTuple):
    """The operands of `attnc::recurrence`, in its order and shapes; documents as integers (B, L)."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor
    decay: Tensor | None = None
    rates: Tensor | None = None
    beta: Tensor | None = None
    bonus: Tensor | None = None
    initial: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    documents: Tensor | None = None


class Operands(NamedTuple):
    """Operands in the dtype of the state, one head of q and k per head of the state; L tokens in dimension 2.

    decay: (B, H, L) or, by channel, (B, H, L, K), logarithms, or None. write: (B, H, L) or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    write: Tensor | None
    state: Tensor
    a: Tensor | None = None
    b: Tensor | None = None


def recurrence(given: Given, rule: RecurrenceRule, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
    """The outputs (B, H, L, V) and the last state (B, H, K, V + rule.columns) of a rule; differentiable.

    chunk_size: tokens per chunk in place of the rule's.
    """
    acc = DTYPES[rule.state]
    q, k, v, decay, rates, beta, bonus, initial, a, b = (None if x is None else x.to(acc) for x in given[:10])
    assert v is not None
    rule = replace(rule, chunk=chunk_size) if chunk_size is not None else rule
    starts = _starts(given.documents) if rule.packed else None
    if starts is not None and rule.gate != "exp":
        decay, rule = _stopped(decay, starts, v, rule)
    q, k = (x if x is None else _normed(x, rule.qk_norm) for x in (q, k))
    q = q * rule.scale if q is not None and rule.scale != 1.0 else q
    if rule.gate == "exp":
        out, last = _under_maximum(q, k, v, decay, beta, bonus, initial, starts, rule)
    else:
        ones = [torch.ones_like(v[..., :1])] if rule.normaliser != "none" else []
        wide = torch.cat([v, *ones], -1) if ones else v
        if starts is not None and a is not None:
            a = a.masked_fill(starts[:, None, :, None], 0.0)
        reset = starts if rule.decay == "state" else None
        read = q
        if starts is not None and rule.read == "before" and q is not None:
            read = q.masked_fill(starts[:, None, :, None], 0.0)
        out, last = _linear(read, k, wide, decay, rates, beta, initial, a, b, reset, rule)
        if bonus is not None:
            out = out + _own(q, k, beta, bonus) * wide
        if ones:
            out = _divided(out, torch.zeros((), dtype=acc), rule)
    return out.to(given.value.dtype if rule.out == "value" else acc), last


def _own(q: Tensor | None, k: Tensor | None, beta: Tensor | None, bonus: Tensor) -> Tensor:
    """What each token reads of itself before the update, q^T diag(bonus) w k, (B, H, L, 1)."""
    H = bonus.shape[0]
    q, k = (bonus.new_ones(()) if x is None else _by_head(x, H) for x in (q, k))
    own = (q * k * bonus[:, None]).sum(-1, keepdim=True)
    return own if beta is None else own * beta[..., None]


def _starts(documents: Tensor | None) -> Tensor:
    """Where a document starts behind another one, (B, L)."""
    assert documents is not None, "packed documents without their numbers"
    return F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=False)


def _stopped(decay: Tensor | None, starts: Tensor, v: Tensor, rule: RecurrenceRule) -> tuple[Tensor | None, Any]:
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


def _normed(x: Tensor, eps: float | None) -> Tensor:
    return x if eps is None else x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)


def _divided(out: Tensor, maximum: Tensor, rule: RecurrenceRule) -> Tensor:
    """The last column of `out` is the normaliser; both are scaled by exp(-maximum)."""
    numerator, denominator = out[..., :-1], out[..., -1:]
    if rule.normaliser == "max1":
        denominator = torch.maximum(denominator.abs(), torch.exp(-maximum))
    return numerator / (denominator + rule.eps)


# The exponential gate.


def _under_maximum(q, k, v, decay, beta, bonus, initial, starts, rule: RecurrenceRule) -> tuple[Tensor, Tensor]:
    """exp(beta) as a gate of at most 1: state and normaliser are kept times exp(-m), m the largest exponent so far."""
    B, H, L, _ = v.shape
    f = torch.zeros_like(beta) if decay is None else decay.view(1, H, 1) if decay.dim() == 1 else decay
    f = f.expand(B, H, L)
    fresh = 0.0 if rule.normaliser == "max1" else -1e38
    start, state = v.new_full((B, H), fresh), None
    if initial is not None:
        state, start = initial[..., :-1], initial[..., 0, -1]
    m, m_before = _running_maximum(f, beta, start, fresh, starts)
    stay = f + m_before - m
    if starts is not None:
        stay = stay.masked_fill(starts[:, None], -math.inf)
    plain = RecurrenceRule(decay="token", gate="write", read=rule.read, chunk=rule.chunk, state=rule.state)
    wide = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    out, last = _linear(q, k, wide, stay, None, torch.exp(beta - m), state, None, None, None, plain)
    if rule.read == "before":
        own = beta if bonus is None else beta + bonus.view(1, H, 1)
        top = torch.maximum(m_before, own)
        read = torch.ones_like(wide[..., :1]) if q is None or k is None else (q * k).sum(-1, keepdim=True)
        out = out * torch.exp(m_before - top)[..., None] + read * wide * torch.exp(own - top)[..., None]
    else:
        top = m
    ends = (start[..., None] if L == 0 else m[..., -1:])[..., None].expand(B, H, last.shape[2], 1)
    return _divided(out, top[..., None], rule), torch.cat([last, ends], -1)


def _running_maximum(
    f: Tensor, i: Tensor, start: Tensor, fresh: float, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
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


# The linear core.


def _linear(q, k, v, decay, rates, write, initial, a, b, starts, rule) -> tuple[Tensor, Tensor]:
    B, H, L, V = v.shape
    K = 1 if k is None else k.shape[-1]
    state = v.new_zeros(B, H, K, V) if initial is None else initial.expand(B, H, K, V)
    if rule.decay == "state" or rule.factors or (K == 1 and not rule.delta and not rule.low_rank):
        return _scanned(q, k, v, decay, rates, write, state, starts, rule)
    q, k, a, b = (x if x is None else _by_head(x, H) for x in (q, k, a, b))
    if decay is not None and rule.decay == "head":
        decay = decay.view(1, H, 1).expand(B, H, L)
    chunk = max(1, min(rule.chunk if rule.chunk > 1 else CHUNK, L))
    operands = Operands(q, k, v, decay, write, state, a, b)
    if rule.low_rank:
        return _in_chunks_low_rank(operands, min(chunk, CHUNK_BY_CHANNEL), rule)
    if rule.decay == "channel":
        return _in_chunks_by_channel(operands, min(chunk, CHUNK_BY_CHANNEL), rule)
    return _in_chunks(operands, chunk, rule)


def _by_head(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _cut(x: Tensor, chunk: int) -> Tensor:
    """(B, H, L, ...) as (B, H, N, chunk, ...), filled up with zeros: no decay, nothing written."""
    B, H, L = x.shape[:3]
    missing = -L % chunk
    if missing:
        x = F.pad(x, (*(0, 0) * (x.dim() - 3), 0, missing))
    return x.reshape(B, H, (L + missing) // chunk, chunk, *x.shape[3:])


def _decays(g: Tensor) -> tuple[Tensor, Tensor]:
    """For logarithms (..., C): decay of a pair (i, j), 0 above the diagonal, and of the state at entry, to each token.

    Sums from the start are taken in float64, where their differences are exact enough; LEAST stands for minus infinity.
    """
    C = g.shape[-1]
    sums = g.clamp(min=LEAST).double().cumsum(-1)
    above = torch.ones(C, C, dtype=torch.bool, device=g.device).triu(1)
    pair = (sums[..., :, None] - sums[..., None, :]).to(g.dtype).masked_fill(above, -math.inf)
    return pair.exp(), sums.to(g.dtype).exp()


def _read_before(pair: Tensor, enter: Tensor) -> tuple[Tensor, Tensor]:
    """The decays as seen before each token's own update; tokens in the last but one and the last dimension."""
    return F.pad(pair[..., :-1, :], (0, 0, 1, 0)), F.pad(enter[..., :-1], (1, 0), value=1.0)


def _in_chunks(x: Operands, chunk: int, rule: RecurrenceRule) -> tuple[Tensor, Tensor]:
    q, k, v = (_cut(t, chunk) for t in (x.q, x.k, x.v))
    w = None if x.write is None else _cut(x.write, chunk)[..., None]
    g = v.new_zeros(v.shape[:4]) if x.decay is None else _cut(x.decay, chunk)
    pair, enter = _decays(g)
    seen, entered = _read_before(pair, enter) if rule.read == "before" else (pair, enter)
    within = (q @ k.transpose(-1, -2)) * seen
    written = k if w is None else k * w
    leaving = (k if rule.delta else written) * pair[..., -1, :, None]
    total = enter[..., -1, None, None]
    state, states = x.state, []
    if rule.delta:
        system = (written @ k.transpose(-1, -2)) * pair
        right = torch.cat([v if w is None else v * w, written * enter[..., None]], -1)
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        v, held = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
        news = []
        for n in range(v.shape[2]):
            states.append(state)
            news.append(v[:, :, n] - held[:, :, n] @ state)
            state = state * total[:, :, n] + leaving[:, :, n].transpose(-1, -2) @ news[-1]
        v = torch.stack(news, 2) if news else v
    else:
        updates = leaving.transpose(-1, -2) @ v
        within = within if w is None else within * w.transpose(-1, -2)
        for n in range(v.shape[2]):
            states.append(state)
            state = state * total[:, :, n] + updates[:, :, n]
    out = within @ v
    if states:
        out = out + (q * entered[..., None]) @ torch.stack(states, 2)
    return out.flatten(2, 3)[:, :, : x.v.shape[2]], state


def _in_chunks_by_channel(x: Operands, chunk: int, rule: RecurrenceRule) -> tuple[Tensor, Tensor]:
    """Chunk after chunk, because the decays of all pairs are K times as many."""
    assert x.decay is not None
    q, k, v, g = (_cut(t, chunk) for t in (x.q, x.k, x.v, x.decay))
    w = None if x.write is None else _cut(x.write, chunk)[..., None]
    state, outs = x.state, []
    for n in range(v.shape[2]):
        qn, kn, vn = q[:, :, n], k[:, :, n], v[:, :, n]
        pair, enter = _decays(g[:, :, n].transpose(-1, -2))  # (B, H, K, C, C), (B, H, K, C)
        seen, entered = _read_before(pair, enter) if rule.read == "before" else (pair, enter)
        written = kn if w is None else kn * w[:, :, n]
        source = kn if rule.delta else written
        within = torch.einsum("bhik,bhkij,bhjk->bhij", qn, seen, source)
        if rule.delta:
            system = torch.einsum("bhik,bhkij,bhjk->bhij", written, pair, kn)
            right = vn if w is None else vn * w[:, :, n]
            right = right - (written * enter.transpose(-1, -2)) @ state
            vn = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        out = within @ vn + (qn * entered.transpose(-1, -2)) @ state
        outs.append(out)
        leaving = source * pair[..., -1, :].transpose(-1, -2)
        state = state * enter[..., -1, None] + leaving.transpose(-1, -2) @ vn
    out = torch.cat(outs, 2)[:, :, : x.v.shape[2]] if outs else x.v
    return out, state


def _in_chunks_low_rank(x: Operands, chunk: int, rule: RecurrenceRule) -> tuple[Tensor, Tensor]:
    """x_t = a_t^T S_{t-1} of a chunk comes from one unit triangular system; the rest as with a decay by channel."""
    assert x.a is not None and x.b is not None
    q, k, v, a, b = (_cut(t, chunk) for t in (x.q, x.k, x.v, x.a, x.b))
    g = torch.zeros_like(k) if x.decay is None else _cut(x.decay, chunk)
    g = g if g.dim() == 5 else g[..., None].expand_as(k)
    w = None if x.write is None else _cut(x.write, chunk)[..., None]
    state, outs = x.state, []
    for n in range(v.shape[2]):
        qn, kn, vn, an, bn = (t[:, :, n] for t in (q, k, v, a, b))
        pair, enter = _decays(g[:, :, n].transpose(-1, -2))
        earlier, entered = _read_before(pair, enter)
        kn = kn if w is None else kn * w[:, :, n]
        rows, columns = [an, an, qn, qn], [bn, kn, bn, kn]
        seen = earlier if rule.read == "before" else pair
        ab, ak, qb, qk = (
            torch.einsum("bhik,bhkij,bhjk->bhij", i, p, j)
            for i, j, p in zip(rows, columns, (earlier, earlier, seen, seen), strict=True)
        )
        right = (an * entered.transpose(-1, -2)) @ state + ak @ vn
        read = torch.linalg.solve_triangular(-ab, right, upper=False, unitriangular=True)
        into = entered if rule.read == "before" else enter
        out = (qn * into.transpose(-1, -2)) @ state + qk @ vn + qb @ read
        outs.append(out)
        leave = pair[..., -1, :].transpose(-1, -2)
        state = state * enter[..., -1, None] + (kn * leave).mT @ vn + (bn * leave).mT @ read
    return torch.cat(outs, 2)[:, :, : x.v.shape[2]] if outs else x.v, state


# The scan.


def _scanned(q, k, v, decay, rates, write, state, starts, rule: RecurrenceRule) -> tuple[Tensor, Tensor]:
    """Element by element of the state, a segment of tokens at a time."""
    outs = []
    for start in range(0, v.shape[2], SEGMENT):
        part = slice(start, start + SEGMENT)
        factors = _factors(None if decay is None else decay if decay.dim() == 1 else decay[:, :, part], rates, rule)
        if starts is not None and factors is not None:
            factors = factors.masked_fill(starts[:, None, part, None, None], 0.0)
        update = v[:, :, part, None] if k is None else k[:, :, part, :, None] * v[:, :, part, None]
        if write is not None:
            update = update * write[:, :, part, None, None]
        states = _scan(factors, update, state)
        read = torch.cat([state[:, :, None], states[:, :, :-1]], 2) if rule.read == "before" else states
        outs.append(read.sum(3) if q is None else (read * q[:, :, part, :, None]).sum(3))
        state = states[:, :, -1]
    return torch.cat(outs, 2) if outs else v, state


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
    a, x = a.expand(*x.shape[:3], *a.shape[3:]), _cut(x, block)
    missing = -length % block
    if missing:
        a = torch.cat([a, torch.ones_like(a[:, :, :1]).expand(-1, -1, missing, -1, -1)], 2)
    a = _cut(a, block)
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

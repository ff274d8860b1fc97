"""Linear recurrences in plain torch, a segment of tokens after the other, forward and backward.

A segment is as many chunks as fill the cache; what happens in it is chunks of matrix products (`cpu_chunks`) or, where
the state is a vector or every element has its own decay, a scan (`cpu_scan`). Only the state passes from segment to
segment, so that memory beyond the inputs and outputs does not grow with the length; the backward keeps so many states
as `STATES` allows and computes each segment again, and the states that it does not keep.

Source: Yang et al. 2024, arXiv:2412.06464, section 3.3 (gated delta rule in chunks); Dao and Gu 2024, arXiv:2405.21060,
section 6 (block decomposition); Griewank and Walther 2000, "Algorithm 799: revolve" (which states to keep).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnc.codegen.cpu_chunks import InChunks, cut
from attnc.codegen.cpu_gates import NEVER, divided, running_maximum, starts_of, stopped
from attnc.codegen.cpu_scan import scanned, stepped
from attnc.rule_recurrence import RecurrenceRule

DTYPES = {"float32": torch.float32, "float64": torch.float64}
CHUNK = 32  # tokens per chunk at most, unless asked for
MATRICES = 128  # chunks times heads of a segment
ELEMENTS = 1 << 20  # elements of the states that a scan holds at once, and at least
FEWEST = 64  # tokens
STATES = 1 << 22  # elements of the states that a backward keeps
KEPT = 16  # states that it may keep in any case


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


OF_TOKENS = ("query", "key", "value", "decay", "beta", "a", "b")  # cut along the tokens; a decay by head is not


def recurrence(given: Given, rule: RecurrenceRule, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
    """The outputs (B, H, L, V), laid out as (B, L, H, V), and the last state (B, H, K, V + rule.columns) of a rule.

    chunk_size: tokens per chunk in place of the rule's; rounded down to a power of two.
    """
    B, H, L, V = given.value.shape
    acc = DTYPES[rule.state]
    out = given.value.new_empty(B, L, H, V, dtype=given.value.dtype if rule.out == "value" else acc).transpose(1, 2)
    chunk = _chunk(L, rule, chunk_size)
    state = None if given.initial is None else given.initial.to(acc)
    with torch.no_grad():
        for tokens in _segments(given, rule, chunk):
            part, state = _segment(_part(given, tokens, rule), state, rule, chunk)
            _stored(part, out[:, :, tokens])
    return out, _first_state(given, rule) if state is None else state.expand(*_state_shape(given, rule)).clone()


def gradients(
    given: Given,
    needs: list[bool],
    grad_out: Tensor,
    grad_state: Tensor,
    rule: RecurrenceRule,
    chunk_size: int | None = None,
) -> list[Tensor]:
    """Gradients of the operands that `needs` names, laid out as they are; autograd must be on."""
    acc = DTYPES[rule.state]
    chunk = _chunk(given.value.shape[2], rule, chunk_size)
    wanted = dict(zip(Given._fields, needs, strict=True))
    found = {name: torch.zeros_like(x) for name, x in given._asdict().items() if wanted[name]}
    carried = grad_state.to(acc)
    for tokens, state in _from_the_end(given, rule, chunk):
        part = _part(given, tokens, rule)
        fresh = (None if x is None else x.detach().requires_grad_(n) for x, n in zip(part, needs, strict=True))
        part = Given(*fresh)  # type: ignore[arg-type]
        own = None if state is None else state.detach().requires_grad_()
        out, last = _segment(part, own, rule, chunk)
        learned = [name for name, x in part._asdict().items() if x is not None and wanted[name] and name != "initial"]
        sources = [getattr(part, name) for name in learned] + ([] if own is None else [own])
        ends = ((out, _as_read(grad_out[:, :, tokens], out)), (last, carried))
        reached = [(y, g) for y, g in ends if y.requires_grad]
        if not reached or not sources:
            continue
        ys, gs = zip(*reached, strict=True)
        grads = torch.autograd.grad(ys, sources, gs, allow_unused=True)
        for name, grad in zip(learned, grads, strict=False):
            if grad is not None and _is_cut(name, given, rule):
                found[name][:, :, tokens].copy_(grad)
            elif grad is not None:
                found[name].add_(grad)
        if own is not None:
            carried = torch.zeros_like(own) if grads[-1] is None else grads[-1]
    if wanted["initial"] and given.initial is not None:
        found["initial"].copy_(carried.sum_to_size(given.initial.shape))
    return [found[name] for name in Given._fields if wanted[name]]


# Segments.


def _state_shape(given: Given, rule: RecurrenceRule) -> tuple[int, ...]:
    B, H, _, V = given.value.shape
    return B, H, 1 if given.key is None else given.key.shape[-1], V + rule.columns


def _first_state(given: Given, rule: RecurrenceRule) -> Tensor:
    """The state before any token: nothing, under the maximum of no exponents."""
    state = given.value.new_zeros(_state_shape(given, rule), dtype=DTYPES[rule.state])
    if rule.gate == "exp":
        state[..., -1] = 0.0 if rule.normaliser == "max1" else NEVER
    return state


def _is_scan(given: Given, rule: RecurrenceRule) -> bool:
    """Whether matrix products have nothing to gain."""
    plain = not rule.delta and not rule.low_rank
    return rule.decay == "state" or rule.factors or (plain and _state_shape(given, rule)[2] == 1)


def _chunk(length: int, rule: RecurrenceRule, asked: int | None) -> int:
    """Tokens per chunk, a power of two."""
    most = asked if asked is not None else min(rule.chunk, CHUNK) if rule.chunk > 1 else CHUNK
    enough = 1 << max(0, length - 1).bit_length()
    return min(1 << (max(1, most).bit_length() - 1), enough)


def _segments(given: Given, rule: RecurrenceRule, chunk: int) -> Iterator[slice]:
    B, H, L, _ = given.value.shape
    if B * H == 0:
        return
    if _is_scan(given, rule):
        size = max(FEWEST, ELEMENTS // max(1, math.prod(_state_shape(given, rule))))
        chunk = 1
    else:
        size = chunk * max(1, MATRICES * CHUNK // (chunk * B * H))
    whole = L // chunk * chunk  # a rest of a chunk stands alone, so that no other segment is padded
    for start in range(0, whole, size):
        yield slice(start, min(start + size, whole))
    if whole < L:
        yield slice(whole, L)


def _is_cut(name: str, given: Given, rule: RecurrenceRule) -> bool:
    return name in OF_TOKENS and not (name == "decay" and rule.decay == "head")


def _part(given: Given, tokens: slice, rule: RecurrenceRule) -> Given:
    """The operands of a segment; in place of the documents, where they start."""
    found = {
        name: x[:, :, tokens] if x is not None and _is_cut(name, given, rule) else x
        for name, x in given._asdict().items()
    }
    if rule.packed and given.documents is not None:
        found["documents"] = starts_of(given.documents[:, max(0, tokens.start - 1) : tokens.stop])[
            :, min(1, tokens.start) :
        ]
    return Given(**{**found, "initial": None})


def _from_the_end(given: Given, rule: RecurrenceRule, chunk: int) -> Iterator[tuple[slice, Tensor | None]]:
    """The segments from the last to the first, each with the state before it."""
    segments = list(_segments(given, rule, chunk))
    state = None if given.initial is None else given.initial.to(DTYPES[rule.state]).expand(*_state_shape(given, rule))
    if state is None and len(segments) > 1:
        state = _first_state(given, rule)
    most = max(KEPT, STATES // max(1, math.prod(_state_shape(given, rule))))
    kept = [(0, len(segments), state)] if segments else []
    while kept:
        start, stop, state = kept.pop()
        while stop - start > 1:
            skipped = _skipped(stop - start, most - len(kept))
            kept.append((start, start + skipped, state))
            with torch.no_grad():
                for tokens in segments[start : start + skipped]:
                    state = _segment(_part(given, tokens, rule), state, rule, chunk, silent=True)[1]
            start += skipped
        yield segments[start], state


def _skipped(count: int, room: int) -> int:
    """Of `count` segments to go through from the end, how many to pass before the next of `room` states is kept.

    With r passes over each segment, `room` states are enough for C(room + r, r) segments; r is the least possible.
    """
    passes = next(r for r in itertools.count(1) if math.comb(room + r, r) >= count)
    return min(math.comb(room + passes - 1, passes - 1), count - math.comb(room + passes - 2, passes - 1))


def _stored(part: Tensor, into: Tensor) -> None:
    (into.unflatten(2, part.shape[2:4]) if part.dim() == 5 else into).copy_(part)


def _as_read(grad: Tensor, out: Tensor) -> Tensor:
    """The gradient in the shape of a segment's output, which may be in chunks."""
    return (grad.unflatten(2, out.shape[2:4]) if out.dim() == 5 else grad).to(out.dtype)


# One segment.


def _segment(
    x: Given, state: Tensor | None, rule: RecurrenceRule, chunk: int, silent: bool = False
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, L, V), or (B, H, L / chunk, chunk, V), and the state after; differentiable."""
    acc, starts = DTYPES[rule.state], x.documents
    q, k, v, decay, rates, beta, bonus, _, a, b = (None if t is None else t.to(acc) for t in x[:10])
    assert v is not None
    state = _first_state(x, rule) if state is None else state.expand(*_state_shape(x, rule))
    if rule.gate == "exp" or bonus is not None or v.shape[2] == 1 or _is_scan(x, rule):  # else where they are cut
        q, k = _normed(q, rule.qk_norm, rule.scale), _normed(k, rule.qk_norm, 1.0)
        rule = replace(rule, qk_norm=None, scale=1.0)
    x = Given(q, k, v, decay, rates, beta, bonus, None, a, b, starts)
    if rule.gate == "exp":
        return _under_maximum(x, state, rule, chunk, silent)
    if rule.normaliser == "none":
        return _linear(x, state, rule, chunk, silent)
    out, last = _linear(x._replace(value=_with_one(v)), state, rule, chunk, silent)
    return out if silent else divided(out, None, rule), last


def _normed(x: Tensor | None, eps: float | None, scale: float) -> Tensor | None:
    if x is None or eps is None:
        return x if x is None or scale == 1.0 else x * scale
    factor = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() + eps)
    return x * (factor if scale == 1.0 else factor * scale)


def _with_one(v: Tensor) -> Tensor:
    """Values beside the one that the normaliser sums."""
    return F.pad(v, (0, 1), value=1.0)


def _under_maximum(x: Given, state: Tensor, rule: RecurrenceRule, chunk: int, silent: bool) -> tuple[Tensor, Tensor]:
    """exp(beta) as a gate of at most 1: state and normaliser are kept times exp(-m), m the largest exponent so far."""
    q, k, v, decay, _, beta, bonus, _, _, _, starts = x
    assert beta is not None
    B, H, L, _ = v.shape
    f = torch.zeros_like(beta) if decay is None else decay.view(1, H, 1) if rule.decay == "head" else decay
    fresh = 0.0 if rule.normaliser == "max1" else NEVER
    m, before = running_maximum(f.expand(B, H, L), beta, state[..., 0, -1], fresh, starts)
    plain = RecurrenceRule(decay="token", gate="write", read=rule.read, packed=rule.packed, state=rule.state)
    wide = _with_one(v)
    gated = Given(q, k, wide, f + before - m, beta=torch.exp(beta - m), documents=starts)
    out, last = _linear(gated, state[..., :-1], plain, chunk, silent, apart=True)
    last = torch.cat([last, m[..., -1:, None].expand(B, H, last.shape[2], 1)], -1)
    if silent:
        return out, last
    if rule.read == "before":
        own = beta if bonus is None else beta + bonus.view(1, H, 1)
        top = torch.maximum(before, own)
        read = wide[..., -1:] if q is None or k is None else (q * k).sum(-1, keepdim=True)
        out = out * torch.exp(before - top)[..., None] + read * wide * torch.exp(own - top)[..., None]
        m = top
    return divided(out, m[..., None], rule), last


def _linear(
    x: Given, state: Tensor, rule: RecurrenceRule, chunk: int, silent: bool, apart: bool = False
) -> tuple[Tensor, Tensor]:
    """The linear core; apart: the outputs token by token, not in chunks."""
    q, k, v, decay, rates, beta, bonus, _, a, b, starts = x
    if starts is not None and v.shape[2] > 1:
        decay, rule = stopped(decay, starts, v, rule)
    if v.shape[2] == 1:
        out, last = stepped(q, k, v, decay, rates, beta, a, b, state, starts, rule)
    elif _is_scan(x, rule):
        out, last = scanned(q, k, v, decay, rates, beta, state, starts, rule)
    else:
        out, last = _in_chunks(x._replace(decay=decay), state, rule, chunk, silent)
    if silent:
        return out, last
    if out.dim() == 5 and (bonus is not None or apart or v.shape[2] % chunk or rule.normaliser != "none"):
        out = out.flatten(2, 3)[:, :, : v.shape[2]]
    return out if bonus is None else out + _own(q, k, beta, bonus) * v, last


def _own(q: Tensor | None, k: Tensor | None, beta: Tensor | None, bonus: Tensor) -> Tensor:
    """What each token reads of itself before the update, q^T diag(bonus) w k, (B, H, L, 1)."""
    group = [x.repeat_interleave(bonus.shape[0] // x.shape[1], 1) for x in (q, k) if x is not None]
    own = (math.prod(group, start=bonus[:, None])).sum(-1, keepdim=True)
    return own if beta is None else own * beta[..., None]


def _in_chunks(x: Given, state: Tensor, rule: RecurrenceRule, chunk: int, silent: bool) -> tuple[Tensor, Tensor]:
    B, H, L, _ = x.value.shape
    key = x.value.new_ones(()).expand(B, 1, L, 1) if x.key is None else x.key
    query = x.value.new_ones(()).expand(B, 1, L, 1) if x.query is None else x.query
    alike = B * max(key.shape[1], query.shape[1])  # heads whose products are computed once
    if rule.delta or rule.low_rank or rule.decay == "channel":
        alike = B * H
    w = None if x.beta is None else x.beta[..., None]
    v = cut(x.value, chunk, B * H, w)
    k = cut(key, chunk, alike, None, rule.qk_norm)
    q = None if silent else cut(query, chunk, alike, None, rule.qk_norm, rule.scale)
    a, b = (None if t is None else cut(t, chunk, B * H) for t in (x.a, x.b))
    if x.documents is not None:
        keep = cut((~x.documents)[:, None, :, None].to(v), chunk, B)
        if rule.read == "before" and q is not None:
            q = (q.unflatten(1, (B, -1)) * keep[:, :, None]).flatten(1, 2)
        if a is not None:
            a = (a.unflatten(1, (B, -1)) * keep[:, :, None]).flatten(1, 2)
    p = a
    if rule.delta:
        p = k if w is None else k * cut(w, chunk, B * H)
    g = None if x.decay is None else _logarithms(x.decay, B, H, L, chunk, rule)
    out, last = InChunks.apply(q, k, v, p, b, g, state.flatten(0, 1), rule.read == "before", silent)
    if not silent:
        out = out.unflatten(1, (B, H)).movedim(0, 2)
    return out, last.unflatten(0, (B, H))


def _logarithms(decay: Tensor, B: int, H: int, L: int, chunk: int, rule: RecurrenceRule) -> Tensor:
    """Per chunk, (n, B H, C) or (n, B H, C, K); one for all chunks where tokens share it."""
    if rule.decay == "channel":
        return cut(decay, chunk, B * H)
    if rule.decay == "head" and L % chunk == 0:
        return decay.view(1, H, 1).expand(B, H, chunk).reshape(1, B * H, chunk)
    each = decay.view(1, H, 1) if rule.decay == "head" else decay
    return cut(each.expand(B, H, L)[..., None], chunk, B * H).squeeze(-1)

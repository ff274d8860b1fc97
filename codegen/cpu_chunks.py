"""Chunks of a linear recurrence as matrix products, with the gradient written out.

For n chunks of C tokens of N heads, rows and columns as `codegen.cpu_decays` has them, D what is left of the state over
a chunk, q^ and p^ with the decay from the chunk's start, k^ and b^ with that to its end:

    plain        u = v                            o = q^ S + (q k) u            S' = D S + k^T u
    corrected    u = (I + p k)^-1 (v - p^ S)      as before                     (delta rule: p = beta k, v times beta)
    low rank     x = (I - a b)^-1 (a^ S + (a k) v)    o = q^ S + (q k) v + (q b) x      S' = D S + k^T v + b^T x

The gradient goes through the chunks from the last to the first with the gradient of the state; a sum of logarithms
moves by row times its gradient, less column times its gradient.

Source: Yang et al. 2024, arXiv:2406.06484, section 3 and arXiv:2412.06464, section 3.3 (delta rule in chunks); Yang et
al. 2023, arXiv:2312.06635, appendix (gradient of the decay); fla-org/flash-linear-attention, DPLR, for the shapes of
the low rank only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnc.codegen.cpu_decays import Decay, decays, for_heads, of_keys, unit_inverse


def cut(
    x: Tensor, chunk: int, heads: int, factor: Tensor | None = None, norm: float | None = None, scale: float = 1.0
) -> Tensor:
    """(B, Hk, L, F) as new memory (n, heads, chunk, F), filled up with zeros: no decay, nothing written.

    heads: a multiple of B Hk. factor: of each token, (B, Hk, L, 1). Without one, scale, and norm: the epsilon under the
    root where rows are divided by their Euclidean norm.
    """
    found: Tensor = _Cut.apply(x, chunk, heads, factor, norm, scale)
    return found


class _Cut(torch.autograd.Function):
    """One pass, and few in its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chunk: int, heads: int, factor, norm: float | None, scale: float) -> Tensor:
        ctx.chunk, ctx.scale, ctx.length, given = chunk, scale, x.shape[2], factor
        if norm is not None:
            factor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(norm).rsqrt_().mul_(scale)
        if x.shape[2] % chunk:
            spare = (0, 0, 0, -x.shape[2] % chunk)
            x, factor = F.pad(x, spare), None if factor is None else F.pad(factor, spare)
        parts = _parts(x, chunk)
        out = x.new_empty(parts.shape[0], heads, chunk, x.shape[3])
        into = out.view(*parts.shape[:3], -1, *out.shape[2:])
        parts = parts[:, :, :, None].expand_as(into)
        if factor is None and scale == 1.0:
            into.copy_(parts)
        else:
            torch.mul(parts, scale if factor is None else _parts(factor, chunk)[:, :, :, None], out=into)
        ctx.factor, ctx.normed = factor, norm is not None
        ctx.save_for_backward(x if given is not None else None, out if norm is not None else None)
        ctx.shape, ctx.across = x.shape, x.stride(1) < x.stride(2)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, out = ctx.saved_tensors
        B, Hk, L, width = ctx.shape
        each = (grad.shape[0], B, Hk, -1, *grad.shape[2:])
        moved = grad.view(each)[:, :, :, 0] if grad.shape[1] == B * Hk else grad.view(each).sum(3)
        of_factor = None
        if ctx.normed:
            out = out.view(each)[:, :, :, 0]
            along = (out * moved).sum(-1, keepdim=True)
            moved = torch.addcmul(moved, out, along, value=-(ctx.scale**-2))
        elif x is not None and ctx.needs_input_grad[3]:
            of_factor = (
                (moved * _parts(x, ctx.chunk)).sum(-1, keepdim=True).movedim(0, 2).flatten(2, 3)[:, :, : ctx.length]
            )
        found = grad.new_empty(B, L, Hk, width).transpose(1, 2) if ctx.across else grad.new_empty(B, Hk, L, width)
        factor = ctx.scale if ctx.factor is None else _parts(ctx.factor, ctx.chunk)
        torch.mul(moved, factor, out=_parts(found, ctx.chunk))
        found = found[:, :, : ctx.length]
        return found, None, None, of_factor, None, None


def _parts(x: Tensor, chunk: int) -> Tensor:
    """(B, H, n chunk, F) as (n, B, H, chunk, F)."""
    return x.unflatten(2, (-1, chunk)).movedim(2, 0)


@dataclass
class Chunks:
    """Operands (n, N, C, ...), in the dtype of the state (N, K, V). correct: rows p; low_rank: rows p and columns b.

    q and k may be those of the keys, N a multiple, unless there is p or a decay by channel. v is overwritten under p.
    earlier: q reads the state before its token. silent: the outputs are not wanted, and there is no q.
    """

    q: Any
    k: Tensor
    v: Tensor
    p: Any
    b: Any
    state: Tensor
    earlier: bool
    silent: bool


class InChunks(torch.autograd.Function):
    """(n, N, C, V) outputs and the last state of n chunks."""

    @staticmethod
    def forward(ctx: Any, q, k, v, p, b, g, state, earlier: bool, silent: bool = False) -> tuple[Tensor, Tensor]:
        n = v.shape[0]
        x = Chunks(q, k, v, p, b, state, earlier, silent)
        decay = decays(g, v.shape[1])
        done = _Done(x, decay)
        ctx.done, ctx.like = done, g
        return done.out, done.states[n].clone()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Any, ...]:
        done, ctx.done = ctx.done, None
        q, k, v, p, b, g, state = done.gradients(grad_out, grad_state, ctx.needs_input_grad[5])
        if g is not None:
            g = g.view(*v.shape[:2], *ctx.like.shape[2:]).sum_to_size(ctx.like.shape)
        return q, k, v, p, b, g, state, None, None


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def _times(x: Tensor, factor: Tensor | None, heads: int) -> Tensor:
    """(n, Hk, C, K) times what is left, (n or 1, heads, C, 1 or K), for each head."""
    if factor is None or x.shape[1] == heads:
        return for_heads(x, heads) if factor is None else x * factor
    each = (x.shape[1], heads // x.shape[1])
    return (x[:, :, None] * factor.unflatten(1, each)).flatten(1, 2)


def _later(x: Tensor, first: float) -> Tensor:
    """Moved by one token: what stood at i stands at i + 1."""
    out = torch.empty_like(x)
    out[..., 1:, :].copy_(x[..., :-1, :])
    out[..., :1, :].fill_(first)
    return out


def _sooner(x: Tensor) -> Tensor:
    """Moved by one token: what stood at i + 1 stands at i."""
    out = torch.empty_like(x)
    out[..., :-1, :].copy_(x[..., 1:, :])
    out[..., -1:, :].zero_()
    return out


class _Done:
    """The forward of n chunks and what its gradient needs; what a rule does not have is None."""

    kept: Any
    p_hat: Any
    b_hat: Any
    inverse: Any

    def __init__(self, x: Chunks, decay: Decay) -> None:
        self.x, self.decay = x, decay
        n, N, _, _ = x.v.shape
        self.enter = decay.enter
        self.before = None if decay.enter is None else _later(decay.enter, 1.0)
        self.q_enter = self.before if x.earlier else self.enter
        self.p_enter = self.before if x.b is not None else self.enter
        self._score()
        self.k_hat = _times(x.k, decay.leave, N)
        self.b_hat = None if x.b is None else _times(x.b, decay.leave, N)
        self.p_hat = None if x.p is None else _times(x.p, self.p_enter, N)
        self.states = x.v.new_empty(n + 1, *x.state.shape)
        self.states[0].copy_(x.state)
        self.kept = [None] * n if decay.total is None else decay.total.expand(n, -1, -1, -1).unbind(0)
        self._move()
        self.out = x.v.new_empty(0) if x.silent else self._read()

    def _rows(self) -> tuple[list[Tensor], list[Tensor]]:
        """Rows and columns of the scores; rows that read the state before their token stand one token sooner."""
        x = self.x
        rows = [] if x.silent else [_sooner(x.q) if x.earlier else x.q]
        if x.p is not None:
            rows.append(x.p if x.b is None else _sooner(x.p))
        return rows, [x.k] + ([] if x.b is None else [x.b])

    def _score(self) -> None:
        x = self.x
        self.rows, self.columns = self._rows()
        self.raw = list(self.decay.scores(self.rows, self.columns)) if self.rows else []
        found = [_flat(self._placed(i, s)) for i, s in enumerate(self.raw)]
        width = len(self.columns)
        self.of_q = found[: 0 if x.silent else width]
        self.of_p = found[len(self.of_q) :]
        self.inverse = None
        if x.p is not None:
            system = self.of_p[-1]
            self.inverse = unit_inverse(system if x.b is None else -system).unflatten(0, x.v.shape[:2])

    def _is_sooner(self, i: int) -> bool:
        of_q = not self.x.silent and i < len(self.columns)
        return self.x.earlier if of_q else self.x.b is not None

    def _placed(self, i: int, scores: Tensor) -> Tensor:
        return _later(scores, 0.0) if self._is_sooner(i) else scores

    def _move(self) -> None:
        """The states at every chunk's start and the values that the chunks write."""
        x, S = self.x, self.states
        n = x.v.shape[0]
        if x.p is None:
            self.u = x.v
            written = torch.bmm(_flat(self.k_hat).mT, _flat(x.v)).view(n, *x.state.shape)
            for i in range(n):
                if self.kept[i] is None:
                    torch.add(S[i], written[i], out=S[i + 1])
                else:
                    torch.addcmul(written[i], S[i], self.kept[i], out=S[i + 1])
            return
        self.u = torch.empty_like(x.v)
        columns = (self.k_hat if x.b is None else self.b_hat).mT.unbind(0)
        right, sign = x.v, -1
        added: Any = None
        if x.b is not None:
            right = torch.bmm(self.of_p[0], _flat(x.v)).view_as(x.v)
            added = torch.bmm(_flat(self.k_hat).mT, _flat(x.v)).view(n, *x.state.shape)
            sign = 1
        states, us = S.unbind(0), self.u.unbind(0)
        each = zip(states, states[1:], us, right.unbind(0), self.p_hat.unbind(0), self.inverse.unbind(0), strict=False)
        for i, (before, after, u, r, p_hat, inverse) in enumerate(each):
            torch.bmm(inverse, r.baddbmm_(p_hat, before, alpha=sign), out=u)
            if self.kept[i] is None:
                after.copy_(before)
            else:
                torch.mul(before, self.kept[i], out=after)
            if added is not None:
                after.add_(added[i])
            after.baddbmm_(columns[i], u)

    def _read(self) -> Tensor:
        x = self.x
        self.q_hat = _times(x.q, self.q_enter, x.v.shape[1])
        out = torch.bmm(self.of_q[0], _flat(x.v if x.b is not None else self.u))
        if x.b is not None:
            out.baddbmm_(self.of_q[1], _flat(self.u))
        return out.baddbmm_(_flat(self.q_hat), _flat(self.states[:-1])).view_as(x.v)

    # The gradient.

    def gradients(self, grad_out: Tensor, grad_state: Tensor, decaying: bool) -> tuple[Tensor | None, ...]:
        x, do = self.x, _flat(grad_out.contiguous())
        shape = x.v.shape
        dS, of_right = self._back(do, grad_state)
        S, last = _flat(self.states[:-1]), _flat(dS[1:])
        dq_hat = torch.bmm(do, S.mT).view_as(self.q_hat)
        values = x.v if x.b is not None else self.u
        dk_hat = torch.bmm(_flat(values), last.mT).view_as(self.k_hat)
        of_scores = [torch.bmm(do, _flat(values).mT)]
        dp_hat: Any = None
        db_hat: Any = None
        if x.b is not None:
            of_scores.append(torch.bmm(do, _flat(self.u).mT))
            db_hat = torch.bmm(_flat(self.u), last.mT).view_as(x.b)
            dp_hat = torch.bmm(_flat(of_right), S.mT).view_as(x.p)
            of_scores += [torch.bmm(_flat(of_right), _flat(t).mT) for t in (x.v, self.u)]
        elif x.p is not None:
            dp_hat = torch.bmm(_flat(of_right), S.mT).neg_().view_as(x.p)
            of_scores.append(torch.bmm(_flat(of_right), _flat(self.u).mT).neg_())
            of_scores[-1].diagonal(0, -2, -1).zero_()
        of_scores = [g.unflatten(0, shape[:2]) for g in of_scores]
        of_scores = [_sooner(g) if self._is_sooner(i) else g for i, g in enumerate(of_scores)]
        rows, columns, sums = self.decay.gradients(self.rows, self.columns, of_scores, self.raw if decaying else None)
        dq, dp = self._of_rows(rows, dq_hat, dp_hat)
        dk = _with(columns[0], dk_hat, self.decay.leave)
        db = None if x.b is None else _with(columns[1], db_hat, self.decay.leave)
        dg = None if sums is None else self._of_decay(sums, dS, dq_hat, dp_hat, dk_hat, db_hat)
        return dq, dk, self.dv.view(shape), dp, db, dg, dS[0]

    def _of_rows(self, rows: list[Tensor], dq_hat: Tensor, dp_hat: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = self.x
        dq = _with(_later(rows[0], 0.0) if x.earlier else rows[0], dq_hat, self.q_enter)
        if x.p is None or dp_hat is None:
            return dq, None
        return dq, _with(_later(rows[1], 0.0) if x.b is not None else rows[1], dp_hat, self.p_enter)

    def _back(self, do: Tensor, grad_state: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the states at every chunk's start, and those of the right hand sides."""
        x = self.x
        n = x.v.shape[0]
        dS = torch.empty_like(self.states)
        dS[n].copy_(grad_state)
        from_out = torch.bmm(_flat(self.q_hat).mT, do).view(n, *x.state.shape)
        du = torch.bmm(self.of_q[-1].mT, do).view_as(x.v)
        right = torch.empty_like(du)
        columns = self.k_hat if x.b is None else self.b_hat
        each = [t.unbind(0) for t in (from_out, dS, du, right)]
        solvers: Any = None if x.p is None else (self.inverse.mT.unbind(0), self.p_hat.mT.unbind(0))
        for i in reversed(range(n)):
            out, later, moved, solved = (t[i] for t in (each[0], each[1][1:], each[2], each[3]))
            kept, before = self.kept[i], each[1][i]
            if kept is None:
                carried = torch.add(out, later, out=before)
            else:
                carried = torch.addcmul(out, later, kept, out=before)
            if solvers is None:
                continue
            inverse, p_hat = solvers[0][i], solvers[1][i]
            torch.bmm(inverse, moved.baddbmm_(columns[i], later), out=solved)
            carried.baddbmm_(p_hat, solved, alpha=-1 if x.b is None else 1)
        if x.p is None:
            self.dv = du.view(-1, *du.shape[2:]).baddbmm_(_flat(self.k_hat), _flat(dS[1:]))
        elif x.b is not None:
            dv = torch.bmm(self.of_q[0].mT, do).baddbmm_(_flat(self.k_hat), _flat(dS[1:]))
            self.dv = dv.baddbmm_(self.of_p[0].mT, _flat(right))
        else:
            self.dv = right
        return dS, right

    def _of_decay(self, sums: Tensor, dS: Tensor, dq_hat, dp_hat, dk_hat, db_hat) -> Tensor:
        """Of the logarithms: what follows a token, less what stands before it."""
        x, width = self.x, sums.shape[-1]
        here = sums.flatten(0, 1)
        next_ = torch.zeros_like(here)
        rows = [(self.q_hat, dq_hat, x.earlier)]
        rows += [] if x.p is None else [(self.p_hat, dp_hat, x.b is not None)]
        for hat, grad, sooner in rows:
            moved = _narrow(hat * grad, width)
            (next_ if sooner else here).add_(moved)
        here[:, :-1].add_(next_[:, 1:])
        leaving = _narrow(self.k_hat * dk_hat, width)
        if x.b is not None:
            assert self.b_hat is not None and db_hat is not None
            leaving = leaving + _narrow(self.b_hat * db_hat, width)
        state = (self.states[:-1] * dS[1:]).sum(-1)[..., None]
        assert self.decay.total is not None
        state = (state * self.decay.total).flatten(0, 1).mT
        state = state.sum(-1, keepdim=True) if width == 1 else state
        later = here.flip(1).cumsum(1).flip(1)
        later[:, 1:].add_(leaving[:, :-1].cumsum(1))
        later.add_(state)
        return later


def _with(near: Tensor, far: Tensor, factor: Tensor | None) -> Tensor:
    """Gradients of pairs, in place, plus those across chunks times what is left."""
    heads, keys = far.shape[1], near.shape[1]
    if heads != keys:
        return near.add_(of_keys(far if factor is None else far * factor, keys))
    return near.add_(far) if factor is None else near.addcmul_(far, factor)


def _narrow(x: Tensor, width: int) -> Tensor:
    """(n, N, C, K) as (n N, C, K), or summed over K where there is one logarithm per token."""
    x = x.flatten(0, 1)
    return x.sum(-1, keepdim=True) if width == 1 else x

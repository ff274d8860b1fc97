"""The gallery of recurrences: one small function per spelling of a linear mixer, with the facts it must lift to.

Each takes q, k (B, H, L, K), v (B, H, L, V), g (B, H, L), negative, and b (B, H, L) between 0 and 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.scan import scan

B, H, L, K, V = 2, 2, 7, 4, 3
RATES = -torch.tensor([0.1, 0.4])


@dataclass(frozen=True)
class Mix:
    """One spelling. facts: of the region, where it is one. reason: a part of why it is left as written."""

    fn: Callable[..., Tensor]
    facts: dict = field(default_factory=dict)
    reason: str = ""
    regions: int = 1

    @property
    def name(self) -> str:
        return self.fn.__name__


def arguments(length: int = L) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(B, H, length, K, generator=draw) / K**0.5 for _ in range(2))
    v, g = torch.randn(B, H, length, V, generator=draw), -torch.rand(B, H, length, generator=draw)
    return [q, k, v, g, torch.rand(B, H, length, generator=draw)]


# Products without softmax.


def later(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).triu(1)


def distance(n: int) -> Tensor:
    return torch.arange(n)[:, None] - torch.arange(n)[None]


def segsum(x: Tensor) -> Tensor:
    n = x.shape[-1]
    x = x[..., None].expand(*x.shape, n).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(-1), 0)
    return x.cumsum(-2).masked_fill(later(n), -torch.inf)


def plain(q, k, v, g, b):
    return (q @ k.mT).tril() @ v


def scaled_einsums(q, k, v, g, b):
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * K**-0.5
    return torch.einsum("bhij,bhjd->bhid", scores.masked_fill(later(q.shape[2]), 0.0), v)


def batched_products(q, k, v, g, b):
    q, k, v = (x.reshape(B * H, L, -1) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.mT).tril(), v).view(B, H, L, V)


def constant_decay(q, k, v, g, b):
    n = distance(L)
    return ((q @ k.mT) * torch.where(n >= 0, (n * RATES[:, None, None]).exp(), 0.0)) @ v


def powers(q, k, v, g, b):
    n = distance(L)
    return ((q @ k.mT) * torch.where(n >= 0, 0.9**n, 0.0)) @ v


def retnet(q, k, v, g, b):
    gamma = 1 - 2.0 ** (-5 - torch.arange(H))
    n = distance(L)
    decay = (gamma[:, None, None] ** n.clamp(min=0)).tril()
    weights = q @ k.mT * K**-0.5 * decay
    return F.group_norm((weights @ v).transpose(1, 2).reshape(B * L, H * V), H).view(B, L, H, V)


def differences(q, k, v, g, b):
    total = g.cumsum(-1)
    apart = total.unsqueeze(-1) - total.unsqueeze(-2)
    return ((q @ k.mT) * apart.masked_fill(later(L), -torch.inf).exp()) @ v


def segment_sums(q, k, v, g, b):
    return (q @ k.mT * segsum(g).exp()) @ v


def state_space_dual(q, k, v, g, b):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.einsum("blhn,bshn,bhls,bshp->blhp", q, k, segsum(g).exp(), v)


def grouped_heads(q, k, v, g, b):
    k, v = (x[:, :1, None].expand(-1, -1, H, -1, -1).flatten(1, 2) for x in (k, v))
    return (q @ k.mT).tril() @ v


def normalised(q, k, v, g, b):
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    weights = weights.tril()
    return (weights @ v) / (weights.sum(-1, keepdim=True) + 1e-3)


def gated_writes(q, k, v, g, b):
    return ((q @ k.mT) * b[:, :, None]).tril() @ v


# Sums over all tokens so far.


def cumulative(q, k, v, g, b):
    return (q.unsqueeze(-1) * (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(2)).sum(-2)


def cumulative_normalised(q, k, v, g, b):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    states = torch.einsum("bhlk,bhlv->bhlkv", k, v).cumsum(2)
    below = torch.einsum("bhlk,bhlk->bhl", q, k.cumsum(2))
    return torch.einsum("bhlk,bhlkv->bhlv", q, states) / (below[..., None] + 1e-3)


def cumulative_weighted(q, k, v, g, b):
    states = (k.unsqueeze(-1) @ v.unsqueeze(-2) * b[..., None, None]).cumsum(2)
    return (q.unsqueeze(-2) @ states).squeeze(-2)


# Loops over tokens.


def outer(k: Tensor, v: Tensor) -> Tensor:
    return k.unsqueeze(-1) * v.unsqueeze(-2)


def stepped(update: Callable[..., Tensor], q, k, v, g, b, *, read_before: bool = False) -> Tensor:
    """State after state; update gives the next one."""
    state, out = q.new_zeros(B, H, K, V), []
    for t in range(q.shape[2]):
        after = update(state, k[:, :, t], v[:, :, t], g[:, :, t], b[:, :, t])
        read = state if read_before else after
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t], read))
        state = after
    return torch.stack(out, 2)


def loop_plain(*given):
    return stepped(lambda s, k, v, g, b: s + outer(k, v), *given)


def loop_by_head(*given):
    return stepped(lambda s, k, v, g, b: RATES.exp()[:, None, None] * s + outer(k, v), *given)


def loop_by_token(*given):
    return stepped(lambda s, k, v, g, b: g[..., None, None].exp() * s + outer(k, v), *given)


def loop_by_channel(*given):
    return stepped(lambda s, k, v, g, b: (k * g[..., None]).sigmoid().unsqueeze(-1) * s + outer(k, v), *given)


def loop_forget_gate(*given):
    return stepped(lambda s, k, v, g, b: (1 - g.sigmoid())[..., None, None] * s + outer(k, v), *given)


def loop_read_before(*given):
    return stepped(lambda s, k, v, g, b: g[..., None, None].exp() * s + outer(k, v), *given, read_before=True)


def delta_step(s, k, v, g, b):
    return s + outer(k, (v - (s * k[..., None]).sum(-2)) * b[..., None])


def loop_delta(*given):
    return stepped(delta_step, *given)


def loop_gated_delta(*given):
    return stepped(lambda s, k, v, g, b: delta_step(g[..., None, None].exp() * s, k, v, g, b), *given)


def loop_other_vectors(*given):
    """Another vector than the key reads the state: a low-rank change of it."""
    return stepped(lambda s, k, v, g, b: s * 0.9 + outer(k, (s * k.sin()[..., None]).sum(-2) + v), *given)


def loop_rows(q, k, v, g, b):
    """Results written into a tensor; a state that is given, transposed; the last state is used."""
    state, out = v[:, :, 0, :, None] * q[:, :, 0, None], torch.empty_like(v)
    for t in range(L):
        state = state * g[:, :, t, None, None].exp() + v[:, :, t, :, None] * k[:, :, t, None, :]
        out[:, :, t] = (state @ q[:, :, t].unsqueeze(-1)).squeeze(-1)
    return out.sum() + state.square().sum() + out


def loop_gated_results(q, k, v, g, b):
    """What a step makes of its result belongs to the loop."""
    state, out = q.new_zeros(B, H, K, V), []
    for q_t, k_t, v_t, g_t in zip(q.unbind(2), k.unbind(2), v.unbind(2), g.unbind(2), strict=True):
        state = state * g_t.exp()[..., None, None] + outer(k_t, v_t)
        out.append(torch.tanh((q_t.unsqueeze(-2) @ state).squeeze(-2)) * v_t.sigmoid())
    return torch.stack(out, 2)


def loop_normalised(q, k, v, g, b):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state, total, out = q.new_zeros(B, H, K, V), q.new_zeros(B, H, K), []
    for t in range(L):
        state, total = state + outer(k[:, :, t], v[:, :, t]), total + k[:, :, t]
        above = torch.einsum("bhk,bhkv->bhv", q[:, :, t], state)
        out.append(above / ((q[:, :, t] * total).sum(-1, keepdim=True) + 1e-3))
    return torch.stack(out, 2)


def loop_elementwise(q, k, v, g, b):
    state, out = q.new_zeros(B, H, K), []
    for t in range(L):
        state = q[:, :, t].sigmoid() * state + k[:, :, t]
        out.append(state)
    return torch.stack(out, 2)


def loop_selective(q, k, v, g, b):
    factors, added = (g[..., None] * torch.arange(1, K + 1)).exp(), g[..., None] * k
    state, out = q.new_zeros(B, H, K), []
    for t in range(L):
        state = factors[:, :, t] * state + added[:, :, t]
        out.append((state * q[:, :1, t]).sum(-1))
    return torch.stack(out, -1)


# torch's scan.


def scanned(q, k, v, g, b):
    def step(state, x):
        k_t, v_t, q_t, g_t = x
        state = state * g_t.exp()[..., None, None] + k_t[..., :, None] * v_t[..., None, :]
        return state, (q_t[..., None] * state).sum(-2)

    return scan(step, q.new_zeros(B, H, K, V), (k, v, q, g), dim=2)[1]


def combine(before, after):
    return before[0] * after[0], after[0] * before[1] + after[1]


def scanned_pairs(q, k, v, g, b):
    factors = (g[..., None] * torch.arange(1, K + 1)).exp()
    return associative_scan(combine, (factors, k * b[..., None]), dim=2, combine_mode="generic")[1] * q


# What must be left alone.


def with_softmax(q, k, v, g, b):
    return (q @ k.mT).softmax(-1).tril() @ v


def squared_scores(q, k, v, g, b):
    return (q @ k.mT).square().tril() @ v


def decay_from_state(*given):
    return stepped(lambda s, k, v, g, b: s.mean((-1, -2), keepdim=True).sigmoid() * s + outer(k, v), *given)


def squashed_state(*given):
    return stepped(lambda s, k, v, g, b: torch.tanh(s + outer(k, v)), *given)


def skipped_step(q, k, v, g, b):
    state, out = q.new_zeros(B, H, K, V), []
    for t in (0, 1, 2, 4, 5, 6):
        state = state + outer(k[:, :, t], v[:, :, t])
        out.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(out, 2)


def other_sources(q, k, v, g, b):
    state, out = q.new_zeros(B, H, K, V), []
    for t, keys in enumerate((k, q, k, q, k, q, k)):
        state = state + outer(keys[:, :, t], v[:, :, t])
        out.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(out, 2)


def some_keys(q, k, v, g, b):
    state, out = q.new_zeros(B, H, K, V), []
    for t in range(L):
        state = state + outer(k[:, :, t], v[:, :, t])
        out.append((q[:, :, t, :2, None] * state[:, :, :2]).sum(-2))
    return torch.stack(out, 2)


def some_values(q, k, v, g, b):
    state, out = q.new_zeros(B, H, K, V), []
    for t in range(L):
        state = state + outer(k[:, :, t], v[:, :, t])
        out.append((q[:, :, t, :, None] * state[..., :2]).sum(-2))
    return torch.stack(out, 2)


def some_sums(q, k, v, g, b):
    return (q[:, :, :6, :, None] * outer(k, v).cumsum(2)[:, :, :6]).sum(-2)


def fewer_queries(q, k, v, g, b):
    return (q[:, :, :5] @ k.mT).tril() @ v


def normalised_weights(q, k, v, g, b):
    weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    return (weights / weights.sum(-1, keepdim=True)) @ v


def weights_returned(q, k, v, g, b):
    return ((weights := (q @ k.mT).tril()) @ v).sum() + weights.square().sum()


def sums_returned(q, k, v, g, b):
    total = outer(k, v).cumsum(2)
    return (q.unsqueeze(-1) * total).sum(-2).sum() + total[:, :, -1].square().sum()


NONE, TOKEN, HEAD, CHANNEL = ({"decay": x, "delta": False} for x in ("none", "token", "head", "channel"))
PRODUCTS = (
    Mix(plain, {**NONE, "written": "products", "B": B, "H": H, "L": L, "K": K, "V": V}),
    Mix(scaled_einsums, {**NONE, "scale": 0.5}),
    Mix(batched_products, {**NONE, "B": B * H, "H": 1}),
    Mix(constant_decay, HEAD),
    Mix(powers, HEAD),
    Mix(retnet, HEAD),
    Mix(differences, TOKEN),
    Mix(segment_sums, TOKEN),
    Mix(state_space_dual, TOKEN),
    Mix(grouped_heads, NONE),
    Mix(normalised, NONE),
    Mix(normalised_weights, NONE),
    Mix(gated_writes, {**NONE, "gate": "write"}),
)
SUMS = (
    Mix(cumulative, {**NONE, "written": "sums"}),
    Mix(cumulative_normalised, NONE),
    Mix(cumulative_weighted, {**NONE, "gate": "write"}),
)
LOOPS = (
    Mix(loop_plain, {**NONE, "written": "loop", "B": B, "H": H, "L": L, "K": K, "V": V}),
    Mix(loop_by_head, HEAD),
    Mix(loop_by_token, TOKEN),
    Mix(loop_by_channel, {**CHANNEL, "factors": False}),
    Mix(loop_forget_gate, {**TOKEN, "factors": False}),
    Mix(loop_read_before, {**TOKEN, "read": "before"}),
    Mix(loop_delta, {"decay": "none", "delta": True, "gate": "write"}),
    Mix(loop_gated_delta, {"decay": "token", "delta": True}),
    Mix(loop_other_vectors, {"low_rank": True, "decay": "head"}),
    Mix(loop_rows, {**TOKEN, "state_in": True, "state_out": True}),
    Mix(loop_gated_results, TOKEN),
    Mix(loop_normalised, NONE),
    Mix(loop_elementwise, {**TOKEN, "K": 1}),
    Mix(loop_selective, {**CHANNEL, "V": 1}),
)
SCANS = (Mix(scanned, {**TOKEN, "written": "scan"}),)
PAIRS = (Mix(scanned_pairs, {**TOKEN, "factors": True, "written": "operator"}),)
LEFT = (
    Mix(with_softmax, regions=0),
    Mix(squared_scores, regions=0, reason="stands between the product of queries and keys"),
    Mix(decay_from_state, regions=0, reason="not affine"),
    Mix(squashed_state, regions=0, reason="not affine"),
    Mix(skipped_step, reason="reads token 4 after the one that reads token 2, expected 3"),
    Mix(other_sources, reason="the steps read different tensors"),
    Mix(some_keys, reason="2 elements of axis 2 are used"),
    Mix(some_values, reason="2 elements of axis 3 are used"),
    Mix(some_sums, regions=0, reason="6 elements of axis 2 are used"),
    Mix(weights_returned, reason="is read elsewhere too"),
    Mix(sums_returned, regions=0, reason="is read elsewhere too"),
    Mix(fewer_queries, reason="5 tokens read"),
)
GALLERY = (*PRODUCTS, *SUMS, *LOOPS, *SCANS)

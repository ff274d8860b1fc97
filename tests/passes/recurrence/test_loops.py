"""Loops found again in unrolled graphs, and what their steps do: decay, delta rule, chunk; loops that are none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnc.passes.capture import capture
from attnc.passes.graph import GraphFacts, NoMatch
from attnc.passes.normalize import normalize
from attnc.passes.recurrence.decay import parallels
from attnc.passes.recurrence.loops import loops
from attnc.passes.recurrence.step import step_facts

B, H, L, K, V = 2, 3, 12, 4, 5
DECAYS = -torch.tensor([0.1, 0.2, 0.3])


def captured(fn, *args):
    """The graph of `fn`, as attnc reads it."""
    graphs = []

    def reader(gm, inputs):
        graphs.append(capture(gm, inputs))
        normalize(graphs[-1])
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=reader, dynamic=False)(*args)
    return graphs[0]


def scalar_decay(q, k, v, g):
    state, out = torch.zeros(B, H, K, V), []
    for t in range(L):
        state = state * g[:, :, t, None, None].exp() + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(out, 2)


def constant_decay(q, k, v, g):
    state, out = torch.zeros(B, H, K, V), []
    for t in range(L):
        state = DECAYS.exp()[:, None, None] * state + torch.einsum("bhk,bhv->bhkv", k[:, :, t], v[:, :, t])
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t], state))
    return torch.stack(out, 2)


def no_decay(q, k, v, g):
    state, out = torch.zeros(B, H, K, V), []
    for t in range(L):
        state = state + k[:, :, t, :, None] @ v[:, :, t, None, :]
        out.append(q[:, :, t, None, :] @ state)
    return torch.cat(out, 2)


def gated_delta(q, k, v, g):
    state, out = torch.zeros(B, H, K, V), torch.zeros_like(v)
    for t in range(L):
        state = state * g[:, :, t, None, None].exp()
        seen = (state * k[:, :, t, :, None]).sum(-2)
        state = state + k[:, :, t, :, None] * ((v[:, :, t] - seen) * g[:, :, t, None].sigmoid()).unsqueeze(-2)
        out[:, :, t] = (q[:, :, t, :, None] * state).sum(-2)
    return out


def channel_delta(q, k, v, g):
    state, out = torch.zeros(B, H, K, V), []
    for t in range(L):
        state = state * (g[:, :, t, None] * k[:, :, t].square()).exp()[..., None]
        seen = torch.einsum("bhk,bhkv->bhv", k[:, :, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, :, t], v[:, :, t] - seen)
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t], state))
    return torch.stack(out, 2)


def channel_decay(q, k, v, g):
    state, out = torch.zeros(B, H, K, V), []
    for t in range(L):
        state = state * k[:, :, t].sigmoid()[..., None] + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(out, 2)


def selective_scan(q, k, v, g):
    decay = torch.exp(DECAYS[:, None, None] * -g[..., None] * torch.arange(1, K + 1))
    added = g[..., None] * k
    state, out = torch.zeros(B, H, K), []
    for t in range(L):
        state = decay[:, :, t] * state + added[:, :, t]
        out.append((state @ q[:, 0, t].unsqueeze(-1))[:, :, 0])
    return torch.stack(out, -1)


def diagonal(q, k, v, g):
    state, out = torch.zeros(B, K), []
    for t in range(L):
        state = q[:, 0, t].sigmoid() * state + k[:, 0, t]
        out.append(state)
    return torch.stack(out, 1)


def chunked(q, k, v, g):
    state, out = torch.zeros(B, H, K, V), []
    for at in range(0, L, 4):
        keys, values, queries = (x[:, :, at : at + 4] for x in (k, v, q))
        out.append(queries @ state + (queries @ keys.transpose(-1, -2)).tril() @ values)
        state = state * g[:, :, at, None, None].exp() + keys.transpose(-1, -2) @ values
    return torch.cat(out, 2)


def arguments():
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(B, H, L, K, generator=draw) for _ in range(2))
    return q, k, torch.randn(B, H, L, V, generator=draw), -torch.rand(B, H, L, generator=draw)


@pytest.mark.parametrize(
    ("fn", "decay", "delta", "chunk"),
    [
        (scalar_decay, "head", False, 1),
        (constant_decay, "constant", False, 1),
        (no_decay, "none", False, 1),
        (gated_delta, "head", True, 1),
        (channel_delta, "key", True, 1),
        (channel_decay, "key", False, 1),
        (selective_scan, "state", False, 1),
        (diagonal, "state", False, 1),
        (chunked, "head", False, 4),
    ],
)
def test_a_step_tells_its_decay_delta_rule_and_chunk(fn, decay, delta, chunk):
    gm = captured(fn, *arguments())
    steps = [step_facts(loop, place) for loop in loops(gm.graph) for place in loop.carried]
    (step,) = [s for s in steps if not isinstance(s, NoMatch)]
    assert (step.decay, step.delta, step.chunk) == (decay, delta, chunk)


def cell(q, k, v, g):
    state, out = torch.zeros(B, K), []
    for t in range(L):
        state = torch.tanh(q[:, 0, t] + state @ k[0, 0, :K])
        out.append(state)
    return torch.stack(out, 1)


def summed(q, k, v, g):
    total = torch.zeros(B, K)
    for t in range(L):
        total = total + q[:, 0, t] * g[:, 0, t, None]
    return total


@pytest.mark.parametrize(("fn", "reason"), [(cell, "not affine"), (summed, "read only after the loop")])
def test_other_loops_are_refused_with_a_reason(fn, reason):
    gm = captured(fn, *arguments())
    found = [step_facts(loop, place) for loop in loops(gm.graph) for place in loop.carried]
    assert found and all(isinstance(x, NoMatch) for x in found)
    assert any(reason in x.reason for x in found)


def test_layers_of_a_model_carry_no_state():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(6)])
    gm = captured(model, torch.randn(2, 8))
    found = [step_facts(loop, place) for loop in loops(gm.graph) for place in loop.carried]
    assert all(isinstance(x, NoMatch) for x in found)


def causal(q, k, v, g):
    return (q @ k.transpose(-1, -2)).tril() @ v


def filled(q, k, v, g):
    total = g.cumsum(-1)
    apart = total.unsqueeze(-1) - total.unsqueeze(-2)
    later = torch.ones(L, L, dtype=torch.bool).triu(1)
    return ((q @ k.transpose(-1, -2)) * apart.masked_fill(later, float("-inf")).exp()) @ v


def einsums(q, k, v, g):
    total = g.cumsum(-1)
    apart = (total.unsqueeze(-1) - total.unsqueeze(-2)).exp().tril()
    return torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k) * apart, v)


def sums(q, k, v, g):
    total = nn.functional.pad(g, (0, 0)).cumsum(-1)
    apart = total.unsqueeze(-1) - total.unsqueeze(-2)
    decay = apart.masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), float("-inf")).exp()
    scores = (q[:, :, :, None, :] * k[:, :, None, :, :]).sum(-1)
    weights = (scores[..., None] * decay[..., None]).sum(-1)
    return (weights[..., None] * v[:, :, None]).sum(3)


def retention(q, k, v, g):
    apart = torch.arange(L)[:, None] - torch.arange(L)[None]
    return ((q @ k.transpose(-1, -2)) * torch.where(apart >= 0, (apart * DECAYS[:, None, None]).exp(), 0.0)) @ v


def softmax(q, k, v, g):
    return (q @ k.transpose(-1, -2)).softmax(-1).tril() @ v


def everywhere(q, k, v, g):
    return (q @ k.transpose(-1, -2)) @ v


@pytest.mark.parametrize(
    ("fn", "decays"),
    [
        (causal, ["none"]),
        (filled, ["head"]),
        (einsums, ["head"]),
        (sums, ["head"]),
        (retention, ["constant"]),
        (softmax, []),
        (everywhere, []),
    ],
)
def test_causal_products_without_softmax_tell_their_decay(fn, decays):
    gm = captured(fn, *arguments())
    assert [found.decay for found in parallels(GraphFacts(gm.graph), ())] == decays

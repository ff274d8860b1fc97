"""Recurrences written out in a graph: loops and products of one mixer are one region, with its facts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attnc

B, H, L, D = 2, 4, 12, 6


class Mixer(nn.Module):
    """Projections around a linear mixer."""

    def __init__(self, mix) -> None:
        super().__init__()
        self.mix = mix
        self.inner, self.gates, self.outer = nn.Linear(8, 3 * H * D), nn.Linear(8, 2 * H), nn.Linear(H * D, 8)

    def forward(self, x):
        q, k, v = self.inner(x).view(B, L, 3, H, D).permute(2, 0, 3, 1, 4)
        g, b = self.gates(x).sigmoid().view(B, L, 2, H).permute(2, 0, 3, 1)
        out = self.mix(q, nn.functional.normalize(k, dim=-1), v, -g, b)
        return self.outer(out.transpose(1, 2).reshape(B, L, H * D))


def chunk_parts(q, k, v, g, b):
    """Decay, triangular system and right side of a delta rule over one chunk."""
    total = g.cumsum(-1)
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).tril().exp().tril()
    system = (b.unsqueeze(-1) * k) @ k.mT * decay
    return decay, system.tril(-1), v * b.unsqueeze(-1)


def delta_by_solve(q, k, v, g, b):
    decay, system, values = chunk_parts(q, k, v, g, b)
    values = torch.linalg.solve_triangular(system + torch.eye(L), values, upper=False, unitriangular=True)
    return (q @ k.mT * decay) @ values


def delta_by_substitution(q, k, v, g, b):
    decay, system, values = chunk_parts(q, k, v, g, b)
    inverse = -system
    for i in range(1, L):
        row, above = inverse[..., i, :i].clone(), inverse[..., :i, :i].clone()
        inverse[..., i, :i] = row + (row.unsqueeze(-1) * above).sum(-2)
    return (q @ k.mT * decay) @ ((inverse + torch.eye(L)) @ values)


def delta_by_token(q, k, v, g, b):
    state, out = q.new_zeros(B, H, D, D), []
    for t in range(L):
        state = state * g[:, :, t, None, None].exp()
        seen = (state * k[:, :, t, :, None]).sum(-2)
        state = state + k[:, :, t, :, None] * ((v[:, :, t] - seen) * b[:, :, t, None]).unsqueeze(-2)
        out.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(out, 2)


def chunks_and_products(q, k, v, g, b):
    state, out = q.new_zeros(B, H, D, D), []
    for at in range(0, L, 4):
        keys, values, queries = (x[:, :, at : at + 4] for x in (k, v, q))
        out.append(queries @ state + (queries @ keys.mT).tril() @ values)
        state = state + keys.mT @ values
    return torch.cat(out, 2)


@pytest.mark.parametrize(
    ("mix", "facts"),
    [
        (delta_by_solve, {"decay": "token", "delta": True, "chunk": L, "written": "products"}),
        (delta_by_substitution, {"decay": "token", "delta": True, "chunk": L, "written": "products"}),
        (delta_by_token, {"decay": "token", "delta": True, "chunk": 1, "written": "loop"}),
        (chunks_and_products, {"decay": "none", "delta": False, "chunk": 4, "written": "chunks"}),
    ],
)
@pytest.mark.parametrize("exported", [False, True])
def test_a_mixer_that_is_written_out_is_one_region(mix, facts, exported):
    model, x = Mixer(mix).eval(), torch.randn(B, L, 8)
    with torch.no_grad():
        report = attnc.explain(torch.export.export(model, (x,)) if exported else model, *([] if exported else [x]))
    (region,) = report.regions
    assert region.kind == "recurrence"
    assert {name: region.facts[name] for name in facts} == facts
    assert {name: region.facts[name] for name in "BHLKV"} == {"B": B, "H": H, "L": L, "K": D, "V": D}
    assert not report.unmatched

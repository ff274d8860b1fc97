"""One compile serves every batch under dynamic=True: no batch is written into the graph, none is guarded on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves

import attnc
from attnc import backend
from tests.gallery_run import attention
from tests.tiny import compiled
from tests.tolerance import assert_close

HEADS, E, LENGTH = 4, 8, 33
BATCHES, ALONE = (2, 3, 5), (1,)  # Dynamo compiles for one sequence by itself: tried with one spelling


def causal(length: int) -> Tensor:
    at = torch.arange(length)
    return at[None, :] > at[:, None]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT * E**-0.5).masked_fill(causal(q.shape[2]), -torch.inf)
    return scores.softmax(-1) @ v


def heads_in_the_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    B, H, L, _ = q.shape
    q, k, v = (t.reshape(B * H, L, -1) for t in (q, k, v))
    scores = torch.baddbmm(torch.zeros(()), q, k.mT, beta=0, alpha=E**-0.5).masked_fill(causal(L), -torch.inf)
    return torch.bmm(scores.softmax(-1), v).view(B, H, L, -1)


def rows_before_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = torch.einsum("bihe,bjhe->bhij", q, k) * E**-0.5
    return torch.einsum("bhij,bjhe->bihe", scores.softmax(-1), v).transpose(1, 2)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t[:, ::2, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for t in (k, v))
    return by_hand(q, k, v)


def grouped_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.unflatten(1, (2, 2))
    scores = torch.einsum("bgrie,bgje->bgrij", q, k[:, ::2]) * E**-0.5
    return torch.einsum("bgrij,bgje->bgrie", scores.softmax(-1), v[:, ::2]).flatten(1, 2)


def one_key_for_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys and values that every sequence shares, as learned latents are."""
    return (q @ k[:1].mT * E**-0.5).softmax(-1) @ v[:1]


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    far = at[:, None] - at
    return (q @ k.mT * E**-0.5).masked_fill((far < 0) | (far >= 9), -torch.inf).softmax(-1) @ v


def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    lengths = torch.arange(q.shape[0]) % 3 * 7 + 9
    keep = torch.arange(k.shape[2]) < lengths[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None])


def sunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * E**-0.5
    sink = scores.new_full((1, HEADS, 1, 1), 0.5).expand(q.shape[0], -1, q.shape[2], -1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.tanh(q @ k.mT * 0.02).mul(20).softmax(-1) @ v


QUICK = (sdpa, by_hand, heads_in_the_batch, grouped_rows, one_key_for_all, padded)
SWEPT = (rows_before_heads, grouped, windowed, sunk, capped)
SPELLINGS = [pytest.param(f, id=f.__name__, marks=() if f in QUICK else pytest.mark.slow) for f in (*QUICK, *SWEPT)]


class Layer(nn.Module):
    """Projections around one spelling."""

    def __init__(self, spelling) -> None:
        super().__init__()
        self.qkv, self.spelling = nn.Linear(HEADS * E, 3 * HEADS * E), spelling

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, E)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.spelling(q, k, v).transpose(1, 2).flatten(2)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that attnc hands to its inner backend."""
    seen, inner = [], backend.inner_compile

    def watched(gm, *given):
        seen.append(gm.graph)
        return inner(gm, *given)

    monkeypatch.setattr(backend, "inner_compile", watched)
    return seen


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_batch_is_neither_baked_nor_guarded_on(spelling, graphs) -> None:
    model, dynamo = Layer(spelling), CompileCounterWithBackend("eager")
    fast, plain = compiled(model, inner="eager", dynamic=True), torch.compile(model, backend=dynamo, dynamic=True)
    batches = (*BATCHES, *ALONE) if spelling is by_hand else BATCHES
    inputs = [torch.randn(batch, LENGTH, HEADS * E) for batch in batches]
    with torch.no_grad():
        for x in inputs:
            assert_close(fast(x), model(x), terms=64)
            if x is inputs[0]:
                (region,) = attention(attnc.last_report(fast))
                assert region.choice.form == "dense" and "B" in region.shape.symbols
        torch._dynamo.reset()
        for x in inputs:
            plain(x)
    assert len(graphs) <= dynamo.frame_count + 1
    given = [x for graph in graphs for node in graph.nodes for x in tree_leaves((node.args, node.kwargs))]
    assert not any(isinstance(x, torch.SymInt) for x in given)

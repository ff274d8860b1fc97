"""Masks of bounded distance: the bounds hold for every kept pair, and windows of symbolic length compute the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import attnc
from attnc.expr_text import parse
from attnc.predicate import distances
from attnc.reading import read, span
from tests.tolerance import error

LENGTH = 40
small = st.integers(-12, 12)
ATOMS = st.one_of(
    st.builds("{}*i - {}*j <= {}".format, st.shared(st.integers(1, 3), key="a"), st.shared(st.integers(1, 3), key="a"),
              small),
    st.builds("{}*j - {}*i <= {}".format, st.shared(st.integers(1, 3), key="c"), st.shared(st.integers(1, 3), key="c"),
              small),
    st.builds("i - j == {}".format, small),
    st.builds("i // {0} == j // {0}".format, st.integers(1, 9)),
    st.builds("abs(i - j) <= {}".format, st.integers(0, 9)),
    st.builds("(i - j) % {} == 0".format, st.integers(2, 5)),
    st.builds("j <= {}".format, small),
    st.builds("i - 2*j <= {}".format, small),
)
MASKS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds("({}) and ({})".format, inner, inner), st.builds("({}) or ({})".format, inner, inner),
        st.builds("not ({})".format, inner),
    ),
    max_leaves=5,
)


@given(MASKS)
def test_no_kept_pair_lies_outside_the_distances(text: str) -> None:
    keep = parse(text)
    device = torch.device("cpu")
    axes = {"i": span("i", 0, LENGTH, device), "j": span("j", 0, LENGTH, device)}
    kept = torch.as_tensor(read(keep, axes, [], [])).expand(1, 1, LENGTH, LENGTH)
    apart = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).expand_as(kept)[kept]
    least, most = distances(keep)
    assert least is None or not len(apart) or int(apart.min()) >= least
    assert most is None or not len(apart) or int(apart.max()) <= most


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("j <= i and i - j <= 511", (0, 511)),
        ("i // 512 == j // 512 and j <= i", (0, 511)),
        ("abs(i - j) <= 64", (-64, 64)),
        ("(j <= i and i - j <= 15) or i == j + 20", (0, 20)),
        ("j <= i", (0, None)),
        ("j <= i and i - j <= 15 or j <= 3", (None, None)),
    ],
)
def test_the_distances_of_known_masks_are_tight(text, want):
    assert distances(parse(text)) == want


class Windowed(nn.Module):
    """One attention layer with a causal window and, if asked, a softcap, over (B, L, 32)."""

    def __init__(self, window: int = 20, cap: float | None = None) -> None:
        super().__init__()
        self.qkv, self.window, self.cap = nn.Linear(32, 64), window, cap

    def forward(self, x):
        q, k, v = self.qkv(x).split([32, 16, 16], -1)
        q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        scores = q @ k.mT / 8**0.5
        scores = self.cap * torch.tanh(scores / self.cap) if self.cap else scores
        at = torch.arange(x.shape[1], device=x.device)
        far = at[:, None] - at
        scores = scores.masked_fill((far < 0) | (far >= self.window), torch.finfo(scores.dtype).min)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def graphs_made() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("cap", [None, pytest.param(5.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_compile_serves_every_length(inner, cap):
    model = Windowed(cap=cap).double()
    form = "block_sparse{provider=band,block_m=16}"
    fast = torch.compile(model, backend="attnc", dynamic=True, options={"inner": inner, "force": form, "strict": True})
    before = graphs_made()
    for length in (64, 200, 33, 70, 128, 129):
        x = torch.randn(2, length, 32, dtype=torch.float64)
        got, want = fast(x), model(x)
        assert error(got, want) < 1e-12
        cotangent = torch.randn_like(want)
        grads = [torch.autograd.grad(out, list(model.parameters()), cotangent) for out in (got, want)]
        assert all(error(one, two) < 1e-11 for one, two in zip(*grads, strict=True))
    assert graphs_made() - before == 1
    assert attnc.last_report(fast).counts()["forms"] == {"block_sparse{provider=band,block_m=16,block_n=128}": 1}


def test_a_long_window_of_symbolic_length_is_chosen_by_itself():
    model = Windowed(window=64)
    with torch.no_grad():
        fast = torch.compile(model, backend="attnc", dynamic=True, options={"inner": "aot_eager"})
        x = torch.randn(1, 4096, 32)
        assert error(fast(x), model(x)) < 1e-5
    (region,) = attnc.last_report(fast).regions
    assert region.choice.form.startswith("block_sparse{provider=band")

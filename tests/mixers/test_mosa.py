"""Mixture of sparse attention against its authors' vectors, and what of it is causal."""

from __future__ import annotations

import pytest
import torch

from attnc.mixers.mosa import mixture_of_sparse

NAMES = ("x", "w.r.0.weight", "w.QKV.W", "w.O.W")


@pytest.mark.parametrize("name", ["mosa/n64_e4_s4_grad", "mosa/n150_e3_s5_first"])
def test_golden_vectors_are_reproduced_with_gradients(name: str, golden) -> None:
    file = golden(name)
    t, o = file.tensors, file.options
    leaves = [t[n].double().requires_grad_() for n in NAMES]
    tokens = max(leaves[0].shape[1] // o["sparsity"], 2)
    first = bool(o["include_first"])
    out, chosen = mixture_of_sparse(
        *leaves, tokens=int(tokens), rotated=o["n_rotate"], first=first, base=float(o["rope_base"])
    )
    assert torch.equal(chosen, t["indices"].long().sort(-1).values)
    assert off(out, t["out"]) < 2e-7
    if "cot_out" in t:
        for one, n in zip(torch.autograd.grad(out, leaves, t["cot_out"].double()), NAMES, strict=True):
            assert off(one, t[f"grad_{n}"]) < 2e-7, n


def test_a_chosen_token_attends_to_nothing_behind_it() -> None:
    x = torch.randn(1, 24, 8, dtype=torch.float64, requires_grad=True)
    weights = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 8), (2, 8, 12), (2, 4, 8)))
    out, _ = mixture_of_sparse(x, *weights, tokens=24, rotated=2)
    slope = torch.autograd.grad(out[:, 9].sum(), x)[0]
    assert bool((slope[:, 10:] == 0).all()) and bool((slope[:, :10] != 0).any())


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.detach().double() - want.double()).abs().max() / want.double().abs().max()).item()

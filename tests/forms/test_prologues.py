"""Triangular prologues: any block gives what one solve gives, gradients included, and the golden vectors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.prologues import delta_values, lucid_values, path_attention, reflected_scores

BOUNDS = {torch.float64: (2e-7, 2e-7), torch.float32: (5e-6, 5e-5)}  # outputs, gradients


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.detach().double() - want.double()).abs().max() / want.double().abs().max()).item()


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def of_path(t, block):
    k, v, w, beta = (t[n].repeat_interleave(t["q"].shape[1] // t[n].shape[1], 1) for n in ("k", "v", "w", "beta"))
    return path_attention(t["q"], k, v, w, beta, t["g"] if t["gated"] else None, 0.25, block)


def of_delta(t, block):
    u = delta_values(t["q"], t["k"], t["v"], t["beta"], 0.25, block)
    return F.scaled_dot_product_attention(t["q"], t["k"], u, is_causal=True, scale=0.25)


@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("block", [1, 24, 64])
@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (of_path, "path_attention/n64_grad"),
        (of_path, "path_attention/n128_gqa_gated"),
        (of_delta, "deltaformer/n64_grad"),
    ],
)
def test_blocks_reproduce_golden_vectors(fn, name: str, block: int, dtype: torch.dtype, golden) -> None:
    file = golden(name)
    given = {k: x.to(dtype) for k, x in file.inputs.items()}
    grads = [k for k in given if f"grad_{k}" in file.tensors and (k != "g" or file.options.get("gated"))]
    given |= {k: given[k].requires_grad_() for k in grads}
    out = fn({**given, "gated": file.options.get("gated")}, block)
    most, most_of_gradient = BOUNDS[dtype]
    assert off(out, file.outputs["out"]) < most
    if grads:
        found = torch.autograd.grad(out, [given[k] for k in grads], file.tensors["cot_out"].to(dtype))
        for k, grad in zip(grads, found, strict=True):
            assert off(grad, file.tensors[f"grad_{k}"]) < most_of_gradient, k


@pytest.mark.parametrize("length", [0, 1, 33, 70])
def test_lucid_blocks_equal_one_solve(length: int) -> None:
    key, value = drawn(2, 3, length, 8), drawn(2, 3, length, 5)
    unit = F.normalize(key, dim=-1)
    want = torch.linalg.solve_triangular(torch.exp(unit @ unit.mT).tril(), value, upper=False)
    got = lucid_values(F.normalize(key, dim=-1), value, block=16)
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-9)
    if length:
        cotangent = torch.randn_like(want)
        for one, two in zip(*(torch.autograd.grad(x, (key, value), cotangent) for x in (got, want)), strict=True):
            assert torch.allclose(one, two, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("length", [1, 33, 70])
def test_reflected_scores_equal_the_product_of_reflections(length: int) -> None:
    q, k = drawn(1, 2, length, 6), drawn(1, 2, length, 6)
    w, beta = F.normalize(drawn(1, 2, length, 6), dim=-1), torch.rand(1, 2, length, dtype=torch.float64) * 2
    got = reflected_scores(q, k, w, beta, block=16)
    want = torch.zeros_like(got)
    for i in range(length):
        row = q[:, :, i]
        for j in range(i, -1, -1):
            want[:, :, i, j] = (row * k[:, :, j]).sum(-1)
            row = row - beta[:, :, j, None] * (row * w[:, :, j]).sum(-1, keepdim=True) * w[:, :, j]
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-9)

"""Routing attention against the vectors of the code that models are trained with, and against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnc.mixers.routing import EPS, nearest, routing


def test_golden_vectors_and_choices_are_reproduced(golden) -> None:
    file = golden("routing_attention/n64_c4_w16_causal")
    t = {n: x.double() if x.is_floating_point() else x for n, x in file.tensors.items()}
    window = file.options["window_size"]
    out = routing(
        t["q"], t["k"], t["v"], t["means"], window=window, memory=(t["mem_key"], t["mem_value"]),
        is_causal=file.options["causal"], scale=file.options["scale"],
    )  # fmt: skip
    assert (out - file.outputs["out"]).abs().max() < 1e-9 * file.outputs["out"].abs().max()
    for name in ("q", "k"):
        want = file.outputs[f"{name}_indices"].long().unflatten(-1, (-1, window)).sort(-1).values
        assert torch.equal(nearest(t[name], t["means"], window), want)


def written(query: Tensor, key: Tensor, value: Tensor, centroids: Tensor, window: int) -> Tensor:
    """The same with the whole matrix of each cluster; causal, without memory."""
    L = query.shape[2]
    total = count = torch.zeros(())
    for c in range(centroids.shape[1]):
        taken = [
            torch.zeros(x.shape[:3], dtype=torch.bool).scatter(-1, nearest(x, centroids, window)[:, :, c], True)
            for x in (query, key)
        ]
        keep = taken[0].unsqueeze(-1) & taken[1].unsqueeze(-2) & torch.ones(L, L, dtype=torch.bool).tril()
        scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~keep, -1e300)
        total = total + scores.softmax(-1).masked_fill(~keep, 0.0) @ value
        count = count + taken[0].unsqueeze(-1)
    return total / (count + EPS)


@pytest.mark.parametrize("length", [1, 33, 70])
def test_it_equals_its_formula_and_gradients(length: int) -> None:
    torch.manual_seed(length)
    tensors = [torch.randn(2, 3, length, n, dtype=torch.float64, requires_grad=True) for n in (6, 6, 5)]
    centroids = torch.randn(3, 4, 6, dtype=torch.float64)
    out, expected = routing(*tensors, centroids, window=9, is_causal=True), written(*tensors, centroids, 9)
    torch.testing.assert_close(out, expected)
    slope = torch.randn_like(out)
    for one, other in zip(*(torch.autograd.grad(o, tensors, slope) for o in (out, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_one_cluster_that_takes_every_token_is_dense_attention() -> None:
    query, key, value = (torch.randn(1, 2, 33, 8) for _ in range(3))
    out = routing(query, key, value, torch.randn(2, 1, 8), window=64, is_causal=True)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(out * (1 + EPS), dense)

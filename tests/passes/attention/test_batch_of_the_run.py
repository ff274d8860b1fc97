"""A batch known at run time only: one compile for all, also where queries or keys have no batch of their own."""

from __future__ import annotations

import pytest
import torch

import attnc

H, E = 2, 8
LATENTS = torch.linspace(-1, 1, 5 * H * E).sin().view(5, H, E).transpose(0, 1)


def heads(x):
    return x.view(x.shape[0], -1, H, E).transpose(1, 2)


def learned_queries(x):
    k = heads(x)
    return (LATENTS[None] @ k.mT * E**-0.5).softmax(-1) @ k


def learned_keys(x):
    return (heads(x) @ LATENTS.mT * E**-0.5).softmax(-1) @ LATENTS


@pytest.mark.parametrize("fn", [learned_queries, learned_keys])
def test_a_batch_of_the_run_is_not_baked_in(fn) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="attnc", options={"inner": "eager", "strict": True})
    for batch in (3, 7):
        x = torch.randn(batch, 6, H * E, generator=torch.Generator().manual_seed(batch))
        torch._dynamo.mark_dynamic(x, 0)
        assert float((compiled(x) - fn(x)).abs().max()) <= 1e-5
    (region,) = attnc.last_report(compiled).regions
    assert region.choice.rewrites and set(region.shape.symbols) == {"B"}

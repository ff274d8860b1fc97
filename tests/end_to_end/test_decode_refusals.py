"""What forms that are allowed by name do not serve they leave as written, with a sentence that says what was found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attnc
from attnc.region import AttentionRegion
from tests.tolerance import assert_close

HEADS, E = 4, 8
BLOCKS = "block_mixture{block=8,top_k=2}"


class Attention(nn.Module):
    """Queries of `x`, keys of `memory`; returns its weights where it is asked to."""

    def __init__(self, *, weights: bool = False, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (nn.Linear(HEADS * E, HEADS * E) for _ in range(3))
        self.weights, self.dropout, self.causal = weights, dropout, causal

    def forward(self, x: Tensor, memory: Tensor):
        query = self.query(x).unflatten(-1, (-1, E)).transpose(1, 2)
        key, value = (p(memory).unflatten(-1, (-1, E)).transpose(1, 2) for p in (self.key, self.value))
        if not self.weights:
            dropout = self.dropout if self.training else 0.0
            return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=self.causal)
        share = (query @ key.mT * E**-0.5).softmax(-1)
        return share @ value, share


class Layers(nn.Module):
    """Two layers of cross-attention: the second one's queries know the memory by the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, memory).transpose(1, 2).flatten(2)
        return x


def regions_of(model: nn.Module, *inputs: Tensor, force: bool = True, allow: str = BLOCKS) -> list[AttentionRegion]:
    """The regions of a compile that gave what the model gives."""
    options = {"inner": "eager", "allow": (allow,), "strict": True, **({"force": allow} if force else {})}
    compiled = torch.compile(model, backend="attnc", options=options)
    torch.manual_seed(1)
    got = compiled(*inputs)
    torch.manual_seed(1)
    for one, other in zip(got, model(*inputs), strict=True):
        assert_close(one, other)
    return list(attnc.last_report(compiled).regions)


def tokens(length: int) -> Tensor:
    return torch.randn(2, length, HEADS * E, generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("length", [1, 12, 40], ids="{} queries of 40 keys".format)
def test_cross_attention_is_left_as_written(length: int) -> None:
    found = regions_of(Layers().eval(), tokens(length), tokens(40) + 1)
    assert len(found) == 2
    for region in found:
        assert region.crosses and f"found cross-attention, {length} queries of 40 keys" in region.choice.reason


def test_self_attention_and_operands_of_unknown_origin_are_no_cross_attention() -> None:
    x = tokens(40)
    assert not regions_of(Attention().eval(), x, x, allow="token_top_k{top_k=64}")[0].crosses

    class Bare(nn.Module):
        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query, key, key)

    bare = regions_of(Bare(), torch.randn(1, 2, 1, 8), torch.randn(1, 2, 40, 8), allow="token_top_k{top_k=64}")
    assert not bare[0].crosses and bare[0].choice.rewrites


def test_returned_probabilities_are_left_as_written() -> None:
    x = tokens(40)
    (found,) = regions_of(Attention(weights=True).eval(), x, x)
    assert not found.choice.rewrites and "its weights are also read by" in found.choice.reason


def test_active_dropout_is_left_as_written() -> None:
    x = tokens(40)
    (found,) = regions_of(Attention(dropout=0.25, causal=True).train(), x, x)
    assert "dropout 0.25 is active" in found.choice.reason


def test_a_prompt_too_short_to_pay_says_so_with_the_length_from_which_it_would() -> None:
    x = tokens(40)
    (found,) = regions_of(Attention(causal=True).eval().requires_grad_(False), x, x, force=False, allow="sinks_window")
    assert not found.choice.rewrites
    assert "not predicted to pay" in found.choice.reason and "from length" in found.choice.reason

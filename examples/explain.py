"""What attnc finds in attention written by hand: a causal window of 64, and its scores scaled before the mask."""

import torch

import attnc


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    position = torch.arange(query.shape[-2])
    distance = position[:, None] - position
    outside = (distance < 0) | (distance >= 64)
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return scores.masked_fill(outside, -torch.inf).softmax(-1) @ value


print(attnc.explain(attention, *torch.randn(3, 1, 8, 2048, 64)))

"""Axes of a source in the order of its memory, from the numbers of its elements: which of them is batch, head, token.

The numbers of a product's rows are sums of one multiple for each axis of the scores and one for the token. Where the
multiples are those of a tensor of these axes, the source is that tensor, reshaped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from attnc.passes.graph import Unliftable, tensor_of

TOKEN, CHANNEL = -1, -2  # beside the axes of the scores, 0, 1, ...


@dataclass(frozen=True)
class Place:
    """`source.reshape(extents)` has the axes `axes`: those of the scores by their place, TOKEN, CHANNEL."""

    source: fx.Node
    axes: tuple[int, ...]
    extents: tuple[int, ...]

    def moved(self, image: Mapping[fx.Node, fx.Node]) -> Place:
        """The same place in another subgraph."""
        return replace(self, source=image[self.source])


def affine(t: torch.Tensor) -> tuple[int, list[int]] | None:
    """(number at 0, step along each axis) where `t` is made of these."""
    first = int(t.flatten()[0])
    steps = [
        int(t[tuple(int(d == at) for d in range(t.dim()))]) - first if n > 1 else 0 for at, n in enumerate(t.shape)
    ]
    whole = torch.full((), first)
    for at, (step, n) in enumerate(zip(steps, t.shape, strict=True)):
        whole = whole + (step * torch.arange(n)).view([n if d == at else 1 for d in range(t.dim())])
    return (first, steps) if torch.equal(whole, t) else None


def tokens(source: fx.Node, numbers: torch.Tensor, valid: torch.Tensor) -> tuple[int, int, torch.Tensor]:
    """(step from token to token, their number, token of each element) along the last axis of `numbers`."""
    value = tensor_of(source)
    assert value is not None
    both = valid[..., 1:] & valid[..., :-1]
    apart = (numbers[..., 1:] - numbers[..., :-1])[both].abs()
    if not len(apart) or not int(apart.min()):
        raise Unliftable("one key stands beside itself in a row of the scores", source)
    step = int(apart.min())
    strides = torch.empty(value.shape, device="meta").stride()
    dim = next((d for d, n in enumerate(value.shape) if n > 1 and strides[d] == step), None)
    if dim is None:
        raise Unliftable("keys that stand beside one another are not beside one another where they come from", source)
    return step, value.shape[dim], torch.where(valid, numbers // step % value.shape[dim], 0)


def along(numbers: torch.Tensor, valid: torch.Tensor, source: fx.Node) -> list[int]:
    """Steps of `numbers`, the same along the last axis wherever they are valid, along the other axes."""
    low = torch.where(valid, numbers, torch.iinfo(torch.int64).max).amin(-1)
    high = torch.where(valid, numbers, -1).amax(-1)
    found = affine(low) if torch.equal(low, high) else None
    if found is None or found[0] != 0:
        raise Unliftable("rows of the scores and of what they are made of do not follow one another", source)
    return found[1]


def placed(source: fx.Node, steps: dict[int, int], extents: dict[int, int]) -> Place:
    """The axes of `source`, from the step and extent of each."""
    value = tensor_of(source)
    assert value is not None
    order = sorted((axis for axis in steps if extents[axis] > 1), key=lambda axis: -steps[axis])
    size = 1
    for axis in reversed(order):
        if steps[axis] != size:
            raise Unliftable("a part of a tensor is cut into chunks, not all of it", source)
        size *= extents[axis]
    if size != value.numel():
        raise Unliftable("a part of a tensor is cut into chunks, not all of it", source)
    return Place(source, tuple(order), tuple(extents[axis] for axis in order))

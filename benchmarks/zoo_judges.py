"""What float32 can say at all about a model: eager in float64, and eager with its weights moved by one unit.

Where attnc and eager differ, these tell a wrong rewrite from numbers that have no more digits: a gradient that is zero
but for rounding, or a sum of large terms that cancel.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import nn

Result = TypeVar("Result")


def nudged(model: nn.Module, run: Callable[[nn.Module], Result]) -> Result:
    """`run` on a copy of the model whose weights are each moved by about one unit in their last place."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in moved.parameters():
            if p.is_floating_point():
                p.mul_(1 + torch.randn(p.shape, generator=generator).to(p.dtype) * torch.finfo(p.dtype).eps)
    return run(moved)


def in_float64(model: nn.Module, run: Callable[[nn.Module], tuple[list, list]]) -> tuple[list, list]:
    """What `run` gives on a copy in double precision, as float32; ([], []) where the model does not run there."""
    wide = copy.deepcopy(model).double()
    if hasattr(wide, "set_experts_implementation"):
        with contextlib.suppress(ValueError):  # torch's grouped product knows no float64
            wide.set_experts_implementation("batched_mm")
    try:
        with _float32_is_float64():
            results = run(wide)
    except (RuntimeError, TypeError, ValueError):
        return [], []
    return tuple([t.float() if t.is_floating_point() else t for t in part] for part in results)  # type: ignore[return-value]


@contextlib.contextmanager
def _float32_is_float64() -> Iterator[None]:
    """A model's own casts to float32 go to float64."""
    before = torch.float32, torch.Tensor.float
    torch.set_default_dtype(torch.float64)
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        torch.float32, torch.Tensor.float = before  # type: ignore[misc,method-assign]
        torch.set_default_dtype(torch.float32)

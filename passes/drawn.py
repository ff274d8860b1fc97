"""Data that a check runs a region on, the same in every run, where the region's tensors lie."""

from __future__ import annotations

import torch
from torch import fx


def drawn(written: fx.GraphModule) -> list[torch.Tensor]:
    """Data to run an instance on; the same for the same graph."""
    generator = torch.Generator().manual_seed(0)
    return [_data(node.meta["val"], generator) for node in written.graph.find_nodes(op="placeholder")]


def _data(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    shape = tuple(value.shape)
    if value.dtype == torch.bool:
        made = torch.rand(shape, generator=generator) < 0.7
    elif value.dtype.is_floating_point:
        made = torch.randn(shape, generator=generator).to(value.dtype)
    else:
        made = torch.randint(0, 2, shape, generator=generator, dtype=torch.int64).to(value.dtype)
    return made.to(value.device)


def run_on(device: torch.device) -> torch.device:
    """Where a check runs: on the region's device, so that what runs there is what is checked; of meta, on the CPU."""
    return torch.device("cpu") if device.type == "meta" else device

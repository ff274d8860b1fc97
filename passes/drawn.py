"""Data that a check runs a region on, the same in every run, where the region's tensors lie."""

from __future__ import annotations

import torch
from torch import fx

from attnc.passes.graph import op_name

_COMPARED = ("eq", "ne", "lt", "le", "gt", "ge")


def drawn(written: fx.GraphModule) -> list[torch.Tensor]:
    """Data to run an instance on; the same for the same graph."""
    generator = torch.Generator().manual_seed(0)
    made = [(node, _data(node.meta["val"], generator)) for node in written.graph.find_nodes(op="placeholder")]
    return [_met(node, data, generator) for node, data in made]


def _met(node: fx.Node, data: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`data` with every other number one that it is compared with, or random floats are never equal to it."""
    others = [user.args[1] for user in node.users if op_name(user) in _COMPARED and len(user.args) == 2]
    numbers = [x for x in others if isinstance(x, int | float) and not isinstance(x, bool)]
    if not numbers or not data.is_floating_point():
        return data
    return torch.where((torch.rand(data.shape, generator=generator) < 0.5).to(data.device), numbers[0], data)


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

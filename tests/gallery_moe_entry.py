"""What one entry of the gallery of experts is, and the parts that its modules share.

Letters: B batch, L length, D model width, W expert width, N experts.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, L, D, W, N = 2, 11, 16, 24, 6


@dataclass(frozen=True)
class Spelling:
    """A module, and the facts of its one region; `facts` None: it is no mixture of experts.

    eager: whether Dynamo holds it in one graph only where it may capture lengths known at run time.
    train: whether it runs in training mode.
    """

    name: str
    make: Callable[[], nn.Module]
    facts: Mapping[str, object] | None = field(default_factory=dict)
    eager: bool = False
    train: bool = False

    def build(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The same module and inputs on every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = self.make().train(self.train)
            inputs = module.inputs() if hasattr(module, "inputs") else (torch.randn(B, L, D),)
        return module, inputs


def weights(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)


class Expert(nn.Module):
    """A gated feed-forward."""

    def __init__(self, width: int = W):
        super().__init__()
        self.gate, self.up = nn.Linear(D, width, bias=False), nn.Linear(D, width, bias=False)
        self.down = nn.Linear(width, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Plain(nn.Module):
    """A feed-forward without gate."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.relu):
        super().__init__()
        self.first, self.second, self.activation = nn.Linear(D, W), nn.Linear(W, D), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.activation(self.first(x)))


class Stacked(nn.Module):
    """Experts with stacked weights: value and gate in one product, gate first."""

    def __init__(self, count: int = N):
        super().__init__()
        self.gate_up, self.down = weights(count, 2 * W, D), weights(count, D, W)


def gathered(self: Stacked, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Weights gathered for each pair: x (T, D), ids and w (T, k)."""
    gate, up = torch.einsum("tkfd,td->tkf", self.gate_up[ids], x).chunk(2, -1)
    y = torch.einsum("tkdf,tkf->tkd", self.down[ids], F.silu(gate) * up)
    return (y * w[..., None]).sum(1)

"""Small trainable models around attention, and how the end-to-end tests compile and compare them."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import attnc
from tests.tolerance import error

WIDTH, HEADS = 32, 4


class CausalAttention(nn.Module):
    """Causal attention by hand over (B, L, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        B, L, _ = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        at = torch.arange(L, device=x.device)
        scores = q @ k.mT / (WIDTH // HEADS) ** 0.5
        scores = scores.masked_fill(at[None, :] > at[:, None], float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, L, WIDTH))


class Net(nn.Module):
    """Residual layers of attention under one norm; `around` wraps the call of each layer."""

    def __init__(self, layers: int = 2, around: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CausalAttention() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            h = self.norm(x)
            x = x + (layer(h) if self.around is None else self.around(layer, h))
        return x


def tokens(length: int = 48, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(length)).to(dtype)


def compiled(model, *, inner: str = "aot_eager", force: str | None = "dense", options: dict | None = None, **given):
    """`model` compiled by attnc; every region that can be is rewritten, whatever the cost rule says."""
    return torch.compile(
        model, backend="attnc", options={"inner": inner, "force": force, "strict": True, **(options or {})}, **given
    )


def rewritten(model) -> int:
    return attnc.last_report(model).counts()["rewritten"]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of the parameters, which are cleared."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def trained(model: nn.Module, x: Tensor, call=None) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of one step through `call` (default: the model itself)."""
    out = model(x) if call is None else call(x)
    out.float().square().mean().backward()
    return out.detach(), gradients(model)


def assert_same_step(got, want, limit: float = 2e-5) -> None:
    assert got[0].dtype == want[0].dtype
    assert error(got[0], want[0]) <= limit
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        assert error(got[1][name], gradient) <= limit, name

"""What looks like a mixture of experts and is none, and mistakes that make one of another kind."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.gallery_moe import Granite, Mixtral
from tests.gallery_moe_all import EveryExpert
from tests.gallery_moe_entry import B, D, Expert, N, Plain, Spelling, W, weights


class Attended(nn.Module):
    """Sparse attention: each query keeps the keys of its best scores, gathered."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        top, ids = (q @ k.mT).topk(3, dim=-1)
        rows = torch.arange(B)[:, None, None]
        return torch.einsum("blk,blkd->bld", top.softmax(-1), v[rows, ids])


class BeamSearch(nn.Module):
    """The best continuations of each beam and the states they continue."""

    def __init__(self):
        super().__init__()
        self.body, self.head = Plain(), nn.Linear(D, 40)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.body(x)
        score, token = self.head(h).log_softmax(-1).topk(4, dim=-1)
        best, at = score.flatten(1).topk(3, dim=-1)
        beam = (at // 4)[..., None].expand(-1, -1, D)
        return best, token.flatten(1).gather(1, at), h.gather(1, beam)


class TopKPooling(nn.Module):
    """The tokens of the best scores, weighted by them, through one feed-forward."""

    def __init__(self):
        super().__init__()
        self.score, self.body = nn.Linear(D, 1), Plain()

    def forward(self, x: Tensor) -> Tensor:
        top, ids = self.score(x)[..., 0].topk(4, dim=-1)
        kept = x.gather(1, ids[..., None].expand(-1, -1, D))
        return (self.body(kept) * top.sigmoid()[..., None]).sum(1)


class SoftmaxGate(nn.Module):
    """A softmax over slots of memory: no experts behind it."""

    def __init__(self):
        super().__init__()
        self.gate, self.memory = nn.Linear(D, N), weights(N, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).softmax(-1) @ self.memory


class GatedTwice(nn.Module):
    """Two feed-forwards, each behind a sigmoid of its own."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.gates = Plain(), Expert(), nn.ModuleList(nn.Linear(D, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.gates[0](x).sigmoid() * self.one(x) + self.gates[1](x).sigmoid() * self.two(x)


class BlockDiagonal(EveryExpert):
    """A feed-forward for each block of features: each has its own weights and its own data."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(torch.einsum("blnd,ndf->blnf", x[:, :, None].repeat(1, 1, N, 1).cumsum(2), self.first))
        return torch.einsum("blnf,nfd->blnd", h, self.second).flatten(2)


class RoutedProjection(nn.Module):
    """Experts of one product each: queries of a mixture of attention heads."""

    def __init__(self):
        super().__init__()
        self.router, self.query = nn.Linear(D, N), weights(N, D, W)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x).softmax(-1).topk(2, dim=-1)
        return torch.einsum("bld,blkdf->blkf", x, self.query[ids]) * w[..., None]


class NotRestored(Granite):
    """Sorted rows are summed as they lie, each token getting other tokens' outputs."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        top, ids = self.router(flat).topk(2, dim=1)
        experts, order = ids.flatten().sort(0)
        rows = flat[order // 2]
        gate, up = torch.einsum("rd,rfd->rf", rows, self.gate_up[experts]).chunk(2, -1)
        y = torch.einsum("rf,rdf->rd", F.silu(gate) * up, self.down[experts]) * top.softmax(1).flatten()[order][:, None]
        return y.view(-1, 2, D).sum(1).view(x.shape)


class OtherExpert(Mixtral):
    """The second product has the weights of another expert than the first."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        w, ids = self.router(flat).softmax(-1).topk(2, dim=-1)
        gate, up = torch.einsum("tkfd,td->tkf", self.gate_up[ids], flat).chunk(2, -1)
        y = torch.einsum("tkdf,tkf->tkd", self.down[ids.flip(-1)], F.silu(gate) * up)
        return (y * w[..., None]).sum(1).view(x.shape)


class OneSlot(Mixtral):
    """Of the two chosen experts only the first is summed."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        w, ids = self.router(flat).softmax(-1).topk(2, dim=-1)
        gate, up = torch.einsum("tkfd,td->tkf", self.gate_up[ids], flat).chunk(2, -1)
        y = torch.einsum("tkdf,tkf->tkd", self.down[ids], F.silu(gate) * up)
        return (y * w[..., None])[:, :1].sum(1).view(x.shape)


class Linear(EveryExpert):
    """No activation between the products."""

    def forward(self, x: Tensor) -> Tensor:
        p = self.router(x).softmax(-1)
        return torch.einsum("blef,efd,ble->bld", torch.einsum("bld,edf->blef", x, self.first), self.second, p)


class Unweighted(EveryExpert):
    """All experts alike: no router."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(torch.einsum("bld,edf->blef", x, self.first))
        return torch.einsum("blef,efd->bld", h, self.second)


LOOKALIKES = tuple(
    Spelling(make.__name__, make, None)
    for make in (Attended, BeamSearch, TopKPooling, SoftmaxGate, GatedTwice, BlockDiagonal, RoutedProjection,
                 NotRestored, OtherExpert, OneSlot, Linear, Unweighted)
)

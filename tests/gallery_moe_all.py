"""Mixtures of experts that run every expert: on every token, or one after the other in a loop."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.gallery_moe_entry import D, Expert, N, Plain, W, weights


class Switch(nn.Module):
    """The best expert, at most `capacity` tokens each; every expert on every token, masked."""

    def __init__(self, capacity: int = 8):
        super().__init__()
        self.router, self.capacity = nn.Linear(D, N, bias=False), capacity
        self.experts = nn.ModuleList(Plain() for _ in range(N))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        p = self.router(flat).softmax(-1)
        w, ids = p.max(-1)
        mask = F.one_hot(ids, N)
        mask = mask * (mask.cumsum(0) <= self.capacity)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            out = out + expert(flat) * (mask[:, number] * w)[:, None]
        return out.view(x.shape)


class Llama4(nn.Module):
    """The weight, a sigmoid, multiplies the input of the one chosen expert; all experts see all tokens."""

    def __init__(self):
        super().__init__()
        self.router, self.shared = nn.Linear(D, N, bias=False), Expert()
        self.gate_up, self.down = weights(N, D, 2 * W), weights(N, W, D)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        top, ids = self.router(flat).topk(1, dim=1)
        scores = torch.full((len(flat), N), -torch.inf).scatter_(1, ids, top).sigmoid()
        rows = (flat.repeat(N, 1) * scores.transpose(0, 1).reshape(-1, 1)).view(N, -1, D)
        gate, up = torch.bmm(rows, self.gate_up).chunk(2, -1)
        y = torch.bmm(up * F.silu(gate), self.down)
        return (self.shared(flat) + y.sum(0)).view(x.shape)


class EveryExpert(nn.Module):
    """Every expert on every token by einsum, weights scattered over the experts."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, N, bias=False)
        self.first, self.second = weights(N, D, W), weights(N, W, D)

    def forward(self, x: Tensor) -> Tensor:
        top, ids = self.router(x).topk(2, dim=-1)
        dense = torch.zeros(*x.shape[:2], N).scatter(-1, ids, top.softmax(-1))
        h = F.gelu(torch.einsum("bld,edf->blef", x, self.first))
        return torch.einsum("blef,efd,ble->bld", h, self.second, dense)


class EveryExpertSummed(EveryExpert):
    """The same, the weighted sum written as a product and a sum."""

    def forward(self, x: Tensor) -> Tensor:
        p = self.router(x).softmax(-1)
        top = p.topk(2, dim=-1)[0]
        dense = torch.where(p >= top[..., -1:], p, 0.0)
        h = F.gelu(torch.einsum("bld,edf->belf", x, self.first))
        y = torch.einsum("belf,efd->beld", h, self.second)
        return (y * dense.transpose(1, 2)[..., None]).sum(1)


class Soft(EveryExpert):
    """No choice: all experts, weighted by a softmax."""

    def forward(self, x: Tensor) -> Tensor:
        p = self.router(x).softmax(-1)
        h = F.gelu(torch.einsum("bld,edf->blef", x, self.first))
        return torch.einsum("bled,ble->bld", torch.einsum("blef,efd->bled", h, self.second), p)


class GShard(EveryExpert):
    """The best two, at most `capacity` tokens for each expert: rows filled and emptied by one-hot products."""

    capacity = 9

    def route(self, x: Tensor) -> Tensor:
        """Weights by token, expert and row."""
        p = self.router(x).softmax(-1)
        first = F.one_hot(p.argmax(-1), N)
        second = F.one_hot(p.masked_fill(first.bool(), 0.0).argmax(-1), N)
        place = first.cumsum(0) - 1, second.cumsum(0) - 1 + first.sum(0, keepdim=True)
        total = (p * (first + second)).sum(-1)
        combine = torch.zeros(len(x), N, self.capacity)
        for mask, at in zip((first, second), place, strict=True):
            mask = mask * (at < self.capacity)
            weight = (p * mask).sum(-1) / total
            rows = F.one_hot((at * mask).sum(-1), self.capacity)
            combine = combine + weight[:, None, None] * mask[:, :, None] * rows[:, None]
        return combine

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        combine = self.route(flat)
        rows = torch.einsum("tec,td->ecd", combine.bool().to(x.dtype), flat)
        y = torch.bmm(F.gelu(torch.bmm(rows, self.first)), self.second)
        return torch.einsum("tec,ecd->td", combine, y).view(x.shape)


class StaticLoop(nn.Module):
    """A loop over all experts, each weighted by a mask of the chosen."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, N, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(N))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        w, ids = self.router(flat).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            weight = torch.where(ids == number, w, 0.0).sum(-1, keepdim=True)
            out += weight * expert(flat)
        return out.view(x.shape)


class StackedLoop(StaticLoop):
    """Outputs of all experts stacked, then weighted and summed."""

    def forward(self, x: Tensor) -> Tensor:
        p = self.router(x).sigmoid()
        w, ids = p.topk(2, dim=-1)
        dense = torch.zeros_like(p).scatter(-1, ids, w)
        return (torch.stack([expert(x) for expert in self.experts], -2) * dense[..., None]).sum(-2)


class RowsLoop(StaticLoop):
    """Each expert gathers its rows and adds its outputs; row counts are known at run time only."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        w, ids = self.router(flat).softmax(-1).topk(2, dim=-1)
        w = w / w.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        mask = F.one_hot(ids, N).permute(2, 1, 0)
        for number, expert in enumerate(self.experts):
            slot, token = torch.where(mask[number])
            out.index_add_(0, token, expert(flat[token]) * w[token, slot, None])
        return out.view(x.shape)

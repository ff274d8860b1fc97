"""Small mixtures of experts, one spelling each, with the facts they must lift to; and what looks like one and is none.

Letters: B batch, L length, D model width, F expert width, N experts.
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

    eager: whether Dynamo cannot hold it in one graph; it is then tested as an exported program only.
    """

    name: str
    make: Callable[[], nn.Module]
    facts: Mapping[str, object] | None = field(default_factory=dict)
    eager: bool = False

    def build(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The same module and inputs on every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = self.make().eval()
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


class Mixtral(Stacked):
    """Softmax of all, the best two, renormalised."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, N, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        p = self.router(flat).softmax(-1)
        w, ids = p.topk(2, dim=-1)
        return gathered(self, flat, ids, w / w.sum(-1, keepdim=True)).view(x.shape)


class MixtralUnflattened(Stacked):
    """The same without flattening batch and length."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, N, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x).topk(2, dim=-1)
        w = w.softmax(-1)
        gate, up = torch.einsum("blkfd,bld->blkf", self.gate_up[ids], x).chunk(2, -1)
        return torch.einsum("blkdf,blkf,blk->bld", self.down[ids], F.silu(gate) * up, w)


class DeepSeek(Stacked):
    """Sigmoid scores, a bias for the choice, groups, a scale, a shared expert; rows sorted, weights by group."""

    def __init__(self):
        super().__init__()
        self.router, self.bias, self.shared = weights(N, D), nn.Buffer(torch.randn(N) * 0.2), Expert()

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x.float(), self.router.float()).sigmoid()
        chosen = scores + self.bias
        merit = chosen.view(-1, 3, N // 3).topk(2, dim=-1)[0].sum(-1)
        best = merit.topk(2, dim=-1, sorted=False)[1]
        keep = torch.zeros_like(merit).scatter_(1, best, 1).bool()
        chosen = chosen.view(-1, 3, N // 3).masked_fill(~keep[..., None], -torch.inf).view(-1, N)
        ids = chosen.topk(3, dim=-1, sorted=False)[1]
        w = scores.gather(1, ids)
        return ids, w / (w.sum(-1, keepdim=True) + 1e-20) * 2.5

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, D)
        ids, w = self.route(flat)
        order = ids.flatten().argsort()
        rows = flat[order // 3]
        experts = ids.flatten()[order]
        gate, up = torch.bmm(self.gate_up[experts], rows[..., None])[..., 0].chunk(2, -1)
        y = torch.bmm(self.down[experts], (F.silu(gate) * up)[..., None])[..., 0]
        y = (y * w.flatten()[order, None])[order.argsort()].view(-1, 3, D).sum(1)
        return y.view(x.shape) + self.shared(x)


class GptOss(nn.Module):
    """Softmax of the chosen, biases, alternating columns, clamps."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, N)
        self.w1, self.b1, self.w2, self.b2 = weights(N, D, 2 * W), weights(N, 2 * W), weights(N, W, D), weights(N, D)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        top, ids = self.router(flat).topk(2, dim=-1)
        w, at = top.softmax(-1), ids.reshape(-1)
        h = torch.bmm(flat.repeat_interleave(2, 0)[:, None], self.w1[at])[:, 0] + self.b1[at]
        gate, up = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(-7.0, 7.0)
        h = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        y = torch.bmm(h[:, None], self.w2[at])[:, 0] + self.b2[at]
        return (y * w.reshape(-1, 1)).view(-1, 2, D).sum(1).view(x.shape)


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


class Granite(Stacked):
    """Rows sorted by expert, their outputs added where they belong."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, N, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        top, ids = self.router(flat).topk(2, dim=1)
        gates = top.softmax(1).flatten()
        experts, order = ids.flatten().sort(0)
        token = order.div(2, rounding_mode="trunc")
        rows = flat[token]
        gate, up = torch.einsum("rd,rfd->rf", rows, self.gate_up[experts]).chunk(2, -1)
        y = torch.einsum("rf,rdf->rd", F.silu(gate) * up, self.down[experts]) * gates[order][:, None]
        return torch.zeros_like(flat).index_add(0, token, y).view(x.shape)


class Dbrx(nn.Module):
    """Weights of all experts in one matrix, three projections, weights normalised by their 1-norm."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, N, bias=False)
        self.w1, self.v1, self.w2 = weights(N * W, D), weights(N * W, D), weights(N * W, D)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        p = self.router(flat).softmax(1)
        top, ids = p.topk(2, dim=-1)
        top = top / torch.norm(top, p=1, dim=-1, keepdim=True)
        w1, v1, w2 = (m.view(N, W, D)[ids.flatten()] for m in (self.w1, self.v1, self.w2))
        rows = flat[:, None].expand(-1, 2, -1).reshape(-1, 1, D)
        h = F.silu(rows @ w1.mT) * (rows @ v1.mT)
        return ((h @ w2)[:, 0].view(-1, 2, D) * top[..., None]).sum(1).view(x.shape)


class LongCat(Stacked):
    """Classes beyond the experts hand the token on; scaled, chosen with a bias."""

    def __init__(self):
        super().__init__()
        self.router, self.bias = weights(N + 2, D), nn.Buffer(torch.randn(N + 2) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        p = F.linear(flat, self.router).softmax(-1)
        ids = (p + self.bias).topk(3, dim=-1)[1]
        w = p.gather(1, ids) * 6.0
        zero = ids >= N
        y = gathered(self, flat, ids.masked_fill(zero, 0), w.masked_fill(zero, 0.0))
        return (y + flat * (w * zero).sum(-1, keepdim=True)).view(x.shape)


class Hash(Stacked):
    """Experts by a table of tokens, weights by their scores."""

    def __init__(self):
        super().__init__()
        self.router, self.table = nn.Linear(D, N, bias=False), nn.Buffer(torch.randint(0, N, (50, 2)))

    def inputs(self) -> tuple[Tensor, ...]:
        return torch.randn(B, L, D), torch.randint(0, 50, (B, L))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        scores = F.softplus(self.router(flat)).sqrt()
        ids = self.table[tokens.reshape(-1)].long()
        w = scores.gather(1, ids)
        return gathered(self, flat, ids, w / w.sum(-1, keepdim=True) * 1.5).view(x.shape)


class MaskedMax(Stacked):
    """The best, that one masked out, the best again."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, N, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        p = self.router(flat).softmax(-1)
        first = p.argmax(-1)
        second = p.masked_fill(F.one_hot(first, N).bool(), -torch.inf).argmax(-1)
        ids = torch.stack([first, second], -1)
        w = p.gather(-1, ids)
        return gathered(self, flat, ids, w / w.sum(-1, keepdim=True)).view(x.shape)


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


class GatedShared(Mixtral):
    """A shared expert behind a sigmoid gate, and noise on the input in training."""

    def __init__(self):
        super().__init__()
        self.shared, self.shared_gate = Expert(W // 2), nn.Linear(D, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shared_gate(x).sigmoid() * self.shared(x)


class Latent(Stacked):
    """Experts between two projections, the router before them."""

    def __init__(self):
        super().__init__()
        self.router, self.into, self.out = weights(N, 2 * D), weights(D, 2 * D), weights(2 * D, D)

    def inputs(self) -> tuple[Tensor, ...]:
        return (torch.randn(B * L, 2 * D),)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = F.linear(x, self.router).sigmoid().topk(2, dim=-1)
        return F.linear(gathered(self, F.linear(x, self.into), ids, w), self.out)


SOFTMAX = {"score": "softmax", "num_experts": N, "top_k": 2, "d_ff": W, "d_model": D, "tokens": B * L}
SPELLINGS = (
    Spelling("mixtral", Mixtral, {**SOFTMAX, "over": "all", "normalise": "chosen", "activation": "silu", "gated": True,
                                  "fused": True, "interleaved": False, "written": "batched_mm"}),
    Spelling("mixtral_unflattened", MixtralUnflattened, {**SOFTMAX, "over": "chosen"}),
    Spelling("deepseek", DeepSeek, {"score": "sigmoid", "choice_bias": True, "groups": 3, "top_groups": 2,
                                    "group_score": "top2", "top_k": 3, "normalise": "chosen", "scale": 2.5,
                                    "shared": 1, "shared_d_ff": W, "shared_gate": ""}),
    Spelling("gpt_oss", GptOss, {**SOFTMAX, "over": "chosen", "logit_bias": True, "expert_bias": True,
                                 "interleaved": True, "activation": "quick_gelu",
                                 "details": ("up>=-7", "up<=7", "gate<=7", "up+1")}),
    Spelling("switch", Switch, {"score": "softmax", "top_k": 1, "num_experts": N, "normalise": "", "gated": False,
                                "capacity": 8, "activation": "relu", "expert_bias": True, "written": "loop"}),
    Spelling("llama4", Llama4, {"score": "sigmoid", "top_k": 1, "weight_at": "input", "shared": 1,
                                "written": "every expert"}),
    Spelling("granite", Granite, {**SOFTMAX, "over": "chosen"}),
    Spelling("dbrx", Dbrx, {**SOFTMAX, "over": "all", "normalise": "chosen", "fused": False}),
    Spelling("longcat", LongCat, {"score": "softmax", "choice_bias": True, "scale": 6.0, "top_k": 3,
                                  "zero_experts": 2, "zero": "identity", "num_experts": N}),
    Spelling("hash", Hash, {"score": "sqrtsoftplus", "choice": "table", "normalise": "chosen", "scale": 1.5}),
    Spelling("masked_max", MaskedMax, {**SOFTMAX, "choice": "masked_max", "normalise": "chosen"}),
    Spelling("every_expert", EveryExpert, {**SOFTMAX, "over": "chosen", "gated": False, "activation": "gelu",
                                           "written": "every expert"}),
    Spelling("every_expert_summed", EveryExpertSummed, {**SOFTMAX, "over": "all", "written": "every expert"}),
    Spelling("soft", Soft, {"score": "softmax", "choice": "all", "top_k": N}),
    Spelling("static_loop", StaticLoop, {**SOFTMAX, "normalise": "", "written": "loop"}),
    Spelling("stacked_loop", StackedLoop, {"score": "sigmoid", "top_k": 2, "num_experts": N, "written": "loop"}),
    Spelling("rows_loop", RowsLoop, {**SOFTMAX, "normalise": "chosen", "written": "loop"}, eager=True),
    Spelling("gated_shared", GatedShared, {**SOFTMAX, "shared": 1, "shared_gate": "sigmoid", "shared_d_ff": W // 2}),
    Spelling("latent", Latent, {"score": "sigmoid", "latent": True, "d_model": 2 * D, "d_latent": D}),
)

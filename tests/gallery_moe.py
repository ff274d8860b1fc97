"""Small mixtures of experts, one spelling each, with the facts they must lift to."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.gallery_moe_all import (
    EveryExpert,
    EveryExpertSummed,
    GShard,
    Llama4,
    RowsLoop,
    Soft,
    StackedLoop,
    StaticLoop,
    Switch,
)
from tests.gallery_moe_entry import B, D, Expert, L, N, Spelling, Stacked, W, gathered, weights


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


class GatedShared(Mixtral):
    """A shared expert behind a sigmoid gate."""

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


class SlotsMixedUp(Mixtral):
    """Weights of another slot: the second expert's for the first."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        w, ids = self.router(flat).softmax(-1).topk(2, dim=-1)
        return gathered(self, flat, ids, w.t().reshape(-1, 2)).view(x.shape)


class OverTokens(Mixtral):
    """A softmax over tokens, not over experts."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        w, ids = self.router(flat).softmax(0).topk(2, dim=-1)
        return gathered(self, flat, ids, w).view(x.shape)


class Jittered(Mixtral):
    """Noise on the input in training."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * torch.empty_like(x).uniform_(0.99, 1.01))


class Grouped(Stacked):
    """Rows sorted into groups, a product for all groups at once."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, N, bias=False)
        self.to(torch.bfloat16)

    def inputs(self) -> tuple[Tensor, ...]:
        return (torch.randn(B, L, D, dtype=torch.bfloat16),)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        w, ids = self.router(flat).float().softmax(-1).topk(2, dim=-1)
        order = ids.flatten().argsort()
        ends = F.one_hot(ids.flatten(), N).sum(0).cumsum(0).to(torch.int32)
        gate, up = torch._grouped_mm(flat[order // 2], self.gate_up.mT, offs=ends).chunk(2, -1)
        y = torch._grouped_mm(F.silu(gate) * up, self.down.mT, offs=ends) * w.to(x.dtype).flatten()[order, None]
        return torch.zeros_like(flat).index_add(0, order // 2, y).view(x.shape)


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
    Spelling("gshard", GShard, {**SOFTMAX, "over": "all", "normalise": "chosen", "choice": "masked_max", "capacity": 9,
                                "written": "one-hot products"}),
    Spelling("soft", Soft, {"score": "softmax", "choice": "all", "top_k": N}),
    Spelling("static_loop", StaticLoop, {**SOFTMAX, "normalise": "", "written": "loop"}),
    Spelling("stacked_loop", StackedLoop, {"score": "sigmoid", "top_k": 2, "num_experts": N, "written": "loop"}),
    Spelling("rows_loop", RowsLoop, {**SOFTMAX, "normalise": "chosen", "written": "loop"}, eager=True),
    Spelling("gated_shared", GatedShared, {**SOFTMAX, "shared": 1, "shared_gate": "sigmoid", "shared_d_ff": W // 2}),
    Spelling("jittered", Jittered, {**SOFTMAX, "jitter": 0.01, "normalise": "chosen"}, train=True),
    Spelling("grouped", Grouped, {**SOFTMAX, "written": "grouped_mm", "router_dtype": "bfloat16", "dtype": "bfloat16"}),
    Spelling("slots_mixed_up", SlotsMixedUp, {"score": "other", "choice": "top_k", "num_experts": N, "top_k": 2}),
    Spelling("softmax_over_tokens", OverTokens, {"score": "other", "num_experts": N, "top_k": 2}),
    Spelling("latent", Latent, {"score": "sigmoid", "latent": True, "d_model": 2 * D, "d_latent": D}),
)

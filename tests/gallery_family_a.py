"""Softmax attention in all its dress: one module per row of family A, written as its paper or reference writes it.

`ROWS` names for each row the entries of the gallery that hold its spellings.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.gallery_entry import NEG, any_of, ids, module, tensors
from tests.gallery_family_a_scores import ENTRIES as SCORES

WIDTH, HEADS, HEAD = 64, 4, 16
X = tensors((2, 33, WIDTH))


def rotated(x, first=0, positions=None):
    """Rotate-half RoPE of channels `first` and up of (..., L, E), the rest as it is (NoPE)."""
    L, half = x.shape[-2], (x.shape[-1] - first) // 2
    at = torch.arange(L) if positions is None else positions
    angle = at[:, None] * 10000 ** (-torch.arange(half) / half)
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    kept, turned = x[..., :first], x[..., first:]
    turned = turned * cos + torch.cat([-turned[..., half:], turned[..., :half]], -1) * sin
    return torch.cat([kept, turned], -1)


def causal(L):
    i, j = ids(L)
    return torch.where(j <= i, 0.0, NEG)


def attend(q, k, v):
    """transformers' eager attention over (B, H, L, E), heads repeated."""
    times = q.shape[1] // k.shape[1]
    k, v = (x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + causal(q.shape[2])
    return F.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v


class Row(nn.Module):
    """Named projections without bias, and heads split off and merged."""

    def __init__(self, **widths):
        super().__init__()
        for name, (wide, narrow) in widths.items():
            setattr(self, name, nn.Linear(wide, narrow, bias=False))

    def heads(self, x, width=HEAD):
        return x.unflatten(-1, (-1, width)).transpose(1, 2)

    def merged(self, x):
        return x.transpose(1, 2).flatten(2)


class GroupedTied(Row):
    """GTA: one state per group is the value and half of the key, whose rotated half all heads share."""

    def __init__(self):
        super().__init__(q=(WIDTH, 64), kv=(WIDTH, 32), rope=(WIDTH, 8), out=(64, WIDTH))

    def forward(self, x):
        q, tied = rotated(self.heads(self.q(x)), 8), self.heads(self.kv(x))
        shared = rotated(self.heads(self.rope(x), 8))
        k = torch.cat([tied[..., :8], shared.expand(-1, tied.shape[1], -1, -1)], -1)
        return self.out(self.merged(attend(q, k, tied)))


class GroupedLatent(Row):
    """GLA: the latent is split over groups of heads; a group's keys and values come from its own part."""

    def __init__(self):
        super().__init__(q=(WIDTH, HEADS * 24), kv=(WIDTH, 2 * 12 + 8), out=(64, WIDTH))
        self.up_k = nn.Parameter(torch.randn(2, 12, 2, 16) / 4)
        self.up_v = nn.Parameter(torch.randn(2, 12, 2, 16) / 4)

    def forward(self, x):
        B, L, _ = x.shape
        q = rotated(self.heads(self.q(x), 24), 16)
        latent, rope = self.kv(x).split([24, 8], -1)
        latent = latent.view(B, L, 2, 12)
        k = torch.einsum("bsgc,gchd->bghsd", latent, self.up_k).flatten(1, 2)
        v = torch.einsum("bsgc,gchd->bghsd", latent, self.up_v).flatten(1, 2)
        rope = rotated(rope[:, None]).expand(-1, HEADS, -1, -1)
        return self.out(self.merged(attend(q, torch.cat([k, rope], -1), v)))


class Latent(Row):
    """MLA, keys and values expanded per head (DeepSeek-V2 and V3)."""

    absorbed = False

    def __init__(self):
        super().__init__(q_a=(WIDTH, 20), q_b=(20, HEADS * 24), kv_a=(WIDTH, 12 + 8), kv_b=(12, HEADS * 28),
                         out=(HEADS * 12, WIDTH))
        self.q_norm, self.kv_norm = nn.RMSNorm(20), nn.RMSNorm(12)

    def forward(self, x):
        q = rotated(self.heads(self.q_b(self.q_norm(self.q_a(x))), 24), 16)
        latent, rope = self.kv_a(x).split([12, 8], -1)
        latent, rope = self.kv_norm(latent), rotated(rope[:, None])
        return self.out(self.merged(self.core(q, latent, rope)))

    def core(self, q, latent, rope):
        k, v = self.heads(self.kv_b(latent), 28).split([16, 12], -1)
        return attend(q, torch.cat([k, rope.expand(-1, HEADS, -1, -1)], -1), v)


class LatentAbsorbed(Latent):
    """MLA as DeepSeek-V3's own inference code writes it: scores and sums in the latent space."""

    def core(self, q, latent, rope):
        weight = self.kv_b.weight.view(HEADS, 28, 12)
        nope, turned = q.transpose(1, 2).split([16, 8], -1)
        nope = torch.einsum("bshd,hdc->bshc", nope, weight[:, :16])
        scores = (torch.einsum("bshc,btc->bsht", nope, latent)
                  + torch.einsum("bshr,btr->bsht", turned, rope[:, 0])) * 24 ** -0.5
        scores = scores + causal(q.shape[2]).unsqueeze(1)
        summed = torch.einsum("bsht,btc->bshc", scores.softmax(-1, dtype=torch.float32).type_as(q), latent)
        return torch.einsum("bshc,hdc->bshd", summed, weight[:, 16:]).transpose(1, 2)


class LatentSharded(Row):
    """TPLA: each part of the latent has a softmax of its own, the parts' outputs are added."""

    def __init__(self):
        super().__init__(q=(WIDTH, HEADS * 24), kv=(WIDTH, 24), out=(HEADS * 12, WIDTH))

    def forward(self, x):
        q, c = self.heads(self.q(x), 24), self.kv(x)[:, None]
        parts = [attend(a, b, b) for a, b in zip(q.chunk(2, -1), c.chunk(2, -1), strict=True)]
        return self.out(self.merged(parts[0] + parts[1]))


class MultiMatrix(Row):
    """MFA: many wide query heads through a bottleneck, one key and one value of their width."""

    def __init__(self):
        super().__init__(q_a=(WIDTH, 20), q_b=(20, HEADS * 32), k=(WIDTH, 32), v=(WIDTH, 32), out=(HEADS * 32, WIDTH))
        self.norm = nn.RMSNorm(20)

    def forward(self, x):
        q = rotated(self.heads(self.q_b(self.norm(self.q_a(x))), 32))
        k, v = rotated(self.k(x)[:, None]), self.v(x)[:, None]
        return self.out(self.merged(attend(q, k, v)))


class Convolved(Row):
    """CCA with grouped keys: two causal convolutions over q and k, their mean, norm, temperature, delayed values."""

    def __init__(self):
        super().__init__(q=(WIDTH, 64), k=(WIDTH, 32), v=(WIDTH, 16), delayed=(WIDTH, 16), out=(64, WIDTH))
        self.depthwise = nn.Conv1d(96, 96, 2, groups=96)
        self.grouped = nn.Conv1d(96, 96, 2, groups=6)
        self.temperature = nn.Parameter(torch.rand(2))

    def forward(self, x):
        q, k = self.q(x), self.k(x)
        mixed = self.grouped(self.depthwise(F.pad(torch.cat([q, k], -1).mT, (2, 0)))).mT
        q, k = q.unflatten(-1, (4, 16)), k.unflatten(-1, (2, 16))
        mean = 0.5 * (q + k.repeat_interleave(2, 2))
        q = mixed[..., :64].unflatten(-1, (4, 16)) + mean
        k = mixed[..., 64:].unflatten(-1, (2, 16)) + mean.unflatten(2, (2, 2)).mean(3)
        q, k = (F.normalize(t, dim=-1) * 4.0 for t in (q, k))
        k = k * self.temperature[:, None]
        late = F.pad(self.delayed(x), (0, 0, 1, 0))[:, :-1]
        v = torch.cat([self.v(x), late], -1).unflatten(-1, (2, 16))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.out(self.merged(attend(rotated(q), rotated(k), v)))


class SparseQuery(Row):
    """SQA: fewer query heads than the width holds."""

    def __init__(self):
        super().__init__(q=(WIDTH, 32), k=(WIDTH, 16), v=(WIDTH, 16), out=(32, WIDTH))

    def forward(self, x):
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        return self.out(self.merged(attend(rotated(q), rotated(k), v)))


class Gated(Row):
    """Qwen3-Next: the query projection holds an output gate beside each head's query."""

    def __init__(self):
        super().__init__(q=(WIDTH, 128), k=(WIDTH, 32), v=(WIDTH, 32), out=(64, WIDTH))
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD), nn.RMSNorm(HEAD)

    def forward(self, x):
        q, gate = self.q(x).unflatten(-1, (-1, 32)).chunk(2, -1)
        q = rotated(self.q_norm(q).transpose(1, 2), 8)
        k = rotated(self.k_norm(self.k(x).unflatten(-1, (-1, 16))).transpose(1, 2), 8)
        out = self.merged(attend(q, k, self.heads(self.v(x))))
        return self.out(out * torch.sigmoid(gate.flatten(2)))


class GatedByHead(Row):
    """One gate per head and token."""

    def __init__(self):
        super().__init__(qkv=(WIDTH, 192), gate=(WIDTH, HEADS), out=(64, WIDTH))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(self.merged(out * torch.sigmoid(self.gate(x).mT[..., None])))


class KnockingHeads(Row):
    """KHA: one matrix, shared by all heads, behind each projection; `mlp`: a gated nonlinearity on the values."""

    def __init__(self, mlp=False):
        super().__init__(q=(WIDTH, 64), k=(WIDTH, 64), v=(WIDTH, 64), out=(64, WIDTH))
        self.knock_q, self.knock_k, self.knock_v = (nn.Parameter(torch.eye(16) + torch.randn(16, 16) / 9)
                                                    for _ in range(3))
        self.up, self.gate = (nn.Linear(16, 16, bias=False) if mlp else None for _ in range(2))

    def forward(self, x):
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        q, k, v = q @ self.knock_q, k @ self.knock_k, v @ self.knock_v
        if self.up is not None:
            v = self.up(v) * torch.sigmoid(self.gate(v))
        return self.out(self.merged(attend(rotated(q), rotated(k), v)))


class Parallel(Row):
    """GPT-J and Cohere: attention and feed-forward read one norm and are added to the residual together."""

    def __init__(self):
        super().__init__(q=(WIDTH, 64), k=(WIDTH, 64), v=(WIDTH, 64), out=(64, WIDTH), up=(WIDTH, 96), down=(96, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (self.heads(layer(y)) for layer in (self.q, self.k, self.v))
        return x + self.out(self.merged(attend(rotated(q, 8), rotated(k, 8), v))) + self.down(F.gelu(self.up(y)))


class Blockwise(Row):
    """Blockwise parallel transformer: attention and feed-forward, one block of queries after another."""

    def __init__(self):
        super().__init__(q=(WIDTH, 64), k=(WIDTH, 64), v=(WIDTH, 64), up=(64, 96), down=(96, WIDTH))

    def forward(self, x):
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        blocks = []
        for rows in q.split(11, 2):
            out = self.merged((rows @ k.mT * 0.25).softmax(-1) @ v)
            blocks.append(out + self.down(F.gelu(self.up(out))))
        return torch.cat(blocks, 1)


class LowRank(Row):
    """Queries and keys projected on a common basis of fewer channels."""

    def __init__(self):
        super().__init__(q=(WIDTH, 64), k=(WIDTH, 64), v=(WIDTH, 64), out=(64, WIDTH))
        self.register_buffer("basis", torch.linalg.qr(torch.randn(HEADS, 16, 16)).Q[..., :6].contiguous())

    def forward(self, x):
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        scores = (q @ self.basis) @ (k @ self.basis).mT * 0.25
        return self.out(self.merged((scores + causal(x.shape[1])).softmax(-1) @ v))


LATENT = {"scale": 24 ** -0.5, "mask": "causal", "E": 24}
CAUSAL = {"scale": 0.25, "mask": "causal", "E": 16}
ENTRIES = (
    module(GroupedTied, {**CAUSAL, "group": 2, "Ev": 16}, X),
    module(GroupedLatent, {**LATENT, "Ev": 16}, X),
    module(Latent, {**LATENT, "Ev": 12}, X),
    module(LatentAbsorbed, {**LATENT, "E": 20, "Ev": 12, "group": 4, "bias": False}, X),
    module(LatentSharded, {"scale": 12 ** -0.5, "mask": "causal", "group": 4}, X, regions=2),
    module(MultiMatrix, {"scale": 32 ** -0.5, "mask": "causal", "group": 4, "E": 32}, X),
    module(Convolved, {**CAUSAL, "group": 2}, X),
    module(SparseQuery, {**CAUSAL, "Hq": 2, "H": 1}, X),
    module(Gated, {**CAUSAL, "group": 2}, X),
    module(GatedByHead, CAUSAL, X),
    module(KnockingHeads, CAUSAL, X),
    module(lambda: KnockingHeads(mlp=True), CAUSAL, X, "KnockingHeadsNonlinear"),
    module(Parallel, CAUSAL, X),
    module(Blockwise, {"scale": 0.25, "mask": "none"}, X, regions=3),
    module(LowRank, {"scale": 0.25, "mask": "causal", "E": any_of(6, 16)}, X),
    *SCORES,
)

# Row of family A -> the entries that spell it. A12 and A29 stand for what a written model computes; A18 is a policy.
ROWS: dict[str, tuple[str, ...]] = {
    "A1": ("product_matmul", "sdpa_plain", "flex_plain", "dropout_eval"),
    "A2": ("softmax_by_hand_with_max",),
    "A3": ("Blockwise",),
    "A4": ("sdpa_is_causal", "output_fp32_from_bf16"),
    "A5": ("sdpa_is_causal",),
    "A6": ("row_bound",),
    "A7": ("mqa_broadcast", "mqa_expand", "mqa_rows"),
    "A8": ("gqa_enable", "gqa_expand_reshape", "gqa_repeat_interleave"),
    "A9": ("GroupedTied",),
    "A10": ("GroupedLatent",),
    "A11": ("Latent", "LatentAbsorbed", "mla_concatenated", "mla_sdpa", "mla_sum_of_products"),
    "A12": ("LatentSharded",),
    "A13": ("MultiMatrix",),
    "A14": ("Convolved",),
    "A15": ("SparseQuery",),
    "A16": ("Gated", "GatedByHead", "gate_output"),
    "A17": ("sink_column", "sink_column_first", "sink_sigmoid", "sink_log_sum"),
    "A18": ("always_kept_prefix",),
    "A19": ("softcap_tanh", "softcap_without_mask", "flex_softcap"),
    "A20": ("norm_rms", "norm_cosine"),
    "A21": ("KnockingHeads", "KnockingHeadsNonlinear"),
    "A22": ("lucid",),
    "A23": ("relative_with_convolution", "shift_by_slices", "disentangled", "shaw", "bias_transformer_xl"),
    "A25": ("weights_shared", "weights_shared_in_sequence"),
    "A29": ("LowRank",),
    "A31": ("Parallel",),
    "A32": ("rotary", "Latent", "Parallel", "pieces_merged_by_sums"),
    "A33": ("pages", "cache_concatenated", "cache_static_decode", "cache_static_prefill"),
}

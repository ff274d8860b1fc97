"""Spellings of grouped heads, latent heads, biases, sinks, softcap, norms and gates."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tests.gallery_entry import NEG, any_of, bshd, given, ids, qkv, spell, tensors

GROUPED = {"mask": "none", "scale": 0.25, "group": 2, "E": 16}
BIASED = {"bias": True, "scale": 0.25}


def causal(q, k):
    """End-aligned causal mask of zeros and finfo.min."""
    i, j = ids(k.shape[-2])
    return torch.where(j <= i, 0.0, NEG)[-q.shape[-2]:]


# Grouped and shared heads

def gqa_enable(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def gqa_enable_for_keys_alone(q, k, v):
    return F.scaled_dot_product_attention(q, k, v.repeat(1, 2, 1, 1), enable_gqa=True)


def gqa_enable_for_one_token(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def one_head_one_token(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def gqa_repeat_interleave(q, k, v):
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    return (q @ k.mT * 0.25).softmax(-1) @ v


def repeat_kv(x, times):
    """transformers' repeat_kv."""
    B, Hk, S, E = x.shape
    return x[:, :, None].expand(B, Hk, times, S, E).reshape(B, Hk * times, S, E)


def gqa_expand_reshape(q, k, v):
    k, v = repeat_kv(k, 2), repeat_kv(v, 2)
    probs = F.softmax(q @ k.transpose(2, 3) * 0.25 + causal(q, k), -1, dtype=torch.float32).to(q.dtype)
    return F.dropout(probs, p=0.0, training=False) @ v


def gqa_expand_before_heads_move(q, k, v):
    """(B, S, Hk, E) repeated on axis 3, then heads moved forward (Falcon, ChatGLM)."""
    B, S, Hk, _E = k.shape
    k, v = (x.unsqueeze(3).expand(B, S, Hk, 2, x.shape[-1]).reshape(B, S, Hk * 2, -1) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (q @ k.mT * 0.25).softmax(-1) @ v


def gqa_five_dims(q, k, v):
    B, H, L, E = q.shape
    Hk = k.shape[1]
    grouped = q.view(B, Hk, H // Hk, L, E)
    scores = grouped @ k.unsqueeze(2).transpose(-1, -2) * 0.25
    return (scores.softmax(-1) @ v.unsqueeze(2)).reshape(B, H, L, -1)


def gqa_five_dims_einsum(q, k, v):
    _B, _H, _L, _E = q.shape
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bkgle,bkse->bkgls", grouped, k) * 0.25
    return torch.einsum("bkgls,bksv->bkglv", scores.softmax(-1), v).flatten(1, 2)


def gqa_group_in_rows(q, k, v):
    """Query heads of one group stacked along the query axis."""
    B, H, L, E = q.shape
    rows = q.reshape(B, k.shape[1], -1, E)
    return ((rows @ k.mT * 0.25).softmax(-1) @ v).reshape(B, H, L, -1)


def gqa_tiled(q, k, v):
    """`repeat` deals key heads out in turn: query head h uses key head h % Hk, not h // 2."""
    k, v = (x.repeat(1, 2, 1, 1) for x in (k, v))
    return (q @ k.mT * 0.25).softmax(-1) @ v


def mqa_broadcast(q, k, v):
    return (q @ k.mT * 0.25).softmax(-1) @ v


def mqa_expand(q, k, v):
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def mqa_rows(q, k, v):
    """GPT-BigCode: (B, H*L, E) rows against one key head."""
    B, H, L, E = q.shape
    scores = torch.bmm(q.reshape(B, H * L, E), k[:, 0].transpose(1, 2)).view(B, H, L, -1) * 0.25
    probs = scores.softmax(-1).view(B, H * L, -1)
    return torch.bmm(probs, v[:, 0]).view(B, H, L, -1)


# Latent heads (MLA): scores from a position-free and a rotary part

def mla_concatenated(q_nope, q_rope, k_nope, k_rope, v):
    q = torch.cat([q_nope, q_rope], -1)
    k = torch.cat([k_nope, k_rope.expand(-1, k_nope.shape[1], -1, -1)], -1)
    probs = (q @ k.mT * 24 ** -0.5 + causal(q, k)).softmax(-1)
    return probs @ v


def mla_sum_of_products(q_nope, q_rope, k_nope, k_rope, v):
    scores = q_nope @ k_nope.mT + q_rope @ k_rope.mT
    return (scores * 24 ** -0.5).softmax(-1) @ v


def mla_sdpa(q_nope, q_rope, k_nope, k_rope, v):
    q = torch.cat([q_nope, q_rope], -1)
    k = torch.cat([k_nope, k_rope.expand_as(q_rope)], -1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# Softcap, biases

def softcap_tanh(q, k, v):
    scores = q @ k.mT * 0.25
    scores = torch.tanh(scores / 20.0) * 20.0
    return (scores + causal(q, k)).softmax(-1) @ v


def softcap_without_mask(q, k, v):
    return (5.0 * torch.tanh(q @ k.mT * 0.25 / 5.0)).softmax(-1) @ v


def bias_alibi(q, k, v):
    H, i_j = q.shape[1], ids(q.shape[-2])
    slopes = 2.0 ** (-8.0 * torch.arange(1, H + 1) / H)
    distance = (i_j[1] - i_j[0]).float()
    return (q @ k.mT * 0.25 + slopes[:, None, None] * distance + causal(q, k)).softmax(-1) @ v


def bias_alibi_baddbmm(q, k, v, slopes):
    """BLOOM: the bias enters as the addend of baddbmm, the mask by masked_fill."""
    B, H, L, _E = q.shape
    alibi = (slopes[:, None] * torch.arange(k.shape[-2])).repeat(B, 1)[:, None]
    q, k, v = (x.reshape(B * H, L, -1) for x in (q, k, v))
    scores = torch.baddbmm(alibi, q, k.mT, beta=1.0, alpha=0.25).view(B, H, L, L)
    drop = torch.ones(L, L, dtype=torch.bool).triu(1)
    probs = scores.masked_fill(drop, NEG).softmax(-1).view(B * H, L, L)
    return torch.bmm(probs, v).view(B, H, L, -1)


def bias_learned(q, k, v, bias):
    return (q @ k.mT * 0.25 + bias).softmax(-1) @ v


def bias_learned_in_place(q, k, v, bias):
    scores = q @ k.mT * 0.25
    scores += bias
    return scores.softmax(-1) @ v


def bias_before_scale(q, k, v, bias):
    """(s + b) * c is not s * c + b."""
    return ((q @ k.mT + bias) * 0.25).softmax(-1) @ v


def bias_through_sdpa(q, k, v, bias):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias + causal(q, k))


def bias_relative_table(q, k, v, table):
    """Swin and LeViT: a table indexed by the distance, one row per head."""
    i, j = ids(q.shape[-2])
    return (q @ k.mT * 0.25 + table[:, i - j + q.shape[-2] - 1]).softmax(-1) @ v


def t5_bucket(distance, buckets=32, longest=128):
    """T5's bidirectional relative position bucket."""
    half = buckets // 2
    side, distance = (distance > 0).long() * half, distance.abs()
    exact = half // 2
    steps = torch.log(distance.float().clamp(min=1) / exact) / math.log(longest / exact) * (half - exact)
    return side + torch.where(distance < exact, distance, (exact + steps.long()).clamp(max=half - 1))


def bias_t5(q, k, v, table):
    i, j = ids(q.shape[-2])
    bias = F.embedding(t5_bucket(j - i), table).permute(2, 0, 1)[None]
    scores = torch.matmul(q, k.transpose(3, 2))
    scores += bias
    return F.softmax(scores.float(), dim=-1).type_as(scores) @ v


def bias_transformer_xl(q, k, v, position, u, w):
    """Two score products summed; the second is shifted into place by pad, view, slice."""
    L = q.shape[-2]
    moving = F.pad((q + w) @ position.mT, (1, 0))
    moving = moving.view(*moving.shape[:2], L + 1, L)[:, :, 1:]
    return (((q + u) @ k.mT + moving) * 0.25 + causal(q, k)).softmax(-1) @ v


# Sinks

def sink_column(q, k, v, sinks):
    """gpt-oss: one more logit per head takes part in the softmax, then its column is dropped."""
    scores = q @ k.mT * 0.25 + causal(q, k)
    column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    logits = torch.cat([scores, column], dim=-1)
    logits = logits - logits.max(dim=-1, keepdim=True).values
    return F.softmax(logits, dim=-1, dtype=logits.dtype)[..., :-1] @ v


def sink_column_first(q, k, v, sinks):
    column = sinks.view(1, -1, 1, 1).expand(q.shape[0], q.shape[1], q.shape[2], 1)
    return torch.cat([column, q @ k.mT * 0.25], -1).softmax(-1)[..., 1:] @ v


def sink_sigmoid(q, k, v, sinks):
    scores = q @ k.mT * 0.25 + causal(q, k)
    keep = torch.sigmoid(torch.logsumexp(scores, -1, keepdim=True) - sinks[:, None, None])
    return scores.softmax(-1) @ v * keep


def sink_log_sum(q, k, v, sinks):
    scores = q @ k.mT * 0.25
    total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), sinks[:, None, None])
    return (scores - total).exp() @ v


# Norms and gates around the core

def norm_rms(q, k, v, q_weight, k_weight):
    q, k = F.rms_norm(q, q.shape[-1:], q_weight), F.rms_norm(k, k.shape[-1:], k_weight)
    return (q @ k.mT * 0.25 + causal(q, k)).softmax(-1) @ v


def norm_cosine(q, k, v, logit_scale):
    """Swin v2: cosine scores times a learned scale per head."""
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    return (scores * torch.clamp(logit_scale, max=math.log(100.0)).exp()).softmax(-1) @ v


def gate_output(q, k, v, gate):
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out * torch.sigmoid(gate)


def rotary(q, k, v):
    angle = torch.arange(q.shape[-2])[:, None] * 10000 ** (-torch.arange(0, 16, 2) / 16)
    cos, sin = (f(torch.cat([angle, angle], -1)) for f in (torch.cos, torch.sin))
    q, k = (x * cos + torch.cat([-x[..., 8:], x[..., :8]], -1) * sin for x in (q, k))
    return (q @ k.mT * 0.25 + causal(q, k)).softmax(-1) @ v


GQA = qkv(Hk=2)
MLA = tensors((2, 4, 33, 16), (2, 4, 33, 8), (2, 4, 33, 16), (2, 1, 33, 8), (2, 4, 33, 12))
LATENT = {"scale": 24 ** -0.5, "E": 24, "Ev": 12}
SINKS = {"parameters": {"sinks": lambda: torch.randn(4)}}
SUNK = {"sink": True, "scale": 0.25}
BIAS = {"parameters": {"bias": lambda: torch.randn(4, 33, 33)}}
ENTRIES = (
    spell(gqa_enable, GROUPED, GQA),
    spell(gqa_enable_for_keys_alone, {"mask": "none"}, GQA),
    spell(gqa_enable_for_one_token, {"mask": "none", "L": 1}, qkv(B=1, L=1, S=33, Hk=1)),
    spell(one_head_one_token, {"mask": "none", "Hq": 1}, qkv(B=1, H=1, L=1, S=33)),
    spell(gqa_repeat_interleave, GROUPED, GQA),
    spell(gqa_expand_reshape, {**GROUPED, "mask": "causal", "dropout": 0.0}, GQA),
    spell(gqa_expand_before_heads_move, GROUPED, bshd(Hk=2)),
    spell(gqa_five_dims, {"mask": "none", "scale": 0.25}, GQA),
    spell(gqa_five_dims_einsum, {"mask": "none", "scale": 0.25}, qkv(L=70, Hk=2, Ev=24)),
    spell(gqa_group_in_rows, {"mask": "none", "scale": 0.25}, GQA),
    spell(gqa_tiled, {"scale": 0.25}, GQA),
    spell(mqa_broadcast, {**GROUPED, "group": 4}, qkv(Hk=1)),
    spell(mqa_expand, {**GROUPED, "mask": "causal", "group": 4}, qkv(L=70, Hk=1)),
    spell(mqa_rows, {"mask": "none", "scale": 0.25}, qkv(Hk=1)),
    spell(mla_concatenated, {**LATENT, "mask": "causal"}, MLA),
    spell(mla_sum_of_products, {**LATENT, "mask": "none", "bias": False}, MLA),
    spell(mla_sdpa, {**LATENT, "mask": "causal"}, MLA),
    spell(softcap_tanh, {"softcap": 20.0, "mask": "causal"}),
    spell(softcap_without_mask, {"softcap": 5.0, "mask": "none"}),
    spell(bias_alibi, {**BIASED, "mask": "causal"}),
    spell(bias_alibi_baddbmm, {**BIASED, "mask": "causal"},
          buffers={"slopes": lambda: 2.0 ** -torch.arange(1, 5)}),
    spell(bias_learned, {**BIASED, "mask": "none"}, **BIAS),
    spell(bias_learned_in_place, {**BIASED, "mask": "none"}, **BIAS),
    spell(bias_before_scale, {"bias": True, "mask": "none"}, **BIAS),
    spell(bias_through_sdpa, {}, **BIAS),
    spell(bias_relative_table, BIASED, parameters={"table": lambda: torch.randn(4, 65)}),
    spell(bias_t5, {"bias": True, "scale": 1.0}, parameters={"table": lambda: torch.randn(32, 4)}),
    spell(bias_transformer_xl, {"bias": True, "mask": any_of("causal")},
          given(qkv(), lambda: torch.randn(1, 4, 33, 16)),
          parameters={"u": lambda: torch.randn(4, 1, 16), "w": lambda: torch.randn(4, 1, 16)}),
    spell(sink_column, {**SUNK, "mask": "causal"}, **SINKS),
    spell(sink_column_first, {**SUNK, "mask": "none"}, **SINKS),
    spell(sink_sigmoid, {**SUNK, "mask": "causal"}, **SINKS),
    spell(sink_log_sum, {**SUNK, "mask": "none"}, **SINKS),
    spell(norm_rms, {"scale": 0.25, "mask": "causal"},
          parameters={"q_weight": lambda: torch.randn(16), "k_weight": lambda: torch.randn(16)}),
    spell(norm_cosine, {"mask": "none"}, parameters={"logit_scale": lambda: torch.randn(4, 1, 1)}),
    spell(gate_output, {"mask": "causal", "scale": 0.25}, given(qkv(), lambda: torch.randn(2, 4, 33, 16))),
    spell(rotary, {"mask": "causal", "scale": 0.25}),
)

"""Spellings of the two products, the scale, the softmax and the layout; no masks beyond causal."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tests.gallery_entry import any_of, bshd, given, qkv, spell

PLAIN = {
    "mask": "none", "scale": 0.25, "group": 1, "bias": False, "sink": False, "dropout": 0.0, "softcap": None,
}
CAUSAL = {**PLAIN, "mask": "causal"}
UNSCALED = {**PLAIN, "scale": 1.0}


# SDPA

def sdpa_plain(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def sdpa_is_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_scale(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=0.3, dropout_p=0.0)


def sdpa_bool_mask(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def sdpa_float_mask(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def sdpa_tril_mask(q, k, v):
    keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def sdpa_bshd(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def sdpa_three_dims(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# Products

def product_matmul(q, k, v):
    return torch.matmul(F.softmax(torch.matmul(q, k.transpose(-2, -1)) * 0.25, dim=-1), v)


def product_at_operator(q, k, v):
    return (q @ k.mT * 0.25).softmax(-1) @ v


def product_bmm_heads_merged(q, k, v):
    B, H, L, _E = q.shape
    q, k, v = (x.reshape(B * H, -1, x.shape[-1]) for x in (q, k, v))
    probs = torch.bmm(q * 0.25, k.transpose(1, 2)).softmax(dim=-1)
    return torch.bmm(probs, v).view(B, H, L, -1)


def product_baddbmm(q, k, v):
    B, H, L, _E = q.shape
    q, k, v = (x.reshape(B * H, -1, x.shape[-1]) for x in (q, k, v))
    empty = torch.empty(B * H, L, k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=0.25)
    return torch.bmm(scores.softmax(-1), v).reshape(B, H, L, -1)


def product_einsum_bhld(q, k, v):
    scores = torch.einsum("bhld,bhsd->bhls", q, k) * 0.25
    return torch.einsum("bhls,bhsd->bhld", scores.softmax(-1), v)


def product_einsum_blhd(q, k, v):
    scores = torch.einsum("blhd,bshd->bhls", q, k) / 4
    return torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v)


def product_einsum_ellipsis(q, k, v):
    scores = torch.einsum("...id,...jd->...ij", q, k) * 0.25
    return torch.einsum("...ij,...jd->...id", scores.softmax(-1), v)


def product_einsum_query_last(q, k, v):
    """The scores lie key-major, so the softmax runs over axis 2 and is still over the keys."""
    scores = torch.einsum("bhld,bhsd->bhsl", q, k) * 0.25
    return torch.einsum("bhsl,bhsd->bhld", scores.softmax(2), v)


def product_keys_first(q, k, v):
    probs = (k @ q.mT * 0.25).softmax(-2)
    return probs.mT @ v


def product_value_transposed(q, k, v):
    probs = (q @ k.mT * 0.25).softmax(-1)
    return (v.mT @ probs.mT).mT


def product_broadcast_sum(q, k, v):
    scores = (q[..., :, None, :] * k[..., None, :, :]).sum(-1) * 0.25
    return scores.softmax(-1) @ v


def product_no_batch(q, k, v):
    return (q[0] @ k[0].mT * 0.25).softmax(-1) @ v[0]


def product_two_dims(q, k, v):
    return torch.mm(torch.mm(q[0, 0], k[0, 0].t()).mul(0.25).softmax(1), v[0, 0])


def product_key_detached(q, k, v):
    return (q @ k.detach().mT * 0.25).softmax(-1) @ v


# Scale

def scale_on_query(q, k, v):
    return ((q * 0.25) @ k.mT).softmax(-1) @ v


def scale_on_key(q, k, v):
    return (q @ (k * 0.25).transpose(2, 3)).softmax(-1) @ v


def scale_on_key_transposed(q, k, v):
    return (q @ (k.transpose(2, 3) * 0.25)).softmax(-1) @ v


def scale_on_both(q, k, v):
    root = math.sqrt(math.sqrt(1 / q.shape[-1]))
    return ((q * root) @ (k * root).mT).softmax(-1) @ v


def scale_division(q, k, v):
    return (q @ k.mT / math.sqrt(q.size(-1))).softmax(-1) @ v


def scale_division_by_tensor(q, k, v):
    return (q @ k.mT / torch.sqrt(torch.tensor(q.size(-1), dtype=q.dtype))).softmax(-1) @ v


def scale_full_tensor(q, k, v):
    return (q @ k.mT / torch.full([], 4.0, dtype=q.dtype)).softmax(-1) @ v


def scale_buffer(q, k, v, factor):
    return (q @ k.mT * factor).softmax(-1) @ v


def scale_twice(q, k, v):
    return ((q / 8) @ k.mT * 2).softmax(-1) @ v


def scale_none(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


def scale_in_place(q, k, v):
    scores = q @ k.mT
    scores /= 4
    return scores.softmax(-1) @ v


def scale_by_layer_index(q, k, v):
    """GPT-2's scale_attn_by_inverse_layer_idx with CogView's subtraction of the maximum before the scale."""
    scores = q @ k.mT / 8
    scores = (scores - scores.amax(-1, keepdim=True)) * 2
    return scores.softmax(-1) @ v


# Softmax

def softmax_fp32_dtype(q, k, v):
    probs = F.softmax(q @ k.mT * 0.25, dim=-1, dtype=torch.float32).to(q.dtype)
    return probs @ v


def softmax_fp32_float(q, k, v):
    return (q @ k.mT * 0.25).float().softmax(-1).to(v.dtype) @ v


def softmax_type_as(q, k, v):
    return F.softmax((q @ k.mT / 4).float(), dim=-1).type_as(q) @ v


def softmax_by_hand(q, k, v):
    weights = torch.exp(q @ k.mT * 0.25)
    return (weights / weights.sum(-1, keepdim=True)) @ v


def softmax_by_hand_with_max(q, k, v):
    scores = q @ k.mT * 0.25
    weights = (scores - scores.max(dim=-1, keepdim=True).values).exp()
    return (weights / weights.sum(dim=-1, keepdim=True)) @ v


def softmax_by_hand_detached_max(q, k, v):
    scores = q @ k.mT * 0.25
    weights = torch.exp(scores - scores.detach().amax(-1, keepdim=True))
    return torch.div(weights, weights.sum(-1).unsqueeze(-1)) @ v


def softmax_normalised_late(q, k, v):
    """The division by the sum comes after the second product, as in flash attention."""
    scores = q @ k.mT * 0.25
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights @ v) / weights.sum(-1, keepdim=True)


def softmax_logsumexp(q, k, v):
    scores = q @ k.mT * 0.25
    return torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True)) @ v


def softmax_exp_of_log_softmax(q, k, v):
    return F.log_softmax(q @ k.mT * 0.25, -1).exp() @ v


# Dropout, layout, casts

def dropout_zero(q, k, v):
    return F.dropout((q @ k.mT * 0.25).softmax(-1), p=0.0, training=True) @ v


def dropout_eval(q, k, v):
    return F.dropout((q @ k.mT * 0.25).softmax(-1), p=0.3, training=False) @ v


def layout_permuted(q, k, v):
    q, v = (x.permute(0, 2, 1, 3) for x in (q, v))
    k = k.permute(0, 2, 3, 1)
    out = (q @ k * 0.25).softmax(-1) @ v
    return out.permute(0, 2, 1, 3).contiguous().flatten(2)


def layout_sequence_first(q, k, v):
    """(L, B, H, E), as fairseq and Megatron keep it."""
    L, B, H, _E = q.shape
    q, k, v = (x.reshape(x.shape[0], B * H, -1).transpose(0, 1) for x in (q, k, v))
    out = (torch.bmm(q, k.transpose(1, 2)) * 0.25).softmax(-1) @ v
    return out.transpose(0, 1).reshape(L, B, -1)


def layout_packed_projection(qkv):
    B, L, _ = qkv.shape
    q, k, v = qkv.view(B, L, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
    out = (q @ k.transpose(-2, -1) * 0.25).softmax(dim=-1) @ v
    return out.transpose(1, 2).reshape(B, L, 64)


def layout_views(q, k, v):
    B, H, L, E = q.shape
    scores = torch.bmm(q.view(-1, L, E), k.view(-1, k.shape[2], E).transpose(1, 2))
    scores = scores.view(B, H, L, -1) * 0.25
    probs = scores.softmax(-1).view(B * H, L, -1)
    return torch.bmm(probs, v.view(B * H, -1, v.shape[-1])).view(B, H, L, -1)


def output_cast(q, k, v):
    return ((q @ k.mT * 0.25).softmax(-1) @ v).to(torch.bfloat16)


def output_fp32_from_bf16(q, k, v):
    return ((q.float() @ k.float().mT) * 0.25).softmax(-1) @ v.float()


def cross_lengths(q, k, v):
    return (q @ k.mT * 0.25).softmax(-1) @ v


def one_query(q, k, v):
    return (q @ k.mT * 0.25).softmax(-1) @ v


BF16 = {"train": False}
ENTRIES = (
    spell(sdpa_plain, PLAIN),
    spell(sdpa_is_causal, CAUSAL, qkv(L=70)),
    spell(sdpa_scale, {**PLAIN, "scale": 0.3}),
    spell(sdpa_bool_mask, {**PLAIN, "mask": "tensor"}, given(qkv(), lambda: torch.rand(2, 1, 33, 33) > 0.4)),
    spell(sdpa_float_mask, {"mask": any_of("tensor", "none")},
          given(qkv(), lambda: torch.randn(2, 4, 33, 33))),
    spell(sdpa_tril_mask, CAUSAL),
    spell(sdpa_bshd, {**PLAIN, "Ev": 24}, bshd(Ev=24)),
    spell(sdpa_three_dims, CAUSAL),
    spell(product_matmul, PLAIN, qkv(L=70)),
    spell(product_at_operator, PLAIN),
    spell(product_bmm_heads_merged, PLAIN),
    spell(product_baddbmm, PLAIN),
    spell(product_einsum_bhld, PLAIN),
    spell(product_einsum_blhd, PLAIN, bshd(S=70)),
    spell(product_einsum_ellipsis, PLAIN),
    spell(product_einsum_query_last, PLAIN, qkv(S=70)),
    spell(product_keys_first, PLAIN),
    spell(product_value_transposed, PLAIN),
    spell(product_broadcast_sum, {}, expect="values", regions=None),
    spell(product_no_batch, PLAIN),
    spell(product_two_dims, PLAIN),
    spell(product_key_detached, PLAIN),
    spell(scale_on_query, PLAIN),
    spell(scale_on_key, PLAIN),
    spell(scale_on_key_transposed, PLAIN),
    spell(scale_on_both, PLAIN),
    spell(scale_division, PLAIN),
    spell(scale_division_by_tensor, PLAIN),
    spell(scale_full_tensor, PLAIN),
    spell(scale_buffer, {**PLAIN, "scale": any_of(None, 1.0)}, buffers={"factor": lambda: torch.tensor(0.3)}),
    spell(scale_twice, PLAIN),
    spell(scale_none, UNSCALED),
    spell(scale_in_place, PLAIN),
    spell(scale_by_layer_index, PLAIN),
    spell(softmax_fp32_dtype, PLAIN, qkv(dtype=torch.bfloat16), **BF16),
    spell(softmax_fp32_float, PLAIN, qkv(dtype=torch.bfloat16), **BF16),
    spell(softmax_type_as, PLAIN),
    spell(softmax_by_hand, PLAIN),
    spell(softmax_by_hand_with_max, PLAIN),
    spell(softmax_by_hand_detached_max, PLAIN),
    spell(softmax_normalised_late, PLAIN),
    spell(softmax_logsumexp, PLAIN),
    spell(softmax_exp_of_log_softmax, PLAIN),
    spell(dropout_zero, PLAIN, training_mode=True),
    spell(dropout_eval, PLAIN),
    spell(layout_permuted, {**PLAIN, "Ev": 8}, bshd(Ev=8)),
    spell(layout_sequence_first, PLAIN, lambda: tuple(torch.randn(33, 2, 4, 16) for _ in range(3))),
    spell(layout_packed_projection, PLAIN, lambda: (torch.randn(2, 33, 192),)),
    spell(layout_views, PLAIN),
    spell(output_cast, PLAIN, train=False),
    spell(output_fp32_from_bf16, PLAIN, qkv(dtype=torch.bfloat16), **BF16),
    spell(cross_lengths, {**PLAIN, "Ev": 24}, qkv(S=70, Ev=24)),
    spell(one_query, PLAIN, qkv(L=1, S=70)),
)

"""Fused inference operators of torch.nn, written out so that the attention inside them is seen.

`nn.TransformerEncoderLayer` and `nn.MultiheadAttention` call one opaque operator on their fast path; each function here
computes the same from ATen, and stands in for it while the graph is retraced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

_SOURCE_MASK, _PADDING_MASK = 0, 1


def _broadcast(mask: torch.Tensor, mask_type: int | None) -> torch.Tensor:
    """The fast path's mask (True or -inf: masked out) against scores (B, H, L, S)."""
    if mask_type == _PADDING_MASK:
        return mask[:, None, None, :]
    return mask[None, None] if mask_type == _SOURCE_MASK else mask


def _self_attention(x: torch.Tensor, heads: int, qkv: tuple[torch.Tensor, torch.Tensor],
                    proj: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None,
                    mask_type: int | None) -> torch.Tensor:
    batch, length, width = x.shape
    q, k, v = F.linear(x, *qkv).view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
    scores = torch.matmul(q, k.transpose(-2, -1)) * (width // heads) ** -0.5
    if mask is not None:  # by hand: a row without keys is NaN there, where scaled_dot_product_attention gives 0
        mask = _broadcast(mask, mask_type)
        scores = scores.masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    out = torch.matmul(scores.softmax(-1), v)
    return F.linear(out.transpose(1, 2).reshape(batch, length, width), *proj)


def encoder_layer(src, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, use_gelu, norm_first, eps,
                  norm_weight_1, norm_bias_1, norm_weight_2, norm_bias_2, ffn_weight_1, ffn_bias_1, ffn_weight_2,
                  ffn_bias_2, mask=None, mask_type=None):
    """torch._transformer_encoder_layer_fwd in ATen. Shapes: src (B, L, embed_dim) -> the same."""
    def first(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    x = first(src) if norm_first else src
    x = src + _self_attention(x, num_heads, (qkv_weight, qkv_bias), (proj_weight, proj_bias), mask, mask_type)
    x = x if norm_first else first(x)
    y = F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps) if norm_first else x
    y = F.linear(y, ffn_weight_1, ffn_bias_1)
    y = F.linear(F.gelu(y) if use_gelu else F.relu(y), ffn_weight_2, ffn_bias_2)
    return x + y if norm_first else F.layer_norm(x + y, (embed_dim,), norm_weight_2, norm_bias_2, eps)


def native_attention(query, key, value, embed_dim, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias, mask=None,
                     need_weights=True, average_attn_weights=True, mask_type=None):
    """torch._native_multi_head_attention for self-attention without returned weights, else the operator itself."""
    if need_weights or query is not key or key is not value:
        return torch._native_multi_head_attention(
            query, key, value, embed_dim, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, need_weights,
            average_attn_weights, mask_type)
    out = _self_attention(query, num_head, (qkv_weight, qkv_bias), (proj_weight, proj_bias), mask, mask_type)
    return out, None


EXPANSIONS: dict[Any, Callable[..., Any]] = {
    torch._transformer_encoder_layer_fwd: encoder_layer,
    torch._native_multi_head_attention: native_attention,
}

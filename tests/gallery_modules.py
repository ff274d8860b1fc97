"""Whole modules: torch's own layers, FlexAttention calls, caches, blocks with projections, several cores."""
from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.gallery_entry import NEG, any_of, given, ids, module, qkv, spell, tensors

D_MODEL, HEADS = 64, 4
SELF = {"scale": 0.25, "mask": "none", "E": 16}
TOKENS = tensors((2, 33, D_MODEL))


# nn.MultiheadAttention and its relatives

class Multihead(nn.Module):
    """nn.MultiheadAttention in self attention; `returned` keeps the weights it computes."""

    def __init__(self, need_weights=False, returned=False, masked=None, batch_first=True):
        super().__init__()
        self.inner = nn.MultiheadAttention(D_MODEL, HEADS, batch_first=batch_first)
        self.need_weights, self.returned, self.masked = need_weights, returned, masked

    def forward(self, x, mask=None):
        masks = {self.masked: mask} if self.masked else {}
        out, weights = self.inner(x, x, x, need_weights=self.need_weights, **masks)
        return (out, weights) if self.returned else out


class MultiheadCausal(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(D_MODEL, HEADS, batch_first=True)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.inner(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


class MultiheadCross(nn.Module):
    """Other widths for key and value, so the projections are three separate weights."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(D_MODEL, HEADS, kdim=24, vdim=40, batch_first=True)

    def forward(self, x, key, value):
        return self.inner(x, key, value, need_weights=False)[0]


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.packed = nn.Parameter(torch.randn(3 * D_MODEL, D_MODEL) / 8)
        self.packed_bias = nn.Parameter(torch.randn(3 * D_MODEL))
        self.out = nn.Linear(D_MODEL, D_MODEL)

    def forward(self, x):
        x = x.transpose(0, 1)
        return F.multi_head_attention_forward(
            x, x, x, D_MODEL, HEADS, self.packed, self.packed_bias, None, None, False, 0.0,
            self.out.weight, self.out.bias, training=self.training, need_weights=False)[0]


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(D_MODEL, HEADS, 96, dropout=0.0, batch_first=True, **options)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False)

    def forward(self, x, padding):
        return self.inner(x, src_key_padding_mask=padding)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.TransformerDecoderLayer(D_MODEL, HEADS, 96, dropout=0.0, batch_first=True)

    def forward(self, x, memory):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.inner(x, memory, tgt_mask=mask, tgt_is_causal=True)


# FlexAttention (its CPU kernel runs forward only)

def keep_causal(b, h, i, j):
    return j <= i


def keep_window(b, h, i, j):
    return (j <= i) & (i - j < 8)


def cap(score, b, h, i, j):
    return 20.0 * torch.tanh(score / 20.0)


def distance(score, b, h, i, j):
    return score - 0.1 * (i - j)


def causal_by_score(score, b, h, i, j):
    return torch.where(j <= i, score, -float("inf"))


class Flex(nn.Module):
    def __init__(self, keep=None, score_mod=None, L=130, **options):
        super().__init__()
        self.block_mask = create_block_mask(keep, None, None, L, L, device="cpu") if keep else None
        self.score_mod, self.options = score_mod, options

    def forward(self, q, k, v):
        return flex_attention(q, k, v, self.score_mod, self.block_mask, **self.options)


# Caches

def cache_concatenated(q, k, v, past_k, past_v):
    k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
    return (q @ k.mT * 0.25).softmax(-1) @ v, k, v


def cache_prefill_continued(q, k, v, past_k, past_v):
    """Several new tokens after a cache: causal with an offset."""
    k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
    i = torch.arange(q.shape[2])[:, None] + past_k.shape[2]
    mask = torch.where(torch.arange(k.shape[2]) <= i, 0.0, NEG)
    return (q @ k.mT * 0.25 + mask).softmax(-1) @ v


class StaticCache(nn.Module):
    """Keys and values are written into preallocated buffers at `position`."""

    def __init__(self, length=48):
        super().__init__()
        self.register_buffer("keys", torch.zeros(2, HEADS, length, 16))
        self.register_buffer("values", torch.zeros(2, HEADS, length, 16))

    def forward(self, q, k, v, position):
        self.keys.index_copy_(2, position, k)
        self.values.index_copy_(2, position, v)
        keep = torch.arange(self.keys.shape[2]) <= position[:, None]
        scores = q @ self.keys.mT * 0.25
        return scores.masked_fill(~keep, NEG).softmax(-1) @ self.values


# Blocks with projections

class Attention(nn.Module):
    """A decoder's attention: grouped heads, causal, fp32 softmax, optional output gate."""

    def __init__(self, heads=HEADS, kv_heads=2, gated=False):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.query = nn.Linear(D_MODEL, heads * 16, bias=False)
        self.key = nn.Linear(D_MODEL, kv_heads * 16, bias=False)
        self.value = nn.Linear(D_MODEL, kv_heads * 16, bias=False)
        self.out = nn.Linear(heads * 16, D_MODEL, bias=False)
        self.gate = nn.Linear(D_MODEL, heads * 16) if gated else None

    def forward(self, x):
        B, L, _ = x.shape
        q = self.query(x).view(B, L, self.heads, 16).transpose(1, 2)
        k = self.key(x).view(B, L, self.kv_heads, 16).transpose(1, 2)
        v = self.value(x).view(B, L, self.kv_heads, 16).transpose(1, 2)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        i, j = ids(L)
        scores = (q @ k.transpose(2, 3)) * 16 ** -0.5 + torch.where(j <= i, 0.0, NEG)
        out = (F.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2).reshape(B, L, -1)
        if self.gate is not None:
            out = out * torch.sigmoid(self.gate(x))
        return self.out(out)


class Block(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(D_MODEL), Attention(**options)
        self.norm_after = nn.LayerNorm(D_MODEL)
        self.up, self.down = nn.Linear(D_MODEL, 96), nn.Linear(96, D_MODEL)

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(F.gelu(self.up(self.norm_after(x))))


class TwoBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class SharedBlock(nn.Module):
    """One layer's weights used three times (ALBERT)."""

    def __init__(self):
        super().__init__()
        self.layer = Block()

    def forward(self, x):
        return self.layer(self.layer(self.layer(x)))


class LearnedQueries(nn.Module):
    """The queries come from parameters only (Perceiver, DETR)."""

    def __init__(self):
        super().__init__()
        self.latents, self.key_value = nn.Parameter(torch.randn(5, D_MODEL)), nn.Linear(D_MODEL, 2 * D_MODEL)

    def forward(self, x):
        k, v = self.key_value(x).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (HEADS, 16)).transpose(-3, -2) for t in (self.latents, k, v))
        return (q @ k.mT * 0.25).softmax(-1) @ v


# Several cores in one module

def cores_difference(q, k, v, q_other, k_other):
    first = (q @ k.mT * 0.25).softmax(-1) @ v
    return first - 0.5 * ((q_other @ k_other.mT * 0.25).softmax(-1) @ v)


def cores_self_then_cross(q, k, v, memory):
    out = F.scaled_dot_product_attention(q, k, v)
    return (out @ memory.mT * 0.25).softmax(-1) @ memory


def cores_in_a_loop(q, k, v):
    """One core per image, as vision models with packed images do."""
    return torch.cat([(a @ b.mT * 0.25).softmax(-1) @ c
                      for a, b, c in zip(*(x.split(10, dim=2) for x in (q, k, v)), strict=True)], dim=2)


# Probabilities that somebody else reads: nothing may be rewritten without them

def weights_returned(q, k, v):
    probs = (q @ k.mT * 0.25).softmax(-1)
    return probs @ v, probs


def weights_averaged(q, k, v):
    probs = (q @ k.mT * 0.25).softmax(-1)
    return probs @ v, probs.mean(1)


def weights_mixed_over_heads(q, k, v, mix):
    """Talking heads: the probabilities are mixed across heads."""
    probs = (q @ k.mT * 0.25).softmax(-1)
    return torch.einsum("bhls,hg->bgls", probs, mix) @ v


def weights_difference(q, k, v, q_other, k_other):
    """Differential attention with the difference taken between the probabilities."""
    probs = (q @ k.mT * 0.25).softmax(-1) - 0.5 * (q_other @ k_other.mT * 0.25).softmax(-1)
    return probs @ v


def multihead(name, label, *, mask=None, **options):
    inputs = given(TOKENS, mask) if mask else TOKENS
    returned = options.get("returned", False)
    return module(partial(Multihead, **options), {} if returned else {**SELF, "mask": label}, inputs, name,
                  expect="refused" if returned else "lifted", regions=None if returned else 1)


def padding():
    return torch.arange(33) >= torch.tensor([33, 12])[:, None]


FLEX = qkv(L=130)
DECODE = given(qkv(L=1), lambda: torch.randn(2, 4, 33, 16), lambda: torch.randn(2, 4, 33, 16))
BLOCK = {"scale": 0.25, "mask": "causal", "group": 2}
TWO_CORES = given(qkv(), lambda: torch.randn(2, 4, 33, 16), lambda: torch.randn(2, 4, 33, 16))
ENTRIES = (
    multihead("multihead", "none"),
    multihead("multihead_sequence_first", "none", batch_first=False),
    multihead("multihead_weights_discarded", "none", need_weights=True),
    multihead("multihead_weights_returned", "none", need_weights=True, returned=True),
    multihead("multihead_key_padding", any_of("padding", "tensor"), mask=padding, masked="key_padding_mask"),
    multihead("multihead_bool_mask", "tensor", mask=lambda: torch.rand(33, 33) > 0.7, masked="attn_mask"),
    multihead("multihead_float_mask", any_of("tensor", "none"), masked="attn_mask",
              mask=lambda: torch.randn(33, 33)),
    module(MultiheadCausal, {**SELF, "mask": "causal"}, TOKENS),
    module(MultiheadCross, SELF, tensors((2, 33, D_MODEL), (2, 70, 24), (2, 70, 40))),
    module(Functional, SELF, TOKENS),
    module(encoder_layer, SELF, TOKENS, "encoder_layer_eval"),
    module(encoder_layer, SELF, TOKENS, "encoder_layer_train", training_mode=True),
    module(partial(encoder_layer, norm_first=True), SELF, TOKENS, "encoder_layer_norm_first"),
    module(Encoder, {**SELF, "mask": any_of("padding", "tensor")}, given(TOKENS, padding), regions=2),
    module(Decoder, {"scale": 0.25}, tensors((2, 33, D_MODEL), (2, 70, D_MODEL)), regions=2),
    module(Flex, {"scale": 0.25, "mask": "none"}, FLEX, "flex_plain", train=False),
    module(partial(Flex, keep_causal), {"mask": "causal"}, FLEX, "flex_causal", train=False),
    module(partial(Flex, keep_window, scale=0.5), {"mask": "window", "scale": 0.5}, FLEX, "flex_window",
           train=False),
    module(partial(Flex, None, cap), {"softcap": 20.0, "mask": "none"}, FLEX, "flex_softcap", train=False),
    module(partial(Flex, keep_causal, distance), {"mask": "causal", "bias": True}, FLEX, "flex_alibi",
           train=False),
    module(partial(Flex, None, causal_by_score), {"mask": any_of("causal", "predicate")}, FLEX,
           "flex_mask_by_score", train=False),
    module(partial(Flex, enable_gqa=True), {"group": 2, "mask": "none"}, qkv(L=130, Hk=2), "flex_gqa",
           train=False),
    spell(cache_concatenated, {"mask": "none", "scale": 0.25}, DECODE),
    spell(cache_prefill_continued, {"mask": any_of("causal", "predicate"), "scale": 0.25},
          given(qkv(L=5), lambda: torch.randn(2, 4, 33, 16), lambda: torch.randn(2, 4, 33, 16))),
    module(StaticCache, {"mask": any_of("causal", "predicate", "padding"), "scale": 0.25},
           given(qkv(L=1), lambda: torch.tensor([20])), "cache_static_decode", train=False),
    module(StaticCache, {"mask": any_of("causal", "predicate"), "scale": 0.25},
           given(qkv(L=5), lambda: torch.arange(20, 25)), "cache_static_prefill", train=False),
    module(Attention, BLOCK, TOKENS, "projected"),
    module(partial(Attention, gated=True), BLOCK, TOKENS, "projected_gated"),
    module(Block, BLOCK, TOKENS, "block_residual"),
    module(TwoBlocks, BLOCK, TOKENS, "two_blocks", regions=2),
    module(SharedBlock, BLOCK, TOKENS, "shared_block", regions=3),
    module(LearnedQueries, {"mask": "none", "scale": 0.25}, TOKENS, "learned_queries"),
    spell(cores_difference, {"mask": "none", "scale": 0.25}, TWO_CORES, regions=2),
    spell(cores_self_then_cross, {"mask": "none", "scale": 0.25},
          given(qkv(), lambda: torch.randn(2, 4, 70, 16)), regions=2),
    spell(cores_in_a_loop, {"mask": "none", "scale": 0.25}, regions=4),
    spell(weights_returned, {}, regions=None, expect="refused"),
    spell(weights_averaged, {}, regions=None, expect="refused"),
    spell(weights_mixed_over_heads, {}, parameters={"mix": lambda: torch.randn(4, 4)},
          regions=None, expect="refused"),
    spell(weights_difference, {}, TWO_CORES, regions=None, expect="refused"),
)

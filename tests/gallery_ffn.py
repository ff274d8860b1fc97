"""Feed-forwards as people write them, each with the facts it must lift to.

Inputs are (2, 7, 12) unless said otherwise, hidden width 40.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, L, D, FF = 2, 7, 12, 40
TOKENS = {"tokens": B * L, "d_model": D, "d_ff": FF, "d_out": D}
UP, DOWN, BOTH = (FF, D), (D, FF), (2 * FF, D)  # weights of F.linear


class Body(nn.Module):
    """A function of its own parameters and of tensors."""

    def __init__(self, fn: Callable, weights: Mapping[str, tuple]):
        super().__init__()
        self.fn = fn
        for name, shape in weights.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.2))

    def forward(self, *args: Tensor):
        return self.fn(self, *args)


@dataclass(frozen=True)
class Spelling:
    """A module, the shapes of its inputs, and the facts of each region it must give; none: a lookalike.

    refusal: part of the sentence that says why it is none.
    """

    name: str
    build: Callable[[], nn.Module]
    facts: tuple[Mapping[str, object], ...] = ()
    inputs: tuple[tuple[int, ...], ...] = ((B, L, D),)
    training: bool = False
    refusal: str = ""


SPELLINGS: list[Spelling] = []


def spelling(*inputs, training=False, regions=1, weights=None, also=None, **facts):
    """Enter the decorated function; `weights` are shapes of its parameters, `also` what differs in a second region."""

    def enter(fn):
        shapes = weights or {"up": UP, "down": DOWN}
        known = {**TOKENS, "activation": "relu", "gated": False, "role": "block", **facts}
        each = (known,) * regions if also is None else (known, {**known, **also})
        SPELLINGS.append(Spelling(fn.__name__, lambda: Body(fn, shapes), each, inputs or ((B, L, D),), training))
        return fn

    return enter


# Products.


@spelling(weights={"up": UP, "b": (FF,), "down": DOWN, "c": (D,)}, bias=True, out_bias=True, written="linear")
def linear_with_bias(p, x):
    return F.linear(F.relu(F.linear(x, p.up, p.b)), p.down, p.c)


@spelling(weights={"up": (D, FF), "b": (FF,), "down": (FF, D), "c": (D,)}, bias=True, out_bias=True, written="addmm")
def addmm_on_views(p, x):
    h = F.relu(torch.addmm(p.b, x.view(-1, D), p.up).view(B, L, FF))
    return torch.addmm(p.c, h.view(-1, FF), p.down).view(x.shape)


@spelling(weights={"up": (FF, D, 1), "b": (FF,), "down": (D, FF, 1)}, bias=True, out_bias=False, written="conv1d")
def convolution_of_kernel_one(p, x):
    return F.conv1d(F.relu(F.conv1d(x.transpose(1, 2), p.up, p.b)), p.down).transpose(1, 2)


@spelling((B, D, 5, 3), weights={"up": (FF, D, 1, 1), "down": (D, FF, 1, 1)}, tokens=B * 15, written="conv2d")
def convolution_over_an_image(p, x):
    return x + F.conv2d(F.relu(F.conv2d(x, p.up)), p.down)


@spelling(weights={"up": (FF, D // 4, 1), "down": (D, FF // 4, 1)}, groups=4, written="conv1d")
def grouped_convolution(p, x):
    return F.conv1d(F.relu(F.conv1d(x.transpose(1, 2), p.up, groups=4)), p.down, groups=4).transpose(1, 2)


@spelling(weights={"up": (D, FF), "down": (FF, D)}, written="einsum")
def einsum_of_two(p, x):
    return torch.einsum("blf,fd->bld", F.relu(torch.einsum("bld,df->blf", x, p.up)), p.down)


@spelling(weights={"up": (D, 4, 10), "down": (4, 10, D)}, written="einsum")
def einsum_with_a_hidden_unit_of_two_axes(p, x):
    return torch.einsum("blhe,hed->bld", F.relu(torch.einsum("bld,dhe->blhe", x, p.up)), p.down)


@spelling(weights={"up": (D, FF), "down": (D, FF)}, written="matmul")
def matmul_with_a_transposed_weight(p, x):
    return F.relu(x @ p.up) @ p.down.T


@spelling((3, B * L, D), weights={"up": (3, D, FF), "down": (3, FF, D)}, tokens=3 * B * L, blocks=3, written="bmm")
def weights_of_its_own_for_each_block(p, x):
    return torch.bmm(F.relu(torch.bmm(x, p.up)), p.down)


@spelling(weights={"up": (FF, D), "b": (FF,), "down": DOWN, "c": (D,)}, bias=True, out_bias=True)
def bias_added_by_hand(p, x):
    return F.relu(F.linear(x, p.up) + p.b) @ p.down.T + p.c


@spelling(weights={"up": UP, "down": (FF, D)}, written="linear+matmul")
def products_of_two_kinds(p, x):
    return F.relu(F.linear(x, p.up)).reshape(-1, FF) @ p.down


# Gates.


@spelling(weights={"gate": UP, "up": UP, "down": DOWN}, gated=True, activation="silu", layout="separate",
          gate_first=True)
def gated(p, x):
    return F.linear(F.silu(F.linear(x, p.gate)) * F.linear(x, p.up), p.down)


@spelling(weights={"up": BOTH, "down": DOWN}, gated=True, activation="silu", layout="halves", gate_first=True)
def gate_of_a_chunk(p, x):
    gate, value = F.linear(x, p.up).chunk(2, -1)
    return F.linear(F.silu(gate) * value, p.down)


@spelling(weights={"up": BOTH, "down": DOWN}, gated=True, activation="gelu", layout="halves", gate_first=False)
def gate_of_a_split(p, x):
    value, gate = F.linear(x, p.up).split([FF, FF], dim=-1)
    return F.linear(value * F.gelu(gate), p.down)


@spelling(weights={"up": BOTH, "down": DOWN}, gated=True, activation="sigmoid", layout="halves", gate_first=False)
def gate_of_glu(p, x):
    return F.linear(F.glu(F.linear(x, p.up)), p.down)


@spelling(weights={"up": BOTH, "down": DOWN}, gated=True, activation="relu", layout="halves", gate_first=True)
def gate_of_slices(p, x):
    both = F.linear(x, p.up)
    return F.linear(F.relu(both[..., :FF]) * both[..., FF:], p.down)


@spelling(weights={"up": BOTH, "down": DOWN}, gated=True, activation="silu", layout="halves", gate_first=True)
def gate_on_an_axis_of_its_own(p, x):
    both = F.linear(x, p.up).unflatten(-1, (2, FF))
    return F.linear(F.silu(both[:, :, 0]) * both[:, :, 1], p.down)


@spelling(weights={"up": BOTH, "down": DOWN}, gated=True, activation="silu", layout="blocked")
def gate_within_blocks(p, x):
    gate, value = F.linear(x, p.up).unflatten(-1, (4, 2, 10)).unbind(-2)
    return F.linear((F.silu(gate) * value).flatten(-2), p.down)


@spelling(weights={"up": BOTH, "b": (2 * FF,), "down": DOWN}, gated=True, activation="quick_gelu", bias=True,
          layout="interleaved", gate_first=True, shift=1.0, up_limits=(-7.0, 7.0), gate_limits=(None, 7.0))
def interleaved_and_clamped(p, x):
    both = F.linear(x, p.up, p.b)
    gate, value = both[..., ::2].clamp(max=7.0), both[..., 1::2].clamp(-7.0, 7.0)
    return F.linear((value + 1) * gate * torch.sigmoid(1.702 * gate), p.down)


@spelling(weights={"gate": UP, "up": UP, "down": DOWN}, gated=True, activation="identity")
def bilinear(p, x):
    return F.linear(F.linear(x, p.gate) * F.linear(x, p.up), p.down)


@spelling(weights={"gate": UP, "up": UP, "down": DOWN}, gated=True, activation="sigmoid", up="tanh")
def two_activations(p, x):
    return F.linear(torch.sigmoid(F.linear(x, p.gate)) * torch.tanh(F.linear(x, p.up)), p.down)


@spelling(weights={"gate": UP, "up": UP, "down": DOWN}, gated=True, activation="silu", factor=0.5, scale=0.25)
def gate_with_factors(p, x):
    return F.linear(F.silu(F.linear(x, p.gate) * 0.5) * F.linear(x, p.up) * 0.25, p.down)


@spelling(weights={"gate": UP, "up": UP, "down": DOWN}, gated=True, activation="relu", up_limits=(-2.0, 2.0))
def gate_by_clamp(p, x):
    return F.linear(F.linear(x, p.gate).clamp(min=0) * F.linear(x, p.up).clamp(-2, 2), p.down)


@spelling(weights={"qkv": (3 * D + 2 * FF, D), "down": DOWN}, gated=True, activation="silu", layout="halves")
def gate_within_a_wider_product(p, x):
    _, gate, value = F.linear(x, p.qkv).split([3 * D, FF, FF], -1)
    return F.linear(F.silu(gate) * value, p.down)


# What stands between.


@spelling(weights={"up": UP, "n": (FF,), "down": DOWN}, inner=("act", "layer_norm"))
def norm_behind_the_activation(p, x):
    return F.linear(F.layer_norm(F.relu(F.linear(x, p.up)), (FF,), p.n), p.down)


@spelling(weights={"up": UP, "n": (FF,), "down": DOWN}, inner=("rms_norm", "act"))
def norm_before_the_activation(p, x):
    return F.linear(F.relu(F.rms_norm(F.linear(x, p.up), (FF,), p.n)), p.down)


@spelling(weights={"gate": UP, "up": UP, "n": (FF,), "down": DOWN}, gated=True, activation="silu",
          inner=("act", "rms_norm"))
def norm_by_hand(p, x):
    h = F.silu(F.linear(x, p.gate)) * F.linear(x, p.up)
    return F.linear(p.n * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)), p.down)


@spelling(weights={"up": UP, "n": (FF,), "b": (FF,), "down": DOWN}, inner=("act", "layer_norm"))
def layer_norm_by_hand(p, x):
    h = F.relu(F.linear(x, p.up))
    centred = h - h.mean(-1, keepdim=True)
    return F.linear(centred / (h.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * p.n + p.b, p.down)


@spelling((B, 9, D), weights={"up": UP, "taps": (FF, 1, 3), "down": DOWN}, tokens=B * 9, inner=("conv 3", "act"))
def depthwise_convolution(p, x):
    h = F.conv1d(F.linear(x, p.up).transpose(1, 2), p.taps, padding=1, groups=FF)
    return F.linear(F.relu(h.transpose(1, 2)), p.down)


@spelling((B, 12, D), weights={"up": UP, "taps": (FF, 1, 3, 3), "b": (FF,), "down": DOWN}, tokens=B * 12,
          activation="gelu", inner=("conv 3x3", "act"))
def depthwise_convolution_over_an_image(p, x):
    h = F.linear(x, p.up).transpose(1, 2).view(B, FF, 3, 4)
    h = F.conv2d(h, p.taps, p.b, padding=1, groups=FF).flatten(2).transpose(1, 2)
    return F.linear(F.gelu(h), p.down)


@spelling(weights={"up": UP, "taps": (FF, 1, 4), "down": DOWN}, inner=("conv 4", "act"))
def causal_convolution(p, x):
    h = F.pad(F.linear(x, p.up).transpose(1, 2), (3, 0))
    return F.linear(F.relu(F.conv1d(h, p.taps, groups=FF).transpose(1, 2)), p.down)


@spelling(weights={"up": UP, "down": DOWN}, training=True, inner=("act", "dropout 0.25"), dropout=0.25)
def dropout_in_training(p, x):
    return F.linear(F.dropout(F.relu(F.linear(x, p.up)), 0.25, p.training), p.down)


@spelling(weights={"up": UP, "gamma": (FF,), "down": DOWN}, inner=("act", "learned scale"))
def learned_scale(p, x):
    return F.linear(F.relu(F.linear(x, p.up)) * p.gamma, p.down)


@spelling(weights={"up": UP, "down": DOWN}, out_scale=0.5)
def half_step(p, x):
    return x + F.linear(F.relu(F.linear(x, p.up)), p.down) * 0.5


@spelling(weights={"up": UP, "down": DOWN}, dtype="bfloat16")
def autocast(p, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.linear(F.relu(F.linear(x, p.up)), p.down)


@spelling(weights={"up": UP, "a": (4, D), "b": (FF, 4), "down": DOWN, "c": (4, FF), "d": (D, 4)}, rank=4,
          training=True)
def low_rank_updates(p, x):
    h = F.relu(F.linear(x, p.up) + F.linear(F.linear(F.dropout(x, 0.1, p.training), p.a), p.b) * 0.5)
    return F.linear(h, p.down) + F.linear(F.linear(h, p.c), p.d)


@spelling(weights={"up": BOTH, "a": (4, D), "b": (2 * FF, 4), "down": DOWN, "w": (D, D)}, rank=4, gated=True,
          activation="silu", layout="halves")
def low_rank_update_of_both_halves(p, x):
    x = F.layer_norm(F.linear(x, p.w), (D,))
    gate, value = (F.linear(x, p.up) + F.linear(F.linear(x, p.a), p.b)).chunk(2, -1)
    return F.linear(F.silu(gate) * value, p.down)


# Activations by hand.


@spelling(activation="gelu")
def gelu_by_erf(p, x):
    h = F.linear(x, p.up)
    return F.linear(h * 0.5 * (1.0 + torch.erf(h / math.sqrt(2.0))), p.down)


@spelling(activation="gelu_tanh")
def gelu_by_tanh(p, x):
    h = F.linear(x, p.up)
    inner = torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0)))
    return F.linear(0.5 * h * (1.0 + inner), p.down)


@spelling(activation="silu")
def silu_by_exp(p, x):
    h = F.linear(x, p.up)
    return F.linear(h / (1 + torch.exp(-h)), p.down)


@spelling(activation="relu")
def relu_by_mask(p, x):
    h = F.linear(x, p.up)
    return F.linear(h * (h > 0).to(h.dtype), p.down)


@spelling(activation="relu2")
def relu_squared_in_place(p, x):
    return F.linear(F.relu(F.linear(x, p.up), inplace=True) ** 2, p.down)


@spelling(activation="gelu", clip=(-10.0, 10.0))
def clipped_gelu(p, x):
    return F.linear(torch.clip(F.gelu(F.linear(x, p.up)), -10, 10), p.down)


@spelling(weights={"up": UP, "beta": (1,), "down": DOWN}, activation="swish")
def swish_with_a_learned_slope(p, x):
    h = F.linear(x, p.up)
    return F.linear(h * torch.sigmoid(p.beta * h), p.down)


@spelling(activation="leaky_relu(0.2)")
def leaky_relu_by_maximum(p, x):
    h = F.linear(x, p.up)
    return F.linear(torch.maximum(h, 0.2 * h), p.down)


@spelling(activation="custom", function="mul(u, sin(u))")
def an_activation_without_a_name(p, x):
    h = F.linear(x, p.up)
    return F.linear(h * torch.sin(h), p.down)


# Roles and axes.


@spelling(weights={"up": UP, "down": (5, FF)}, d_out=5, role="head")
def prediction_head(p, x):
    return F.linear(F.relu(F.linear(x, p.up)), p.down)


@spelling(weights={"up": (4, D), "down": (D, 4)}, d_ff=4, role="bottleneck")
def adapter(p, x):
    return x + F.linear(F.relu(F.linear(x, p.up)), p.down)


@spelling(weights={"up": (4, D), "down": (D, 4)}, d_ff=4, role="gate", activation="silu")
def low_rank_gate(p, x):
    return x * torch.sigmoid(F.linear(F.silu(F.linear(x, p.up)), p.down))


@spelling(weights={"n": (D,), "up": (FF, L), "down": (L, FF)}, tokens=B * D, d_model=L, d_out=L, axis="tokens")
def mixer_over_tokens(p, x):
    h = F.layer_norm(x, (D,), p.n).transpose(1, 2)
    return x + F.linear(F.relu(F.linear(h, p.up)), p.down).transpose(1, 2)


@spelling(weights={"n": (D,), "up": (FF, L), "down": (L, FF)}, tokens=B * D, d_model=L, d_out=L, axis="tokens",
          written="matmul")
def mixer_with_the_weight_on_the_left(p, x):
    return x + p.down @ F.relu(p.up @ F.layer_norm(x, (D,), p.n))


@spelling(weights={"qkv": (3 * D, D), "up": UP, "down": DOWN}, parallel=True)
def beside_an_attention(p, x):
    q, k, v = (t.unflatten(-1, (2, D // 2)).transpose(1, 2) for t in F.linear(x, p.qkv).chunk(3, -1))
    return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) + F.linear(
        F.relu(F.linear(x, p.up)), p.down)


@spelling((B, L, D), (B, D), weights={"modulate": (3 * D, D), "up": UP, "down": DOWN}, activation="gelu_tanh")
def modulated_as_in_dit(p, x, condition):
    shift, factor, gate = F.linear(F.silu(condition), p.modulate)[:, None].chunk(3, -1)
    h = F.layer_norm(x, (D,)) * (1 + factor) + shift
    return x + gate * F.linear(F.gelu(F.linear(h, p.up), approximate="tanh"), p.down)


@spelling(weights={"up": UP, "down": DOWN}, regions=2)
def two_layers(p, x):
    for _ in range(2):
        x = x + F.linear(F.relu(F.linear(F.layer_norm(x, (D,)), p.up)), p.down)
    return x


@spelling(weights={"a": (FF, D), "b": (FF, FF), "c": (D, FF)}, d_out=FF, role="head",
          also={"d_model": FF, "d_out": D, "chained": True})
def three_products(p, x):
    return x + F.linear(F.relu(F.linear(F.relu(F.linear(x, p.a)), p.b)), p.c)


@spelling(weights={"up": UP, "down": DOWN, "mix": (4, D)}, activation="silu")
def output_spread_over_streams(p, x):
    out = F.linear(F.silu(F.linear(x, p.up)), p.down)
    return F.linear(x.softmax(-1), p.mix)[..., None] * out[:, :, None]

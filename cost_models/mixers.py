"""Layers that mix tokens: softmax attention, latent attention, recurrences with a state of fixed size.

Source: grouped heads Ainslie et al. 2023, arXiv:2305.13245; MLA DeepSeek-V2, arXiv:2405.04434, with a lightning indexer
DeepSeek-V3.2 (inference code); MFA Step-3, arXiv:2507.19427; lightning attention arXiv:2405.17381; gated delta rule
arXiv:2412.06464; KDA arXiv:2510.26692; Mamba arXiv:2312.00752; Mamba-2 arXiv:2405.21060; JetBlock arXiv:2508.15884.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnc.cost_models.layers import WHOLE, Conventions, Layer, Mixing, Product, Reach


@dataclass(frozen=True)
class Attention(Layer):
    """Softmax attention: MHA, GQA or MQA by its heads; MFA with `q_rank` and one wide key head.

    gate: an output gate as wide as the heads together, out of the query projection. qk_norm: "" none, "head" one norm
    of head_dim for queries and one for keys, "wide" norms over all heads. sinks: one logit per head.
    """

    d: int
    heads: int
    kv_heads: int
    head_dim: int
    span: Reach = WHOLE
    q_rank: int = 0
    gate: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: str = ""
    norm_bias: bool = False
    sinks: bool = False
    kind: ClassVar[str] = "attention"

    @property
    def reach(self) -> Reach:
        return self.span

    @property
    def products(self) -> tuple[Product, ...]:
        q, kv = self.heads * self.head_dim * (1 + self.gate), 2 * self.kv_heads * self.head_dim
        out = Product("mixer", self.heads * self.head_dim, self.d, self.out_bias)
        if self.q_rank:
            return (
                Product("mixer", self.d, self.q_rank + kv, self.qkv_bias),
                Product("mixer", self.q_rank, q, self.qkv_bias),
                out,
            )
        return Product("mixer", self.d, q + kv, self.qkv_bias), out

    @property
    def small(self) -> int:
        wide = self.heads + self.kv_heads if self.qk_norm == "wide" else 2
        normed = wide * self.head_dim * (1 + self.norm_bias) if self.qk_norm else 0
        return normed + self.q_rank + self.sinks * self.heads

    def mixing(self, phase: str, how: Conventions) -> tuple[Mixing, ...]:
        return (Mixing(pair=4 * self.heads * self.head_dim, reach=self.span),)

    @property
    def kv_elements(self) -> int:
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class LatentAttention(Layer):
    """Multi-head latent attention: keys and values of all heads come from one latent of kv_rank, stored with a rotary
    part of `rope`. The projections cost the same whether they expand the latent or are absorbed into query and output.

    index_top: a lightning indexer of `index_heads` heads scores every key, and attention reads the best index_top of
    them (DeepSeek-V3.2), always absorbed; its keys of `index_dim` are stored beside the latent.
    """

    d: int
    heads: int
    q_rank: int
    kv_rank: int
    nope: int
    rope: int
    v: int
    bias: bool = False
    index_heads: int = 0
    index_dim: int = 0
    index_top: int = 0
    kind: ClassVar[str] = "mla"

    @property
    def products(self) -> tuple[Product, ...]:
        q = self.heads * (self.nope + self.rope)
        down = self.kv_rank + self.rope
        query = (
            (Product("mixer", self.d, self.q_rank, self.bias), Product("mixer", self.q_rank, q))
            if self.q_rank
            else (Product("mixer", self.d, q),)
        )
        index = (
            Product("mixer", self.q_rank or self.d, self.index_heads * self.index_dim),
            Product("mixer", self.d, self.index_dim),
            Product("mixer", self.d, self.index_heads),
        )
        return (
            *query,
            *(index if self.index_top else ()),
            Product("mixer", self.d, down, self.bias),
            Product("mixer", self.kv_rank, self.heads * (self.nope + self.v)),
            Product("mixer", self.heads * self.v, self.d, self.bias),
        )

    @property
    def small(self) -> int:
        return self.q_rank + self.kv_rank + (2 * self.index_dim if self.index_top else 0)

    @property
    def kv_elements(self) -> int:
        return self.latent + (self.index_dim if self.index_top else 0)

    @property
    def latent(self) -> int:
        """Width of the absorbed key."""
        return self.kv_rank + self.rope

    def mixing(self, phase: str, how: Conventions) -> tuple[Mixing, ...]:
        served = "absorbed" if phase == "decode" or self.index_top else "naive"
        name = served if how.mla == "phase" else how.mla
        key, value = {
            "naive": (self.nope + self.rope, self.v),
            "absorbed": (self.latent, self.kv_rank),
            "padded": (self.latent, self.latent),
        }[name]
        pair = 2 * self.heads * (key + value)
        if not self.index_top:
            return (Mixing(pair),)
        return Mixing(pair, reach=Reach("window", self.index_top)), Mixing(2 * self.index_heads * self.index_dim)


# FLOP per state element and token, in products: the outer product with the value and the read by the query; the delta
# rule reads once more, by the key.
STEP_FLOPS = {"lightning": 4, "mamba": 4, "mamba2": 4, "gdn": 6, "kda": 6, "jet": 6}


@dataclass(frozen=True)
class Recurrence(Layer):
    """A mixer with a state [heads, key_dim, value_dim] per sequence; `rule` names how the state is updated.

    conv_channels, conv_width: the short convolution before it, which keeps its last inputs. k_heads: key heads where
    several value heads share one.
    """

    rule: str
    heads: int
    key_dim: int
    value_dim: int
    weights: tuple[Product, ...]
    extra: int
    conv_channels: int = 0
    conv_width: int = 0
    k_heads: int = 0
    kind: ClassVar[str] = "recurrence"

    @property
    def products(self) -> tuple[Product, ...]:
        return self.weights

    @property
    def small(self) -> int:
        return self.extra

    @property
    def state_elements(self) -> int:
        return self.heads * self.key_dim * self.value_dim

    @property
    def conv_elements(self) -> int:
        return self.conv_channels * self.conv_width

    def mixing(self, phase: str, how: Conventions) -> tuple[Mixing, ...]:
        step = STEP_FLOPS[self.rule] if how.state_flops is None else how.state_flops
        if phase == "decode" or how.recurrence == "step" or self.rule == "mamba" or how.state_flops is not None:
            return (Mixing(token=step * self.state_elements),)
        k, v, c = self.key_dim, self.value_dim, how.chunk
        # Per token and head: state in and out, then the chunk's own triangle; the delta rule also inverts one.
        chunked = 6 * k * v + 2 * c * k + c * v + c * c if step == 6 else 4 * k * v + c * (k + v)
        return (Mixing(token=self.heads * chunked),)


def lightning(d: int, heads: int, head_dim: int) -> Recurrence:
    """Lightning attention of MiniMax-01: query, key, value, gate, output, and a norm over all heads."""
    width = heads * head_dim
    weights = (Product("mixer", d, 4 * width), Product("mixer", width, d))
    return Recurrence("lightning", heads, head_dim, head_dim, weights, width)


def gated_delta(d: int, k_heads: int, v_heads: int, k_dim: int, v_dim: int, conv: int) -> Recurrence:
    """Gated delta rule as in Qwen3-Next: query, key, value and output gate in one product, two scalars per head."""
    keys, values = k_heads * k_dim, v_heads * v_dim
    channels = 2 * keys + values
    weights = (
        Product("mixer", d, 2 * keys + 2 * values),
        Product("mixer", d, 2 * v_heads),
        Product("mixer", values, d),
    )
    return Recurrence(
        "gdn", v_heads, k_dim, v_dim, weights, channels * conv + 2 * v_heads + v_dim, channels, conv, k_heads
    )


def kimi_delta(d: int, heads: int, head_dim: int, conv: int) -> Recurrence:
    """Kimi delta attention: decay and output gate per channel through a rank of head_dim, beta per head."""
    width = heads * head_dim
    weights = (
        Product("mixer", d, 3 * width),
        Product("mixer", d, head_dim, copies=2),
        Product("mixer", head_dim, width, copies=2),
        Product("mixer", d, heads),
        Product("mixer", width, d),
    )
    small = 3 * width * conv + width + heads + head_dim
    return Recurrence("kda", heads, head_dim, head_dim, weights, small, 3 * width, conv, heads)


def mamba2(
    d: int,
    heads: int,
    head_dim: int,
    state: int,
    groups: int,
    conv: int,
    conv_bias: bool = True,
    bias: bool = False,
    norm: bool = True,
) -> Recurrence:
    """Mamba-2: gate, value, B, C and step in one product; decay, step bias and skip per head, a gated norm."""
    width = heads * head_dim
    channels = width + 2 * groups * state
    weights = (Product("mixer", d, width + channels + heads, bias), Product("mixer", width, d, bias))
    small = channels * (conv + conv_bias) + 3 * heads + norm * width
    return Recurrence("mamba2", heads, state, head_dim, weights, small, channels, conv, groups)


def mamba(
    d: int,
    width: int,
    state: int,
    rank: int,
    conv: int,
    conv_bias: bool = True,
    bias: bool = False,
    norms: bool = False,
) -> Recurrence:
    """Mamba: gate and value, then step (through `rank`), B and C from the value; decay per channel and state.

    norms: over step, B and C, as Jamba has.
    """
    weights = (
        Product("mixer", d, 2 * width, bias),
        Product("mixer", width, rank + 2 * state),
        Product("mixer", rank, width, True),
        Product("mixer", width, d, bias),
    )
    small = width * (conv + conv_bias) + width * state + width + norms * (rank + 2 * state)
    return Recurrence("mamba", width, state, 1, weights, small, width, conv)


def jet_block(d: int, heads: int, k_dim: int, v_dim: int, conv: int, reduction: int) -> Recurrence:
    """JetBlock: a gated delta rule whose convolution of the values has kernels made from the input."""
    keys, values, rank = heads * k_dim, heads * v_dim, d // reduction
    weights = (
        Product("mixer", d, 2 * keys + 2 * values),
        Product("mixer", d, 2 * heads),
        Product("mixer", d, rank),
        Product("mixer", rank, values * conv),
        Product("mixer", values, d),
    )
    return Recurrence("jet", heads, k_dim, v_dim, weights, 2 * heads + v_dim, values, conv, heads)


def short_conv(d: int, conv: int, bias: bool = False) -> Recurrence:
    """A gated short convolution as mixer (LFM2): it keeps its last inputs and no other state."""
    weights = (Product("mixer", d, 3 * d, bias), Product("mixer", d, d, bias))
    return Recurrence("lightning", 0, 0, 0, weights, d * (conv + bias), d, conv)

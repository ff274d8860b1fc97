"""The layers of a language model as data: weights, what one token does with them, what a sequence leaves behind.

Every layer answers the same questions, so that a model is a sum over layers (`model_card.py`): `products` are its
weight matrices, `small` the parameters that enter no matrix product, `mixing` the FLOP between tokens, `kv_elements`
what it stores per token, `state_elements` and `conv_elements` what it stores per sequence.

One multiply-add is 2 FLOP; softmax, norms, rotary embedding, routing and short convolutions are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
from sympy import Expr, Integer, Min, Mod, floor

from attnc.errors import UsageError, did_you_mean

LENGTH = sympy.Symbol("length", positive=True, integer=True)


@dataclass(frozen=True)
class Product:
    """`copies` products of a token with a weight [inputs, outputs]; `role` is the column it is counted in."""

    role: str
    inputs: int
    outputs: int
    bias: bool = False
    copies: int = 1

    @property
    def weights(self) -> int:
        return self.copies * self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        return self.weights + self.bias * self.copies * self.outputs


@dataclass(frozen=True)
class Reach:
    """Which keys a query sees: all before it, a window of `width` keys, or the chunk of `width` keys it stands in."""

    shape: str = "all"
    width: int = 0

    def keys(self, length: Expr = LENGTH) -> Expr:
        """Keys read by the query at position `length`; a chunk counts as full, as published tables do."""
        return length if self.shape == "all" else Min(length, Integer(self.width))

    def pairs(self, causal: str, length: Expr = LENGTH) -> Expr:
        """Pairs of query and key over `length` tokens: "half" leaves the upper triangle out, "full" counts it."""
        keep = Integer(1) if causal == "full" else sympy.Rational(1, 2)
        if self.shape == "chunk":
            return keep * (floor(length / self.width) * self.width**2 + Mod(length, self.width) ** 2)
        width = self.keys(length)
        return length * width if causal == "full" else length * width - width**2 / 2

    @property
    def limit(self) -> int | None:
        """Tokens that the cache keeps at most."""
        return None if self.shape == "all" else self.width


WHOLE = Reach()


@dataclass(frozen=True)
class Mixing:
    """FLOP between tokens: `pair` per query and key in reach (all heads), `token` per token whatever the length."""

    pair: int = 0
    token: int = 0
    reach: Reach = WHOLE


ALLOWED = {
    "causal": ("half", "full"),
    "mla": ("phase", "naive", "absorbed", "padded"),
    "recurrence": ("chunked", "step"),
    "head": ("last", "all"),
}


@dataclass(frozen=True)
class Conventions:
    """How FLOP between tokens are counted.

    causal: "half" the square or the "full" one. mla: "naive" (expanded keys and values), "absorbed" (one latent key,
    as wide as stored, and its latent value), "padded" (absorbed, value product padded to the key's width) or "phase":
    naive over a prompt and in training, absorbed in decode. recurrence: a prompt in chunks ("chunked") or token by
    token ("step"). state_flops: FLOP per state element and token, where a source counts its own. head: whether the
    output head runs on "all" tokens of a prompt or on the "last"; training always runs it on all.
    """

    causal: str = "half"
    mla: str = "phase"
    recurrence: str = "chunked"
    chunk: int = 64
    state_flops: int | None = None
    head: str = "last"

    def __post_init__(self) -> None:
        for name, allowed in ALLOWED.items():
            value = getattr(self, name)
            if value not in allowed:
                near = did_you_mean(str(value), allowed) or " Name one of them."
                raise UsageError(f"{name}={value!r}: allowed are {', '.join(allowed)}.{near}")

    def __str__(self) -> str:
        state = "" if self.state_flops is None else f", {self.state_flops} FLOP per state element and token"
        square = "half the square" if self.causal == "half" else "the full square"
        mla = {"phase": "naive in prefill and training, absorbed in decode"}.get(self.mla, self.mla)
        return (
            f"attention over {square}, MLA {mla}, recurrences {self.recurrence} in prefill{state}, output head on "
            f"{'every token' if self.head == 'all' else 'the last token of a prompt'}; one multiply-add is 2 FLOP"
        )


USUAL = Conventions()


@dataclass(frozen=True)
class Layer:
    """What all layers answer; the defaults are those of a layer that does not mix tokens."""

    kind: ClassVar[str] = "layer"

    @property
    def products(self) -> tuple[Product, ...]:
        return ()

    @property
    def small(self) -> int:
        return 0

    @property
    def total(self) -> int:
        """Parameters."""
        return sum(p.parameters for p in self.products) + self.small

    def active(self, chosen: float | None = None) -> float:
        """Parameters that one token meets; `chosen` replaces the mean number of routed experts."""
        return float(self.total)

    def active_weights(self, role: str) -> float:
        """Weights of the products of `role` that one token meets."""
        return float(sum(p.weights for p in self.products if p.role == role))

    def mixing(self, phase: str, how: Conventions) -> tuple[Mixing, ...]:
        """What tokens do with each other, summed over the entries."""
        return ()

    @property
    def kv_elements(self) -> int:
        return 0

    @property
    def state_elements(self) -> int:
        return 0

    @property
    def conv_elements(self) -> int:
        return 0

    @property
    def reach(self) -> Reach:
        return WHOLE


@dataclass(frozen=True)
class Norms(Layer):
    """`count` norms of `width` elements."""

    width: int
    count: int
    bias: bool = False
    kind: ClassVar[str] = "norm"

    @property
    def small(self) -> int:
        return self.count * self.width * (1 + self.bias)


@dataclass(frozen=True)
class Embedding(Layer):
    """Token embedding and output head; `positions` learned positions, `tied` when both are one matrix."""

    vocab: int
    d: int
    tied: bool = False
    positions: int = 0
    head_bias: bool = False
    kind: ClassVar[str] = "embedding"

    @property
    def products(self) -> tuple[Product, ...]:
        return (Product("head", self.d, self.vocab, self.head_bias),)

    @property
    def small(self) -> int:
        return self.positions * self.d + (0 if self.tied else self.vocab * self.d)


@dataclass(frozen=True)
class FeedForward(Layer):
    """Dense feed-forward: two matrices, three when gated."""

    d: int
    width: int
    gated: bool = True
    bias: bool = False
    kind: ClassVar[str] = "ffn"

    @property
    def products(self) -> tuple[Product, ...]:
        ups = 2 if self.gated else 1
        return (
            Product("ffn", self.d, ups * self.width, self.bias),
            Product("ffn", self.width, self.d, self.bias),
        )


@dataclass(frozen=True)
class Experts(Layer):
    """Mixture of experts: router, `experts` routed of which a token takes `top_k`, a shared one of `shared_width`.

    zero_experts: choices of the router that do nothing. latent: width of the space the routed experts live in, with
    one projection down and one up. Parameters beside the matrices: shared_gate [d], router_bias, expert_bias,
    correction (a bias of the choice alone).
    """

    d: int
    width: int
    experts: int
    top_k: int
    gated: bool = True
    shared_width: int = 0
    shared_gate: bool = False
    zero_experts: int = 0
    latent: int = 0
    router_bias: bool = False
    expert_bias: bool = False
    correction: bool = False
    kind: ClassVar[str] = "moe"

    @property
    def chosen(self) -> float:
        """Routed experts that a token meets on average, when zero experts are as likely as others."""
        return self.top_k * self.experts / (self.experts + self.zero_experts)

    @property
    def expert(self) -> FeedForward:
        return FeedForward(self.latent or self.d, self.width, self.gated, self.expert_bias)

    @property
    def fixed(self) -> tuple[Product, ...]:
        """Products that every token makes."""
        routed = Product("router", self.d, self.experts + self.zero_experts, self.router_bias)
        shared = FeedForward(self.d, self.shared_width, self.gated).products if self.shared_width else ()
        latent = (Product("ffn", self.d, self.latent), Product("ffn", self.latent, self.d)) if self.latent else ()
        return (routed, *shared, *latent)

    @property
    def products(self) -> tuple[Product, ...]:
        routed = (Product(p.role, p.inputs, p.outputs, p.bias, self.experts) for p in self.expert.products)
        return (*self.fixed, *routed)

    @property
    def small(self) -> int:
        return self.shared_gate * self.d + self.correction * (self.experts + self.zero_experts)

    def active(self, chosen: float | None = None) -> float:
        met = self.chosen if chosen is None else min(chosen, self.top_k)
        return sum(p.parameters for p in self.fixed) + self.small + met * self.expert.total

    def active_weights(self, role: str) -> float:
        fixed = sum(p.weights for p in self.fixed if p.role == role)
        return fixed + self.chosen * self.expert.active_weights(role)

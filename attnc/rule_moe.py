"""Mixture of experts as facts: how a token's experts are chosen and weighted, and what an expert computes.

    y_t = sum_{e in chosen(t)} w_te F_e(x_t) + sum over shared experts,   F_e(x) = g(x U_e) D_e

The router is data: `score` turns logits into scores, `choice` and what stands beside it say which experts they pick,
`normalise` and `scale` what the weights are. A rule is free of sizes, which stand in `MoEShape`.

Source: Shazeer et al. 2017, arXiv:1701.06538, section 2; DeepSeek-AI 2024, arXiv:2412.19437, section 2.1.2 (groups,
bias of the choice, shared experts).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnc.rule import Rule, Shape

# How a token's experts are picked: the best k scores, by one maximum after another, from a table of tokens, every
# expert of each token, outside of the graph, or in a way that was not identified.
CHOICES = ("top_k", "masked_max", "table", "all", "given", "other")
# What becomes of a router's class that has no expert of its own.
ZERO = ("", "identity", "none")


@dataclass(frozen=True)
class MoERule(Rule):
    """Router and experts.

    score:        function of the logits, "other" where it was not identified, "given" where it is not in the graph.
    over:         what a softmax runs over, "all" classes or the "chosen" ones; "each" for element-wise scores.
    choice:       one of CHOICES.
    choice_bias:  whether a vector is added to the scores for the choice alone.
    logit_bias:   whether the logits have a bias, which counts for the weights too.
    logit_scale:  factor of the logits; softcap: `c` where they become `c * tanh(logits / c)`.
    groups, top_groups, group_score: experts are chosen from the best `top_groups` of `groups` neighbours, judged by
                  their "max" or the sum of their best two, "top2".
    normalise:    "" or what the weights of a token are divided by the sum of: "chosen", "chosen and shared".
    scale:        factor of the weights; expert_scale: whether there is a learned one for each expert.
    weight_at:    what the weight multiplies: the "output" of the expert, its "inner" values, or its "input".
    jitter:       width of the noise that multiplies the router's input in training.
    capacity:     tokens that one expert takes, those beyond are dropped; None: no limit.
    zero_experts: router classes without weights, `zero`: one of ZERO, what they compute.
    router_dtype: dtype of the logits.
    activation:   name of the inner function; gated: whether it multiplies a second projection.
    fused, interleaved: whether both projections are one product, and whether their columns alternate.
    details:      what else the inner function does, as text ("gate<=7.0", "1+up").
    expert_bias, post_norm: whether experts have biases, and a norm before their weight.
    latent:       whether experts work between two projections that they share.
    shared:       shared experts that every token passes; shared_gate: function that scales them, "" for none.
    shared_activation, shared_gated: as for the experts.
    """

    kind: ClassVar[str] = "moe"

    score: str = "softmax"
    over: str = "all"
    choice: str = "top_k"
    choice_bias: bool = False
    logit_bias: bool = False
    logit_scale: float = 1.0
    softcap: float | None = None
    groups: int = 1
    top_groups: int = 1
    group_score: str = ""
    normalise: str = ""
    scale: float = 1.0
    expert_scale: bool = False
    weight_at: str = "output"
    jitter: float = 0.0
    capacity: int | None = None
    zero_experts: int = 0
    zero: str = ""
    router_dtype: str = "float32"
    activation: str = "silu"
    gated: bool = True
    fused: bool = True
    interleaved: bool = False
    details: tuple[str, ...] = ()
    expert_bias: bool = False
    post_norm: bool = False
    latent: bool = False
    shared: int = 0
    shared_gate: str = ""
    shared_activation: str = ""
    shared_gated: bool = True

    def flops(self, shape: MoEShape) -> int:
        """FLOP of the products: router, the chosen experts of each token, shared experts and what lies around them."""
        router = self._router(shape)
        experts = shape.active * _matrices(self.gated) * shape.d_expert * shape.d_ff
        latent = 2 * shape.d_model * shape.d_expert if self.latent else 0
        shared = _matrices(self.shared_gated) * shape.d_model * shape.shared_d_ff
        gate = shape.d_model * self.shared if self.shared_gate else 0
        return 2 * shape.tokens * (router + experts + latent + shared + gate)

    def elements(self, shape: MoEShape) -> int:
        """Input, output and weights, each once; of the experts as many as the tokens can reach."""
        router = self._router(shape)
        reached = min(shape.num_experts, shape.tokens * shape.active)
        experts = reached * _matrices(self.gated) * shape.d_expert * shape.d_ff
        latent = 2 * shape.d_model * shape.d_expert if self.latent else 0
        shared = _matrices(self.shared_gated) * shape.d_model * shape.shared_d_ff
        return 2 * shape.tokens * shape.d_model + router + experts + latent + shared

    def _router(self, shape: MoEShape) -> int:
        """Elements of the router's weight."""
        return 0 if self.choice == "given" else shape.d_router * (shape.num_experts + self.zero_experts)

    def summary(self, shape: MoEShape) -> list[str]:
        """Tokens, experts and widths, then what is peculiar about router and experts."""
        parts = [
            f"{shape.text('tokens')} tokens",
            f"{shape.top_k} of {shape.num_experts} experts",
            f"d {shape.d_model}" + (f"/{shape.d_latent}" if shape.d_latent else "") + f" x {shape.d_ff}",
            f"{self.activation}{' gated' if self.gated else ''}",
            self.score if self.over == "each" else f"{self.score} over {self.over}",
        ]
        parts += [self.choice.replace("_", " ")] if self.choice not in ("top_k", "all") else []
        parts += ["bias of choice"] if self.choice_bias else []
        parts += [f"groups {self.top_groups}/{self.groups}"] if self.groups > 1 else []
        parts += [f"capacity {self.capacity}"] if self.capacity is not None else []
        parts += [f"{self.zero_experts} {self.zero} experts"] if self.zero_experts else []
        return parts + ([f"shared {shape.shared_d_ff}"] if self.shared else [])


@dataclass(frozen=True)
class MoEShape(Shape):
    """Sizes of one mixture of experts.

    shared_d_ff: of all shared experts together. d_latent: width that experts see between shared projections, 0 for
    d_model. d_routed: width of the router's input, 0 for d_model. zeros: router classes without weights, on average
    chosen as often as others.
    """

    tokens: int
    d_model: int
    d_ff: int
    num_experts: int
    top_k: int
    shared_d_ff: int = 0
    d_latent: int = 0
    d_routed: int = 0

    @property
    def d_expert(self) -> int:
        """Width of an expert's input."""
        return self.d_latent or self.d_model

    @property
    def d_router(self) -> int:
        """Width of the router's input."""
        return self.d_routed or self.d_model

    @property
    def active(self) -> int:
        """Experts that one token passes."""
        return min(self.top_k, self.num_experts)


def _matrices(gated: bool) -> int:
    return 3 if gated else 2

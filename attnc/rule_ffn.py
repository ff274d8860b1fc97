"""Feed-forwards as facts.

`FFNRule` is what happens to each token x (a row of d_model numbers) between two products with weights:

    h = scale * clip(up(u) * act(g))      u = x Wu + bu,  g = x Wg + bg,  up(u) = clamp(u) + shift,  act of clamp(g)
    y = h Wd + bd

and `h = scale * clip(act(u))` where it is not gated. A rule is free of shapes.

Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.3; Shazeer 2020, "GLU variants improve transformer",
arXiv:2002.05202.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnc.rule import Rule, Shape

Limits = tuple[float | None, float | None]

NO_LIMITS: Limits = (None, None)
LAYOUTS = ("one", "separate", "halves", "interleaved", "blocked")
ROLES = ("block", "bottleneck", "head", "gate", "constant")


@dataclass(frozen=True)
class FFNRule(Rule):
    """What a feed-forward computes of its input and weights.

    activation: its name, see `passes.ffn.activations`, or "custom" (then `function` says what it is).
    gated:      whether the hidden unit is a product of two projections of the input.
    layout:     where value and gate are: "one" product alone, two "separate" products, or one product whose outputs
                are "halves", "interleaved" (even and odd) or "blocked" (halves within blocks).
    gate_first: whether the gate is the first of the two products, halves or columns.
    up:         what is applied to the value, "identity" but for gates such as tanh(u) * sigmoid(g).
    shift:      what is added to the value before it is gated.
    factor:     what the activation's argument is multiplied by. scale: what the hidden unit is multiplied by.
    out_scale:  what the output is multiplied by.
    up_limits, gate_limits, clip: limits of the value, of the activation's argument, of the activation's value.
    bias, out_bias: whether the products before and after the activation add one.
    inner:      what else stands between the products, in order, around "act"; empty for the activation alone.
    dropout:    probability with which hidden units are dropped, 0 outside training.
    axis:       what the products run over, "features", or "tokens" where tokens are mixed for each feature.
    role:       "block"; "bottleneck" where the hidden width is less than the input's; "head" where the output's width
                is not the input's; "gate" where the output goes through a bounded function and multiplies something;
                "constant" where the input is the same for all data.
    parallel:   whether a token mixer reads the same input.
    rank:       of what low-rank updates add to the first products, all of them together.
    chained:    whether the first product is the second one of another feed-forward, where its cost is counted.
    blocks:     sets of weights, each for its own part of the tokens. groups: parts of the features on their own.
    function:   the text of a custom activation.
    """

    kind: ClassVar[str] = "ffn"

    activation: str
    gated: bool = False
    layout: str = "one"
    gate_first: bool = False
    up: str = "identity"
    shift: float = 0.0
    factor: float = 1.0
    scale: float = 1.0
    out_scale: float = 1.0
    up_limits: Limits = NO_LIMITS
    gate_limits: Limits = NO_LIMITS
    clip: Limits = NO_LIMITS
    bias: bool = False
    out_bias: bool = False
    inner: tuple[str, ...] = ()
    dropout: float = 0.0
    axis: str = "features"
    role: str = "block"
    parallel: bool = False
    rank: int = 0
    chained: bool = False
    blocks: int = 1
    groups: int = 1
    function: str = ""

    def flops(self, shape: FFNShape) -> int:
        """FLOP of its own products, forward."""
        return 2 * shape.tokens * self._weights(shape) // self.groups

    def elements(self, shape: FFNShape) -> int:
        """Elements of input, weights and output, each once; hidden units are not counted."""
        read = shape.d_ff if self.chained else shape.d_model
        return shape.tokens * (read + shape.d_out) + self.blocks * self._weights(shape) // self.groups

    def _weights(self, shape: FFNShape) -> int:
        before = 0 if self.chained else shape.d_model * (2 if self.gated else 1)
        fused = self.gated and self.layout != "separate"
        update = self.rank * (shape.d_model + shape.d_ff * (2 if fused else 1))
        return shape.d_ff * (before + shape.d_out) + update

    def summary(self, shape: FFNShape) -> list[str]:
        """Sizes, the activation, and what is peculiar."""
        name = self.function if self.activation == "custom" and self.function else self.activation
        parts = [f"{shape.text('tokens')} tokens", f"d_model {shape.text('d_model')}", f"d_ff {shape.text('d_ff')}"]
        parts += [f"d_out {shape.text('d_out')}"] if shape.d_out != shape.d_model else []
        parts.append(f"gated {name}" if self.gated else name)
        parts += [self.layout] if self.layout not in ("one", "separate") else []
        parts += ["clamped"] if any(x != NO_LIMITS for x in (self.up_limits, self.gate_limits, self.clip)) else []
        parts += [step for step in self.inner if step != "act"]
        parts += [f"mixes {self.axis}"] if self.axis != "features" else []
        parts += [name for name in ("parallel", "chained") if getattr(self, name)]
        parts += [f"low-rank updates {self.rank}"] if self.rank else []
        parts += [f"blocks {self.blocks}"] if self.blocks > 1 else []
        return parts + ([self.role] if self.role != "block" else [])


@dataclass(frozen=True)
class FFNShape(Shape):
    """Sizes of one feed-forward; tokens: rows of the input, whatever axes they are spread over."""

    tokens: int
    d_model: int
    d_ff: int
    d_out: int

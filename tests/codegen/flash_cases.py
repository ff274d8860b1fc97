"""Rules that the flash kernels are held to, with what they capture, and inputs in the layouts of models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnc.forms import spell_attention
from attnc.forms.flash import Flash
from attnc.forms.masked import reference
from attnc.op_flash import flash
from attnc.operands import Operands
from attnc.rule_attention import AttentionRule

SMALL = Flash(block_m=32, block_n=16, dq_block_m=16, dq_block_n=32, dkv_block_m=32, dkv_block_n=16, section=2, xcds=4)
WIDE = Flash(block_m=64, block_n=32, dq_block_m=32, dq_block_n=64, dkv_block_m=64, dkv_block_n=64)


@dataclass(frozen=True)
class Shape:
    """Sizes and dtype of one call."""

    L: int = 33
    S: int = 33
    dtype: torch.dtype = torch.float32
    Hq: int = 2
    H: int = 2
    E: int = 16
    Ev: int = 16
    B: int = 1


def _bias(x: Shape) -> Tensor:
    return torch.randn(x.B, x.L, x.S, x.Hq).permute(0, 3, 1, 2)


def _documents(x: Shape) -> Tensor:
    return (torch.arange(max(x.L, x.S)) // 23 + torch.arange(x.B)[:, None]).int()


@dataclass(frozen=True)
class Case:
    """A rule; `captured` makes its tensors, `sizes` its sizes, from a shape. Float tensors learn."""

    rule: str
    captured: Callable[[Shape], list[Tensor]] = lambda x: []
    sizes: Callable[[Shape], list[int]] = lambda x: []


CASES = {
    "full": Case("score=0.25 * s"),
    "negative_scale": Case("score=-0.25 * s"),
    "causal": Case("score=0.25 * s; keep=j <= i; empty=never"),
    "causal_with_cache": Case("score=0.25 * s; keep=j - i <= n0; empty=zero", sizes=lambda x: [x.S - x.L]),
    "window": Case("score=0.25 * s; keep=j <= i and i - j <= 20; empty=zero"),
    "documents": Case("score=0.25 * s; keep=t0[b, i] == t0[b, j]; empty=zero", lambda x: [_documents(x)]),
    "prefix": Case("score=0.25 * s; keep=j <= i or j - t0[b] <= 0; empty=zero", lambda x: [torch.arange(x.B) * 7 + 9]),
    "padded": Case(
        "score=0.25 * s; keep=p0[b, j]; empty=zero",
        lambda x: [torch.arange(x.S) < torch.arange(x.B)[:, None] * 11 + 17],
    ),
    "softcap": Case("score=20.0 * tanh(0.0125 * s); keep=j <= i; empty=never"),
    "alibi": Case("score=0.25 * s + f0[h] * float(j - i); keep=j <= i", lambda x: [torch.rand(x.Hq)]),
    "relative_table": Case(
        "score=0.25 * s + f0[h, i - j + n0]", lambda x: [torch.randn(x.Hq, x.L + x.S)], lambda x: [x.S - 1]
    ),
    "bias_strided": Case("score=0.25 * s + f0[b, h, i, j]; keep=j <= i", lambda x: [_bias(x)]),
    "bias_broadcast": Case(
        "score=0.25 * s + f0[b, h, i, j]", lambda x: [torch.randn(1, 1, x.L, x.S).expand(x.B, x.Hq, x.L, x.S)]
    ),
    "bias_of_keys": Case("score=10.0 * tanh(0.025 * s + f0[b, j])", lambda x: [torch.randn(x.B, x.S)]),
    "sink": Case("score=0.25 * s; keep=j <= i; sink=f0[h]", lambda x: [torch.randn(x.Hq)]),
    "sink_of_rows": Case("score=0.25 * s; sink=0.5 * f0[b, h, i]", lambda x: [torch.randn(x.B, x.Hq, x.L)]),
    "rows_without_keys": Case("score=0.25 * s; keep=j - i + 5 <= 0; empty=zero"),
    "rows_with_a_sink_alone": Case(
        "score=0.25 * s; keep=j - i + 5 <= 0; empty=zero; sink=f0[h]", lambda x: [torch.randn(x.Hq)]
    ),
}


@dataclass(frozen=True)
class Call:
    """Inputs of one call: query as a transposed view, key contiguous, value in every other column of its memory."""

    query: Tensor
    key: Tensor
    value: Tensor
    captured: list[Tensor]
    sizes: list[int]
    rule: AttentionRule

    def run(self, knobs: Flash) -> tuple[Tensor, Tensor]:
        """out and lse by the kernels."""
        return flash(self.query, self.key, self.value, self.captured, self.sizes, spell_attention(knobs, self.rule))

    def double(self) -> Call:
        """The same numbers in float64, as the oracle takes them."""
        query, key, value = (t.detach().double().requires_grad_() for t in (self.query, self.key, self.value))
        captured = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in self.captured]
        return Call(query, key, value, captured, self.sizes, self.rule)

    def wanted(self) -> tuple[Tensor, Tensor]:
        """out and lse of the oracle."""
        return reference(Operands(self.query, self.key, self.value, self.captured, self.sizes, self.rule))

    def learned(self) -> list[Tensor]:
        """What gradients are asked of."""
        return [self.query, self.key, self.value, *(t for t in self.captured if t.is_floating_point())]


def call_of(name: str, x: Shape) -> Call:
    """Random inputs for a case."""
    case = CASES[name]
    kind = torch.float32 if x.dtype.itemsize == 1 else x.dtype
    query = torch.randn(x.B, x.L, x.Hq, x.E).to(x.dtype).transpose(1, 2).detach()
    key = torch.randn(x.B, x.H, x.S, x.E).to(x.dtype)
    value = torch.randn(x.B, x.H, x.S, 2 * x.Ev).to(x.dtype)[..., ::2].detach()
    captured = [t.to(kind).detach() if t.is_floating_point() else t for t in case.captured(x)]
    for t in (query, key, value, *captured):
        t.requires_grad_(t.is_floating_point() and t.dtype.itemsize > 1)
    return Call(query, key, value, captured, case.sizes(x), AttentionRule.parse(case.rule))


def tolerance(dtype: torch.dtype) -> float:
    """Rounding of inputs of the second product, of the result, and of sums of float32."""
    return max(1.5 * torch.finfo(dtype).eps, 1e-5)

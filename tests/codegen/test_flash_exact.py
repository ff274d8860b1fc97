"""Flash and decode are exact: their error against float64 is at most 1.5 times that of the written model.

Errors are root mean squares over a tensor: a maximum over thousands of numbers is the luck of one of them. Measured
under the interpreter with the rounding of GPUs, bf16 and fp16, all rules of flash_cases, length 70: at most
0.7 (out), 1.0 (dq), 0.9 (dk), 0.7 (dv), 1.1 (decode) times the eager model, whose softmax is float32; level with the
library's fused kernels, whose backward takes delta from the rounded out too; 1.1 (out) and 1.4 (dq) times its function
with a learned bias, which it computes in float32 on the CPU. There dq finds delta anew: from the rounded out it were
2.0, and the slopes of ALiBi 2.5 times eager's error.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnc.forms import spell_attention
from attnc.forms.flash_decode import FlashDecode
from attnc.forms.masked import sink_of
from attnc.op_decode import flash_decode
from attnc.operands import Operands
from tests.codegen.flash_cases import SMALL, Call, Shape, call_of
from tests.codegen.interpreter import mend, nearest_bfloat16

mend()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def eager(call: Call) -> Tensor:
    """As models write it: scores and weights in their dtype, the softmax in float32."""
    given = Operands(call.query, call.key, call.value, call.captured, call.sizes, call.rule)
    key, value = (t.repeat_interleave(given.group, 1) for t in (call.key, call.value))
    raw = call.query @ key.mT
    keep = torch.as_tensor(given.read(call.rule.keep)).expand(raw.shape)
    score = given.tensor(call.rule.score, raw).to(raw.dtype).masked_fill(~keep, -torch.inf)
    sink = sink_of(given)
    if sink is not None:
        score = torch.cat([score, sink.expand(raw.shape[:3]).unsqueeze(-1).to(raw.dtype)], -1)
    return score.softmax(-1, dtype=FP32).to(raw.dtype)[..., : key.shape[2]] @ value


def library(call: Call) -> Tensor:
    """The library's function: causal, fused on the CPU where no bias learns."""
    key, value = (t.repeat_interleave(call.query.shape[1] // t.shape[1], 1) for t in (call.key, call.value))
    if not call.captured:
        return scaled_dot_product_attention(call.query, key, value, is_causal=True, scale=0.25)
    ahead = torch.ones(call.query.shape[2], key.shape[2]).triu(1).bool()
    return scaled_dot_product_attention(
        call.query, key, value, call.captured[0].masked_fill(ahead, -torch.inf), scale=0.25
    )


def distance(got: Tensor, want: Tensor) -> float:
    """Root mean square of the error, by that of what is wanted."""
    return ((got.double() - want).norm() / want.norm()).item()


def assert_exact(found: list[Tensor], own: list[Tensor], want: list[Tensor]) -> None:
    for n, (one, other, exact) in enumerate(zip(found, own, want, strict=True)):
        floor = 1e-6 if one.dtype == FP32 else 0.0
        assert distance(one, exact) <= max(1.5 * distance(other, exact), floor), f"tensor {n}"


def with_gradients(out: Tensor, call: Call, cotangent: Tensor) -> list[Tensor]:
    return [out, *torch.autograd.grad(out, call.learned(), cotangent)]


@pytest.mark.parametrize(
    ("name", "dtype", "written"),
    [("causal", BF16, eager), ("softcap", BF16, eager), ("alibi", BF16, eager), ("sink", BF16, eager),
     ("causal", FP16, eager), ("alibi", FP16, eager), ("causal", FP32, eager),
     ("causal", BF16, library), ("bias_strided", BF16, library), ("bias_strided", FP16, library)],
)  # fmt: skip
def test_results_and_gradients_are_exact(name, dtype, written):
    call = call_of(name, Shape(33, 33, dtype, Hq=2, H=1, E=32, Ev=32))
    exact, cotangent = call.double(), torch.randn(1, 2, 33, 32).to(dtype)
    want = with_gradients(exact.wanted()[0], exact, cotangent.double())
    own = with_gradients(written(call), call, cotangent)
    assert_exact(with_gradients(call.run(SMALL)[0], call, cotangent), own, want)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_decoding_is_exact(dtype):
    call = call_of("causal_with_cache", Shape(3, 200, dtype, Hq=4, H=2, E=32, Ev=32))
    given = (call.query, call.key, call.value, call.captured, call.sizes)
    with torch.no_grad():
        found = flash_decode(*given, spell_attention(FlashDecode(block_m=16, block_n=32, splits=3), call.rule))[0]
        assert_exact([found], [eager(call)], [call.double().wanted()[0]])


def test_the_interpreter_rounds_to_bfloat16_as_torch_does():
    ties = torch.arange(0x3F80_0000, 0x3F90_0000, 0x4000, dtype=torch.int32).view(FP32)
    x = torch.cat(
        [ties, -ties, torch.randn(1000) * 1e3, torch.tensor([0.0, -0.0, 3.4e38, 1e-40, torch.inf, -torch.inf])]
    )
    assert np.array_equal(nearest_bfloat16(x.numpy()), x.bfloat16().view(torch.uint16).numpy())
    assert nearest_bfloat16(np.float32([np.nan])) == 0x7FC0

"""The operators `attnc::flash` and `attnc::flash_backward`: attention by generated Triton kernels.

    flash(query, key, value, captured, sizes, spelling) -> (out, lse)
    flash_backward(grad_out, query, key, value, out, lse, captured, sizes, needs, spelling) -> Tensor[]
    spelling = FORM{knobs} | RULE        e.g. "flash{block_m=64,skip=table} | score=0.125 * s; keep=-i + j <= 0"
               FORM{knobs} @ STORE | RULE    where kernels are kept elsewhere than in the user's own store

Shapes: query (B, Hq, L, E), key (B, H, S, E), value (B, H, S, Ev) -> out (B, Hq, L, Ev), lse (B, Hq, L) float32. lse is
natural, holds the sink, is -inf for a row without keys and not differentiable. The backward gives the gradients of
query, key and value, then those of the captured tensors that `needs` names.

On a GPU compilers see the kernels themselves (`triton_op`); on CPU, where Triton's interpreter runs them, one opaque
operator. Kernels are rendered and loaded once per rule and kinds of captured tensors.

Source: Dao 2023, "FlashAttention-2", arXiv:2307.08691; torch.library.triton_op.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from attnc.codegen import gpu_flash
from attnc.codegen.float8 import FLOAT8, name_of
from attnc.codegen.gpu_flash import FlashKnobs
from attnc.codegen.launch import slots_of
from attnc.codegen.load import kernel_folder, load
from attnc.codegen.render import rule_text
from attnc.codegen.triton_text import Slot
from attnc.errors import UsageError
from attnc.forms import parse_generated
from attnc.forms.flash import Flash
from attnc.forms.generated import store_in
from attnc.operands import Operands
from attnc.options import Options
from attnc.rule_attention import AttentionRule

FORWARD, BACKWARD = ("flash_forward",), ("flash_dq", "flash_dkv")
library = torch.library.Library("attnc", "FRAGMENT")
library.define(
    "flash_interpreted(Tensor query, Tensor key, Tensor value, Tensor[] captured, SymInt[] sizes, str spelling) "
    "-> (Tensor, Tensor)"
)
library.define(
    "flash_backward_interpreted(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    "Tensor[] captured, SymInt[] sizes, bool[] needs, str spelling) -> Tensor[]"
)


@lru_cache(maxsize=1024)
def parse_flash(spelling: str) -> tuple[FlashKnobs, AttentionRule]:
    """The schedule and the rule of a spelling. Raises: UsageError if it is not one."""
    form, rule = parse_generated(spelling, Flash)
    return form.schedule, rule


@lru_cache(maxsize=1024)
def kernels_of(
    skeleton: str,
    rule: AttentionRule,
    slots: tuple[Slot, ...],
    device: str,
    kernels: tuple[str, ...],
    store: str | None = None,
) -> ModuleType:
    """The loaded module with `kernels` of a skeleton for a rule; knobs are arguments of a launch, not of the source.

    store: where the module is kept; None: the user's own.
    """
    return load(rule_text(skeleton, rule, slots, device, kernels), kernel_folder(store or Options().store))


def _launch(
    query: Tensor, key: Tensor, value: Tensor, captured: Sequence[Tensor], sizes: Sequence[int], spelling: str
) -> tuple[Tensor, Tensor]:
    knobs, rule = parse_flash(spelling)
    slots, store = slots_of(captured, [False] * len(captured)), store_in(spelling)
    kernels = kernels_of("flash", rule, slots, query.device.type, FORWARD, store)
    return gpu_flash.forward(kernels, Operands(query, key, value, captured, sizes, rule), knobs)


def _launch_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    captured: Sequence[Tensor], sizes: Sequence[int], needs: Sequence[bool], spelling: str,
) -> list[Tensor]:  # fmt: skip
    knobs, rule = parse_flash(spelling)
    slots, store = slots_of(captured, needs), store_in(spelling)
    kernels = kernels_of("flash", rule, slots, query.device.type, BACKWARD, store)
    x = Operands(query, key, value, captured, sizes, rule)
    return gpu_flash.backward(kernels, x, knobs, (out, lse), grad_out, needs)


def _fake(query: Tensor, key: Tensor, value: Tensor, captured: Any, sizes: Any, spelling: str) -> tuple[Tensor, Tensor]:
    return gpu_flash.empty_out(query, value)


def _fake_backward(
    grad_out: Any, query: Tensor, key: Tensor, value: Tensor, out: Any, lse: Any,
    captured: Sequence[Tensor], sizes: Any, needs: Sequence[bool], spelling: str,
) -> list[Tensor]:  # fmt: skip
    learned = [t.new_empty(t.shape) for t, need in zip(captured, needs, strict=True) if need]
    return [*(torch.empty_like(t) for t in (query, key, value)), *learned]


library.impl("flash_interpreted", _launch, "CPU")
library.impl("flash_backward_interpreted", _launch_backward, "CPU")
torch.library.register_fake("attnc::flash_interpreted", _fake, lib=library)
torch.library.register_fake("attnc::flash_backward_interpreted", _fake_backward, lib=library)


@triton_op("attnc::flash", mutates_args=())
def flash(
    query: Tensor, key: Tensor, value: Tensor, captured: Sequence[Tensor], sizes: Sequence[int], spelling: str
) -> tuple[Tensor, Tensor]:
    """out and lse of the spelled attention."""
    if query.device.type == "cpu":
        return torch.ops.attnc.flash_interpreted(query, key, value, captured, sizes, spelling)
    return _launch(query, key, value, captured, sizes, spelling)


@triton_op("attnc::flash_backward", mutates_args=())
def flash_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    captured: Sequence[Tensor], sizes: Sequence[int], needs: Sequence[bool], spelling: str,
) -> list[Tensor]:  # fmt: skip
    """Gradients of query, key, value and of the captured tensors that `needs` names."""
    given = (grad_out, query, key, value, out, lse, captured, sizes, needs, spelling)
    if query.device.type == "cpu":
        return torch.ops.attnc.flash_backward_interpreted(*given)
    return _launch_backward(*given)


def _check_learns(*operands: Tensor) -> None:
    narrow = sorted({name_of(t.dtype) for t in operands if t.dtype in FLOAT8})
    if narrow:
        raise UsageError(
            f"differentiate flash: found operands of {', '.join(narrow)}, allowed are float32, float16 and bfloat16: 8 "
            "bits hold no gradient. Widen them before the attention, or run it under torch.no_grad()."
        )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, captured, ctx.sizes, ctx.spelling = inputs
    _check_learns(query, key, value)
    ctx.save_for_backward(query, key, value, *output, *captured)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Any) -> tuple[Any, ...]:
    query, key, value, out, lse, *captured = ctx.saved_tensors
    needs = [bool(need) for need in ctx.needs_input_grad[3]]
    dq, dk, dv, *learned = flash_backward(
        grad_out, query, key, value, out, lse, captured, ctx.sizes, needs, ctx.spelling
    )
    found = iter(learned)
    # torch takes an empty list of sizes for one of tensors
    return dq, dk, dv, [next(found) if need else None for need in needs], None if ctx.sizes else [], None


flash.register_autograd(_differentiate, setup_context=_remember)

"""The operators `attnc::selected` and `attnc::selected_backward`: attention over keys chosen at run time.

    selected(query, key, value, captured, sizes, spelling) -> (out, lse, chosen)
    selected_backward(grad_out, query, key, value, out, lse, chosen, captured, sizes, needs, spelling) -> Tensor[]
    spelling = FORM{knobs} | RULE        e.g. "block_mixture{block=512,top_k=4} | score=0.125 * s; keep=-i + j <= 0"

Shapes: query (B, Hq, L, E), key (B, H, S, E), value (B, H, S, Ev) -> out (B, Hq, L, Ev), lse (B, Hq, L), chosen int64
of a shape that the form says. lse and chosen are not differentiable; the backward reuses the choice. One opaque
operator: how many rows choose a block is known at run time only. On a GPU kernels walk the lists, with the tiles of the
form's knob `kernel`, by default those of `ListKnobs`.

Source: Lu et al. 2025, "MoBA", arXiv:2502.13189, algorithm 1; torch.library.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnc.codegen import cpu_key_lists, gpu_key_lists
from attnc.codegen.gpu_key_lists import Arranged, Kernels, ListKnobs, of_choice, of_lists
from attnc.codegen.launch import slots_of
from attnc.forms import parse_generated
from attnc.forms.selected import BEST, TABLE, BlockSelected, Selected
from attnc.forms.selected_lists import knobs_of
from attnc.op_flash import kernels_of
from attnc.operands import Operands
from attnc.rule_attention import AttentionRule

library = torch.library.Library("attnc", "FRAGMENT")


def parse_selected(spelling: str) -> tuple[Selected, AttentionRule]:
    """The form and the rule of a spelling. Raises: UsageError if the form chooses no keys."""
    return parse_generated(spelling, Selected, "one that chooses keys")  # type: ignore[type-abstract]


@torch.library.custom_op("attnc::selected", mutates_args=())
def selected(
    query: Tensor, key: Tensor, value: Tensor, captured: Sequence[Tensor], sizes: Sequence[int], spelling: str
) -> tuple[Tensor, Tensor, Tensor]:
    """out and lse of the spelled attention, and what it chose."""
    form, rule = parse_selected(spelling)
    given = Operands(query, key, value, captured, sizes, rule)
    chosen = form.choice_of(given)
    if query.device.type == "cpu":
        return *cpu_key_lists.forward(*form.laid(chosen, given)), chosen
    return *walk(form, chosen, given), chosen


def walk(form: Selected, chosen: Tensor, given: Operands) -> tuple[Tensor, Tensor]:
    """out and lse by kernels that walk the lists of a choice; on CPU tensors by Triton's interpreter."""
    laid, lists, knobs = _arranged(form, chosen, given)
    return gpu_key_lists.forward(_kernels(laid, [False] * len(laid.captured)), laid, lists, knobs)


def _arranged(form: Selected, chosen: Tensor, given: Operands) -> tuple[Operands, list[Arranged], ListKnobs]:
    """What the kernels take: operands, lists and schedule. Nothing waits for the device where the choice is blocks."""
    knobs = ListKnobs() if form.kernel in (BEST, TABLE) else knobs_of(form.kernel)
    if not form.chooses_blocks or not isinstance(form, BlockSelected):
        laid, every = form.laid(chosen, given)
        return laid, [of_lists(lists) for lists in every], knobs
    (B, Hq, L, _), (_, H, S, _) = given.query.shape, given.key.shape
    return given, [of_choice(chosen, (B, Hq, H, L), form.tile_rows, form.block_keys, S, knobs.block_m)], knobs


def _kernels(given: Operands, needs: Sequence[bool]) -> Kernels:
    slots, device = slots_of(given.captured, needs), given.query.device.type

    def of(skeleton: str, rule: AttentionRule, names: tuple[str, ...]) -> ModuleType:
        return kernels_of(skeleton, rule, slots, device, names)

    return of


@selected.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, captured: Sequence[Tensor], sizes: Sequence[int], spelling: str
) -> tuple[Tensor, Tensor, Tensor]:
    form, rule = parse_selected(spelling)
    given = Operands(query, key, value, captured, sizes, rule)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty((*query.shape[:3], value.shape[-1]))
    return (
        out,
        query.new_empty(query.shape[:3], dtype=wide),
        query.new_empty(form.chosen_shape(given), dtype=torch.int64),
    )


@torch.library.custom_op("attnc::selected_backward", mutates_args=())
def selected_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, chosen: Tensor,
    captured: Sequence[Tensor], sizes: Sequence[int], needs: Sequence[bool], spelling: str,
) -> list[Tensor]:  # fmt: skip
    """Gradients of query, key, value and of the captured tensors that `needs` names."""
    form, rule = parse_selected(spelling)
    given = Operands(query, key, value, captured, sizes, rule)
    if query.device.type != "cpu":
        return walk_backward(form, chosen, given, (out, lse), grad_out, needs)
    laid, lists = form.laid(chosen, given)
    needs = [*needs, *[False] * (len(laid.captured) - len(needs))]  # what the choice captures has no gradient
    dq, dk, dv, learned = cpu_key_lists.backward(grad_out, laid, lists, out, lse, needs)
    return [dq, form.folded(dk, key), form.folded(dv, value), *learned]


def walk_backward(
    form: Selected,
    chosen: Tensor,
    given: Operands,
    attended: tuple[Tensor, Tensor],
    grad: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of `walk`, which gave `attended`: of query, key, value and the captured tensors of `needs`."""
    laid, lists, knobs = _arranged(form, chosen, given)
    needs = [*needs, *[False] * (len(laid.captured) - len(needs))]
    kernels = _kernels(laid, needs)
    dq, dk, dv, learned = gpu_key_lists.backward(kernels, laid, lists, knobs, attended, grad, needs)
    learn = [t for t, need in zip(laid.captured, needs, strict=True) if need]
    learned = [torch.empty_like(t).copy_(found) for t, found in zip(learn, learned, strict=True)]
    return [dq, form.folded(dk, given.key), form.folded(dv, given.value), *learned]


@selected_backward.register_fake
def _(
    grad_out: Any, query: Tensor, key: Tensor, value: Tensor, out: Any, lse: Any, chosen: Any,
    captured: Sequence[Tensor], sizes: Any, needs: Sequence[bool], spelling: str,
) -> list[Tensor]:  # fmt: skip
    learned = [torch.empty_like(t) for t, need in zip(captured, needs, strict=True) if need]
    return [*(t.new_empty(t.shape) for t in (query, key, value)), *learned]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, captured, ctx.sizes, ctx.spelling = inputs
    ctx.save_for_backward(query, key, value, *output, *captured)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Any, ...]:
    query, key, value, out, lse, chosen, *captured = ctx.saved_tensors
    needs = [bool(need) for need in ctx.needs_input_grad[3]]
    dq, dk, dv, *learned = selected_backward(
        grad_out, query, key, value, out, lse, chosen, captured, ctx.sizes, needs, ctx.spelling
    )
    found = iter(learned)
    # torch takes an empty list of sizes for one of tensors
    return dq, dk, dv, [next(found) if need else None for need in needs], None if ctx.sizes else [], None


selected.register_autograd(_differentiate, setup_context=_remember)

"""Launch the kernels of chunked recurrences, backward: gradients of all inputs from what the forward saved.

    backward(kernels, inputs, (grad_out, grad_state), rule, knobs) -> Given, the gradients in place of the inputs

Gradients have the shapes and dtypes of the inputs; those of absent inputs are None. Gradients of q, k, a and b of
grouped heads are summed over the group, of decays by head and of the bonus over the batch, in float32, without atomics.

Kernels, one after the other: `chunk_within_backward` (delta rule, low rank), `chunk_state_backward`, which goes from
the last chunk to the first, `chunk_values_backward` (but for the delta rule), `chunk_output_backward`.

Runs as it is on CPU tensors under Triton's interpreter, eagerly on a GPU, and traced: nothing here depends on data.

Source: Yang et al. 2024, arXiv:2406.06484, section 3; Yang et al. 2023, arXiv:2312.06635, appendix.
"""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from attnc.codegen.cpu_recurrence import Given
from attnc.codegen.gpu_recurrence import (
    BackwardKnobs,
    Prepared,
    RecurrenceKnobs,
    Saved,
    constants_of,
    forward,
    pointers,
    prepared,
    run_kernel,
    tile_width,
)
from attnc.codegen.gpu_recurrence import kernels_of as forward_kernels
from attnc.codegen.launch import strides
from attnc.codegen.load import kernel_folder, load
from attnc.codegen.render import render, skeleton_text
from attnc.codegen.tiles import blocks
from attnc.options import Options
from attnc.rule_recurrence import RecurrenceRule

KERNELS = {
    "chunk_within_backward": ("chunk_within_backward",),
    "chunk_state_backward": ("chunk_state_backward",),
    "chunk_output_backward": ("chunk_output_backward", "chunk_values_backward"),
}


def schedule_of(rule: RecurrenceRule, knobs: RecurrenceKnobs, backend: str) -> BackwardKnobs:
    """The schedule of a rule; untuned, where `chunk_output_backward` would else spill with narrower tiles, and on AMD
    with fewer warps, whose threads may have twice the registers then. backend: "cuda" or "hip"."""
    if knobs.backward is not None:
        return knobs.backward
    return BackwardKnobs(
        output_block_k=16 if rule.low_rank or rule.delta else 32, output_warps=4 if backend == "hip" else 8
    )


@lru_cache(maxsize=8)
def kernels_of(device: str, store: str | None = None) -> SimpleNamespace:
    """The loaded kernels by name, for all rules, and those of the forward, with `store` as there."""
    found: dict[str, Any] = dict(vars(forward_kernels(device, store)))
    for skeleton, names in KERNELS.items():
        module = load(text_of(skeleton, device), kernel_folder(store or Options().store))
        found |= {name: getattr(module, name) for name in names}
    return SimpleNamespace(**found)


@lru_cache(maxsize=32)
def text_of(skeleton: str, device: str) -> str:
    """A skeleton's kernels as one file."""
    return render(skeleton_text(skeleton), {}, (), spelling=skeleton, device=device, kernels=KERNELS[skeleton])


def backward(
    kernels: Any,
    inputs: Given,
    grads: tuple[Tensor, Tensor],
    rule: RecurrenceRule,
    knobs: RecurrenceKnobs,
    *,
    saved: Saved | None = None,
) -> Given:
    """Gradients of the inputs of a forward, given those of its results; without `saved` the forward runs again.

    For rules without normaliser and exponential gate; those go through `gpu_recurrence_normalised`.
    """
    schedule = schedule_of(rule, knobs, "hip" if torch.version.hip else "cuda")
    if saved is None:
        saved = forward(kernels, inputs, rule, knobs)[2]
    x = prepared(inputs, rule)
    given = pointers_of(grads, x, saved, rule, knobs)
    (B, H, _, V), N = x.value.shape, saved.states.shape[2]
    given |= {"BLOCK_K": tile_width(given["K"], schedule.block_k), "BLOCK_V": tile_width(V, schedule.block_v)}
    if saved.inverse is not None:
        run_kernel(kernels.chunk_within_backward, N * B * H, given, schedule.warps, schedule.stages)
    narrow = given | {"BLOCK_V": tile_width(V, schedule.state_block_v)}
    programs = blocks(V, narrow["BLOCK_V"]) * B * H
    run_kernel(kernels.chunk_state_backward, programs, narrow, schedule.state_warps, schedule.state_stages)
    if rule.delta:
        assert saved.corrected is not None
        given |= {"p_v": saved.corrected, **strides("v", saved.corrected)}
    else:
        programs = blocks(V, given["BLOCK_V"]) * N * B * H
        run_kernel(kernels.chunk_values_backward, programs, given, schedule.warps, schedule.stages)
    given["BLOCK_K"] = tile_width(given["K"], schedule.output_block_k)
    given["BLOCK_V"] = tile_width(V, schedule.output_block_v)
    run_kernel(kernels.chunk_output_backward, N * B * H, given, schedule.output_warps, schedule.output_stages)
    return _gathered(given, x, saved, rule)


def pointers_of(
    grads: tuple[Tensor, Tensor], x: Prepared, saved: Saved, rule: RecurrenceRule, knobs: RecurrenceKnobs
) -> dict[str, Any]:
    """Arguments of all kernels by name but for tiles: what is given, and unwritten memory for what they find."""
    (grad_out, grad_state), (B, H, L, V) = grads, x.value.shape
    K, N = x.key.shape[3], saved.states.shape[2]
    constants, mid, solve = constants_of(rule, x, knobs), saved.states.dtype, saved.inverse is not None

    def empty(*shape: int, dtype: torch.dtype = torch.float32, when: bool = True) -> Tensor | None:
        return x.value.new_empty(B, H, *shape, dtype=dtype) if when else None

    given = constants | pointers(x, saved, constants["DECAY"]) | strides("o", grad_out)
    by_head = {"q": x.query, "k": x.key, "a": x.a, "b": x.b}
    found = {f"p_d{n}": None if t is None else empty(L, K, dtype=_grad_type(t, H, rule)) for n, t in by_head.items()}
    return given | found | {
        "p_do": grad_out,
        "p_grad": grad_state.float().contiguous(),
        "p_weights": empty(L, K, dtype=mid, when=solve),
        "p_y": empty(L, V, dtype=mid, when=solve),
        "p_x": None if rule.delta else saved.corrected,
        "p_dstates": empty(N, K, V, dtype=mid),
        "p_dinitial": empty(K, V),
        "p_dv": empty(L, V, dtype=x.value.dtype, when=not rule.delta),
        "p_dg": empty(*((L, K) if rule.decay == "channel" else (L,)), when=constants["DECAY"] != 0),
        "p_dbeta": empty(L, when=x.beta is not None),
        "p_dbonus": empty(N, K, when=x.bonus is not None),
    }  # fmt: skip


def _grad_type(x: Tensor, heads: int, rule: RecurrenceRule) -> torch.dtype:
    """Type of a gradient by head: the input's where nothing is done to it afterwards."""
    return torch.float32 if x.shape[1] != heads or rule.qk_norm is not None else x.dtype


def _gathered(given: dict[str, Any], x: Prepared, saved: Saved, rule: RecurrenceRule) -> Given:
    """Gradients of the inputs from those by head and token."""
    decay, beta, bonus, initial = given["p_dg"], given["p_dbeta"], given["p_dbonus"], given["p_dinitial"]
    value = given["p_dv"]
    if rule.delta:
        value, v = given["p_y"].float(), x.value.float()
        if x.beta is not None:
            beta = beta + (value * v).sum(-1)
            value = value * x.beta.float()[..., None]
    if rule.decay == "head":
        decay = decay.sum((0, 2))
    norms = (None, None) if saved.norms is None else (saved.norms[1], saved.norms[0])
    return Given(
        query=_over_group(given["p_dq"], x.query, norms[0]),
        key=_over_group(given["p_dk"], x.key, norms[1]),
        value=value.to(x.value.dtype),
        decay=decay if decay is None or x.decay is None else decay.to(x.decay.dtype),
        beta=beta if x.beta is None else beta.to(x.beta.dtype),
        bonus=bonus if x.bonus is None else bonus.sum((0, 2)).to(x.bonus.dtype),
        initial=None if x.initial is None else initial.sum_to_size(x.initial.shape).to(x.initial.dtype),
        a=None if x.a is None else _over_group(given["p_da"], x.a, None),
        b=None if x.b is None else _over_group(given["p_db"], x.b, None),
    )


def _over_group(grad: Tensor, x: Tensor, norm: Tensor | None) -> Tensor:
    """Gradients by head summed over those that share x; with `norm`, of x where grad is that of x * norm."""
    B, heads, L, K = x.shape
    if grad.shape[1] != heads:
        grad = grad.view(B, heads, -1, L, K).sum(2)
    if norm is not None:
        unit = x.float() * norm[..., None]
        grad = norm[..., None] * (grad - unit * (unit * grad).sum(-1, keepdim=True))
    return grad.to(x.dtype)

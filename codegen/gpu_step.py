"""Launch the kernel that goes through a recurrence token by token: decoding, and rules that chunks do not compute.

    step(kernel, given, rule, knobs) -> (out, final_state)

Shapes: as `attnc::recurrence`; out laid out as (B, L, H, V), final_state float32. Forward only.

Source: Yang et al. 2024, arXiv:2406.06484, equation 4 (recurrent form).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnc.codegen.cpu_recurrence import Given
from attnc.codegen.gpu_segments import segments_of
from attnc.codegen.launch import launch, strides
from attnc.codegen.load import kernel_folder, load
from attnc.codegen.render import render, skeleton_text
from attnc.codegen.tiles import blocks
from attnc.options import Options
from attnc.rule_recurrence import RecurrenceRule

SKELETON = "recurrence_step"
KINDS = {"none": 0, "head": 1, "token": 2, "channel": 3, "state": 4}
LARGEST = 16384  # elements of a block of the state: 64 KiB of registers


@dataclass(frozen=True)
class StepKnobs:
    """block_v: columns of the state in a program."""

    block_v: int = 32
    warps: int = 4


@lru_cache(maxsize=8)
def kernel_of(device: str, store: str | None = None) -> Any:
    """The loaded kernel: the same for all rules, which are constants of a launch."""
    return load(text_of(device), kernel_folder(store or Options().store)).recurrence_step


def text_of(device: str) -> str:
    """The skeleton as a file."""
    return render(skeleton_text(SKELETON), {}, (), spelling=SKELETON, device=device, kernels=(SKELETON,))


def step(kernel: Any, given: Given, rule: RecurrenceRule, knobs: StepKnobs) -> tuple[Tensor, Tensor]:
    """Outputs and last state of `rule`."""
    value = given.value
    B, H, L, V = value.shape
    K = 1 if given.key is None else given.key.shape[3]
    out = value.new_empty(B, L, H, V, dtype=value.dtype if rule.out == "value" else torch.float32).transpose(1, 2)
    last = value.new_empty(B, H, K, V + rule.columns, dtype=torch.float32)
    names = {"q": given.query, "k": given.key, "v": value, "a": given.a, "b": given.b, "o": out}
    places: dict[str, Any] = {}
    for name, x in names.items():
        places |= dict.fromkeys((f"{name}_{axis}" for axis in "bhle"), 0) if x is None else strides(name, x)
    constants = constants_of(rule, given, knobs, K, V)
    launch(
        kernel,
        B * H * blocks(V, constants["BLOCK_V"]),
        {
            "p_q": given.query, "p_k": given.key, "p_v": value, "p_a": given.a, "p_b": given.b, "p_out": out,
            "p_decay": given.decay, "p_rates": dense(given.rates), "p_beta": given.beta, "p_final": last,
            "p_bonus": dense(given.bonus), "p_initial": given.initial,
            "p_segments": None if given.documents is None else segments_of(given.documents),
            **places, **decay_strides(given, rule), **strides_by("w", "bhl", given.beta),
            **strides_by("i", "bhkv", given.initial), "H": H, "L": L, **constants,
        },
        num_warps=knobs.warps,
        num_stages=1,
    )  # fmt: skip
    return out, last


def constants_of(rule: RecurrenceRule, given: Given, knobs: StepKnobs, K: int, V: int) -> dict[str, Any]:
    """The compile-time arguments of the kernel."""
    shared = {"GROUP": given.key, "GROUP_A": given.a, "GROUP_B": given.b}
    groups = {name: 1 if x is None else given.value.shape[1] // x.shape[1] for name, x in shared.items()}
    there = {name: getattr(given, name) is not None for name in ("query", "key", "bonus")}
    packed, rank = given.documents is not None, given.a is not None
    kinds = kinds_of(rule, **there, rank=rank, packed=packed)
    return {**groups, **kinds, **sizes_of(K, V, knobs), "INITIAL": given.initial is not None}


def kinds_of(rule: RecurrenceRule, *, query: bool, key: bool, rank: bool, bonus: bool, packed: bool) -> dict[str, Any]:
    """What a rule is to the kernel."""
    return {
        "SCALE": rule.scale,
        "EPS": rule.eps,
        "NORM": rule.qk_norm or 0.0,
        "NORMED": rule.qk_norm is not None,
        "QUERY": query,
        "KEY": key,
        "KIND": KINDS[rule.decay],
        "FACTORS": rule.factors,
        "DELTA": rule.delta,
        "RANK": rank,
        "WRITE": rule.gate == "write",
        "EXPONENTIAL": rule.gate == "exp",
        "BEFORE": rule.read == "before",
        "BONUS": bonus,
        "NORMALISED": rule.normaliser != "none",
        "MAX1": rule.normaliser == "max1",
        "PACKED": packed,
        "COLUMNS": rule.columns,
    }


def sizes_of(K: int, V: int, knobs: StepKnobs) -> dict[str, int]:
    """The block of the state that a program keeps."""
    block_k = 1 << (K - 1).bit_length()
    block_v = max(1, min(knobs.block_v, 1 << (V - 1).bit_length(), LARGEST // block_k))
    return {"K": K, "V": V, "BLOCK_K": block_k, "BLOCK_V": block_v}


def decay_strides(given: Given, rule: RecurrenceRule) -> dict[str, int]:
    """Strides of a decay as the kernels' g_b, g_h, g_l, g_e, 0 along what it does not have."""
    x = given.decay
    if x is not None and rule.decay == "head":
        return {"g_b": 0, "g_h": x.stride(0), "g_l": 0, "g_e": 0}
    return {"g_e": 0} | strides_by("g", "bhl" if x is None or x.dim() == 3 else "bhle", x)


def strides_by(name: str, axes: str, x: Tensor | None) -> dict[str, int]:
    """Strides as name_axis, 0 where there is no tensor."""
    return {f"{name}_{axis}": 0 if x is None else x.stride(n) for n, axis in enumerate(axes)}


def dense(x: Tensor | None) -> Tensor | None:
    """Contiguous, if given."""
    return None if x is None else x.contiguous()

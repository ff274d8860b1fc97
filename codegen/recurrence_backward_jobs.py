"""The backward kernels of chunked recurrences as jobs of the ahead-of-time compiler: what a launch would pass."""

from __future__ import annotations

import ast
from typing import Any

import torch

from attnc.codegen.compile_stats import Job
from attnc.codegen.flash_jobs import TRITON_TYPES
from attnc.codegen.gpu_recurrence import (
    DECAYS,
    RANK,
    BackwardKnobs,
    RecurrenceKnobs,
    kinds_of,
    product_type,
    sizes_of,
    tile_width,
    types_of,
)
from attnc.codegen.gpu_recurrence_backward import KERNELS, schedule_of, text_of
from attnc.rule_recurrence import RecurrenceRule

INPUTS = ("p_q", "p_k", "p_v", "p_a", "p_b", "p_do", "p_dv")
BY_HEAD = ("p_dq", "p_dk", "p_da", "p_db")
PRODUCTS = ("p_states", "p_dstates", "p_inverse", "p_scores", "p_keys", "p_reads", "p_x", "p_y", "p_weights")


def backward_jobs(
    rule: RecurrenceRule,
    dtype: torch.dtype,
    group: int,
    K: int,
    V: int,
    knobs: RecurrenceKnobs,
    target: str,
    *,
    bonus: bool = False,
) -> list[Job]:
    """The jobs of the kernels that a rule's backward launches, in their order; arguments as of `recurrence_jobs`."""
    backend = target.partition(":")[0]
    mid, schedule = product_type(dtype, knobs.products), schedule_of(rule, knobs, backend)
    constants = {
        **kinds_of(rule, low_rank=rule.low_rank, packed=rule.packed, bonus=bonus),
        **types_of(dtype, knobs, backend),
        **sizes_of(K, V, knobs),
        **dict.fromkeys(("GROUP", "GROUP_A", "GROUP_B"), group),
        "BLOCK_K": tile_width(K, schedule.block_k),
        "BLOCK_V": tile_width(V, schedule.block_v),
        "MID": "tl.bfloat16" if mid == torch.bfloat16 else "tl.float32",
        "K": K,
        "V": V,
    }
    types = dict.fromkeys(INPUTS, dtype) | dict.fromkeys(PRODUCTS, mid) | {"p_segments": torch.int32}
    types |= dict.fromkeys(BY_HEAD, torch.float32 if group > 1 or rule.qk_norm is not None else dtype)
    if rule.delta:
        types["p_v"] = mid
    absent = _absent(constants)
    jobs = []
    for kernel, skeleton, own, warps, stages in _launched(constants, rule, schedule):
        text = text_of(skeleton, target)
        function = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == kernel)
        names = [arg.arg for arg in function.args.args]
        fixed = {name: (constants | own)[name] for name in names if name in constants}
        fixed |= {name: None for name in names if name in absent}
        fixed |= {name: 1 for name in names if name.endswith("_e") and name not in fixed}
        signature = {name: _type_of(name, types) for name in names if name not in fixed}
        jobs.append(Job(text, kernel, signature, fixed, target, warps, stages))
    return jobs


def _launched(constants: dict[str, Any], rule: RecurrenceRule, x: BackwardKnobs) -> list[tuple]:
    """Kernels with their skeletons, the constants that are theirs alone, warps and stages."""
    names = {kernel: skeleton for skeleton, kernels in KERNELS.items() for kernel in kernels}
    narrow = {"BLOCK_V": tile_width(constants["V"], x.state_block_v)}
    output = {
        "BLOCK_K": tile_width(constants["K"], x.output_block_k),
        "BLOCK_V": tile_width(constants["V"], x.output_block_v),
    }
    found = [
        ("chunk_within_backward", constants["SOLVE"] != 0, {}, x.warps, x.stages),
        ("chunk_state_backward", True, narrow, x.state_warps, x.state_stages),
        ("chunk_values_backward", not rule.delta, {}, x.warps, x.stages),
        ("chunk_output_backward", True, output, x.output_warps, x.output_stages),
    ]
    return [(kernel, names[kernel], *rest) for kernel, wanted, *rest in found if wanted]


def _absent(constants: dict[str, Any]) -> set[str]:
    """Pointers that a launch passes as None."""
    decay, solve = constants["DECAY"], constants["SOLVE"]
    present = {
        **dict.fromkeys(("p_a", "p_b", "p_da", "p_db", "p_keys", "p_reads", "p_x"), solve == RANK),
        **dict.fromkeys(("p_inverse", "p_y", "p_weights"), solve != 0),
        **dict.fromkeys(("p_beta", "p_dbeta"), constants["GATED"]),
        **dict.fromkeys(("p_bonus", "p_dbonus"), constants["BONUS"]),
        "p_sums": decay >= DECAYS["token"],
        "p_rate": decay == DECAYS["head"],
        "p_dg": decay != DECAYS["none"],
        "p_norms": constants["NORMED"],
        "p_segments": constants["PACKED"],
        "p_scores": constants["STORED"],
    }
    return {name for name, there in present.items() if not there}


def _type_of(name: str, types: dict[str, torch.dtype]) -> str:
    if name.startswith("p_"):
        return f"*{TRITON_TYPES[types.get(name, torch.float32)]}"
    return "i32" if name in ("B", "H", "L") else "i32:16"

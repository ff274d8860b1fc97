"""The forward kernels of chunked recurrences as jobs of the ahead-of-time compiler: what a launch would pass."""

from __future__ import annotations

import ast
from typing import Any

import torch

from attnc.codegen.compile_stats import Job
from attnc.codegen.flash_jobs import TRITON_TYPES
from attnc.codegen.gpu_recurrence import (
    DECAYS,
    KERNELS,
    RANK,
    RecurrenceKnobs,
    kinds_of,
    product_type,
    sizes_of,
    text_of,
    tile_width,
    types_of,
)
from attnc.rule_recurrence import RecurrenceRule

COUNTS = ("B", "H", "L")  # numbers of which nothing is known
INPUTS = ("p_q", "p_k", "p_v", "p_a", "p_b", "p_out")
PRODUCTS = ("p_states", "p_inverse", "p_scores", "p_keys", "p_reads", "p_corrected")


def recurrence_jobs(
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
    """The jobs of the kernels that a rule launches, in their order.

    Inputs of `dtype` with contiguous rows; decays, gates and states float32. group: heads of values per head of keys.
    target: "cuda:90".
    """
    mid = product_type(dtype, knobs.products)
    constants = {
        **kinds_of(rule, low_rank=rule.low_rank, packed=rule.packed, bonus=bonus),
        **types_of(dtype, knobs, target.partition(":")[0]),
        **sizes_of(K, V, knobs),
        **dict.fromkeys(("GROUP", "GROUP_A", "GROUP_B"), group),
        "MID": "tl.bfloat16" if mid == torch.bfloat16 else "tl.float32",
        "K": K,
        "V": V,
        "INITIAL": rule.state_in,
    }
    jobs = []
    for kernel, own, warps, stages in _launched(constants, rule, knobs):
        skeleton = next(name for name, kernels in KERNELS.items() if kernel in kernels)
        text = text_of(skeleton, target)
        function = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == kernel)
        names = [arg.arg for arg in function.args.args]
        absent = _absent(constants, rule, own)
        fixed = {name: (constants | own)[name] for name in names if name in constants or name in own}
        fixed |= {name: None for name in names if name in absent}
        fixed |= {name: 1 for name in names if name.endswith("_e") and name not in fixed}
        signature = {name: _type_of(name, dtype, mid) for name in names if name not in fixed}
        jobs.append(Job(text, kernel, signature, fixed, target, warps, stages))
    return jobs


def _launched(constants: dict[str, Any], rule: RecurrenceRule, knobs: RecurrenceKnobs) -> list[tuple]:
    """Kernels with the constants that are theirs alone, warps and stages."""
    decay, width = constants["DECAY"], tile_width(constants["K"], 64)
    by_channel = decay == DECAYS["channel"]
    found: list[tuple] = []
    if decay in (DECAYS["token"], DECAYS["channel"]):
        sizes = {"K": constants["K"], "BLOCK_K": width} if by_channel else {"K": 1, "BLOCK_K": 1}
        found.append(("chunk_sums", sizes, 4, 1))
    if constants["NORMED"]:
        found.append(("row_norms", {"EPS": rule.qk_norm, "BLOCK_C": 64, "BLOCK_K": width}, 4, 1))
    if constants["SOLVE"] or constants["STORED"]:
        tile = {"BLOCK_K": tile_width(constants["K"], knobs.within_block_k)}
        found.append(("chunk_within", tile, knobs.within_warps, 1))
    found.append(("chunk_state", {}, knobs.warps, knobs.stages))
    reading = {"BLOCK_V": tile_width(constants["V"], knobs.out_block_v)}
    if rule.delta:
        reading["GATED"] = False
    return [*found, ("chunk_output", reading, knobs.out_warps, knobs.out_stages)]


def _absent(constants: dict[str, Any], rule: RecurrenceRule, own: dict[str, Any]) -> set[str]:
    """Pointers that a launch passes as None."""
    decay, solve = constants["DECAY"], constants["SOLVE"]
    present = {
        "p_a": solve == RANK,
        "p_b": solve == RANK,
        "p_beta": constants["GATED"],
        "p_bonus": constants["BONUS"],
        "p_sums": decay >= DECAYS["token"],
        "p_rate": decay == DECAYS["head"],
        "p_norms": constants["NORMED"],
        "p_segments": constants["PACKED"],
        "p_scores": constants["STORED"],
        "p_inverse": solve != 0,
        "p_keys": solve == RANK,
        "p_reads": solve == RANK,
        "p_corrected": solve != 0,
        "p_normalisers": constants["NORMALISED"],
        "p_maximum": rule.gate == "exp",
        "p_initial": constants["INITIAL"],
    }
    return {name for name, there in present.items() if not there}


def _type_of(name: str, dtype: torch.dtype, mid: torch.dtype) -> str:
    if name in INPUTS:
        return f"*{TRITON_TYPES[dtype]}"
    if name in PRODUCTS:
        return f"*{TRITON_TYPES[mid]}"
    if name == "p_segments":
        return "*i32"
    if name.startswith("p_"):
        return "*fp32"
    return "i32" if name in COUNTS else "i32:16"

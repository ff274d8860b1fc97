"""The flash kernels as jobs of the ahead-of-time compiler: what a launch would pass, as types and divisibility."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attnc.codegen.compile_stats import Job
from attnc.codegen.float8 import multiplies, wide_type
from attnc.codegen.gpu_flash import FlashKnobs, Launch, constants_of
from attnc.codegen.render import rule_text
from attnc.codegen.triton_text import CAPTURED_NAME, Slot
from attnc.errors import LoweringError
from attnc.rule_attention import AttentionRule

KERNELS = ("flash_forward", "flash_dq", "flash_dkv")
TRITON_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.float8_e4m3fnuz: "fp8e4b8",
    torch.float8_e5m2fnuz: "fp8e5b16",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
FIXED = {"p_lse": "*fp32", "p_delta": "*fp32", "p_list": "*i32", "p_counts": "*i32", "Hq": "i32"}


def flash_job(
    kernel: str,
    rule: AttentionRule,
    captured: Sequence[Slot],
    dtype: torch.dtype,
    group: int,
    E: int,
    Ev: int,
    knobs: FlashKnobs,
    target: str,
    *,
    held: tuple[torch.dtype, torch.dtype] | None = None,
) -> Job:
    """The job of one of KERNELS for queries of `dtype`, strides and lengths being multiples of 16.

    group: query heads per key head. target: "cuda:90". held: types of key and value, where they are not `dtype`.
    Raises: LoweringError for a rule that kernels do not compute.
    """
    launch = launch_of(kernel, knobs)
    text = rule_text("flash", rule, tuple(captured), target, (kernel,))
    functions = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    types = operand_types(dtype, held)
    names = [arg.arg for arg in functions[kernel].args.args]
    dot8, learns = multiplies(types["p_q"], types["p_k"]), [n for n, slot in enumerate(captured) if slot.needs_grad]
    every = constants_of(rule, group, E, Ev, knobs, launch, dot8=dot8, learns=learns)
    constants = {name: value for name, value in every.items() if name in names}
    signature: dict[str, str] = {}
    for name in (name for name in names if name not in every):
        kind = type_of(name, types, captured)
        if name.endswith("_e") or (name in ("p_list", "p_counts") and knobs.skip != "table"):
            constants[name] = 1 if name.endswith("_e") else None
        elif kind == "1":
            constants[name] = 1
        else:
            signature[name] = kind
    return Job(text, kernel, signature, constants, target, launch.warps, launch.stages)


def launch_of(kernel: str, knobs: FlashKnobs) -> Launch:
    """The tile and resources of one of KERNELS."""
    if kernel not in KERNELS:
        raise LoweringError(f"compile the kernel {kernel!r}: the skeleton flash has {', '.join(KERNELS)}.")
    return dict(zip(KERNELS, (knobs.forward, knobs.dq, knobs.dkv), strict=True))[kernel]


def operand_types(dtype: torch.dtype, held: tuple[torch.dtype, torch.dtype] | None = None) -> dict[str, torch.dtype]:
    """The types of tensors by parameter, for queries of `dtype`; held: of key and value, by default the same."""
    key, value = held or (dtype, dtype)
    wide = wide_type(dtype)
    outs = {"p_out": wide, "p_do": wide, "p_dq": dtype, "p_dk": key, "p_dv": value}
    return {"p_q": dtype, "p_k": key, "p_v": value, **outs}


def type_of(
    name: str, types: dict[str, torch.dtype], captured: Sequence[Slot], fixed: Mapping[str, str] = FIXED
) -> Any:
    """The Triton type of a parameter; "1" for the stride of the last dimension, which is the constant 1.

    types: of tensors by parameter. fixed: the types of parameters that no operand decides.
    """
    if name in fixed:
        return fixed[name]
    if name.startswith("p_"):
        return f"*{TRITON_TYPES[types[name]]}"
    if name[0] == "g" and name[1:].isdecimal():
        return "*fp32"
    if CAPTURED_NAME.fullmatch(name) is None:
        return "i32:16"
    base, _, part = name.partition("_")
    if base[0] == "n":
        return "i32"
    slot = captured[int(base[1:])]
    if not part:
        return f"*{TRITON_TYPES[slot.dtype]}"
    return "1" if part == f"s{slot.rank - 1}" else "i32:16"

"""The decode kernels as jobs of the ahead-of-time compiler: what a launch would pass, as types and divisibility."""

from __future__ import annotations

import ast
from collections.abc import Collection, Sequence

import torch

from attnc.codegen.compile_stats import Job
from attnc.codegen.flash_jobs import TRITON_TYPES, operand_types
from attnc.codegen.float8 import multiplies
from attnc.codegen.gpu_decode import KERNELS, DecodeKnobs, combine_constants, constants_of
from attnc.codegen.render import rule_text
from attnc.codegen.triton_text import CAPTURED_NAME, Slot
from attnc.rule_attention import AttentionRule

COUNTS = ("B", "H", "Hq", "L", "ROWS", "SPLITS")  # small numbers, of which nothing is known


def decode_jobs(
    rule: AttentionRule,
    captured: Sequence[Slot],
    dtype: torch.dtype,
    group: int,
    E: int,
    Ev: int,
    knobs: DecodeKnobs,
    target: str,
    *,
    held: tuple[torch.dtype, torch.dtype] | None = None,
    value_in_key: bool = False,
    ones: Collection[str] = ("L",),
) -> list[Job]:
    """The jobs of KERNELS for queries of `dtype` and keys and values of the types `held`, each width contiguous.

    group: query heads per key head. target: "cuda:90". ones: which of COUNTS are 1, which Triton makes constants.
    Raises: LoweringError for a rule that kernels do not compute.
    """
    text = rule_text("flash_decode", rule, tuple(captured), target, KERNELS)
    functions = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    types = operand_types(dtype, held)
    dot8 = multiplies(types["p_q"], types["p_k"])
    jobs = []
    for kernel, constants, warps, stages in (
        (
            "flash_decode",
            constants_of(rule, group, E, Ev, knobs, value_in_key=value_in_key, dot8=dot8),
            knobs.warps,
            knobs.stages,
        ),
        ("flash_combine", combine_constants(Ev), 4, 1),
    ):
        names = [arg.arg for arg in functions[kernel].args.args]
        constants |= {name: 1 for name in names if name in ones or _is_one(name, captured)}
        signature = {name: _type_of(name, types, captured) for name in names if name not in constants}
        jobs.append(Job(text, kernel, signature, constants, target, warps, stages))
    return jobs


def _is_one(name: str, captured: Sequence[Slot]) -> bool:
    """Whether a parameter is the stride of a last dimension."""
    base, _, part = name.partition("_")
    if CAPTURED_NAME.fullmatch(name) is None:
        return part == "e"
    return part.startswith("s") and part == f"s{captured[int(base[1:])].rank - 1}"


def _type_of(name: str, types: dict[str, torch.dtype], captured: Sequence[Slot]) -> str:
    if name.startswith("p_"):
        return f"*{TRITON_TYPES[types.get(name, torch.float32)]}"
    if name in COUNTS or name[0] == "n":
        return "i32"
    if CAPTURED_NAME.fullmatch(name) and "_" not in name:
        return f"*{TRITON_TYPES[captured[int(name[1:])].dtype]}"
    return "i32:16"

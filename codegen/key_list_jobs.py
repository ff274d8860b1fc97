"""The kernels of key lists as jobs of the ahead-of-time compiler: what a launch would pass."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import replace

import torch

from attnc.codegen.compile_stats import Job
from attnc.codegen.flash_jobs import FIXED, operand_types, type_of
from attnc.codegen.gpu_key_lists import KERNELS, LEAST, ListKnobs, constants_of
from attnc.codegen.render import rule_text
from attnc.codegen.triton_text import Slot
from attnc.errors import LoweringError
from attnc.expr import TRUE
from attnc.rule_attention import AttentionRule

WIDE = dict.fromkeys(("p_rows", "p_blocks", "p_place", "p_block", "p_first", "p_end"), torch.int64)
NARROW = {"p_order": torch.int32, "p_columns": torch.int32, "p_added": torch.float32}
COUNTS = {"B": "i32", "H": "i32", "N": "i32", "BLOCKS": "i32"}


def list_job(
    kernel: str,
    rule: AttentionRule,
    captured: Sequence[Slot],
    dtype: torch.dtype,
    E: int,
    Ev: int,
    rows: int,
    width: int,
    knobs: ListKnobs,
    target: str,
    *,
    keeps: str = "rule",
    final: bool = True,
    added: bool = False,
) -> Job:
    """The job of one of KERNELS for tiles of `rows` rows and blocks of `width` keys, strides being multiples of 16.

    target: "cuda:90". keeps, added: as of `KeyLists`. final: whether a row has one part.
    Raises: LoweringError for a rule that kernels do not compute, or another kernel.
    """
    if kernel not in KERNELS:
        raise LoweringError(f"compile the kernel {kernel!r}: the skeleton key_lists has {', '.join(KERNELS)}.")
    rule = rule if keeps == "rule" else replace(rule, keep=TRUE)
    tile = knobs.of(kernel, rows, width)
    text = rule_text("key_lists", rule, tuple(captured), target, (kernel,))
    functions = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    names = [arg.arg for arg in functions[kernel].args.args]
    types = operand_types(dtype) | WIDE | NARROW
    types |= dict.fromkeys(("p_dk", "p_dv", *(() if final else ("p_out", "p_dq"))), torch.float32)
    every = constants_of(rule, E, Ev, knobs, tile, rows, width, diagonal=keeps == "diagonal")
    every |= {"FINAL": final, "SCATTER": width < LEAST, "WIDE": False}
    every |= {} if added else {"p_added": None}
    every |= {} if added or keeps == "diagonal" else {"p_columns": None}
    constants = {name: value for name, value in every.items() if name in names}
    signature: dict[str, str] = {}
    for name in (name for name in names if name not in every):
        kind = type_of(name, types, captured, FIXED | COUNTS)
        if name.endswith("_e") or kind == "1":
            constants[name] = 1
        else:
            signature[name] = kind
    return Job(text, kernel, signature, constants, target, tile.warps, tile.stages)

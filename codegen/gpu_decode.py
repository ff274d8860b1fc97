"""Launch the decode kernels: few query rows over many keys, split over the keys and merged.

Runs as it is on CPU tensors under Triton's interpreter, eagerly on a GPU, and traced: nothing here depends on data.

Source: Dao et al. 2023, "Flash-Decoding for long-context inference", pytorch.org/blog/flash-decoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnc.codegen.float8 import multiplies
from attnc.codegen.gpu_flash import check_types, empty_out, widths
from attnc.codegen.holes import plain_scale
from attnc.codegen.launch import launch, strides
from attnc.codegen.tiles import blocks
from attnc.errors import UsageError
from attnc.operands import Operands
from attnc.rule_attention import AttentionRule

ROWS = 16  # query rows up to which decoding pays
KERNELS = ("flash_decode", "flash_combine")


@dataclass(frozen=True)
class DecodeKnobs:
    """Schedule of the two kernels.

    block_m: rows of all query heads of a key head in one tile. splits: parts of the keys.
    precision: of float32 products, "ieee" or "tf32". dot8: as of `FlashKnobs`.
    """

    block_m: int = 16
    block_n: int = 64
    splits: int = 8
    warps: int = 4
    stages: int = 2
    precision: str = "ieee"
    dot8: bool = False


def shares_latent(E: int, Ev: int, least: int = 16) -> bool:
    """Whether a value that is the key's first Ev columns can be taken from the key's own tile."""
    (main, _), (value_main, value_tail) = widths(E, least), widths(Ev, least)
    return value_tail == 0 and value_main == main and Ev <= E


def decode(
    kernels: ModuleType, x: Operands, knobs: DecodeKnobs, *, value_in_key: bool = False
) -> tuple[Tensor, Tensor]:
    """out and lse by the kernels rendered for the rule from skeleton flash_decode.

    value_in_key: the value is `key[..., :Ev]`, so that the key is read once (absorbed latent attention).
    Shapes: as `Operands` -> out (B, Hq, L, Ev), lse (B, Hq, L) float32.
    Raises: UsageError for a value that cannot be taken from the key's tile.
    """
    query, key, value, captured, sizes, rule = x
    B, Hq, L, E = query.shape
    H, S, Ev, dot8 = key.shape[1], key.shape[2], int(value.shape[3]), multiplies(query.dtype, key.dtype)
    least = least_width(knobs, dot8)
    check_types(query, key, value)
    if value_in_key and not shares_latent(int(E), Ev, least):
        raise UsageError(
            f"decode with the value inside the key: found widths {E} and {Ev}, allowed are values of the key's "
            f"leading {widths(int(E), least)[0]} columns. Leave value_in_key out."
        )
    out, lse = empty_out(query, value)
    parts = query.new_empty(knobs.splits, B, Hq, L, Ev, dtype=torch.float32)
    part_lse = query.new_empty(knobs.splits, B, Hq, L, dtype=torch.float32)
    group = int(x.group)
    given = {
        "p_q": query, "p_k": key, "p_v": key if value_in_key else value, "p_parts": parts, "p_lse": part_lse,
        **strides("q", query), **strides("k", key), **strides("v", value),
        "B": B, "H": H, "L": L, "S": S, "SPLITS": knobs.splits,
        **constants_of(rule, group, int(E), Ev, knobs, value_in_key=value_in_key, dot8=dot8),
    }  # fmt: skip
    programs = blocks(group * L, knobs.block_m) * knobs.splits * B * H
    launch(kernels.flash_decode, programs, given, captured, sizes, num_warps=knobs.warps, num_stages=knobs.stages)
    given = {
        "p_parts": parts, "p_part_lse": part_lse, "p_out": out, "p_lse": lse, **strides("o", out),
        "Hq": Hq, "L": L, "ROWS": B * Hq * L, "SPLITS": knobs.splits, **combine_constants(Ev),
    }  # fmt: skip
    launch(kernels.flash_combine, B * Hq * L, given, captured, sizes, num_warps=4, num_stages=1)
    return out, lse


def least_width(knobs: DecodeKnobs, dot8: bool) -> int:
    """The narrowest head that matrix units multiply; dot8: whether queries and keys have one type of 8 bits."""
    return 32 if knobs.dot8 and dot8 else 16


def constants_of(
    rule: AttentionRule, group: int, E: int, Ev: int, knobs: DecodeKnobs, *, value_in_key: bool, dot8: bool = False
) -> dict[str, Any]:
    """Constant parameters of flash_decode; group: query heads per key head; dot8 as of `least_width`."""
    least = least_width(knobs, dot8)
    (e_main, e_tail), (ev_main, ev_tail) = widths(E, least), widths(Ev, least)
    return {
        "GROUP": group, "E": E, "E_MAIN": e_main, "E_TAIL": e_tail,
        "EV": Ev, "EV_MAIN": ev_main, "EV_TAIL": ev_tail, "VALUE_IN_KEY": value_in_key,
        "SCALE": plain_scale(rule), "PRECISION": knobs.precision, "DOT8": knobs.dot8 and dot8,
        "HEADS_ALIKE": "h" not in rule.keep.names(), "BLOCK_M": knobs.block_m, "BLOCK_N": knobs.block_n,
    }  # fmt: skip


def combine_constants(Ev: int, rows: int = 1) -> dict[str, Any]:
    """Constant parameters of flash_combine; rows: of a program, one to read many parts of it at a time."""
    return {"EV": Ev, "BLOCK_EV": max(16, 1 << (Ev - 1).bit_length()), "BLOCK_P": 8 // min(rows, 4), "BLOCK_R": rows}

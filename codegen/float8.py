"""Numbers of 8 bits as operands of attention: which of them Triton's kernels read on which target.

They are stored, and not computed with: a tile is widened to the type of the output, which holds each of them exactly
(bfloat16 and float16 have more bits and a wider range), so products and their float32 sums are those of the widened
tensors. Only where a launch asks for it (DOT8) are queries and keys of one type multiplied as they are; the matrix
units of compute capability 8.9 and 9.0 then keep about 14 bits of each sum.

Source: the table is what Triton 3.7.1 compiled (tests/codegen/test_float8.py compiles it again) where the hardware has
the type; sums of 14 bits: Zhang et al. 2024, "SageAttention2", arXiv:2411.10958, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache, reduce

import torch

from attnc.region import FLOAT8 as NAMES

FLOAT8: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in NAMES)
OCP, FNUZ = FLOAT8[:2], FLOAT8[2:]
# By kind of target and architecture. Under 8.9 Triton widens e5m2, the upper half of a float16, and refuses e4m3fn. On
# AMD GPUs it reads every type, in software where there are no instructions: those are left out.
CUDA = ((89, OCP), (80, OCP[1:]))  # from this compute capability on
HIP = {"gfx942": FNUZ, "gfx950": OCP}


def reads(target: str) -> tuple[torch.dtype, ...]:
    """The types of 8 bits that kernels read on a target of Triton's, "cuda:90"."""
    kind, _, arch = target.partition(":")
    if kind == "cuda":
        return next((types for least, types in CUDA if int(arch) >= least), ())
    return HIP.get(arch, ()) if kind == "hip" else ()


def unread(dtypes: Iterable[torch.dtype], target: str) -> str | None:
    """Which of `dtypes` kernels cannot read on a target, against what they can; None where they read all of them."""
    allowed = reads(target)
    strange = sorted({name_of(t) for t in dtypes if t in FLOAT8 and t not in allowed})
    if not strange:
        return None
    names = ", ".join(map(name_of, allowed)) or "none of 8 bits"
    return f"found operands of {', '.join(strange)} on {target}, allowed there are {names} and wider types"


def name_of(dtype: torch.dtype) -> str:
    """A type as regions name it, "float8_e4m3fn"."""
    return str(dtype).removeprefix("torch.")


def wide_type(query: torch.dtype) -> torch.dtype:
    """The type of the output, and of weights: that of the query, or bfloat16 where it has 8 bits."""
    return torch.bfloat16 if query in FLOAT8 else query


def widest_type(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The widest of `dtypes`, to which those of 8 bits are widened; bfloat16 where each is of these."""
    wide = [dtype for dtype in dtypes if dtype not in FLOAT8]
    return reduce(torch.promote_types, wide) if wide else torch.bfloat16


def multiplies(query: torch.dtype, key: torch.dtype) -> bool:
    """Whether both have one type of 8 bits, so that matrix units can multiply them as they are."""
    return query == key and query in FLOAT8


@lru_cache(maxsize=16)
def target_of(device: torch.device) -> str | None:
    """Triton's target of a GPU that is here; None for what is none, or not here."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    if torch.version.hip is not None:
        return f"hip:{torch.cuda.get_device_properties(device).gcnArchName.partition(':')[0]}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:{major}{minor}"

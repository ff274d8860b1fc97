"""Small kernels made from text, run by Triton's interpreter."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from attnc.codegen.triton_text import captured_names
from attnc.reading import Axis, span

_NUMBERS = itertools.count()

HEAD = """import triton
import triton.language as tl


@triton.jit
def body({parameters}):
{body}


"""
OF_PAIRS = """@triton.jit
def run(p_s, p_out, L, S, {captured}N: tl.constexpr):
    b, h = tl.program_id(0), tl.program_id(1)
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    m_ok = (i < L) & (j < S)
    at = ((b * tl.num_programs(1) + h) * L + i) * S + j
    s = tl.load(p_s + at, mask=m_ok, other=0.0)
    value = body({arguments})
    tl.store(p_out + at, value + tl.zeros([N, N], tl.int32), mask=m_ok)
"""


def imported(text: str, folder: Path) -> ModuleType:
    """The module that `text` is; Triton reads the source of its functions from the file."""
    name = f"attnc_test_kernels_{next(_NUMBERS)}"
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def values_of(names: Sequence[str], captured: Sequence[torch.Tensor], sizes: Sequence[int]) -> list:
    """What a launch passes for the names that stand for captured tensors and sizes."""
    found = []
    for name in names:
        kind, number, part, d = re.fullmatch(r"([tn])(\d+)(?:_([sd])(\d+))?", name).groups()
        if kind == "n":
            found.append(sizes[int(number)])
        else:
            tensor = captured[int(number)]
            found.append(tensor if part is None else (tensor.stride if part == "s" else tensor.size)(int(d)))
    return found


def kernel_over_pairs(body: str) -> str:
    """A file with a kernel `run` that stores the value of a hole's body at every (b, h, i, j)."""
    names = captured_names([body])
    parameters = ", ".join(["s", "b", "h", "i", "j", "m_ok", *names])
    text = HEAD.format(parameters=parameters, body="    " + body.replace("\n", "\n    "))
    return text + OF_PAIRS.format(captured="".join(f"{name}, " for name in names), arguments=parameters)


def over_pairs(body: str, score: torch.Tensor, captured, sizes, folder: Path, out: torch.dtype) -> torch.Tensor:
    """The value of a hole's body at every (b, h, i, j) of `score` (B, Hq, L, S), computed by a kernel."""
    names = captured_names([body])
    B, Hq, L, S = score.shape
    result = torch.empty(score.shape, dtype=out)
    size = 1 << max(L, S, 2).bit_length()
    imported(kernel_over_pairs(body), folder).run[B, Hq](
        score, result, L, S, *values_of(names, captured, sizes), N=size
    )
    return result


def axes(shape: Sequence[int]) -> dict[str, Axis]:
    """The coordinates of scores of this shape."""
    return {name: span(name, 0, n, torch.device("cpu")) for name, n in zip("bhij", shape, strict=True)}

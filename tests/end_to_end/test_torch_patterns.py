"""All attention patterns that the installed torch itself knows are recognised.

Source: torch/_inductor/fx_passes/fuse_attention.py: its search functions with its own example inputs.
"""
from __future__ import annotations

import inspect
import logging
import re
import types
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch._inductor.fx_passes import fuse_attention

import attnc
from tests.gallery_entry import Core
from tests.gallery_run import Run, assert_same, attention, attnc_compiled, run

log = logging.getLogger("attnc.tests")
PATTERN = re.compile(r"_sfdp_pattern_\d+")


# The search functions as if they were written in this file: Dynamo runs torch._inductor's own files eagerly.
for _name, _written in vars(fuse_attention).items():
    if PATTERN.fullmatch(_name):
        _code = _written.__code__.replace(co_filename=__file__)
        globals()[_name] = types.FunctionType(_code, globals(), _name, _written.__defaults__, _written.__closure__)
    elif not _name.startswith("__"):
        globals().setdefault(_name, _written)


@dataclass(frozen=True)
class Pattern:
    """One search function with the inputs torch traces it with."""

    name: str
    inputs: tuple
    scale: float | None

    @property
    def function(self):
        """The search function of this name."""
        return globals()[PATTERN.match(self.name).group()]

    @property
    def has_dropout(self) -> bool:
        return "dropout_p" in inspect.signature(self.function).parameters

    def module(self, dropout_p: float) -> Core:
        fixed = {"dropout_p": dropout_p} if self.has_dropout else {}
        if self.scale is not None:
            fixed["inv_scale"] = self.scale
        return Core(partial(self.function, **fixed), {}, {})

    def args(self) -> tuple:
        generator = torch.Generator().manual_seed(0)
        return tuple(filled(x, generator) for x in self.inputs)


def filled(example: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Values for an example: zeros and ones where it is a mask of two dimensions or of bools."""
    if example.ndim == 0:
        return torch.tensor(2.0, dtype=example.dtype)
    if example.ndim == 3 and example.shape[0] > 4:
        example = example[:4]
    values = torch.randn(example.shape, generator=generator)
    if example.dtype == torch.bool or example.ndim == 2:
        values = values > -0.5
        values[..., 0] = True
    return torch.empty_like(example, requires_grad=False).copy_(values)


def patterns() -> list[Pattern]:
    found = {}
    for name, row in fuse_attention._get_sfdp_patterns(torch.device("cpu")):
        scale = (row.get("scalar_workaround") or {}).get("inv_scale")
        if name.endswith("_inference") and PATTERN.match(name):
            found[name] = Pattern(name, tuple(row["example_inputs"]), scale)
    return list(found.values())


PATTERNS = patterns()


def named(chosen):
    """Half precision is slow on a CPU."""
    return [pytest.param(p, id=p.name, marks=pytest.mark.slow if "half" in p.name else ()) for p in chosen]


def both(pattern: Pattern, dropout_p: float) -> tuple[Run, Run, object]:
    want = run(pattern.module(dropout_p), pattern.args())
    compiled = attnc_compiled(pattern.module(dropout_p), inner="eager")  # left as written: torch's own graph
    got = run(compiled, pattern.args())
    return got, want, attnc.last_report(compiled)


def test_every_search_function_of_torch_is_tried():
    written = {name for name in vars(fuse_attention) if PATTERN.fullmatch(name)}
    tried = {PATTERN.match(p.name).group() for p in PATTERNS}
    assert tried == written
    assert len(written) >= 24


@pytest.mark.parametrize("pattern", named(PATTERNS))
def test_pattern_of_torch_is_one_attention_region(pattern):
    got, want, report = both(pattern, dropout_p=0.0)
    assert_same(got, want)
    regions = attention(report)
    log.info("%s: %d regions, %s", pattern.name, len(regions), [region.facts["mask"] for region in regions])
    assert len(regions) == 1, [f"{item.anchor}: {item.reason}" for item in report.unmatched]


@pytest.mark.parametrize("pattern", named(p for p in PATTERNS if p.has_dropout))
def test_pattern_with_dropout_keeps_the_random_stream(pattern):
    got, want, _ = both(pattern, dropout_p=0.3)
    assert_same(got, want)


@pytest.mark.parametrize("number", [1, 5, 14, 16, 25])
def test_pattern_of_torch_has_eager_gradients(number):
    pattern = next(p for p in PATTERNS if PATTERN.match(p.name).group() == f"_sfdp_pattern_{number}")
    want = run(pattern.module(0.0), pattern.args(), backward=True)
    got = run(attnc_compiled(pattern.module(0.0)), pattern.args(), backward=True)
    assert_same(got, want)

"""Filled skeletons: what stands in the file, and that it runs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from attnc.codegen.render import holes_in, render, render_rule, skeleton_text, source_hash
from attnc.codegen.triton_text import Slot
from attnc.errors import LoweringError
from attnc.rule_attention import AttentionRule
from tests.codegen.kernels import imported, values_of
from tests.forms.rules import RULES

TINY = '''"""Scores of all pairs."""

import triton
import triton.language as tl

HOLES = ("keep", "score")
HALF = tl.constexpr(0.5)
UNUSED = tl.constexpr(3)


@triton.jit
def keep(b, h, i, j, m_ok, captured):
    """Whether a pair is kept, é."""
    return m_ok


@triton.jit
def score(s, b, h, i, j, m_ok, captured):
    return s


@triton.jit
def kept(s, b, h, i, j, m_ok, captured, FILL: tl.constexpr):
    é = keep(b, h, i, j, m_ok, captured) & m_ok; return tl.where(é, score(s, b, h, i, j, m_ok, captured=captured), FILL)


@triton.jit
def masked(p_s, p_out, captured, L, S, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    m_ok = (i < L) & (j < S)
    s = tl.load(p_s + i * S + j, mask=m_ok, other=0.0)
    tl.store(p_out + i * S + j, kept(s, 0, 1, i, j, m_ok, captured, -HALF), mask=m_ok)


@triton.jit
def other(p_out, captured):
    tl.store(p_out, keep(0, 0, 0, 0, 0, captured))
'''
SLOTS = [Slot(torch.int64, 2), Slot(torch.float32, 1)]
TEXT = {"keep": "return tl.load(t0 + b * t0_s0 + j * t0_s1) == n0", "score": "return s * tl.load(t1 + h * t1_s0)"}


def filled(holes: dict[str, str], kernels: tuple[str, ...] | None = ("masked",), text: str = TINY) -> str:
    return render(text, holes, SLOTS, spelling="flash{block_m=64}", device="h100 (cuda:90)", kernels=kernels)


def test_a_filled_skeleton_computes_what_the_holes_say(tmp_path: Path) -> None:
    module = imported(filled(TEXT), tmp_path)
    s, out = torch.randn(3, 5), torch.empty(3, 5)
    captured, names = [torch.randint(2, (1, 5)), torch.tensor([0.0, 2.0])], module.masked.arg_names
    assert names[2:-3] == ["t0", "t0_s0", "t0_s1", "t1", "t1_s0", "n0"]
    module.masked[(1,)](s, out, *values_of(names[2:-3], captured, [1]), 3, 5, N=8)
    assert out.equal(torch.where(captured[0] == 1, 2.0 * s, -0.5))


def test_an_unfilled_skeleton_runs_filled_with_nothing(tmp_path: Path) -> None:
    module = imported(filled({}), tmp_path)
    s, out = torch.randn(3, 5), torch.empty(3, 5)
    module.masked[(1,)](s, out, 3, 5, N=8)
    assert out.equal(s)


def test_the_skeleton_runs_as_it_stands(tmp_path: Path) -> None:
    s, out = torch.randn(3, 5), torch.empty(3, 5)
    imported(TINY, tmp_path).masked[(1,)](s, out, None, 3, 5, N=8)
    assert out.equal(s)


def test_only_what_a_kernel_reaches_is_kept() -> None:
    text = filled(TEXT)
    kept = {n.name for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)}
    assert kept == {"keep", "score", "kept", "masked"}
    assert "HALF" in text and "UNUSED" not in text and "HOLES" not in text and "captured" not in text
    assert "def other(p_out, t0, t0_s0, t0_s1, n0):" in filled(TEXT, kernels=None)


def test_a_function_takes_only_the_names_it_needs() -> None:
    text = filled(TEXT)
    assert "def keep(b, h, i, j, m_ok, t0, t0_s0, t0_s1, n0):" in text
    assert "score(s, b, h, i, j, m_ok, t1=t1, t1_s0=t1_s0)" in " ".join(text.split())


def test_the_header_names_spelling_device_version_and_skeleton() -> None:
    first, second = filled({}).splitlines()[:2]
    assert first == "# flash{block_m=64}" and "h100 (cuda:90)" in second and source_hash(TINY) in second


def test_rendering_is_reproducible() -> None:
    assert filled(TEXT) == filled(dict(reversed(TEXT.items())))


def test_long_lists_of_names_are_broken_into_lines() -> None:
    many = " + ".join(f"tl.load(t0 + b * t0_s0 + t0_d0 * n{n})" for n in range(40))
    text = filled({"keep": f"x = {many.replace(' + tl', chr(10) + 'x = x + tl')}\nreturn x == 0"})
    assert max(len(line) for line in text.splitlines()) <= 120
    ast.parse(text)


@pytest.mark.parametrize(
    ("holes", "text", "says"),
    [
        ({"visit": "return 0"}, TINY, "the skeleton has none of this name, but keep, score"),
        ({"keep": "return ("}, TINY, "its body is no Python"),
        ({"keep": "return rows"}, TINY, "its body names rows, allowed are its parameters"),
        ({"keep": "return tl.load(t5)"}, TINY, "its body names t5"),
        (
            {"keep": "return m_ok"},
            TINY.replace("keep(b, h, i, j, m_ok, captured)", "keep(b, captured)"),
            "the parameters",
        ),
        ({}, TINY.replace("s = tl.load(p_s", "s = captured + tl.load(p_s"), "uses 'captured' in another way"),
        ({}, TINY.replace("HOLES", "PLACES"), "no constant HOLES"),
        ({}, TINY.replace('"keep", ', '"keep", "sink", '), "no function sink"),
        ({}, TINY + "\n(", "no Python"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(holes: dict[str, str], text: str, says: str) -> None:
    with pytest.raises(LoweringError, match=says.replace("(", r"\(")):
        filled(holes, text=text)


def test_kernels_that_do_not_exist_are_refused() -> None:
    with pytest.raises(LoweringError, match="render the kernels flash"):
        filled({}, kernels=("flash",))
    with pytest.raises(LoweringError, match="found none of this name"):
        skeleton_text("nothing")


CAPTURED = [Slot(torch.int64, 2), Slot(torch.int64, 2), Slot(torch.float32, 1, True), Slot(torch.bfloat16, 3, True)]


@pytest.mark.parametrize("skeleton", ["flash", "flash_decode", "key_lists"])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_fills_every_skeleton(skeleton: str, name: str) -> None:
    rule = AttentionRule.parse(RULES[name].format(offset=7, empty="zero"))
    text = render_rule(skeleton_text(skeleton), rule, CAPTURED, spelling=skeleton, device="h100")
    unfilled = holes_in(skeleton_text(skeleton))
    assert "captured" not in {n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)}
    assert {n.name for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)} >= set(unfilled)
    assert max(len(line) for line in text.splitlines()) <= 120

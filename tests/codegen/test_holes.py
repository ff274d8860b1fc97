"""The holes of an attention rule: ranges against all pairs, gradients of captured tensors against autograd."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from attnc.codegen.holes import holes_of, plain_scale
from attnc.codegen.triton_text import Slot, captured_names, gradient_names, slot_of
from attnc.errors import LoweringError
from attnc.expr_text import parse
from attnc.reading import read
from attnc.rule_attention import AttentionRule
from tests.codegen.kernels import axes, imported, values_of
from tests.forms.rules import RULES
from tests.tolerance import assert_close

LENGTHS = torch.tensor([[5, 0], [1 << 40, 0]])
RANGED = {
    **{name: text.partition("keep=")[2].partition(";")[0].format(offset=3) or "True" for name, text in RULES.items()},
    "lengths": "j <= t0[b, 0] - 1 and j - i <= n0",
    "row_lengths": "j < t0[b, 0] and i < t0[b, 0]",
    "block_causal": "j // 4 <= i // 4",
    "block_window": "i // 3 - j // 3 <= 2 and i // 3 - j // 3 >= -1",
    "twice": "2 * j <= i",
    "never": "False",
    "two_prefixes": "j <= 3 or j <= n0",
    "not_before": "not (j <= i) and j - 2 * h <= i",
}


def as_python(body: str, parameters: str):
    """A range's body as a Python function; a captured tensor is an offset into its values."""
    flat = LENGTHS.flatten().tolist()
    fake = SimpleNamespace(
        minimum=min,
        maximum=max,
        cast=lambda x, _: x,
        int32=None,
        load=lambda at: flat[at],
        where=lambda p, a, c: a if p else c,
    )
    names = dict(zip(captured_names([body]), values_of(captured_names([body]), [LENGTHS], [2]), strict=True))
    if "t0" in names:
        names["t0"] = 0
    space = {"tl": fake, **names}
    exec(f"def body({parameters}):\n    " + body.replace("\n", "\n    "), space)
    return space["body"]


@pytest.mark.parametrize("name", RANGED)
def test_ranges_hold_all_that_is_kept_and_full_ones_nothing_else(name: str) -> None:
    keep, (B, Hq, L, S) = parse(RANGED[name]), (2, 2, 13, 17)
    if any(x.op == "load" and x.args[1:] != parse("t0[b, 0]").args[1:] for x in keep.walk()):
        table = (torch.arange(17) // 5).repeat(2, 1)
    else:
        table = LENGTHS
    kept = torch.as_tensor(read(keep, axes((B, Hq, L, S)), [table, table], [2])).expand(B, Hq, L, S)
    bodies = holes_of(AttentionRule(keep=keep, empty="zero"), [Slot(torch.int64, 2)] * 2, ("visit", "visit_rows"))
    visit = as_python(bodies["visit"], "b, h, i_low, i_high, L, S")
    rows = as_python(bodies["visit_rows"], "b, h, j_low, j_high, L, S")
    for b, h in ((0, 0), (1, 1)):
        pairs = kept[b, h]
        for low, high in ((0, 4), (4, 8), (12, 13), (0, 13)):
            check(visit(b, h, low, high, L, S), pairs[low:high])
            check(rows(b, h, low, high, L, S), pairs[:, low:high].T)


def check(found: tuple[int, int, int, int], pairs: torch.Tensor) -> None:
    """`found` against the kept pairs of some rows (all keys, or transposed)."""
    low, high, full_low, full_high = found
    at = torch.arange(pairs.shape[1])
    assert not pairs[:, (at < low) | (at >= high)].any(), "a kept pair lies outside the range"
    full = (at >= full_low) & (at < full_high) & (at >= low) & (at < high)
    assert pairs[:, full].all(), "a pair in the full range is not kept"


TIGHT = ("causal", "window", "two_sided_window", "chunk", "prefix", "lengths", "block_causal", "block_window", "twice")


@pytest.mark.parametrize("name", TIGHT)
def test_ranges_of_linear_masks_are_tight(name: str) -> None:
    keep = parse(RANGED[name])
    body = holes_of(AttentionRule(keep=keep, empty="zero"), [Slot(torch.int64, 2)], ("visit",))["visit"]
    low, high, full_low, full_high = as_python(body, "b, h, i_low, i_high, L, S")(0, 0, 4, 6, 13, 17)
    pairs = torch.as_tensor(read(keep, axes((1, 1, 13, 17)), [LENGTHS], [2]))[0, 0, 4:6]
    some, all_rows = pairs.any(0).nonzero().flatten().tolist(), pairs.all(0).nonzero().flatten().tolist()
    assert (max(low, 0), min(high, 17)) == (some[0], some[-1] + 1)
    if all_rows:
        assert (max(full_low, low, 0), min(full_high, high, 17)) == (all_rows[0], all_rows[-1] + 1)


KERNEL = """import triton
import triton.language as tl


@triton.jit
def add_grads(d_score, s, b, h, i, j, m_ok, {names}):
{body}


@triton.jit
def run(p_s, p_d, L, S, {names}, N: tl.constexpr):
    b, h = tl.program_id(0), tl.program_id(1)
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    m_ok = (i < L) & (j < S)
    at = ((b * tl.num_programs(1) + h) * L + i) * S + j
    s = tl.load(p_s + at, mask=m_ok, other=0.0)
    d = tl.load(p_d + at, mask=m_ok, other=float("nan"))
    add_grads(d, s, b, h, i, j, m_ok, {names})
"""
SCORES = {
    "pairs": "0.5 * s + f0[h, i, j]",
    "heads": "0.5 * s + f1[h] * float(j - i)",
    "keys": "0.5 * s + f2[b, j] * 3.0",
    "rows": "s * f3[i]",
    "all": "s * f4[()]",
    "relative": "0.5 * s + f5[h, i - j + 4]",
    "inside_softcap": "5.0 * tanh(0.2 * (s + f0[h, i, j])) + f1[h] * f2[b, j]",
    "constant_place": "s + f2[1, j]",
}


@pytest.mark.parametrize("name", SCORES)
def test_gradients_of_captured_tensors_are_those_of_autograd(name: str, tmp_path: Path) -> None:
    B, Hq, L, S = shape = (2, 2, 3, 5)
    sizes = ((Hq, S, L), (Hq,), (B, S), (L,), (), (Hq, 9))
    captured = [torch.randn(n, dtype=torch.float64).requires_grad_() for n in sizes]
    captured[0] = captured[0].detach().mT.requires_grad_()
    e, score, d = parse(SCORES[name]), torch.randn(shape), torch.randn(shape)
    given = read(e, axes(shape), captured, [], score=score.double())
    want = torch.autograd.grad(given, captured, d.double(), allow_unused=True)
    body = holes_of(AttentionRule(score=e), [slot_of(t) for t in captured], ("add_grads",))["add_grads"]
    names, buffers = captured_names([body]), [torch.zeros(t.shape) for t in captured]
    grads = [buffers[int(g[1:])] for g in gradient_names([body])]
    text = KERNEL.format(names=", ".join([*names, *gradient_names([body])]), body="    " + body.replace("\n", "\n    "))
    values = [v.detach() if isinstance(v, torch.Tensor) else v for v in values_of(names, captured, [])]
    imported(text, tmp_path).run[B, Hq](score, d, L, S, *values, *grads, N=8)
    for buffer, expected in zip(buffers, want, strict=True):
        assert_close(buffer, torch.zeros(buffer.shape) if expected is None else expected, torch.float32)


def test_a_score_that_is_only_a_factor_says_so() -> None:
    assert plain_scale(AttentionRule.parse("score=0.25 * s")) == 0.25
    assert plain_scale(AttentionRule.parse("score=s")) == 1.0
    assert plain_scale(AttentionRule.parse("score=0.25 * s + 1.0")) == 0.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("score=s; row=f0[i]", "a factor of the query rows"),
        ("score=s; dropout=0.1", "dropout=0.1"),
        ("score=s; sink=f0[j]", "a sink that depends on the key"),
    ],
)
def test_what_kernels_do_not_compute_is_refused(text: str, says: str) -> None:
    with pytest.raises(LoweringError, match=says):
        holes_of(AttentionRule.parse(text), [Slot(torch.float32, 1)])

"""Index expressions as Triton text: kernels compute what `attnc.reading` reads."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnc import predicate
from attnc.codegen.compile_stats import Compiled, compile_for
from attnc.codegen.derivative import derivative, lookup_slopes
from attnc.codegen.triton_text import Slot, captured_names, slot_of, text_of
from attnc.errors import LoweringError
from attnc.expr import (
    BOOL,
    FLOAT,
    INT,
    SCORE,
    B,
    Expr,
    H,
    I,
    J,
    add,
    const,
    div,
    floordiv,
    load,
    maximum,
    minimum,
    mod,
    mul,
    size,
    sub,
    to_float,
    unary,
)
from attnc.expr_text import parse
from attnc.reading import read
from tests.codegen.kernels import axes, kernel_over_pairs, over_pairs
from tests.tolerance import assert_close

SHAPE = (2, 2, 3, 5)
SIZES = (3, -4)
RESULT = {BOOL: torch.bool, INT: torch.int64, FLOAT: torch.float32}


def tables() -> list[torch.Tensor]:
    """t0 int64 (B, S), t1 int32 per row and key, f2 float32 (Hq), f3 bfloat16 (Hq, L, S) not contiguous, p4 bool."""
    return [
        torch.randint(-9, 9, (2, 5)),
        torch.randint(-9, 9, (3, 5), dtype=torch.int32),
        torch.tensor([0.5, -1.25]),
        (torch.randint(-8, 8, (2, 5, 3)) / 4).bfloat16().mT,
        torch.rand(2, 5) > 0.5,
    ]


def scores() -> torch.Tensor:
    return torch.randint(-16, 17, SHAPE) / 8


# Integers by position, sizes and lookups; divisors that are not 0.
_places = st.sampled_from([B, H, I, J, size("n0"), size("n1"), load(0, (B, J), INT), load(1, (I, J), INT)])
_small = st.integers(-5, 9).map(const)


def _grown(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    two = st.tuples(inner, inner)
    divisor = st.sampled_from([1, 2, 3, 4, 7, -3]).map(const)
    return st.one_of(
        two.map(lambda x: add(*x)),
        two.map(lambda x: sub(*x)),
        st.tuples(inner, _small).map(lambda x: mul(*x)),
        st.tuples(inner, divisor).map(lambda x: floordiv(*x)),
        st.tuples(inner, divisor).map(lambda x: mod(*x)),
        inner.map(lambda x: floordiv(x, size("n1"))),
        inner.map(lambda x: mod(x, size("n1"))),
        two.map(lambda x: minimum(*x)),
        two.map(lambda x: maximum(*x)),
        inner.map(lambda x: unary("abs", x)),
        # Held inside the table, as reading holds tensors (it counts single numbers from the end).
        inner.filter(lambda x: "j" in x.names()).map(lambda x: load(0, (B, x), INT)),
        st.tuples(_bools(inner), inner, inner).map(lambda x: predicate.where(*x)),
    )


def _bools(ints: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    two = st.tuples(ints, ints)
    bound = st.one_of(
        two.map(lambda x: predicate.le(*x)),
        two.map(lambda x: predicate.lt(*x)),
        two.map(lambda x: predicate.eq(*x)),
        st.just(load(4, (B, J), BOOL)),
        st.just(predicate.le(SCORE, load(2, (H,), FLOAT))),
    )
    pair = st.tuples(bound, bound)
    return st.one_of(
        bound,
        pair.map(lambda x: predicate.conjunction(*x)),
        pair.map(lambda x: predicate.disjunction(*x)),
        pair.map(lambda x: predicate.xor(*x)),
    )


_ints = st.recursive(st.one_of(_places, _small), _grown, max_leaves=5)
_exact = st.one_of(
    st.just(SCORE), _ints.map(to_float), st.just(load(2, (H,), FLOAT)), st.just(load(3, (H, I, J), FLOAT))
)
_bounded = _exact.map(lambda x: mul(x, const(0.125)))
_floats = st.one_of(
    st.tuples(_exact, _exact).map(lambda x: add(*x)),
    st.tuples(_exact, _bounded).map(lambda x: mul(*x)),
    st.tuples(st.sampled_from(["tanh", "sigmoid", "abs"]), _exact).map(lambda x: unary(*x)),
    _bounded.map(lambda x: unary("exp", minimum(x, const(3.0)))),
    _exact.map(lambda x: unary("sqrt", unary("abs", x))),
    _exact.map(lambda x: unary("log", add(unary("abs", x), const(1.0)))),
    _exact.map(lambda x: div(x, add(unary("abs", x), const(0.5)))),
    _exact.map(lambda x: to_float(unary("trunc", x))),
    st.tuples(_bools(_ints), _exact, _bounded).map(lambda x: predicate.where(*x)),
    st.tuples(_exact, _exact).map(lambda x: maximum(*x)),
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(e=st.one_of(_ints, _bools(_ints), _floats))
def test_a_kernel_computes_what_reading_reads(e: Expr) -> None:
    torch.manual_seed(0)
    captured, score = tables(), scores()
    doubles = [t.double() if t.is_floating_point() else t for t in captured]
    want = torch.as_tensor(read(e, axes(SHAPE), doubles, SIZES, score=score.double())).expand(SHAPE)
    with tempfile.TemporaryDirectory() as folder:
        text = text_of(e, [slot_of(t) for t in captured])
        got = over_pairs(text, score, captured, SIZES, Path(folder), RESULT[e.kind])
    if e.kind == FLOAT:
        assert_close(got, want.double(), torch.float32, terms=64)
    else:
        assert got.equal(want.to(RESULT[e.kind])), text


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("i - j <= 511 and j <= i", "return ((i - j) <= 511) & (j <= i)"),
        ("i // 16 == j // 16", "return (i >> 4) == (j >> 4)"),
        ("(i - j) % 4 == 0", "return ((i + 3 * j) & 3) == 0"),
        ("i // 12", "return i // 12"),
        ("0.5 * s + 1.0", "return 0.5 * s + 1.0"),
        ("where(s <= 0.0, inf, s)", 'return tl.where(s <= 0.0, float("inf"), s)'),
        ("1e-60 * s", "return 0.0 * s"),
    ],
)
def test_text_reads_as_one_would_write_it(text: str, want: str) -> None:
    assert text_of(parse(text), []) == want


def test_parts_that_are_used_twice_are_named_once() -> None:
    e = parse("tanh(0.5 * s) * tanh(0.5 * s) + tanh(0.5 * s)")
    assert text_of(e, []).count("exp2") == 1


def test_negative_numbers_divide_as_in_python(tmp_path: Path) -> None:
    score = torch.zeros(1, 1, 7, 7)
    for text in ("(j - i) // 3", "(j - i) % 3", "(j - i) // 4", "(j - i) % 4", "(j - i) // n1", "(j - i) % n1"):
        e = parse(text)
        got = over_pairs(text_of(e, []), score, [], SIZES, tmp_path, torch.int64)
        assert got.equal(read(e, axes(score.shape), [], SIZES).expand(score.shape)), text


def test_products_beyond_32_bits_are_exact(tmp_path: Path) -> None:
    score, e = torch.zeros(1, 1, 5, 5), parse("(i + 50000) * (j + 50000) % 1000003")
    got = over_pairs(text_of(e, []), score, [], [], tmp_path, torch.int64)
    assert got.equal(read(e, axes(score.shape), [], []).expand(score.shape))


def test_wide_tables_are_read_with_64_bit_offsets() -> None:
    text = text_of(parse("f0[h, i, j]"), [Slot(torch.float32, 3, wide=True)])
    assert "tl.cast(h, tl.int64) * t0_s0" in text and "tl.cast(i, tl.int64) * t0_s1" in text


def test_captured_names_are_those_used_in_order() -> None:
    text = text_of(parse("t1[b, j] == n0 and t0[b, i] == 1"), [Slot(torch.int64, 2)] * 2)
    assert captured_names([text]) == ("t0", "t0_s0", "t0_s1", "t0_d1", "t1", "t1_s0", "t1_s1", "t1_d1", "n0")


def test_a_lookup_without_a_slot_is_refused() -> None:
    with pytest.raises(LoweringError, match="captured tensor 1 is absent"):
        text_of(parse("t1[b]"), [Slot(torch.int64, 1)])
    with pytest.raises(LoweringError, match="is of rank 2"):
        text_of(parse("t0[b]"), [Slot(torch.int64, 2)])


EVERY_OPERATION = (
    "where(p4[b, j] or not (s <= 0.5), min(s, f2[h]), max(s, inf)) + exp(s) * tanh(s) + sigmoid(s) + sqrt(abs(s))",
    "log(abs(s) + 1.0) + s % 1.5 + s // 0.5 + 1.0 / (f3[h, i, j] + 2.0) + float(trunc(s)) + float(n0)",
    "float((i - j) // 3 + (i - j) % 3 + (i - j) // n1 + (i - j) % n1 + (i - j) // 4 + abs(i - j) + min(i, n0))",
    "where(t0[b, j] == t1[i, j] and f2[h] == s and (n0 <= 5) and i * 100003 * j <= n1, 1.0, t0[b, 2 * i - j] * s)",
)


@pytest.mark.parametrize("target", ["cuda:80", "hip:gfx942"])
def test_every_operation_compiles_ahead_of_time(target: str, tmp_path: Path) -> None:
    slots, types = [slot_of(t) for t in tables()], ("*i64", "*i32", "*fp32", "*bf16", "*i1")
    for ones in ((), ("n0", "n1", "L")):  # Triton makes a constant of a 1
        text, names = pairs_kernel(
            " + ".join(f"({e})" for e in EVERY_OPERATION) if not ones else EVERY_OPERATION[2], slots
        )
        signature = {"p_s": "*fp32", "p_out": "*fp32", "L": "i32", "S": "i32"}
        signature |= {n: types[int(n[1])] if len(n) == 2 and n[0] == "t" else "i32" for n in names}
        constants = {"N": 16, **dict.fromkeys(ones, 1)}
        signature = {n: kind for n, kind in signature.items() if n not in constants}
        found = compile_for(text, "run", signature, constants, target, folder=tmp_path)
        assert isinstance(found, Compiled), found


def pairs_kernel(text: str, slots: list[Slot]) -> tuple[str, tuple[str, ...]]:
    body = text_of(parse(text), slots)
    return kernel_over_pairs(body), captured_names([body])


SCORES = (
    "0.25 * s",
    "20.0 * tanh(0.0125 * s)",
    "20.0 * tanh(0.05 * (s + f2[h])) + f3[h, i, j]",
    "0.5 * s + f2[h] * float(j - i)",
    "where(j <= i, s * f2[h], sigmoid(s) * exp(0.1 * s))",
    "max(s, f3[h, i, j]) + min(0.5 * s, 1.3)",
    "sqrt(abs(s) + 1.0) * log(abs(f3[h, i, j]) + 2.0)",
    "s / (f2[h] * f2[h] + 1.0) + s * s * s",
    "s % 1.7 + float(trunc(s))",
)


@pytest.mark.parametrize("text", SCORES)
def test_derivatives_are_those_of_autograd(text: str) -> None:
    e, captured = parse(text), [t.double() if t.is_floating_point() else t for t in tables()]
    score = (scores().double() + 0.03).requires_grad_()
    leaves = [t.requires_grad_() for t in captured[2:4]]
    slots = [slot_of(t) for t in captured]
    grad = torch.randn(SHAPE, dtype=torch.float64)
    want = torch.autograd.grad(
        read(e, axes(SHAPE), captured, SIZES, score=score), [score, *leaves], grad, allow_unused=True
    )
    slope = torch.as_tensor(read(derivative(e, SCORE), axes(SHAPE), captured, SIZES, score=score))
    assert_close(slope * grad, want[0], torch.float64)
    found = {2: torch.zeros_like(leaves[0]), 3: torch.zeros_like(leaves[1])}
    for lookup, slope_of in lookup_slopes(e, slots):
        value = torch.as_tensor(read(slope_of, axes(SHAPE), captured, SIZES, score=score)) * grad
        keep = [d for d, name in enumerate("bhij") if var_in(lookup, name)]
        found[lookup.args[0]] += value.sum([d for d in range(4) if d not in keep])
    for slot, got in ((2, want[1]), (3, want[2])):
        assert_close(found[slot], torch.zeros_like(found[slot]) if got is None else got, torch.float64)


def var_in(lookup: Expr, name: str) -> bool:
    return any(name in x.names() for x in lookup.args[1:])

"""Every masked form against the reference in float64: outputs, lse, gradients, ragged lengths, every rule."""

from __future__ import annotations

import pytest
import torch

from attnc import ops
from attnc.forms.masked import reference
from attnc.operands import Operands
from attnc.predicate import distances
from tests.forms.rules import ALWAYS_KEEPING, DIMS, RULES, Dims, inputs, rule_of
from tests.tolerance import error

TRAINS = (
    "dense",
    "block_sparse{provider=blocked,block_m=16,block_n=16}",
    "block_sparse{provider=blocked,block_m=32,block_n=8}",
)
BAND = "block_sparse{provider=band,block_m=16}"
FLEX = "block_sparse{provider=flex,block_m=32,block_n=16}"
CLOSE = 1e-11


def run(form: str, qkv, captured, rule):
    return torch.ops.attnc.attention(*qkv, captured, [], ops.spell_attention(form, rule))


def cases(name: str, dims: Dims):
    return ("zero", "mean", "mean_added") if name not in ALWAYS_KEEPING else ("never",)


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_a_form_is_the_reference(name: str, dims: Dims) -> None:
    for empty in cases(name, dims):
        rule = rule_of(name, dims, empty)
        qkv, captured = inputs(dims)
        want, want_lse = reference(Operands(*qkv, captured, [], rule))
        leaves = [*qkv, *captured[2:]]
        cotangent = torch.randn_like(want)
        want_grads = torch.autograd.grad(want, leaves, cotangent, allow_unused=True)
        banded = dims.L == dims.S and None not in distances(rule.keep)
        for form in (*TRAINS, BAND) if banded else TRAINS:
            got, lse = run(form, qkv, captured, rule)
            assert error(got, want) < CLOSE and error(lse, want_lse) < CLOSE, (form, empty)
            if not got.requires_grad:
                continue
            grads = torch.autograd.grad(got, leaves, cotangent, allow_unused=True)
            for one, two in zip(grads, want_grads, strict=True):
                one, two = (torch.zeros(()) if g is None else g for g in (one, two))
                assert (
                    error(one.expand_as(two) if one.dim() == 0 else one, two.expand_as(one) if two.dim() == 0 else two)
                    < CLOSE
                ), (form, empty)
        with torch.no_grad():
            got, lse = run(FLEX, qkv, captured, rule)
        assert error(got, want) < CLOSE and error(lse, want_lse) < CLOSE, (FLEX, empty)


@pytest.mark.parametrize("form", [*TRAINS, FLEX])
def test_rows_without_keys_give_nan_where_the_rule_says_so(form: str) -> None:
    dims = Dims(33, 33)
    rule = rule_of("causal_padding", dims, "nan")
    qkv, captured = inputs(dims, grad=False)
    got, _ = run(form, qkv, captured, rule)
    want, _ = reference(Operands(*qkv, captured, [], rule))
    assert want[0, :, :5].isnan().all() and not want[0, :, 5:].isnan().any()
    assert error(got, want) < CLOSE


@pytest.mark.parametrize("name", ["window", "documents", "softcap_sink", "disjunction"])
def test_unwritten_memory_is_never_read(name: str, poisoned_memory: None) -> None:
    dims = Dims(70, 70, 4, 2, 16, 8)
    rule = rule_of(name, dims)
    qkv, captured = inputs(dims)
    want, _ = reference(Operands(*qkv, captured, [], rule))
    for form in TRAINS:
        got, lse = run(form, qkv, captured, rule)
        grads = torch.autograd.grad(got.sum(), qkv)
        assert error(got, want) < CLOSE and not any(g.isnan().any() for g in (*grads, lse))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["causal", "window", "softcap", "causal_padding_sink"])
def test_low_precision_is_as_good_as_the_written_model(name: str, dtype: torch.dtype) -> None:
    dims = Dims(70, 70, 4, 2)
    rule = rule_of(name, dims)
    qkv, captured = inputs(dims, dtype, grad=False)
    given = Operands(*qkv, captured, [], rule)
    exact, written = reference(given.double())[0], reference(given)[0]
    for form in (*TRAINS, FLEX):
        got, lse = run(form, qkv, captured, rule)
        assert got.dtype == dtype and lse.dtype == torch.float32
        assert error(got, exact) <= max(1.5 * error(written, exact), 2e-6), form


@pytest.mark.parametrize("form", [*TRAINS, FLEX])
def test_autocast_does_not_reach_inside(form: str) -> None:
    dims = Dims(33, 33)
    rule = rule_of("window", dims)
    qkv, captured = inputs(dims, torch.float32, grad=False)
    want, _ = run(form, qkv, captured, rule)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        got, _ = run(form, qkv, captured, rule)
    assert torch.equal(got, want)


def test_sizes_shift_the_mask() -> None:
    dims = Dims(33, 70, 4, 2)
    qkv, captured = inputs(dims, grad=False)
    want, _ = reference(Operands(*qkv, captured, [], rule_of("causal_with_cache", dims)))
    rule = rule_of("causal_with_cache", dims).parse("score=0.25 * s; keep=j - i - n0 <= 0; empty=zero")
    for form in (*TRAINS, FLEX):
        got, _ = torch.ops.attnc.attention(*qkv, captured, [37], ops.spell_attention(form, rule))
        assert error(got, want) < CLOSE, form

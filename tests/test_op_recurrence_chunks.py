"""Chunks of recurrences on the CPU: exact at the ends of their range, whatever the size of the chunk."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnc.codegen import cpu_recurrence
from attnc.codegen.cpu_decays import decays, unit_inverse
from attnc.codegen.cpu_recurrence import Given
from tests.recurrences import CASES, INPUTS, Case, in_float64, token_loop
from tests.test_op_recurrence import learnable, scalar
from tests.tolerance import assert_close

DECAYED = ("mamba2", "gla", "rwkv6", "gated_delta_rule", "kda", "rwkv7", "low_rank_by_token")
BY_NAME = pytest.mark.parametrize("case", [c for c in CASES if c.name in DECAYED], ids=lambda c: c.name)
CORRECTED = pytest.mark.parametrize(
    "case", [c for c in CASES if c.rule.delta and not c.rule.packed], ids=lambda c: c.name
)


def run(inputs: list[Tensor | None], case: Case, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    return cpu_recurrence.recurrence(Given(*inputs), case.rule, chunk)


def wide(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [x.double() if x is not None and x.is_floating_point() else x for x in inputs]


def with_decay(case: Case, fill: str) -> list[Tensor | None]:
    inputs = case.inputs(70, torch.float32, state=True)
    decay, some = inputs[3], torch.rand_like(inputs[3]) < 0.5
    filled = {
        "strong": torch.full_like(decay, -20.0),
        "mixed": torch.where(some, -20.0, decay),
        "stopped": torch.where(some, -math.inf, decay),
        "none": torch.zeros_like(decay),
    }[fill]
    return [filled if name == "decay" else x for name, x in zip(INPUTS, inputs, strict=True)]


@BY_NAME
@pytest.mark.parametrize("fill", ["strong", "mixed", "stopped", "none"])
def test_decays_at_the_ends_of_their_range_are_exact(case: Case, fill: str) -> None:
    inputs = with_decay(case, fill)
    for got, want in zip(run(inputs, case, 64), token_loop(wide(inputs), in_float64(case)), strict=True):
        assert got.isfinite().all()
        assert_close(got, want, torch.float32)


@BY_NAME
@pytest.mark.parametrize("fill", ["strong", "stopped"])
def test_gradients_of_strong_decays_are_finite_and_exact(case: Case, fill: str) -> None:
    inputs = wide(with_decay(case, fill))
    leaves = learnable(inputs)
    needs = [x is not None and x.requires_grad for x in inputs]
    want = token_loop(inputs, in_float64(case))
    cotangents = torch.autograd.grad(scalar(*(fixed := [x.detach().requires_grad_() for x in want])), fixed)
    got = cpu_recurrence.gradients(Given(*inputs), needs, *cotangents, in_float64(case), 64)
    for a, b in zip(got, torch.autograd.grad(want, leaves, cotangents, allow_unused=True), strict=True):
        assert a.isfinite().all()
        assert_close(a, torch.zeros_like(a) if b is None else b)


@BY_NAME
def test_chunk_size_changes_nothing_beyond_rounding(case: Case) -> None:
    inputs = case.inputs(130, torch.float32, state=True)
    want = token_loop(wide(inputs), in_float64(case))
    for chunk in (1, 2, 16, 24, 64, 128):
        for a, b in zip(run(inputs, case, chunk), want, strict=True):
            assert_close(a, b, torch.float32)


@CORRECTED
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_writing_nothing_and_writing_all_are_exact(case: Case, beta: float) -> None:
    inputs = case.inputs(70, torch.float32, state=True)
    inputs[1] = inputs[1][:, :, :1].expand_as(inputs[1]).contiguous()  # the same key: each replaces the one before
    inputs[5] = torch.full_like(inputs[5], beta)
    for a, b in zip(run(inputs, case, 64), token_loop(wide(inputs), in_float64(case)), strict=True):
        assert_close(a, b, torch.float32)


SOME = (
    "mamba1",
    "gated_delta_rule",
    "mlstm",
    "rwkv4_packed",
    "rwkv7_packed",
    "retention",
    "normalised_linear_attention",
)


@pytest.mark.parametrize(
    ("segment", "cases"),
    [(1, [c for c in CASES if c.name in SOME]), pytest.param(3, CASES, marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_segments_change_nothing(segment: int, cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_recurrence, "MATRICES", segment)
    monkeypatch.setattr(cpu_recurrence, "CHUNK", 16)
    monkeypatch.setattr(cpu_recurrence, "ELEMENTS", 1)
    monkeypatch.setattr(cpu_recurrence, "FEWEST", 16)
    for case in cases:
        inputs = case.inputs(70, state=True)
        leaves, rule = learnable(inputs), in_float64(case)
        want, got = token_loop(inputs, rule), cpu_recurrence.recurrence(Given(*inputs), rule)
        for a, b in zip(got, want, strict=True):
            assert_close(a, b)
        cotangents = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) for x in want]
        if rule.gate == "exp":
            cotangents[1] = torch.zeros_like(cotangents[1])  # the scale of the state is free
        needs = [x is not None and x.requires_grad for x in inputs]
        found = cpu_recurrence.gradients(Given(*inputs), needs, *cotangents, rule)
        for a, b in zip(found, torch.autograd.grad(want, leaves, cotangents, allow_unused=True), strict=True):
            assert_close(a, torch.zeros_like(a) if b is None else b)


def test_inverse_of_a_unit_triangular_matrix() -> None:
    for size in (1, 2, 16, 64):
        lower = torch.randn(3, size, size).double() / 4
        eye = torch.eye(size).double()
        assert_close(unit_inverse(lower) @ (eye + lower.tril(-1)), eye.expand(3, -1, -1))


def test_decay_of_a_pair_is_exact_beside_one_of_another_order() -> None:
    g = torch.tensor([[-1000.0, -1e-3, -1e-3, 0.0]])
    (pair,) = decays(g[None], 1).scores([torch.ones(1, 1, 4, 1)], [torch.ones(1, 1, 4, 1)])
    assert pair[0, 0, 2, 1].item() == pytest.approx(math.exp(-1e-3), rel=1e-7)


def test_results_share_no_memory_with_what_is_given() -> None:
    case = replace(CASES[0], H=4, Hk=4)
    for length in (0, 1):
        inputs = case.inputs(length, torch.float32, state=True)
        out, state = run(inputs, case)
        assert state.data_ptr() != inputs[7].data_ptr() and out.shape[2] == length

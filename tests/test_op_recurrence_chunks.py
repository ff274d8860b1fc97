"""Chunks of recurrences on the CPU: exact at the ends of their range, whatever the size of the chunk."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class Held(TorchDispatchMode):
    """Bytes of all tensors made inside, now and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves(made := function(*args, **(kwargs or {}))):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.known:
                memory = x.untyped_storage()
                self.known.add(memory._cdata)
                self.now += memory.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(memory, self._freed, memory._cdata, memory.nbytes())
        return made

    def _freed(self, memory: int, size: int) -> None:
        self.known.discard(memory)
        self.now -= size


def beyond_results(run: Callable[[], Any], given: list[Tensor | None]) -> int:
    """Bytes that a call holds at its peak beyond what it is given and returns."""
    held = Held()
    held.known.update(x.untyped_storage()._cdata for x in given if x is not None)
    with held:
        kept = run()  # alive while `now` is read
        return held.peak - held.now if kept else 0


@pytest.mark.parametrize("name", ["mamba2", "rwkv7_packed", "mlstm", "mamba1"])
def test_memory_beyond_operands_and_results_does_not_grow_with_the_length(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"MATRICES": 1, "CHUNK": 16, "ELEMENTS": 1, "FEWEST": 16, "STATES": 1, "KEPT": 2}
    for constant, value in small.items():
        monkeypatch.setattr(cpu_recurrence, constant, value)
    case, found = next(c for c in CASES if c.name == name), []
    for length in (96, 192):
        inputs = case.inputs(length, torch.float32, state=True, batch=1)
        given, needs = Given(*inputs), [x is not None and x.is_floating_point() for x in inputs]
        grads = cpu_recurrence.recurrence(given, case.rule)
        forward = beyond_results(lambda: cpu_recurrence.recurrence(given, case.rule), inputs)  # noqa: B023
        backward = beyond_results(
            lambda: cpu_recurrence.gradients(given, needs, *grads, case.rule),  # noqa: B023
            [*inputs, *grads],
        )
        found.append((forward, backward))
    assert found[0] == found[1]


def test_states_that_are_not_kept_are_computed_again_a_few_times() -> None:
    def passes(count: int, room: int) -> int:
        done, kept, order = 0, [(0, count)], []
        while kept:
            start, stop = kept.pop()
            while stop - start > 1:
                skipped = cpu_recurrence._skipped(stop - start, room - len(kept))
                kept.append((start, start + skipped))
                start, done = start + skipped, done + skipped
            assert len(kept) <= room
            order.append(start)
        assert order == list(reversed(range(count)))
        return done

    assert passes(17, 16) == 16  # all are kept
    assert passes(153, 16) == 2 * 153 - 17 - 1  # the least, by Griewank and Walther
    assert passes(900, 16) < 3 * 900


def test_inverse_of_a_unit_triangular_matrix() -> None:
    for size in (1, 2, 16, 64):
        lower = torch.randn(3, size, size).double() / 4
        eye = torch.eye(size).double()
        assert_close(unit_inverse(lower) @ (eye + lower.tril(-1)), eye.expand(3, -1, -1))


def test_decay_of_a_pair_is_exact_beside_one_of_another_order() -> None:
    g = torch.tensor([[-1000.0, -1e-3, -1e-3, 0.0]])
    (pair,) = decays(g[None], 1).scores([torch.ones(1, 1, 4, 1)], [torch.ones(1, 1, 4, 1)])
    assert pair[0, 0, 2, 1].item() == pytest.approx(math.exp(-1e-3), rel=1e-7)


def test_a_scan_shares_keys_among_groups_of_heads() -> None:
    case = replace(next(c for c in CASES if c.name == "mamba1"), Hk=3)
    inputs = case.inputs(70)
    for a, b in zip(run(inputs, case), token_loop(inputs, in_float64(case)), strict=True):
        assert_close(a, b, torch.float32)


def test_results_share_no_memory_with_what_is_given() -> None:
    case = replace(CASES[0], H=4, Hk=4)
    for length in (0, 1):
        inputs = case.inputs(length, torch.float32, state=True)
        out, state = run(inputs, case)
        assert state.data_ptr() != inputs[7].data_ptr() and out.shape[2] == length

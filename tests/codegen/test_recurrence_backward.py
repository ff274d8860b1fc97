"""Gradients of chunked recurrences under the interpreter, against autograd through the token loop in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnc.codegen.cpu_recurrence import Given
from attnc.codegen.gpu_recurrence import BackwardKnobs, RecurrenceKnobs
from attnc.codegen.gpu_recurrence_backward import backward, kernels_of
from attnc.codegen.gpu_recurrence_normalised import normalised_backward
from attnc.rule_recurrence import RecurrenceRule
from tests.codegen.flash_cases import tolerance
from tests.codegen.interpreter import mend
from tests.codegen.test_recurrence_forward import COMPUTED, SMALL, given
from tests.recurrences import INPUTS, Case, token_loop
from tests.tolerance import error

mend()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TILES = BackwardKnobs(block_k=16, block_v=16, state_block_v=16, output_block_k=16, output_block_v=16)
TRIED = ("linear_attention", "retention", "mamba2_packed", "rwkv6_packed", "simple_gla_before", "delta_rule",
         "gated_delta_rule_packed", "gla", "kda_packed", "rwkv7_packed", "low_rank_before",
         "normalised_linear_attention", "mlstm_packed")  # fmt: skip
GROUPED = ("linear_attention", "gated_delta_rule_packed")  # with two heads of values per head of keys


def wanted(inputs: dict, rule: RecurrenceRule, grads: tuple) -> dict[str, torch.Tensor]:
    """Gradients in float64 by name of those inputs that have one."""
    exact = [x if x is None or not x.is_floating_point() else x.double().requires_grad_() for x in inputs.values()]
    results = token_loop(exact, replace(rule, state="float64"))
    learned = {name: x for name, x in zip(inputs, exact, strict=True) if x is not None and x.requires_grad}
    found = torch.autograd.grad(results, list(learned.values()), [g.double() for g in grads], allow_unused=True)
    pairs = zip(learned.items(), found, strict=True)
    return {name: torch.zeros_like(x) if g is None else g for (name, x), g in pairs}


def gradients(
    inputs: dict, rule: RecurrenceRule, grads: tuple, knobs: RecurrenceKnobs = SMALL, tiles: BackwardKnobs = TILES
) -> dict[str, torch.Tensor | None]:
    function = backward if rule.normaliser == "none" and rule.gate != "exp" else normalised_backward
    found = function(kernels_of("cpu"), Given(*inputs.values()), grads, rule, replace(knobs, backward=tiles))
    return dict(zip(INPUTS, found, strict=True))


def cotangents(inputs: dict, K: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of out, transposed in memory, and of the last state."""
    B, H, L, V = inputs["value"].shape
    return torch.randn(B, L, H, V).to(inputs["value"].dtype).transpose(1, 2), torch.randn(B, H, K, V + columns)


def check(case: Case, inputs: dict, knobs: RecurrenceKnobs = SMALL, tiles: BackwardKnobs = TILES) -> None:
    grads = cotangents(inputs, case.K, case.rule.columns)
    want = wanted(inputs, case.rule, grads)
    got = gradients(inputs, case.rule, grads, knobs, tiles)
    assert {name for name, x in got.items() if x is not None} == set(want)
    for name, expected in want.items():
        assert got[name].dtype == inputs[name].dtype and got[name].shape == inputs[name].shape
        assert error(got[name], expected) <= 2 * tolerance(inputs["value"].dtype), name


@pytest.mark.parametrize("name", TRIED)
def test_gradients_are_those_of_float64(name, poisoned_memory):
    case = replace(COMPUTED[name], H=2 if name in GROUPED else 1, Hk=1, K=20)
    check(case, given(case, 21))


@pytest.mark.parametrize(("name", "dtype"), [("gated_delta_rule", BF16), ("mamba2", FP16)])
def test_inputs_of_sixteen_bits_have_gradients_of_their_type(name, dtype, poisoned_memory):
    case = replace(COMPUTED[name], H=1, Hk=1, K=16)
    check(case, given(case, 21, dtype))


@pytest.mark.parametrize("name", ["mamba2", "kda"])
def test_decays_of_any_strength_have_finite_gradients(name, poisoned_memory):
    case = replace(COMPUTED[name], H=1, Hk=1, K=16)
    inputs = given(case, 21)
    kind = torch.randint(4, inputs["decay"].shape)
    strengths = torch.tensor([-20.0, -torch.inf, 0.0, -1e-3])
    inputs["decay"] = torch.where(kind < 3, strengths[kind], inputs["decay"])
    check(case, inputs)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_gates_of_nothing_and_of_all(beta, poisoned_memory):
    case = replace(COMPUTED["gated_delta_rule"], H=1, Hk=1, K=16)
    inputs = given(case, 17)
    inputs["beta"] = torch.full_like(inputs["beta"], beta)
    check(case, inputs)


def test_one_token_and_no_state(poisoned_memory):
    case = replace(COMPUTED["gated_delta_rule"], H=1, Hk=1)
    check(case, given(case, 1, state=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("length", [1, 33, 70, 200])
def test_the_whole_table(name, length, poisoned_memory):
    for number, (chunk, dtype, V) in enumerate(((16, FP32, 6), (64, BF16, 20), (32, FP16, 16), (128, FP32, 24))):
        case = replace(COMPUTED[name], Hk=1 + number % 2, H=2, K=(8, 20, 40, 16)[number], V=V)
        knobs = replace(SMALL, chunk_size=chunk, block_k=(16, 64)[number % 2], out_block_v=(64, 16)[number % 2])
        inputs = given(case, length, dtype, state=number % 2 == 0, batch=2 - number % 2)
        check(case, inputs, knobs, TILES if number % 2 else BackwardKnobs())

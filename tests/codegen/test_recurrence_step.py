"""The step kernel under Triton's interpreter against the token loop: every rule, states, documents, types."""

from __future__ import annotations

import pytest
import torch

from attnc.codegen.cpu_recurrence import Given
from attnc.codegen.gpu_step import StepKnobs, kernel_of, step
from tests.recurrences import CASES, Case, in_float64, token_loop

KERNEL = kernel_of("cpu")


def run(case: Case, inputs: list, block_v: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    narrow = [x if x is None or not x.is_floating_point() else x.float() for x in inputs]
    return step(KERNEL, Given(*narrow), case.rule, StepKnobs(block_v))


@pytest.mark.parametrize("length", [3, pytest.param(33, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_rule_is_the_token_loop(case: Case, length: int) -> None:
    torch.manual_seed(0)
    inputs = case.inputs(length, state=True, batch=1)
    if inputs[-1] is not None and length == 3:
        inputs[-1] = torch.tensor([[4, 4, 2]])
    want, state = token_loop(inputs, in_float64(case))
    out, last = run(case, inputs)
    torch.testing.assert_close(out.double(), want, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(last.double(), state, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_keep_a_float32_state(dtype: torch.dtype) -> None:
    case = next(c for c in CASES if c.name == "gated_delta_rule")
    inputs = [x if x is None else x.to(dtype).double() for x in case.inputs(5, batch=1)]
    want, state = token_loop(inputs, in_float64(case))
    out, last = step(KERNEL, Given(*(x if x is None else x.to(dtype) for x in inputs)), case.rule, StepKnobs(4))
    assert out.dtype == dtype and last.dtype == torch.float32
    torch.testing.assert_close(last.double(), state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.double(), want, rtol=2e-2, atol=2e-2)


def test_a_step_continues_where_the_last_one_ended() -> None:
    case = next(c for c in CASES if c.name == "kda")
    inputs = case.inputs(5, batch=1)
    whole, state = run(case, inputs)
    first, middle = run(case, [x if x is None else x[:, :, :3] for x in inputs])
    second, last = run(case, [x if x is None else x[:, :, 3:] for x in inputs[:7]] + [middle.double(), *inputs[8:]])
    torch.testing.assert_close(torch.cat([first, second], 2), whole)
    torch.testing.assert_close(last, state)

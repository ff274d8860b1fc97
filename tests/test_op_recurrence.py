"""The recurrence operator: equal to the token loop in float64, with gradients, opaque to compilers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from attnc.errors import UsageError
from attnc.op_recurrence import RECURRENCE
from attnc.rule_recurrence import RecurrenceRule, RecurrenceShape
from tests.recurrences import CASES, Case, apply, in_float64, token_loop
from tests.tolerance import assert_close

BY_NAME = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
FEW = [c for c in CASES if c.name in ("mamba1", "gated_delta_rule", "mlstm", "rwkv6", "rwkv7", "kda_packed")]
A_FEW = pytest.mark.parametrize("case", FEW, ids=lambda c: c.name)


def learnable(inputs: list[Tensor | None]) -> list[Tensor]:
    return [x.requires_grad_() for x in inputs if x is not None and x.is_floating_point()]


def scalar(out: Tensor, state: Tensor) -> Tensor:
    """A number that every element moves."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return (out * weights).sum() + (state[..., :1] * torch.linspace(1, 2, state.shape[2])[:, None]).sum()


@BY_NAME
@pytest.mark.parametrize("length", [1, 33, 70])
@pytest.mark.parametrize("state", [False, True])
def test_equals_the_token_loop_and_its_gradients(case: Case, length: int, state: bool) -> None:
    inputs = case.inputs(length, state=state)
    leaves, rule = learnable(inputs), in_float64(case)
    want, got = token_loop(inputs, rule), apply(inputs, rule)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)
    wanted = torch.autograd.grad(scalar(*want), leaves, allow_unused=True)
    found = torch.autograd.grad(scalar(*got), leaves, allow_unused=True)
    for a, b, x in zip(found, wanted, leaves, strict=True):
        assert_close(torch.zeros_like(x) if a is None else a, torch.zeros_like(x) if b is None else b)


@BY_NAME
def test_length_200_in_fresh_memory_of_nan(case: Case, poisoned_memory: None) -> None:
    inputs = case.inputs(200)
    for a, b in zip(apply(inputs, in_float64(case)), token_loop(inputs, in_float64(case)), strict=True):
        assert_close(a, b)


@BY_NAME
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_inputs_are_computed_in_float32(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(70, dtype)
    out, state = apply(inputs, case.rule)
    assert out.dtype == dtype and state.dtype == torch.float32
    want, _ = token_loop(
        [x if x is None or not x.is_floating_point() else x.double() for x in inputs], in_float64(case)
    )
    assert_close(out, want)


def compiled_cases():
    """A few by AOTAutograd, of them two by Inductor; the rest of these is slow."""
    for case in FEW:
        for backend in ("aot_eager", "inductor"):
            marks = () if backend == "aot_eager" or case.name in ("mamba1", "rwkv7") else pytest.mark.slow
            yield pytest.param(case, backend, id=f"{case.name}-{backend}", marks=marks)


@pytest.mark.parametrize(("case", "backend"), list(compiled_cases()))
def test_compiled_gradients_equal_eager_ones(case: Case, backend: str) -> None:
    def mixer(*inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        out, state = apply(inputs, case.rule)
        return out.transpose(1, 2).flatten(2) * 2, state

    inputs = case.inputs(33, torch.float32, state=True)
    leaves = learnable(inputs)
    compiled = torch.compile(mixer, backend=backend, fullgraph=True)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for a, b in zip(compiled(*inputs), mixer(*inputs), strict=True):
                assert_close(a, b)
    found = torch.autograd.grad(scalar(*compiled(*inputs)), leaves)
    for a, b in zip(found, torch.autograd.grad(scalar(*mixer(*inputs)), leaves), strict=True):
        assert_close(a, b)


@A_FEW
def test_one_node_forward_and_one_backward(case: Case) -> None:
    graphs: list[list[str]] = []

    def keep(gm: torch.fx.GraphModule, _: object) -> object:
        graphs.append([str(n.target) for n in gm.graph.nodes if "attnc" in str(n.target)])
        return gm.forward

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    inputs = case.inputs(33, torch.float32)
    learnable(inputs)
    mixer = torch.compile(lambda *x: apply(x, case.rule), backend=backend)
    scalar(*mixer(*inputs)).backward()
    assert graphs == [["attnc.recurrence.default"], ["attnc.recurrence_backward.default"]]


@A_FEW
def test_export_keeps_the_operator(case: Case) -> None:
    class Mixer(torch.nn.Module):
        def forward(self, *inputs: Tensor | None) -> Tensor:
            return apply(inputs, case.rule)[0]

    inputs = tuple(case.inputs(33, torch.float32))
    program = torch.export.export(Mixer(), inputs)
    assert [n.target for n in program.graph.nodes].count(RECURRENCE) == 1
    assert_close(program.module()(*inputs), Mixer()(*inputs))


@A_FEW
def test_fake_results_and_schema_are_true(case: Case) -> None:
    inputs = case.inputs(9, torch.float32, state=True)
    learnable(inputs)
    torch.library.opcheck(RECURRENCE, (*inputs[:8], case.rule.spell(), *inputs[8:]))


def test_lengths_stay_symbolic() -> None:
    case = FEW[0]
    compiled = torch.compile(lambda *x: apply(x, case.rule)[0], backend="aot_eager", dynamic=True, fullgraph=True)
    for length in (33, 70, 5):
        inputs = case.inputs(length, torch.float32)
        with torch._dynamo.config.patch(error_on_recompile=length != 33):
            assert_close(compiled(*inputs), apply(inputs, case.rule)[0])


def test_output_is_laid_out_token_by_token() -> None:
    out, _ = apply(FEW[1].inputs(33), in_float64(FEW[1]))
    assert out.transpose(1, 2).is_contiguous()


def test_an_empty_batch_has_empty_results_and_gradients() -> None:
    case = next(c for c in CASES if c.name == "gated_delta_rule")
    inputs = [x if x is None else x[:0].detach().requires_grad_() for x in case.inputs(5, torch.float32)]
    out, state = apply(inputs, case.rule)
    assert out.numel() == state.numel() == 0
    scalar(out, state).backward()
    assert inputs[2].grad.shape == inputs[2].shape


def test_second_derivatives_are_an_error_not_zero() -> None:
    q, k, v = (torch.randn(1, 1, 3, 2).requires_grad_() for _ in range(3))
    out, _ = RECURRENCE(q, k, v, None, None, None, None, None, RecurrenceRule().spell())
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="not differentiable twice"):
        torch.autograd.grad(grad.square().sum(), k)


def test_gradients_are_laid_out_as_the_inputs() -> None:
    # Otherwise the gradient of softplus has other strides than its meta kernel says, and a view after it fails.
    def mixer(q: Tensor, v: Tensor, raw: Tensor) -> Tensor:
        decay = -torch.nn.functional.softplus(raw.view(2, 33, 4))
        rule = "decay='token'; chunk=16"
        return RECURRENCE(*(x.transpose(1, 2) for x in (q, q, v, decay)), None, None, None, None, rule)[0]

    inputs = [torch.randn(2, 33, 4, 8).requires_grad_() for _ in range(2)] + [torch.randn(66, 4).requires_grad_()]
    torch.compile(mixer, backend="aot_eager")(*inputs).sum().backward()
    assert all(x.grad.is_contiguous() for x in inputs)


def test_extreme_decays_stay_finite() -> None:
    case = next(c for c in CASES if c.name == "mamba2")
    inputs = case.inputs(70, torch.float32)
    inputs[3] = torch.where(torch.rand_like(inputs[3]) < 0.2, -300.0, -1e-3)
    want, _ = token_loop(
        [x if x is None or not x.is_floating_point() else x.double() for x in inputs], in_float64(case)
    )
    assert_close(apply(inputs, case.rule)[0], want)


def test_spelling_reads_back() -> None:
    for case in CASES:
        assert RecurrenceRule.parse(case.rule.spell()) == case.rule


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="decay='sometimes'"):
        RecurrenceRule(decay="sometimes")
    with pytest.raises(UsageError, match="delta rule"):
        RecurrenceRule(delta=True, read="before")


def test_costs_grow_with_the_length_and_the_state() -> None:
    rule = RecurrenceRule(decay="token", delta=True, gate="write", chunk=64)
    shape = RecurrenceShape(B=1, H=4, L=128, K=16, V=16, Hk=4)
    assert rule.flops(RecurrenceShape(B=1, H=4, L=256, K=16, V=16, Hk=4)) == 2 * rule.flops(shape)
    # 6 K V + C (5 K + 3 V) of the catalogue, D14, for each token and head.
    assert rule.flops(shape) == 4 * 128 * (6 * 16 * 16 + 64 * (5 * 16 + 3 * 16))
    assert rule.elements(shape) == 128 * (4 * (2 * 16 + 2) + 2 * 4 * 16)
    assert rule.summary(shape) == ["gated delta rule", "L 128", "heads 4", "state 16 x 16", "B 1", "chunk 64"]

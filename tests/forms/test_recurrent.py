"""Forms of recurrences: kernels under the interpreter against the CPU core, choices for GPUs, what each refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import attnc
from attnc.codegen.cpu_recurrence import Given
from attnc.cost_models.device import device_named
from attnc.forms import FORMS, parse_recurrence
from attnc.forms.chunked import Chunked
from attnc.forms.recurrent import RecurrentForm
from attnc.forms.step import Step
from attnc.op_recurrence import RECURRENCE
from attnc.region import Region
from attnc.rule_recurrence import RecurrenceRule, RecurrenceShape
from tests.recurrences import CASES, Case
from tests.tolerance import tol

FORMS_OF_RECURRENCES = [form for form in FORMS if issubclass(form, RecurrentForm)]


def case(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


def region(rule: RecurrenceRule, device: str = "cuda", L: int = 512, K: int = 64, V: int = 64, **more) -> Region:
    return Region("mixer", "recurrence", rule, RecurrenceShape(2, 4, L, K, V, 4), "bfloat16", device, **more)


def close(got: torch.Tensor, want: torch.Tensor, times: float = 1.0) -> None:
    assert (got.double() - want.double()).abs().max() <= times * tol(want.dtype) * want.double().abs().max().clamp(
        min=1.0
    )


@pytest.mark.parametrize("name", ["retention", "gated_delta_rule", "mlstm"])
def test_kernels_and_the_cpu_core_are_one_function_gradients_included(name: str) -> None:
    torch.manual_seed(0)
    which = case(name)
    given = Given(*(x if x is None else x.float() for x in which.inputs(20, state=True, batch=1)))
    form = Chunked(chunk_size=16, block_v=16)
    out, state = form.run(given, which.rule)
    kernel_out, kernel_state = form.launch(given, which.rule)
    close(kernel_out, out)
    close(kernel_state, state)
    needs = [x is not None and x.is_floating_point() for x in given]
    cotangents = torch.randn_like(out), torch.randn_like(state)
    own = Given(*(x if x is None else x.detach().requires_grad_(n) for x, n in zip(given, needs, strict=True)))
    with torch.enable_grad():
        want = form.gradients(own, needs, cotangents, which.rule)
    got = form.launch_gradients(given, needs, cotangents, which.rule)
    for mine, theirs in zip(got, want, strict=True):
        close(mine, theirs, 10)


@pytest.mark.parametrize("name", ["retention", "mlstm"])
def test_gradients_of_the_kernels_are_laid_out_as_the_operator_promises(name: str) -> None:
    torch.manual_seed(0)
    which = case(name)
    given = which.inputs(3, state=True, batch=2)
    given = [x if x is None or x.dim() != 4 else x.float().transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    needs = [x is not None and x.is_floating_point() for x in given]
    own = Given(*given)
    form = Chunked(chunk_size=16, block_v=16)
    out, state = form.launch(own, which.rule)
    got = form.launch_gradients(own, needs, (torch.randn_like(out), torch.randn_like(state)), which.rule)
    learned = [x for x, need in zip(given, needs, strict=True) if need]
    assert [g.stride() for g in got] == [torch.empty_like(x).stride() for x in learned]


def test_the_gradient_of_a_state_that_is_shared_is_summed() -> None:
    torch.manual_seed(0)
    which = case("retention")
    given = Given(*(x if x is None else x.float() for x in which.inputs(3, state=True, batch=2)))
    given = given._replace(initial=given.initial[:1].clone())
    form, needs = Chunked(chunk_size=16, block_v=16), [name == "initial" for name in Given._fields]
    out, state = form.run(given, which.rule)
    cotangents = torch.randn_like(out), torch.randn_like(state)
    with torch.enable_grad():
        (want,) = form.gradients(given, needs, cotangents, which.rule)
    (got,) = form.launch_gradients(given, needs, cotangents, which.rule)
    close(got, want, 10)


def test_an_operator_runs_by_the_form_that_its_spelling_names() -> None:
    which = case("gla")
    inputs = [x if x is None else x.float() for x in which.inputs(40)]
    plain = RECURRENCE(*inputs[:8], which.rule.spell())
    for form in ("chunked{chunk_size=16}", "chunked{chunk_size=128}"):
        out, state = RECURRENCE(*inputs[:8], f"{form} | {which.rule.spell()}")
        close(out, plain[0])
        close(state, plain[1])
    with pytest.raises(attnc.UsageError, match="one of a recurrence"):
        parse_recurrence(f"dense | {which.rule.spell()}")


@pytest.mark.parametrize("which", CASES, ids=lambda c: c.name)
def test_some_form_computes_every_rule_on_every_device(which: Case) -> None:
    shape = RecurrenceShape(2, which.H, 512, which.K, which.V, which.Hk)
    for name, kind in (("cpu", "cpu"), ("h100", "cuda")):
        there = Region("", "", which.rule, shape, "float32", kind)
        fitting = [form() for form in FORMS_OF_RECURRENCES if form().refuse(there) is None]
        if name == "h100" and not fitting:  # the message says what runs instead
            assert "chunked" in Chunked().refuse(there)
            continue
        for form in fitting:
            for setting in form.space(there, device_named(name)):
                assert setting.misfit(there, device_named(name)) is None
                held = setting.estimate(there, device_named(name))
                assert 0 < held.low <= held.seconds <= held.high


def test_decoding_takes_the_step_and_prefill_the_chunks() -> None:
    rule = RecurrenceRule(decay="token", delta=True, gate="write")
    one, many = region(rule, L=1), region(rule, L=4096)
    assert Step().refuse(one) is None and "at most" in Step().refuse(many)
    assert "no backward" in Step().refuse(replace(one, training=True))
    h100 = device_named("h100")
    assert Step().space(one, h100)[0].seconds(one, h100) < Chunked().space(one, h100)[0].seconds(one, h100)


def test_explain_names_the_form_of_each_recurrence_for_a_gpu_that_is_not_here() -> None:
    class Retention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = torch.nn.Linear(64, 3 * 64)

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            at = torch.arange(x.shape[1])
            gamma = 1 - 2.0 ** (-5 - torch.arange(2.0))[:, None, None]
            decay = torch.where(at[:, None] >= at, gamma ** (at[:, None] - at).clamp(min=0), 0.0)
            return ((q @ k.mT) * decay @ v).transpose(1, 2).flatten(2)

    with torch.no_grad():
        report = attnc.explain(Retention(), torch.randn(1, 256, 64), device="h100")
    (found,) = [r for r in report.regions if r.kind == "recurrence"]
    assert found.choice.name in ("chunked", "scan"), found.choice
    assert found.choice.low_s < found.choice.predicted_s < found.choice.high_s

"""Recurrences written out, put on the operator: facts, values and gradients of each spelling of the gallery."""

from __future__ import annotations

import pytest
import torch

import attnc
from attnc.plan import Plan
from attnc.region import Region
from tests.gallery_recurrence import GALLERY, LEFT, PAIRS, Mix, arguments

RELATIVE = 1e-5
ALIKE = dict.fromkeys(
    ("loop_plain", "loop_by_head", "loop_forget_gate", "loop_gated_results", "loop_selective", "scaled_einsums",
     "batched_products", "powers", "segment_sums", "cumulative_weighted", "constant_decay", "grouped_heads",
     "gated_writes", "cumulative_normalised", "loop_by_token", "loop_delta", "loop_read_before", "loop_elementwise"),
    "another spelling of one that is run",
)  # fmt: skip


def run(fn, given, **options) -> tuple[torch.Tensor, list, attnc.Report]:
    """Result, gradients and report of `fn` compiled by attnc."""
    torch._dynamo.reset()
    own = [x.clone().requires_grad_() for x in given]
    compiled = torch.compile(fn, backend="attnc", options={"inner": "eager", **options}, dynamic=False)
    out = compiled(*own)
    return out.detach(), gradients(out, own), attnc.last_report(compiled)


def gradients(out, given) -> list:
    weight = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    return list(torch.autograd.grad((out * weight).sum(), given, allow_unused=True))


def mixers(report: attnc.Report) -> list[Region]:
    return [r for r in report.regions if r.kind == "recurrence"]


def assert_near(got, want) -> None:
    for a, b in zip(got, want, strict=True):
        a, b = (torch.zeros(()) if x is None else x for x in (a, b))
        assert float((a - b).abs().max()) <= RELATIVE * max(1e-3, float(b.abs().max()))


def assert_equals_eager(mix: Mix, **options) -> attnc.Report:
    given = arguments()
    out, grads, report = run(mix.fn, given, **options)
    own = [x.clone().requires_grad_() for x in given]
    want = mix.fn(*own)
    assert_near([out, *grads], [want.detach(), *gradients(want, own)])
    return report


def params(mixes) -> list:
    return [
        pytest.param(m, id=m.name, marks=[pytest.mark.slow] if m.name in ALIKE else []) for m in mixes
    ]


@pytest.mark.parametrize("mix", params(GALLERY))
def test_a_mixer_written_out_runs_as_the_operator_and_equals_eager(mix: Mix) -> None:
    report = assert_equals_eager(mix, strict=True)
    regions = mixers(report)
    assert len(regions) == mix.regions and all(r.choice.name in ("chunked", "scan", "step") for r in regions)
    facts = max(regions, key=lambda r: r.shape.V).facts
    assert {name: facts[name] for name in mix.facts} == mix.facts
    assert report.problems == ()


@pytest.mark.parametrize("mix", params(PAIRS))
def test_an_associative_scan_of_pairs_is_one_operator(mix: Mix) -> None:
    (region,) = mixers(assert_equals_eager(mix, strict=True, inner="aot_eager"))
    assert {name: region.facts[name] for name in mix.facts} == mix.facts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "loop_gated_delta", "cumulative", "scanned"])
def test_inductor_compiles_the_rewritten_graph(name: str) -> None:
    (mix,) = (m for m in GALLERY if m.name == name)
    assert_equals_eager(mix, inner="inductor")


@pytest.mark.parametrize("mix", LEFT, ids=lambda m: m.name)
def test_what_is_no_such_recurrence_is_left_alone_with_a_reason(mix: Mix) -> None:
    report = assert_equals_eager(mix)
    regions = mixers(report)
    assert not any(r.choice.rewrites for r in regions)
    reasons = [r.choice.reason for r in regions] + [u.reason for u in report.unmatched]
    assert len(regions) == mix.regions and (not mix.reason or any(mix.reason in said for said in reasons))


@pytest.mark.parametrize("draw", [torch.rand_like, lambda x: torch.rand(x.shape[-1])], ids=["alike", "alone"])
def test_random_numbers_are_drawn_step_by_step_as_written(draw) -> None:
    def mix(q, k, v, g, b):
        state, out = 0.0 * k[:, :, 0, :, None] * v[:, :, 0, None, :], []
        for t in range(q.shape[2]):
            state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
            out.append((q[:, :, t, :, None] * state).sum(-2) * draw(v[:, :, t]))
        return torch.stack(out, 2)

    _, _, report = run(mix, arguments(), check=False)
    (region,) = mixers(report)
    assert "draws random numbers" in region.choice.reason


def test_a_loop_in_sixteen_bits_is_recognised() -> None:
    (mix,) = (m for m in GALLERY if m.name == "loop_by_token")
    given = [x.bfloat16() for x in arguments()]
    out, _, report = run(mix.fn, given)
    assert [r.choice.rewrites for r in mixers(report)] == [True]
    want = mix.fn(*(x.double() for x in given))
    assert float((out - want).abs().max()) <= 2e-2 * float(want.abs().max())


def test_a_plan_names_the_form_of_a_loop() -> None:
    (mix,) = (m for m in GALLERY if m.name == "loop_rows")
    _, _, report = run(mix.fn, arguments())
    (region,) = mixers(report)
    plan = Plan({region.key: region.choice}, "cpu")
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.slow
def test_a_loop_of_256_steps_becomes_one_node() -> None:
    (mix,) = (m for m in GALLERY if m.name == "loop_by_token")
    given = arguments(256)
    out, _, report = run(mix.fn, given)
    assert mixers(report)[0].shape.L == 256 and mixers(report)[0].choice.rewrites
    assert_near([out], [mix.fn(*given)])


def test_the_length_of_a_product_may_be_symbolic() -> None:
    torch._dynamo.reset()

    def mix(q, k, v, g):
        total = g.cumsum(-1)
        later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        apart = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, -torch.inf)
        return (q @ k.mT * apart.exp()) @ v

    compiled = torch.compile(mix, backend="attnc", options={"inner": "aot_eager"})
    for length in (9, 33):
        *given, _ = arguments(length)
        for x in given:
            torch._dynamo.mark_dynamic(x, 2)
        assert_near([compiled(*given)], [mix(*given)])
    (region,) = mixers(attnc.last_report(compiled))
    assert region.choice.rewrites and set(region.shape.symbols) == {"L"}

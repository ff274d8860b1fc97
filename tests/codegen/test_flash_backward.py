"""Flash backward under the interpreter: gradients of inputs, captured tensors and sinks against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnc.forms import spell_attention
from attnc.forms.flash import Flash
from attnc.op_flash import flash
from attnc.rule_attention import AttentionRule
from tests.codegen.flash_cases import CASES, SMALL, WIDE, Shape, call_of, tolerance
from tests.codegen.interpreter import mend
from tests.tolerance import error

mend()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TABLE = replace(SMALL, skip="table")

PAIRS = [
    ("full", Shape(33, 17, BF16, Hq=1, H=1, E=24, Ev=48)),
    ("full", Shape(1, 70, FP32, Hq=2, H=1)),
    ("negative_scale", Shape(17, 33, FP32, Hq=1, H=1)),
    ("causal", Shape(33, 33, FP16, Hq=2, H=1, E=16, Ev=32)),
    ("causal_with_cache", Shape(33, 70, BF16, Hq=1, H=1)),
    ("causal_with_cache", Shape(70, 33, FP32, Hq=1, H=1)),
    ("window", Shape(70, 70, FP16, Hq=1, H=1)),
    ("documents", Shape(33, 33, FP32, B=2, Hq=1, H=1)),
    ("prefix", Shape(33, 33, FP16, B=2, Hq=1, H=1)),
    ("padded", Shape(33, 33, FP32, B=2, Hq=1, H=1)),
    ("softcap", Shape(33, 33, BF16, Hq=2, H=1)),
    ("alibi", Shape(33, 33, FP32, Hq=2, H=1)),
    ("relative_table", Shape(17, 33, BF16)),
    ("bias_strided", Shape(33, 33, FP16)),
    ("bias_broadcast", Shape(17, 33, FP32, B=2)),
    ("bias_of_keys", Shape(33, 33, FP32, Hq=2, H=2)),
    ("sink", Shape(33, 33, BF16, Hq=2, H=1)),
    ("sink_of_rows", Shape(17, 17, FP32, B=2)),
    ("rows_without_keys", Shape(33, 33, FP16, Hq=1, H=1)),
    ("rows_with_a_sink_alone", Shape(33, 33, FP32, Hq=2, H=2)),
]


def gradients(name: str, x: Shape, *settings: Flash) -> tuple[list, ...]:
    """Gradients by the oracle, then by the kernels of each of `settings`."""
    call = call_of(name, x)
    exact = call.double()
    cotangent = torch.randn(x.B, x.Hq, x.L, x.Ev).to(x.dtype)
    want = torch.autograd.grad(exact.wanted()[0], exact.learned(), cotangent.double(), allow_unused=True)
    got = [torch.autograd.grad(call.run(knobs)[0], call.learned(), cotangent) for knobs in settings]
    return want, *got


def check(name: str, x: Shape, *settings: Flash) -> None:
    want, *found = gradients(name, x, *settings)
    for got in found:
        for n, (one, two) in enumerate(zip(got, want, strict=True)):
            assert one.dtype == (x.dtype if n < 3 else one.dtype)
            assert error(one, two) <= 2 * tolerance(x.dtype), f"gradient {n}"


@pytest.mark.parametrize(("name", "x"), PAIRS, ids=str)
def test_gradients_are_those_of_float64(name, x, poisoned_memory):
    check(name, x, SMALL)


def test_every_rule_is_tried():
    assert {name for name, _ in PAIRS} == set(CASES)


LENGTHS = ((1, 1), (1, 70), (33, 33), (70, 33), (33, 200))


@pytest.mark.slow
@pytest.mark.parametrize("lengths", list(enumerate(LENGTHS)), ids=str)
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_over_the_whole_table(name, dtype, lengths, poisoned_memory):
    # Each heads with each knobs in the lengths of a rule and type.
    turn, (L, S) = lengths
    for n, heads in enumerate(((2, 2, 16, 16), (3, 1, 40, 80))):
        check(name, Shape(L, S, dtype, *heads, B=2), (SMALL, TABLE, WIDE)[(n + turn) % 3])


@pytest.mark.parametrize("E, Ev", [(80, 8), (16, 96), (192, 192)])
def test_any_width(E, Ev, poisoned_memory):
    check("causal", Shape(17, 17, FP32, Hq=1, H=1, E=E, Ev=Ev), SMALL)


@pytest.mark.parametrize("name", ["documents", "window", "rows_without_keys"])
def test_tables_give_the_gradients_of_ranges(name, poisoned_memory):
    _, one, two = gradients(name, Shape(40, 40, FP32, B=2, Hq=1, H=1), SMALL, TABLE)
    assert all(error(a, b) <= 1e-6 for a, b in zip(one, two, strict=True))


def test_a_captured_tensor_that_does_not_learn_has_no_gradient():
    call = call_of("alibi", Shape(17, 17, Hq=1, H=1))
    slope = call.captured[0].detach()
    out, lse = flash(call.query, call.key, call.value, [slope], [], spell_attention(SMALL, call.rule))
    assert not lse.requires_grad
    out.sum().backward()
    assert slope.grad is None and call.query.grad is not None


def test_the_operator_is_lawful():
    call = call_of("relative_table", Shape(17, 17, Hq=1, H=1))
    given = (call.query, call.key, call.value, call.captured, call.sizes, spell_attention(SMALL, call.rule))
    torch.library.opcheck(torch.ops.attnc.flash.default, given)


def test_a_compiler_takes_it_under_symbolic_lengths():
    rule = AttentionRule.parse("score=0.25 * s + f0[h, i - j + n0]; keep=j <= i; sink=f1[h]")
    table, sink = (torch.randn(shape, requires_grad=True) for shape in ((1, 90), (1,)))
    spelling = spell_attention(SMALL, rule)

    def attend(query, key, value):
        return flash(query, key, value, [table, sink], [key.shape[2] - 1], spelling)[0]

    torch._dynamo.utils.counters.clear()
    fast = torch.compile(attend, backend="aot_eager", dynamic=True, fullgraph=True)
    for length in (17, 40):
        given = [torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3)]
        learned = [*given, table, sink]
        one, two = (torch.autograd.grad(f(*given).sin().sum(), learned) for f in (fast, attend))
        assert all(error(a, b) <= 1e-6 for a, b in zip(one, two, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("x", [Shape(0, 5), Shape(5, 0), Shape(3, 3, B=0)], ids=str)
def test_nothing_to_attend_to_or_from(x, poisoned_memory):
    call = call_of("sink", x)
    for knobs in (SMALL, TABLE):
        out, lse = call.run(knobs)
        assert not out.abs().sum() and lse.shape == (x.B, x.Hq, x.L)
        assert not any(g.abs().sum() for g in torch.autograd.grad(out.sum(), call.learned()))

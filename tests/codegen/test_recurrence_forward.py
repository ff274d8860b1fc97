"""Chunked recurrences under the interpreter: outputs and last states against the token loop in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnc.codegen.compile_stats import TARGETS, Compiled, compile_job
from attnc.codegen.cpu_recurrence import Given
from attnc.codegen.gpu_recurrence import RecurrenceKnobs, forward, kernels_of, refuse, text_of
from attnc.codegen.recurrence_jobs import recurrence_jobs
from attnc.errors import LoweringError
from attnc.rule_recurrence import RecurrenceRule
from tests.codegen.flash_cases import tolerance
from tests.codegen.interpreter import mend
from tests.recurrences import CASES, INPUTS, Case, token_loop
from tests.tolerance import error

mend()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALL = RecurrenceKnobs(chunk_size=16, block_k=16, within_block_k=16, block_v=16, out_block_v=16)
FIRST = ("query", "key", "value", "a", "b")  # in the dtype of the model, the rest is float32
COMPUTED = {case.name: case for case in CASES if refuse(case.rule, case.K, case.V, query=case.Hk > 0) is None}
TRIED = ("linear_attention", "retention", "mamba2_packed", "rwkv6_packed", "simple_gla_before",
         "normalised_linear_attention", "delta_rule", "gated_delta_rule_packed", "gla", "kda_packed", "rwkv7_packed",
         "low_rank_before", "mlstm_packed")  # fmt: skip
GROUPED = ("linear_attention", "gated_delta_rule_packed")  # with two heads of values per head of keys


def given(case: Case, length: int, dtype: torch.dtype = FP32, *, state: bool = True, batch: int = 1) -> dict:
    """Inputs by name, rounded to what kernels are given; values in every other column of their memory."""
    inputs = dict(zip(INPUTS, case.inputs(length, FP32, state=state, batch=batch), strict=True))
    for name in FIRST:
        if inputs[name] is not None:
            inputs[name] = inputs[name].to(dtype)
    inputs["value"] = inputs["value"].repeat_interleave(2, -1)[..., ::2]
    inputs["query"] = inputs["query"].transpose(1, 2).contiguous().transpose(1, 2)
    if case.rule.gate == "exp" and state:
        inputs["initial_state"][..., -1] = inputs["initial_state"][..., :1, -1]
    return inputs


def run(inputs: dict, rule: RecurrenceRule, knobs: RecurrenceKnobs = SMALL) -> tuple:
    return forward(kernels_of("cpu"), Given(*inputs.values()), rule, knobs)


def wanted(inputs: dict, rule: RecurrenceRule) -> tuple:
    doubled = [x if x is None or not x.is_floating_point() else x.double() for x in inputs.values()]
    return token_loop(doubled, replace(rule, state="float64"))


def check(case: Case, inputs: dict, knobs: RecurrenceKnobs = SMALL, allowed: float | None = None) -> None:
    dtype = inputs["value"].dtype
    out, last, _ = run(inputs, case.rule, knobs)
    want, want_last = wanted(inputs, case.rule)
    assert out.dtype == dtype and last.dtype == FP32
    assert error(out, want) <= (allowed or tolerance(dtype))
    assert error(last, want_last) <= (allowed or tolerance(dtype))


@pytest.mark.parametrize("name", TRIED)
def test_outputs_and_states_are_those_of_float64(name, poisoned_memory):
    case = replace(COMPUTED[name], H=2 if name in GROUPED else 1, Hk=1, K=20)
    check(case, given(case, 21))


def test_what_is_not_tried_is_in_the_sweep():
    assert set(TRIED) <= set(COMPUTED) and {case.name for case in CASES} - set(COMPUTED) == {
        f"{name}{packed}" for name in ("mamba1", "rg_lru", "rwkv4", "cumulative_sum") for packed in ("", "_packed")
    }


@pytest.mark.parametrize(("name", "dtype"), [("gated_delta_rule", BF16), ("mamba2", FP16)])
def test_inputs_of_sixteen_bits_keep_their_precision(name, dtype, poisoned_memory):
    case = replace(COMPUTED[name], H=1, Hk=1, K=16)
    check(case, given(case, 21, dtype))


@pytest.mark.parametrize("name", ["mamba2", "kda"])
def test_decays_of_any_strength_stay_exact(name, poisoned_memory):
    case = replace(COMPUTED[name], H=1, Hk=1, K=16)
    inputs = given(case, 21)
    kind = torch.randint(4, inputs["decay"].shape)
    strengths = torch.tensor([-20.0, -torch.inf, 0.0, -1e-3])
    inputs["decay"] = torch.where(kind < 3, strengths[kind], inputs["decay"])
    check(case, inputs)


def test_keys_all_alike_do_not_blow_up_the_inverse(poisoned_memory):
    case = replace(COMPUTED["delta_rule"], H=1, Hk=1)
    inputs = given(case, 64, state=False)
    inputs["key"] = inputs["key"][:, :, :1].expand_as(inputs["key"])
    inputs["beta"] = torch.ones_like(inputs["beta"])
    check(case, inputs, replace(SMALL, chunk_size=64))


def test_one_token_and_no_state(poisoned_memory):
    case = replace(COMPUTED["gated_delta_rule"], H=1, Hk=1)
    check(case, given(case, 1, state=False))


def test_float16_holds_states_beyond_its_range(poisoned_memory):
    case = replace(COMPUTED["linear_attention"], H=1, Hk=1)
    inputs = given(case, 33, FP16, state=False)
    inputs["key"], inputs["value"] = inputs["key"].abs() * 100 + 50, inputs["value"].abs() * 100 + 50
    inputs["query"] = inputs["query"] * 1e-4
    check(case, inputs)


def test_out_lies_in_memory_as_tokens_by_heads():
    case = replace(COMPUTED["linear_attention"], H=2, Hk=1)
    out, _, saved = run(given(case, 17), case.rule)
    assert out.transpose(1, 2).is_contiguous()
    assert saved.scores is None and saved.inverse is None and saved.states.shape == (1, 2, 2, 8, 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("length", [1, 33, 70, 200])
def test_the_whole_table(name, length, poisoned_memory):
    for number, (chunk, dtype) in enumerate(((16, FP32), (64, BF16), (32, FP16), (128, FP32))):
        case = replace(COMPUTED[name], Hk=1 + number % 2, H=2, K=(8, 20, 40, 16)[number], V=(6, 20, 16, 24)[number])
        knobs = replace(SMALL, chunk_size=chunk, block_k=(16, 64)[number % 2], out_block_v=(64, 16)[number % 2])
        check(case, given(case, length, dtype, state=number % 2 == 0, batch=2 - number % 2), knobs)


@pytest.mark.parametrize(
    ("rule", "said"),
    [(RecurrenceRule(decay="state"), "a decay by state, allowed are none, head, token, channel"),
     (RecurrenceRule(state="float64"), "a state of float64, allowed is float32"),
     (RecurrenceRule(delta=True, normaliser="sum"), "a normaliser under the delta rule")],
)  # fmt: skip
def test_what_kernels_do_not_compute_is_a_sentence(rule, said):
    assert said in str(refuse(rule, 64, 64)) and refuse(rule, 64, 64).endswith("of the CPU path instead.")
    case = COMPUTED["retention"]
    with pytest.raises(LoweringError, match=said):
        run(given(case, 2), rule)
    assert "257 x 64, allowed are 256 x 256" in str(refuse(RecurrenceRule(), 257, 64))


def test_what_kernels_share_stands_in_their_own_file():
    text = text_of("chunk_state", "cpu")
    assert "from attnc" not in text and "def decay_sums(" in text and "def inverse(" not in text


def test_products_in_float32_leave_only_the_rounding_of_the_output():
    case = replace(COMPUTED["gated_delta_rule"], H=1, Hk=1, K=16, V=16)
    inputs = given(case, 33, BF16)
    want, _ = wanted(inputs, case.rule)
    rounding = error(want.to(BF16), want)  # to nearest; the interpreter rounds towards zero
    assert error(run(inputs, case.rule, replace(SMALL, products="float32"))[0], want) <= 2.01 * rounding


# Ahead of time.

SYSTEMS = {
    "retention": RecurrenceRule(decay="head"),
    "mamba2": RecurrenceRule(decay="token", gate="write", packed=True, state_in=True),
    "normalised": RecurrenceRule(normaliser="sum", eps=1e-6),
    "mlstm": RecurrenceRule(decay="token", gate="exp", normaliser="max1", eps=1e-6),
    "gated_delta_rule": RecurrenceRule(decay="token", delta=True, gate="write", qk_norm=1e-6),
    "rwkv6": RecurrenceRule(decay="channel", read="before"),
    "kda": RecurrenceRule(decay="channel", delta=True, gate="write", qk_norm=1e-6),
    "rwkv7": RecurrenceRule(decay="channel", low_rank=True),
}


def compiled(name: str, dtype: torch.dtype, target: str, knobs: RecurrenceKnobs, K: int = 64, folder=None) -> dict:
    jobs = recurrence_jobs(SYSTEMS[name], dtype, 2, K, K, knobs, target, bonus=name == "rwkv6")
    found = {job.kernel: compile_job(job, folder=folder) for job in jobs}
    assert all(isinstance(x, Compiled) for x in found.values()), f"{name} {dtype} {target}: {found}"
    return found


@pytest.mark.parametrize(("name", "target"), [("normalised", "cuda:80"), ("retention", "hip:gfx942")])
def test_a_sample_compiles(name, target, tmp_path):
    found = compiled(name, BF16, target, RecurrenceKnobs(chunk_size=16, block_v=16, out_block_v=16), 16, tmp_path)
    assert {"mma", "wgmma", "mfma"} & found["chunk_state"].instructions.keys()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_compiles_for_every_target(name, target):
    compiled(name, BF16, target, RecurrenceKnobs(stages=1))
    compiled(name, FP32, target, RecurrenceKnobs(chunk_size=32, block_k=32, block_v=32, out_block_v=32, stages=1))

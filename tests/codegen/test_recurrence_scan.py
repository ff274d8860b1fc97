"""The scan kernels under Triton's interpreter: outputs, states and gradients against the token loop in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnc.codegen.cpu_recurrence import Given
from attnc.codegen.gpu_scan import ScanKnobs, gradients, kernels_of, refuse, scan, sizes_of
from attnc.errors import LoweringError
from attnc.forms.recurrent import is_elementwise
from attnc.forms.scan import Scan
from attnc.rule_recurrence import RecurrenceRule as R
from attnc.rule_recurrence import RecurrenceShape
from tests.codegen.interpreter import mend
from tests.recurrences import CASES, Case, token_loop
from tests.tolerance import error

mend()
KERNELS = kernels_of("cpu")
SMALL = ScanKnobs(block_t=8, block_h=8)
SCANNED = [c for c in CASES if is_elementwise(c.rule, RecurrenceShape(2, c.H, 9, c.K, c.V, c.Hk))]
MORE = [
    Case("mamba1_in_groups", R(decay="state", gate="write", scale=0.5), H=4, K=3, V=2, Hk=2),
    Case("mamba1_alone", R(decay="state", gate="write"), H=5, K=4, V=1, Hk=5),
    Case("hgrn", R(decay="channel", factors=True), H=5, K=1, V=3, Hk=5),
    Case("hgrn_packed", R(decay="channel", packed=True), H=5, K=1, V=1, Hk=0),
    Case("factors_by_channel", R(decay="channel", factors=True, packed=True), H=2, K=4, V=3, Hk=1),
    Case("before_with_bonus", R(decay="channel", factors=True, read="before", gate="write", packed=True, scale=0.5),
         H=3, K=4, V=2, Hk=1, bonus=True),
    Case("average", R(decay="head", normaliser="sum", eps=1e-6, qk_norm=1e-6), H=3, K=1, V=2, Hk=3),
    Case("mlstm_of_one", R(decay="token", gate="exp", normaliser="max1", eps=1e-6, packed=True), H=3, K=1, V=2, Hk=1),
]  # fmt: skip
TABLE = {case.name: case for case in [*SCANNED, *MORE]}
TRIED = ("mamba1_packed", "mamba1_in_groups", "mamba1_alone", "rg_lru", "rwkv4_packed", "cumulative_sum_packed",
         "hgrn_packed", "factors_by_channel", "before_with_bonus", "average", "mlstm_of_one")  # fmt: skip


def given(case: Case, length: int, dtype: torch.dtype = torch.float32, *, state: bool = True, batch: int = 1) -> Given:
    """Operands; those of tokens lie in memory with the tokens innermost, as convolutions leave them."""
    torch.manual_seed(0)
    inputs = Given(*case.inputs(length, torch.float32, state=state, batch=batch))
    if case.rule.packed and length > 2:
        inputs = inputs._replace(documents=(torch.arange(length) // max(2, length // 3)).expand(batch, -1))
    if case.rule.gate == "exp" and state:
        inputs.initial[..., -1] = inputs.initial[..., :1, -1]
    value = inputs.value.to(dtype).transpose(2, 3).contiguous().transpose(2, 3)
    pair = (x if x is None else x.to(dtype) for x in inputs[:2])
    return Given(*pair, value, *inputs[3:])


def check(case: Case, x: Given, knobs: ScanKnobs = SMALL, allowed: float = 2e-5) -> None:
    exact = Given(*(t if t is None or not t.is_floating_point() else t.double().requires_grad_() for t in x))
    want, want_last = token_loop(list(exact), replace(case.rule, state="float64"))
    out, last = scan(KERNELS, x, case.rule, knobs)
    assert out.dtype == x.value.dtype and last.dtype == torch.float32 and out.transpose(1, 2).is_contiguous()
    assert error(out, want) <= allowed and error(last, want_last) <= allowed
    ends = torch.randn(want.shape).to(out.dtype), torch.randn(want_last.shape)
    learned = {name: t for name, t in exact._asdict().items() if t is not None and t.requires_grad}
    doubled = [e.double() for e in ends]
    slopes = torch.autograd.grad((want, want_last), list(learned.values()), doubled, allow_unused=True)
    with torch.enable_grad():
        found = gradients(KERNELS, x, [n in learned for n in Given._fields], ends, case.rule, knobs)
    for (name, t), slope, got in zip(learned.items(), slopes, found, strict=True):
        own = getattr(x, name)
        assert got.dtype == own.dtype and got.stride() == torch.empty_like(own).stride(), name
        assert error(got, torch.zeros_like(t) if slope is None else slope) <= 4 * allowed, name


@pytest.mark.parametrize("name", TRIED)
def test_outputs_and_gradients_are_those_of_float64(name: str, poisoned_memory: None) -> None:
    check(TABLE[name], given(TABLE[name], 11))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_keep_a_float32_state(dtype: torch.dtype, poisoned_memory: None) -> None:
    check(TABLE["mamba1"], given(TABLE["mamba1"], 11, dtype), allowed=1.6e-2)


def test_one_token_and_no_state(poisoned_memory: None) -> None:
    for name in ("mamba1", "before_with_bonus"):
        check(TABLE[name], given(TABLE[name], 1, state=False))


@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_factors_of_nothing_and_of_all(factor: float, poisoned_memory: None) -> None:
    x = given(TABLE["rg_lru"], 11)
    check(TABLE["rg_lru"], x._replace(decay=torch.full_like(x.decay, factor)))


def test_decays_of_any_strength_have_finite_gradients(poisoned_memory: None) -> None:
    x = given(TABLE["hgrn_packed"], 11)
    strengths = torch.tensor([-20.0, 0.0, -1e-3, -200.0])
    check(TABLE["hgrn_packed"], x._replace(decay=strengths[torch.randint(4, x.decay.shape)]))


def test_tiles_do_not_change_results() -> None:
    x = given(TABLE["mamba1"], 19)
    first, last = scan(KERNELS, x, TABLE["mamba1"].rule, SMALL)
    for knobs in (ScanKnobs(32, 4), ScanKnobs(4, 16)):
        out, end = scan(KERNELS, x, TABLE["mamba1"].rule, knobs)
        torch.testing.assert_close(out, first)
        torch.testing.assert_close(end, last)


def test_the_form_launches_what_it_computes_on_cpus(poisoned_memory: None) -> None:
    x, rule = given(TABLE["mamba1_packed"], 6), TABLE["mamba1_packed"].rule
    for got, want in zip(Scan(block_t=8, block_h=8).launch(x, rule), Scan().run(x, rule), strict=True):
        assert got.stride() == want.stride() and error(got, want) <= 1e-5


def test_blocks_of_channels_stay_within_a_head_of_keys_where_they_stay_wide() -> None:
    knobs = ScanKnobs(16, 32)
    assert sizes_of(4096, 1, 16, 1, knobs)["SHARED"] and sizes_of(4096, 1, 16, 1, knobs)["BLOCK_H"] == 32
    assert sizes_of(64, 8, 16, 2, knobs)["BLOCK_H"] == 16 and sizes_of(64, 8, 16, 2, knobs)["SHARED"]
    assert sizes_of(64, 64, 1, 1, knobs)["BLOCK_H"] == 32 and not sizes_of(64, 64, 1, 1, knobs)["SHARED"]


@pytest.mark.parametrize(
    ("rule", "said"),
    [(R(delta=True), "a transition of low rank"), (R(decay="channel", gate="exp"), "an exponential gate under a decay"),
     (R(state="float64"), "a state of float64, allowed is float32")],
)  # fmt: skip
def test_what_kernels_do_not_compute_is_a_sentence(rule: R, said: str) -> None:
    assert said in str(refuse(rule, 1)) and str(refuse(rule, 1)).endswith("in plain torch instead.")
    with pytest.raises(LoweringError, match=said):
        scan(KERNELS, Given(None, None, torch.ones(1, 1, 1, 1)), rule, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 33, 70, 200])
@pytest.mark.parametrize("name", TABLE)
def test_the_whole_table(name: str, length: int, poisoned_memory: None) -> None:
    for number, knobs in enumerate((ScanKnobs(16, 16), ScanKnobs(64, 4))):
        check(TABLE[name], given(TABLE[name], length, state=number == 0, batch=2), knobs, 1e-4)

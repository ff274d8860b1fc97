"""Decode kernels against the reference in float64, under Triton's interpreter; and compiled ahead of time."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from attnc.codegen.compile_stats import Compiled, compile_job
from attnc.codegen.decode_jobs import COUNTS, decode_jobs
from attnc.codegen.gpu_decode import KERNELS, DecodeKnobs, decode, shares_latent
from attnc.codegen.render import render_rule, skeleton_text
from attnc.codegen.triton_text import Slot, slot_of
from attnc.errors import UsageError
from attnc.forms.masked import reference
from attnc.operands import Operands
from attnc.rule_attention import AttentionRule
from tests.codegen.interpreter import mend
from tests.codegen.kernels import imported
from tests.forms.rules import RULES, Dims, inputs, rule_of
from tests.tolerance import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SMALL = DecodeKnobs(block_m=16, block_n=16, splits=3)


@pytest.fixture(scope="module", autouse=True)
def products_of_bfloat16() -> None:
    mend()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("decode")


@cache
def rendered(rule: AttentionRule, slots: tuple[Slot, ...]) -> str:
    spelling = "flash_decode{block_m=16}"
    return render_rule(skeleton_text("flash_decode"), rule, slots, spelling=spelling, device="cpu", kernels=KERNELS)


def check(rule, qkv, captured, sizes, folder: Path, knobs: DecodeKnobs = SMALL, **given) -> None:
    """Out and lse of the kernels against the reference in float64."""
    module = imported(rendered(rule, tuple(slot_of(t) for t in captured)), folder)
    x = Operands(*qkv, captured, sizes, rule)
    out, lse = decode(module, x, knobs, **given)
    want, want_lse = reference(x.double())
    dtype = qkv[0].dtype if qkv[0].dtype.itemsize > 1 else torch.bfloat16
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close(out, want, dtype, terms=64)
    # Queries and keys of 16 bits are exact factors: only weights are rounded. lse is float32 throughout.
    assert_close(lse, want_lse, torch.float32, terms=1024)


def drawn(dims: Dims, dtype: torch.dtype = torch.float32):
    qkv, captured = inputs(dims, dtype, grad=False)
    return qkv, [t.float() if t.is_floating_point() else t for t in captured]


DECODES = (Dims(1, 33, 4, 2), Dims(5, 70, 6, 2, 16, 24), Dims(16, 200, 2, 1, 24, 16), Dims(1, 1, 2, 2))


@pytest.mark.parametrize(("name", "dims"), [(name, DECODES[n % 3]) for n, name in enumerate(RULES)], ids=str)
def test_every_rule_decodes_as_the_reference(name: str, dims: Dims, folder: Path) -> None:
    qkv, captured = drawn(dims)
    check(rule_of(name, dims), qkv, captured, [], folder)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", DECODES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_every_rule_length_and_type(name: str, dims: Dims, dtype: torch.dtype, folder: Path) -> None:
    qkv, captured = drawn(dims, dtype)
    check(rule_of(name, dims), qkv, captured, [], folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal_with_cache", "softcap_sink", "documents"])
def test_types_of_16_bits(dtype: torch.dtype, name: str, folder: Path) -> None:
    dims = Dims(2, 70, 4, 2, 16, 16, 2)
    qkv, captured = drawn(dims, dtype)
    check(rule_of(name, dims), qkv, captured, [], folder)


@pytest.mark.parametrize(("query", "dot8"), [(torch.float16, False), (torch.float8_e4m3fn, False)])
def test_keys_and_values_of_8_bits(query: torch.dtype, dot8: bool, folder: Path) -> None:
    qkv, _ = drawn(Dims(1, 70, 4, 2, 32, 32))
    qkv = [t.to(d) for t, d in zip(qkv, (query, torch.float8_e4m3fn, torch.float8_e4m3fn), strict=True)]
    check(AttentionRule.parse("score=0.2 * s"), qkv, [], [], folder, DecodeKnobs(16, 32, 2, dot8=dot8))


@pytest.mark.parametrize(("splits", "length"), [(1, 33), (2, 1), (2, 200), (7, 70), (20, 33)])
def test_any_number_of_parts_gives_the_same(splits: int, length: int, folder: Path) -> None:
    dims = Dims(1, length, 4, 1)
    qkv, captured = drawn(dims)
    check(rule_of("softcap_sink", dims), qkv, captured, [], folder, DecodeKnobs(16, 16, splits))


def test_lengths_of_sequences_come_from_a_captured_tensor(folder: Path) -> None:
    qkv, _ = drawn(Dims(2, 200, 4, 2, 16, 16, 3))
    lengths = torch.tensor([200, 7, 0])
    rule = AttentionRule.parse("score=0.25 * s; keep=j <= t0[b] - 1 and j - i <= t0[b] - n0; empty=zero")
    check(rule, qkv, [lengths], [2], folder, DecodeKnobs(16, 32, 4))


@pytest.mark.parametrize("keep", ["j <= t0[h] and j <= t1[b]", "j - 9 * h <= 5 and 9 * h - j <= 4"])
def test_ranges_of_packed_heads_that_differ(keep: str, folder: Path) -> None:
    qkv, _ = drawn(Dims(2, 70, 4, 2, 16, 16, 2))
    captured = [torch.tensor([3, 60, 0, 33]), torch.tensor([50, 20])]
    check(AttentionRule.parse(f"score=0.25 * s; keep={keep}; empty=zero"), qkv, captured, [], folder)


def test_what_lies_behind_a_sequence_in_the_cache_is_not_read(folder: Path) -> None:
    (query, key, value), _ = drawn(Dims(1, 70, 4, 2, 16, 16, 2))
    rule = AttentionRule.parse("score=0.25 * s; keep=j <= t0[b] - 1; empty=zero")
    lengths = torch.tensor([41, 16])
    behind = torch.arange(70)[None, None, :, None] >= lengths[:, None, None, None]
    want, _ = reference(Operands(query, key, value, [lengths], [], rule).double())
    key, value = (t.masked_fill(behind, torch.nan) for t in (key, value))
    module = imported(rendered(rule, (slot_of(lengths),)), folder)
    assert_close(decode(module, Operands(query, key, value, [lengths], [], rule), SMALL)[0], want, torch.float32)


def test_more_rows_than_a_tile(folder: Path) -> None:
    dims = Dims(5, 33, 12, 2)
    qkv, captured = drawn(dims)
    check(rule_of("per_head", dims), qkv, captured, [], folder)


def test_widths_that_are_no_powers_of_two(folder: Path) -> None:
    dims = Dims(1, 33, 2, 1, 72, 80)
    qkv, captured = drawn(dims)
    check(rule_of("causal_with_cache", dims), qkv, captured, [], folder)


@pytest.mark.parametrize(("E", "Ev"), [(40, 32), (576, 512)])
def test_a_latent_is_read_once_for_key_and_value(E: int, Ev: int, folder: Path) -> None:
    (query, latent, _), captured = drawn(Dims(1, 70, 20, 1, E, Ev, 2))
    check(
        rule_of("sink", Dims(1, 70)), [query[:, :2], latent, latent[..., :Ev]], captured, [], folder, value_in_key=True
    )


def test_a_value_outside_the_keys_tile_is_refused() -> None:
    assert shares_latent(576, 512) and not shares_latent(576, 256) and not shares_latent(128, 128 + 64)
    (query, key, _), _ = drawn(Dims(1, 33, 2, 1, 576, 16))
    with pytest.raises(UsageError, match="found widths 576 and 16"):
        decode(None, Operands(query, key, key[..., :16], [], [], AttentionRule()), SMALL, value_in_key=True)  # type: ignore[arg-type]


def test_any_strides(folder: Path) -> None:
    dims = Dims(2, 33, 4, 2, 16, 16, 2)
    qkv, captured = drawn(dims)
    apart = [torch.stack([t, t], -1)[..., 0].transpose(1, 2).contiguous().transpose(1, 2) for t in qkv]
    check(rule_of("causal_with_cache", dims), apart, captured, [], folder)


TARGETS = ("cuda:80", "cuda:90", "cuda:120", "hip:gfx942")
SLOTS = [Slot(torch.int64, 2), Slot(torch.int64, 2), Slot(torch.float32, 1), Slot(torch.bfloat16, 3)]
WIDE = DecodeKnobs(16, 32, 8, 8, 1)
CASES = {
    "gqa": ("causal_with_cache", torch.bfloat16, 8, 128, 128, DecodeKnobs(), {}),
    "sink and documents": ("causal_padding_sink", torch.float16, 4, 64, 64, DecodeKnobs(), {}),
    "bias": ("bias", torch.float32, 1, 96, 80, DecodeKnobs(), {}),
    "heads differ": ("per_head", torch.bfloat16, 8, 192, 128, DecodeKnobs(), {}),
    "latent": ("causal_with_cache", torch.bfloat16, 128, 576, 512, WIDE, {"value_in_key": True}),
    "8-bit cache": ("softcap", torch.bfloat16, 8, 128, 128, DecodeKnobs(), {"held": (torch.float8_e5m2,) * 2}),
}


def compiled(case: str, target: str, folder: Path) -> None:
    name, dtype, group, E, Ev, knobs, given = CASES[case]
    jobs = decode_jobs(rule_of(name, Dims(1, 64)), SLOTS, dtype, group, E, Ev, knobs, target, **given)
    for job in jobs:
        found = compile_job(job, folder=folder)
        assert isinstance(found, Compiled), f"{job.kernel}: {found}"
        assert found.spill_bytes == 0, f"{job.kernel}: {found}"


@pytest.mark.parametrize(
    ("case", "target"), [("gqa", "cuda:90"), ("latent", "cuda:80"), ("heads differ", "hip:gfx942")]
)
def test_decode_compiles_ahead_of_time(case: str, target: str, tmp_path: Path) -> None:
    compiled(case, target, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_every_case_compiles_for_every_target(case: str, target: str, tmp_path: Path) -> None:
    compiled(case, target, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_every_rule_compiles(name: str, tmp_path: Path) -> None:
    rule, knobs = rule_of(name, Dims(1, 64)), DecodeKnobs(splits=1)
    for target, ones in (("cuda:90", COUNTS), ("cuda:80", ()), ("hip:gfx942", ("L",))):
        for job in decode_jobs(rule, SLOTS, torch.bfloat16, 4, 64, 64, knobs, target, ones=ones):
            assert isinstance(found := compile_job(job, folder=tmp_path), Compiled), found


@pytest.mark.slow
def test_products_of_8_bits_compile_where_the_target_has_them(tmp_path: Path) -> None:
    knobs, dtype = DecodeKnobs(dot8=True), torch.float8_e4m3fn
    for target in ("cuda:90", "cuda:120"):
        job = decode_jobs(AttentionRule.parse("score=0.1 * s"), [], dtype, 8, 128, 128, knobs, target)[0]
        assert isinstance(found := compile_job(job, folder=tmp_path), Compiled), found

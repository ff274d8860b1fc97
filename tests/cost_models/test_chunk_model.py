"""The chunk model: never faster than the roofs, never faster for more work, near what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attnc.cost_models.chunk_model import ChunkKnobs, ChunkWork, chunk_fits, chunk_seconds, kernels_of
from attnc.cost_models.device import gpu_named

GPUS = ("a100", "h100", "b200", "l40s", "mi300x")
works = st.builds(
    lambda B, group, Hk, chunks, K, V, decay, delta, training: ChunkWork(
        B, Hk * group, Hk, 128 * chunks, K, V, "bfloat16", decay, delta, training=training
    ),
    st.sampled_from([1, 4, 16]),
    st.sampled_from([1, 4]),
    st.sampled_from([1, 8]),
    st.sampled_from([1, 4, 32, 256]),
    st.sampled_from([64, 128]),
    st.sampled_from([64, 128]),
    st.sampled_from(["none", "head", "token", "channel"]),
    st.booleans(),
    st.booleans(),
)
knobs = st.builds(
    ChunkKnobs,
    st.sampled_from([16, 32, 64, 128]),
    st.sampled_from([16, 32, 64, 128]),
    st.sampled_from([2, 4, 8]),
    st.integers(1, 3),
)


@settings(deadline=None)
@given(works, knobs, st.sampled_from(GPUS))
def test_no_setting_beats_the_roofs(work: ChunkWork, knob: ChunkKnobs, name: str) -> None:
    device = gpu_named(name)
    assume(chunk_fits(work, knob, device) is None)
    tokens, found = work.B * work.H * work.L, chunk_seconds(work, knob, device)
    flops = tokens * (4.0 * work.K * work.V + 2 * knob.chunk_size * (work.K + work.V))
    assert found >= flops / device.tensor["bf16"]
    moved = 2.0 * work.B * work.L * (work.Hk * 2 * work.K + work.H * 2 * work.V)
    assert found >= (moved - device.l2_bytes) / device.bandwidth


@settings(deadline=None)
@given(works, knobs, st.sampled_from(GPUS), st.sampled_from(["B", "H", "L", "K", "V"]))
def test_twice_the_work_never_takes_less(work: ChunkWork, knob: ChunkKnobs, name: str, field: str) -> None:
    device, changes = gpu_named(name), {field: 2 * getattr(work, field)}
    larger = replace(work, **changes, **({"Hk": 2 * work.Hk} if field == "H" else {}))
    assume(chunk_fits(work, knob, device) is None and chunk_fits(larger, knob, device) is None)
    assert chunk_seconds(larger, knob, device) >= chunk_seconds(work, knob, device) * 0.999


def test_time_grows_in_proportion_to_length() -> None:
    device, work = gpu_named("h100"), ChunkWork(4, 16, 16, 8192, 128, 128, decay="token", delta=True)
    ratio = chunk_seconds(replace(work, L=65536), ChunkKnobs(), device) / chunk_seconds(work, ChunkKnobs(), device)
    assert 7.0 < ratio < 8.5


def test_training_has_a_kernel_more_for_each_of_the_forward() -> None:
    work = ChunkWork(1, 4, 4, 1024, 64, 64, training=True)
    assert kernels_of(work) == ("within", "state", "output", "doutput", "dstate", "dwithin")
    device = gpu_named("h100")
    apart = sum(chunk_seconds(work, ChunkKnobs(), device, kernels=(name,)) for name in kernels_of(work))
    assert apart == pytest.approx(chunk_seconds(work, ChunkKnobs(), device))


def test_what_a_setting_lacks_is_said() -> None:
    device, work = gpu_named("l40s"), ChunkWork(1, 4, 4, 4096, 256, 256, "float32", delta=True)
    why = chunk_fits(work, ChunkKnobs(64, 128, 8, 4), device)
    assert why is not None and "shared memory" in why and "smaller" in why
    narrow = chunk_fits(replace(work, K=128, V=128, dtype="bfloat16"), ChunkKnobs(64, 128, 1, 2), device)
    assert narrow is not None and "registers" in narrow


# (device, batch, length, key heads, value heads, decay, measured us): Triton kernels of flash-linear-attention as vLLM
# and SGLang run them, bf16, heads of 128; shared/measurements/gdn.parquet, NVIDIA aiconfigurator (Apache-2.0).
MEASURED = [
    ("h100", 1, 4096, 8, 16, "token", 301.0),
    ("h100", 2, 2048, 16, 32, "token", 453.9),
    ("h100", 4, 8192, 16, 32, "token", 3687.5),
    ("h100", 16, 8192, 4, 16, "token", 4665.1),
    ("rtxpro6000", 8, 8192, 4, 12, "token", 2683.6),
    ("rtxpro6000", 32, 2048, 8, 16, "token", 3657.0),
]


@pytest.mark.parametrize("case", MEASURED, ids=lambda c: f"{c[0]}-{c[1]}x{c[2]}")
def test_the_best_setting_is_within_a_factor_of_two_of_measured_kernels(case: tuple) -> None:
    name, batch, length, key_heads, heads, decay, measured = case
    device, work = gpu_named(name), ChunkWork(batch, heads, key_heads, length, 128, 128, decay=decay, delta=True)
    tried = [
        ChunkKnobs(64, block, warps, stages) for block in (32, 64, 128) for warps in (2, 4, 8) for stages in (2, 3)
    ]
    best = min(chunk_seconds(work, knob, device) for knob in tried if chunk_fits(work, knob, device) is None)
    assert 0.5 < best * 1e6 / measured < 2

"""Time of the flash kernels by their knobs: never below the roofs, growing with the work, near what was measured."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attnc.cost_models.device import gpu_named
from attnc.cost_models.tile_kernels import matrix_class, padded, tile_of
from attnc.cost_models.tile_model import (
    Band,
    FlashTiles,
    FlashWork,
    TileCount,
    coefficients,
    fits,
    flash_seconds,
    kernel_occupancy,
)
from attnc.cost_models.tile_terms import Coefficients

GPUS = ("a100", "h100", "l40s", "rtxpro6000", "b200", "mi300x", "mi355x")
GRID = [FlashTiles(*k) for k in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4))]
DECODE = [
    FlashTiles(16, n, 4, s, splits=k, pack=True)
    for n, s, k in itertools.product((32, 64, 128), (2, 3, 4), (1, 2, 4, 8, 16, 32))
]


def causal(B: int, Hq: int, H: int, L: int, E: int, window: int = 0, **more) -> FlashWork:
    return FlashWork(B, Hq, H, L, L, E, E, band=Band.causal(L, L, window), **more)


def best(work: FlashWork, name: str) -> float:
    device = gpu_named(name)
    grid = DECODE if work.L == 1 else GRID
    return min(flash_seconds(work, t, device) for t in grid if fits(work, t, device) is None)


# Fastest library for a shape, microseconds; shared/measurements (NVIDIA aiconfigurator 095f58a5, Apache-2.0), bf16:
# part, causal, batch, L, S, query heads, key heads, head width.
MEASURED = [
    ("a100", True, 8, 4096, 4096, 4, 1, 128, 802.7),
    ("a100", True, 32, 2048, 2048, 16, 1, 128, 2895.9),
    ("a100", True, 2, 1024, 1024, 64, 8, 128, 252.2),
    ("h100", True, 1, 12288, 12288, 16, 4, 128, 1023.3),
    ("h100", True, 8, 12288, 12288, 32, 4, 128, 16493.3),
    ("h100", True, 64, 2048, 2048, 64, 2, 128, 9194.4),
    ("h100", False, 16, 6144, 6144, 5, 5, 64, 1411.7),
    ("h100", False, 1, 65536, 65536, 32, 32, 64, 68862.2),
    ("rtxpro6000", True, 1, 12288, 12288, 32, 4, 128, 3529.1),
    ("rtxpro6000", True, 1, 16384, 16384, 8, 2, 64, 1074.4),
    ("rtxpro6000", False, 2, 7744, 7744, 10, 10, 64, 866.0),
    ("rtxpro6000", False, 4, 12288, 12288, 5, 5, 64, 2087.4),
    ("a100", True, 32, 1, 4096, 16, 8, 128, 419.5),
    ("a100", True, 16, 1, 32768, 8, 4, 128, 718.3),
    ("h100", True, 64, 1, 65536, 4, 1, 64, 358.2),
    ("h100", True, 16, 1, 131072, 6, 1, 128, 355.4),
    ("rtxpro6000", True, 32, 1, 65536, 2, 1, 128, 716.1),
    ("rtxpro6000", True, 16, 1, 8192, 96, 8, 128, 363.0),
]


@pytest.mark.parametrize("row", MEASURED, ids=lambda r: f"{r[0]}-{r[3]}x{r[4]}x{r[7]}")
def test_the_best_setting_is_near_the_best_library(row) -> None:
    name, is_causal, B, L, S, Hq, H, E, measured = row
    band = Band.causal(L, S) if is_causal else Band()
    predicted = best(FlashWork(B, Hq, H, L, S, E, E, band=band), name) * 1e6
    assert 1 / 1.5 <= predicted / measured <= 1.5


works = st.builds(
    lambda B, group, H, L, S, E, dense, training: FlashWork(
        B, group * H, H, L, S, E, E, band=Band() if dense else Band.causal(L, S), training=training
    ),
    st.sampled_from([1, 3, 16]),
    st.sampled_from([1, 4]),
    st.sampled_from([1, 8]),
    st.integers(1, 4000),
    st.integers(4000, 9000),
    st.sampled_from([64, 128]),
    st.booleans(),
    st.booleans(),
)
knobs = st.builds(
    FlashTiles,
    st.sampled_from([16, 32, 64, 128]),
    st.sampled_from([16, 32, 64, 128]),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 4),
)


@settings(deadline=None)
@given(works, knobs, st.sampled_from(GPUS))
def test_no_setting_beats_the_roofs(work: FlashWork, tiles: FlashTiles, name: str) -> None:
    device = gpu_named(name)
    assume(fits(work, tiles, device) is None)
    pairs = work.B * work.Hq * work.tile_count(1, 1).visited
    passes = 3.5 if work.training else 1.0
    flops = 4.0 * passes * pairs * work.E
    moved = 2.0 * (work.B * work.Hq * work.L * 2 * work.E + work.B * work.H * work.S * 2 * work.E)
    found = flash_seconds(work, tiles, device)
    assert found >= flops / device.tensor["bf16"]
    assert found >= pairs * (3 if work.training else 1) / device.exp2_rate * 0.99
    assert found >= (moved - device.l2_bytes) / device.bandwidth


@settings(deadline=None)
@given(works, knobs, st.sampled_from(GPUS), st.sampled_from(["B", "S", "L", "E", "Hq"]))
def test_twice_the_work_never_takes_less(work: FlashWork, tiles: FlashTiles, name: str, field_: str) -> None:
    device = gpu_named(name)
    L = -(-work.L // 128) * 128  # a ragged block of rows takes masks that a whole one does not
    work = replace(work, L=L, band=Band() if work.band.ahead is None else Band.causal(L, work.S))
    changes: dict = {field_: 2 * getattr(work, field_)}
    if field_ == "E":
        changes["Ev"] = 2 * work.Ev
    if field_ in "LS" and work.band.ahead is not None:
        assume(field_ == "S" or 2 * work.L <= work.S)
        changes["band"] = Band.causal(changes.get("L", work.L), changes.get("S", work.S))
    larger = replace(work, **changes)
    assume(fits(work, tiles, device) is None and fits(larger, tiles, device) is None)
    assert flash_seconds(larger, tiles, device) >= flash_seconds(work, tiles, device) * 0.999


@pytest.mark.parametrize("name", GPUS)
def test_masks_save_time_where_they_save_tiles(name: str) -> None:
    dense = best(FlashWork(4, 32, 8, 8192, 8192, 128, 128), name)
    lower = best(causal(4, 32, 8, 8192, 128), name)
    packed = best(causal(4, 32, 8, 8192, 128, documents=8.0), name)
    window = best(causal(4, 32, 8, 8192, 128, window=512), name)
    assert 0.4 < lower / dense < 0.65
    assert window < packed < 0.5 * lower
    assert window < 0.3 * lower


def test_exact_counts_replace_the_band() -> None:
    device, tiles = gpu_named("h100"), FlashTiles(128, 64, 8, 3)
    work = causal(4, 32, 8, 8192, 128)
    counted = replace(work, band=Band(), counts=lambda m, n: work.tile_count(m, n))
    fewer = replace(work, counts=lambda m, n: TileCount(100.0, 10.0, 4.0))
    assert flash_seconds(counted, tiles, device) == pytest.approx(flash_seconds(work, tiles, device))
    assert flash_seconds(fewer, tiles, device) < 0.1 * flash_seconds(work, tiles, device)


def test_training_takes_three_to_five_forwards() -> None:
    for name in GPUS:
        work = causal(4, 32, 32, 4096, 64)
        assert 2.8 < best(replace(work, training=True), name) / best(work, name) < 6.0


def test_a_score_with_more_work_takes_longer() -> None:
    device, tiles, work = gpu_named("h100"), FlashTiles(128, 64, 8, 3), causal(4, 32, 32, 4096, 64)
    capped = flash_seconds(replace(work, vector=4.0, exps=2.0), tiles, device)
    biased = flash_seconds(replace(work, pair_bytes=2.0), tiles, device)
    assert capped > 1.2 * flash_seconds(work, tiles, device)
    assert biased > flash_seconds(work, tiles, device)


def test_decode_of_few_long_sequences_needs_splits() -> None:
    device = gpu_named("h100")
    work = FlashWork(1, 32, 8, 1, 65536, 128, 128, band=Band.causal(1, 65536))
    by_splits = {t.splits: flash_seconds(work, t, device) for t in DECODE if t.block_n == 64 and t.stages == 3}
    assert by_splits[16] < 0.3 * by_splits[1]
    many = replace(work, B=128)
    one, split = (flash_seconds(many, FlashTiles(16, 64, 4, 3, splits=k, pack=True), device) for k in (1, 32))
    assert one < split
    unpacked = flash_seconds(many, FlashTiles(16, 64, 4, 3), device)
    assert one < unpacked  # four heads read the same keys


def test_a_value_inside_the_key_is_read_once() -> None:
    device, tiles = gpu_named("h100"), FlashTiles(16, 32, 4, 2, splits=4, pack=True)
    work = FlashWork(32, 128, 1, 1, 8192, 576, 512, band=Band.causal(1, 8192))
    once = replace(work, value_in_key=True)
    assert flash_seconds(once, tiles, device) < flash_seconds(work, tiles, device)
    assert tile_of("forward", tiles, 576, 512, "bf16", device, True).passing_bytes == 32 * 576 * 2


@pytest.mark.parametrize("name", GPUS)
def test_decode_over_a_cache_of_8_bits_is_predicted_faster_and_longer_caches_slower(name: str) -> None:
    device, tiles = gpu_named(name), FlashTiles(16, 64, 4, 3, splits=8, pack=True)
    cached = [FlashWork(16, 32, 8, 1, S, 128, 128, band=Band.causal(1, S)) for S in (4096, 16384, 65536)]
    wide, mixed, narrow = (
        [flash_seconds(replace(work, stored=stored), tiles, device) for work in cached]
        for stored in (None, (2, 1, 2), (2, 1, 1))
    )
    for times in (wide, mixed, narrow):
        assert times == sorted(times)
    assert all(a > b > c for a, b, c in zip(wide, mixed, narrow, strict=True))
    assert narrow[-1] < 0.8 * wide[-1]


def test_the_peak_of_8_bits_is_for_products_of_8_bits_alone() -> None:
    device, tiles = gpu_named("h100"), FlashTiles(128, 64, 8, 2)
    work = causal(4, 32, 32, 4096, 128)
    stored = replace(work, stored=(1, 1, 1))
    assert flash_seconds(stored, tiles, device) >= flash_seconds(work, tiles, device)  # widened, then as bf16
    assert flash_seconds(replace(stored, dtype="fp8"), tiles, device) < flash_seconds(stored, tiles, device)


def test_tiles_of_8_bits_are_loaded_narrow_and_multiplied_wide() -> None:
    given = ("forward", FlashTiles(64, 64, 4, 2), 64, 64, "bf16", gpu_named("a100"), False)
    wide, narrow = tile_of(*given), tile_of(*given, (1, 1))
    assert narrow.passing_bytes * 2 == wide.passing_bytes == narrow.multiplied_bytes
    assert narrow.shared_traffic == wide.shared_traffic and narrow.vector > wide.vector


def test_kernels_are_timed_and_checked_alone() -> None:
    device, work = gpu_named("h100"), causal(4, 32, 32, 4096, 64, training=True)
    tiles = FlashTiles(64, 64, 4, 2)
    parts = [flash_seconds(work, tiles, device, kernels=(k,)) for k in ("forward", "dq", "dkv")]
    assert flash_seconds(work, tiles, device) == pytest.approx(sum(parts))
    large = FlashTiles(128, 128, 4, 4)
    wide = causal(4, 32, 32, 4096, 128)
    assert (fits(wide, large, device, kernels=("dkv",)) or "").startswith("dkv")


@dataclass(frozen=True)
class Made:
    """What a compile says, see attnc.codegen.compile_stats."""

    registers: int = 168
    spill_bytes: int = 0
    shared_bytes: int = 98304
    threads: int = 256
    instructions: dict = field(default_factory=dict, hash=False)


MIX = {"wgmma": 24, "exp2": 68, "float": 340, "integer": 90, "convert": 32, "shared": 7, "global": 10, "sync": 8}


@given(st.integers(0, 2000), st.integers(1, 2000))
def test_more_spills_are_never_faster(some: int, more: int) -> None:
    device, tiles, work = gpu_named("h100"), FlashTiles(128, 128, 8, 2), causal(4, 32, 32, 4096, 128)
    less, worse = (
        flash_seconds(work, tiles, device, Made(255, 4 * n, instructions={**MIX, "local": n}))
        for n in (some, some + more)
    )
    assert less < worse


def test_a_compile_refines_the_closed_form() -> None:
    device, tiles, work = gpu_named("h100"), FlashTiles(128, 64, 4, 3), causal(4, 32, 32, 4096, 128)
    closed = flash_seconds(work, tiles, device)
    made = Made(226, 0, 98304, 128, MIX)
    assert 0.5 < flash_seconds(work, tiles, device, made) / closed < 2
    assert flash_seconds(work, tiles, device, {"forward": made}) == flash_seconds(work, tiles, device, made)
    slow = replace(made, instructions={**MIX, "float": 3400})
    assert flash_seconds(work, tiles, device, slow) > 2 * closed
    assert flash_seconds(work, tiles, device, replace(made, shared_bytes=300_000)) == float("inf")


@pytest.mark.parametrize(
    ("name", "tiles", "E", "says"),
    [
        ("a100", FlashTiles(128, 128, 8, 4), 256, "bytes of shared memory, a block of a100 has 166912"),
        ("rtxpro6000", FlashTiles(64, 128, 8, 3), 128, "Use smaller blocks or fewer stages"),
        ("h100", FlashTiles(128, 128, 4, 1), 256, "registers a thread, h100 has 255"),
        ("h100", FlashTiles(16, 16, 2, 2), 64, "use at most 1 warps"),
        ("h100", FlashTiles(96, 64, 4, 2), 64, "block_m is 96, allowed are powers of two from 16"),
        ("h100", FlashTiles(64, 8, 4, 2), 64, "block_n is 8"),
        ("h100", FlashTiles(64, 64, 3, 2), 64, "warps is 3"),
    ],
)
def test_what_does_not_fit_is_said(name: str, tiles: FlashTiles, E: int, says: str) -> None:
    sentence = fits(causal(1, 8, 8, 1024, E), tiles, gpu_named(name))
    assert sentence is not None and says in sentence and sentence.endswith(".")


def test_the_backward_can_be_what_does_not_fit() -> None:
    device, work = gpu_named("h100"), causal(1, 8, 8, 1024, 128)
    tiles = FlashTiles(128, 64, 4, 4)
    assert fits(work, tiles, device) is None
    assert (fits(work, tiles, device, backward=True) or "").startswith("d")
    smaller = replace(tiles, dq=FlashTiles(64, 64, 4, 2), dkv=FlashTiles(64, 64, 4, 2))
    assert fits(work, smaller, device, backward=True) is None


# Compiled by Triton 3.7.1 from the forward loop of tests/codegen/test_compile_stats.py:
# part, width, block_m, block_n, warps, stages, shared bytes, registers and the spilled ones.
COMPILED = [
    ("a100", 64, 64, 128, 4, 3, 73728, 202),
    ("a100", 64, 128, 32, 8, 2, 24576, 123),
    ("a100", 128, 32, 64, 4, 2, 45056, 128),
    ("a100", 64, 128, 128, 4, 4, 114688, 293),
    ("h100", 64, 64, 128, 4, 3, 106496, 184),
    ("h100", 64, 128, 32, 8, 2, 32768, 86),
    ("h100", 64, 128, 128, 4, 4, 147456, 254),
    ("h100", 128, 64, 64, 8, 3, 114688, 128),
    ("b200", 64, 128, 32, 8, 4, 49696, 86),
    ("b200", 128, 128, 64, 4, 3, 131104, 280),
    ("rtxpro6000", 64, 64, 128, 4, 3, 73728, 260),
]


@pytest.mark.parametrize("row", COMPILED, ids=lambda r: f"{r[0]}-{r[2]}x{r[3]}x{r[1]}-{r[4]}-{r[5]}")
def test_shared_memory_and_registers_are_as_compiled(row) -> None:
    name, E, block_m, block_n, warps, stages, shared, registers = row
    tile = tile_of("forward", FlashTiles(block_m, block_n, warps, stages), E, E, "bf16", gpu_named(name))
    assert 0.9 * shared <= tile.shared_bytes <= shared
    assert 0.65 <= tile.registers / registers <= 1.4
    assert kernel_occupancy(tile, gpu_named(name)).blocks >= 1


def test_hopper_and_blackwell_need_64_rows_for_their_own_instructions() -> None:
    assert [matrix_class("sm90", m, w) for m, w in ((64, 4), (64, 2), (32, 4))] == ["wgmma", "mma", "mma"]
    assert [matrix_class("sm100", m, 4) for m in (128, 16)] == ["tcgen05", "mma"]
    assert matrix_class("sm120", 128, 8) == "mma" and matrix_class("gfx950", 16, 1) == "mfma"


@pytest.mark.parametrize(("E", "wide"), [(16, 16), (64, 64), (72, 80), (80, 80), (96, 96), (192, 192), (40, 48)])
def test_widths_are_a_power_of_two_and_a_tail(E: int, wide: int) -> None:
    assert padded(E) == wide


@pytest.mark.parametrize(
    ("instruction", "name"), [("mma", "a100"), ("wgmma", "h100"), ("tcgen05", "b200"), ("mfma", "mi300x")]
)
def test_coefficients_are_physical(instruction: str, name: str) -> None:
    found = coefficients(instruction, gpu_named(name))
    assert isinstance(found, Coefficients)
    assert 0.3 < found.efficiency <= 1 and 0 <= found.serial <= 1.5 and 0.5 < found.memory <= 1
    assert found.softmax >= 1 and found.launch >= 1e-6


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", "float16", "fp8", "float32", "tf32"])
def test_every_type_has_a_time(dtype: str) -> None:
    for name in GPUS:
        work = causal(2, 8, 8, 1024, 64, dtype=dtype)
        assert 0 < flash_seconds(work, FlashTiles(64, 32, 4, 2), gpu_named(name)) < 1

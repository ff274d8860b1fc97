"""Blocks per SM: values of NVIDIA's occupancy calculator, AMD's waves, and what must hold for all kernels."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnc.cost_models.device import device_named, gpu_named
from attnc.cost_models.occupancy import occupancy, waves

GPUS = ("a100", "h100", "l40s", "rtxpro6000", "b200", "mi300x", "mi355x")


@pytest.mark.parametrize(
    ("name", "threads", "registers", "shared", "blocks", "limit"),
    [
        # CUDA occupancy calculator: 65,536 registers, 2048 threads, 32 blocks, 164 KB (sm80); 228 KB (sm90).
        ("a100", 128, 32, 0, 16, "warps"),
        ("a100", 32, 32, 0, 32, "blocks"),
        ("a100", 1024, 32, 0, 2, "warps"),
        ("a100", 128, 255, 0, 2, "registers"),
        ("a100", 128, 168, 0, 3, "registers"),
        ("a100", 128, 128, 0, 4, "registers"),
        ("a100", 128, 96, 0, 5, "registers"),
        ("a100", 256, 96, 0, 2, "registers"),
        ("a100", 256, 128, 0, 2, "registers"),
        ("a100", 256, 129, 0, 1, "registers"),
        ("a100", 1024, 65, 0, 0, "registers"),
        ("a100", 128, 32, 49152, 3, "shared memory"),
        ("a100", 128, 32, 166912, 1, "shared memory"),
        ("a100", 128, 32, 166913, 0, "shared memory"),
        ("h100", 128, 32, 65536, 3, "shared memory"),
        ("h100", 128, 168, 65536, 3, "registers"),
        ("h100", 384, 168, 0, 1, "registers"),
        # sm89, sm120: 1536 threads, 24 blocks, 100 KB.
        ("l40s", 128, 32, 0, 12, "warps"),
        ("l40s", 32, 32, 0, 24, "blocks"),
        ("rtxpro6000", 256, 32, 101376, 1, "shared memory"),
        ("rtxpro6000", 128, 32, 49152, 2, "shared memory"),
        # CDNA3: 512 registers a lane and SIMD, 8 waves a SIMD, 64 KB of LDS.
        ("mi300x", 256, 64, 0, 8, "warps"),
        ("mi300x", 256, 128, 0, 4, "registers"),
        ("mi300x", 256, 256, 0, 2, "registers"),
        ("mi300x", 256, 257, 0, 1, "registers"),
        ("mi300x", 256, 128, 32768, 2, "shared memory"),
    ],
)
def test_known_values(name: str, threads: int, registers: int, shared: int, blocks: int, limit: str) -> None:
    found = occupancy(gpu_named(name), threads, registers, shared)
    assert (found.blocks, found.limit) == (blocks, limit)


def test_tensor_memory_limits_blackwell() -> None:
    device = device_named("b200")
    assert occupancy(device, 128, 64, 1024, columns=256).blocks == 2
    assert occupancy(device, 128, 64, 1024, columns=512).limit == "tensor memory"


kernels = st.tuples(st.sampled_from(GPUS), st.integers(1, 16), st.integers(16, 255), st.integers(0, 100_000))


@given(kernels, st.integers(1, 64), st.integers(1, 50_000))
def test_more_of_anything_never_gives_more_blocks(kernel, registers: int, shared: int) -> None:
    name, warps, base, bytes_ = kernel
    device = gpu_named(name)
    threads = warps * device.warp_size
    found = occupancy(device, threads, base, bytes_)
    assert occupancy(device, threads, min(base + registers, 255), bytes_).blocks <= found.blocks
    assert occupancy(device, threads, base, bytes_ + shared).blocks <= found.blocks
    assert occupancy(device, threads + device.warp_size, base, bytes_).blocks <= found.blocks


@given(kernels)
def test_what_an_sm_holds_fits_it(kernel) -> None:
    name, warps, registers, shared = kernel
    device = gpu_named(name)
    found = occupancy(device, warps * device.warp_size, registers, shared)
    assert found.warps == found.blocks * warps <= device.warps_per_sm
    assert found.blocks <= device.blocks_per_sm
    assert found.warps * device.warp_size * registers <= device.registers_per_sm
    assert found.blocks * shared <= device.shared_per_sm


@given(st.sampled_from(GPUS), st.integers(1, 10**6), st.integers(1, 8))
def test_waves_cover_the_grid(name: str, grid: int, blocks: int) -> None:
    device = gpu_named(name)
    found = waves(device, grid, blocks)
    slots = device.sms * blocks
    assert (found.rounds - 1) * slots < grid <= found.rounds * slots
    assert 0 < found.filled <= 1
    assert found.filled * found.rounds * slots == pytest.approx(grid)


def test_one_block_too_many_costs_a_wave() -> None:
    device = gpu_named("h100")
    assert waves(device, 132 * 2, 2).rounds == 1
    assert waves(device, 132 * 2 + 1, 2).rounds == 2
    assert waves(device, 132 * 2 + 1, 2).filled == pytest.approx((132 * 2 + 1) / (132 * 4))

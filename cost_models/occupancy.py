"""How many blocks of a kernel an SM holds at once, what limits them, and how a grid falls into waves.

An SM (CU) has four parts with registers of their own, warps go round them; registers come in groups of 8 a thread,
shared memory in granules, and NVIDIA keeps 1 KB of it for itself in every block.

Source: NVIDIA, CUDA C++ Programming Guide, "Compute Capabilities", and the occupancy calculator that ships with CUDA;
AMD, CDNA3 ISA (512 vector registers a lane and SIMD, 8 waves a SIMD, LDS granules of 512 bytes).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from attnc.cost_models.device import Gpu

PARTS = 4
REGISTER_UNIT = 8
MAX_REGISTERS = {"sm": 255, "gfx": 512}  # of a thread
TENSOR_MEMORY_COLUMNS = 512  # of 128 lanes, sm100 (PTX ISA, "Tensor Memory")
# By arch or its start: granule of shared memory, and what the system keeps of it in each block, in bytes.
SHARED_UNITS = (("sm70", 256, 0), ("sm75", 256, 0), ("sm", 128, 1024), ("gfx950", 1280, 0), ("gfx", 512, 0))


@dataclass(frozen=True)
class Occupancy:
    """Blocks that one SM holds, and the warps in them; blocks is 0 where a block does not fit.

    limit: "registers", "shared memory", "warps", "blocks" or "tensor memory", the first that binds.
    """

    blocks: int
    warps: int
    limit: str


@lru_cache(maxsize=65536)
def occupancy(device: Gpu, threads: int, registers: int, shared_bytes: int, columns: int = 0) -> Occupancy:
    """Blocks per SM of a kernel with `threads` a block, `registers` a thread, `shared_bytes` a block.

    columns: of tensor memory that a block holds (tcgen05 alone; a power of two of at least 32).
    """
    warps = ceil(threads / device.warp_size)
    granule, kept = _shared_units(device.arch)
    of_warp = _up(max(registers, 1), REGISTER_UNIT) * device.warp_size
    bounds = {
        "warps": device.warps_per_sm // warps,
        "blocks": device.blocks_per_sm,
        "registers": (device.registers_per_sm // PARTS // of_warp) * PARTS // warps,
        "shared memory": device.shared_per_sm // max(_up(shared_bytes + kept, granule), 1),
    }
    if columns:
        bounds["tensor memory"] = TENSOR_MEMORY_COLUMNS // columns
    if registers > max_registers(device):
        bounds["registers"] = 0
    if shared_bytes > device.shared_per_block:
        bounds["shared memory"] = 0
    limit = min(bounds, key=lambda name: bounds[name])
    return Occupancy(bounds[limit], bounds[limit] * warps, limit)


@lru_cache(maxsize=256)
def max_registers(device: Gpu) -> int:
    """Registers that one thread can have."""
    return next((count for start, count in MAX_REGISTERS.items() if device.arch.startswith(start)), 256)


@dataclass(frozen=True)
class Waves:
    """How a grid falls on the SMs. rounds: waves begun; filled: their mean filling, 0 to 1."""

    rounds: int
    filled: float


def waves(device: Gpu, grid: int, blocks_per_sm: int) -> Waves:
    """Waves of `grid` equal blocks: 1.1 waves take as long as 2."""
    slots = device.sms * blocks_per_sm
    rounds = ceil(grid / slots)
    return Waves(rounds, grid / (rounds * slots) if rounds else 1.0)


def _shared_units(arch: str) -> tuple[int, int]:
    return next(((granule, kept) for start, granule, kept in SHARED_UNITS if arch.startswith(start)), (128, 0))


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit

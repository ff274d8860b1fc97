"""Time of recurrences that go token by token or element by element: bound by memory, exponentials, or one token's wait.

    token_seconds(work, device)      one token after the other, closed form
    scan_seconds(work, device)       tiles of tokens and channels, a tile after the other

Every element of the state takes a factor and a multiply-add for each token. Of a scan, the tiles of a program follow
each other: loads that are waited for, then the tile's instructions, while programs on one SM share its issue slots.

Source: Williams, Waterman, Patterson 2009, doi:10.1145/1498765.1498785 (roofs); shared/measurements (gdn, stage
recurrent: single steps on the H100 and the RTX PRO 6000); instructions and registers of the scan as compiled for
cuda:90 (codegen/scan_jobs.py, Mamba-1 and RG-LRU, Triton 3.7).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from attnc.cost_models.device import Gpu
from attnc.cost_models.estimate import Bounds, Estimate
from attnc.cost_models.tile_estimate import unmeasured

LAUNCH = 3e-6
TOKEN = 500.0  # cycles from one token's loads to the next one's
MEMORY = 0.8  # share of the bandwidth
L2_SPEED = 2.5  # of the L2 over the memory
# Instructions of a warp for 32 elements of a tile, forward and backward, as compiled.
FORWARD, BACKWARD = 16.0, 80.0
REGISTERS = (40.0, 2.0)  # of a thread: at least, and for each element of its share of a tile
AROUND = (12, 100.0)  # launches and bytes of a value around the kernels, where a rule is not theirs alone
# Hold 80% of the measured steps over predicted ones; a scan over many tokens is in no table.
BOUNDS = Bounds((), (0.68,), (1.35,))


@dataclass(frozen=True)
class TokenWork:
    """B, H, L, K, V: sizes; moved: bytes of operands and results; states: bytes of states in and out.

    exps: exponentials of a token and head. tokens: those of a block that follow each other, all of them without a scan.
    """

    B: int
    H: int
    L: int
    K: int
    V: int
    moved: float
    states: float
    exps: float
    tokens: int
    training: bool = False


def token_seconds(work: TokenWork, device: Gpu) -> float:
    """Predicted seconds of the recurrence, the backward, three times the work, where it trains."""
    elements = float(work.B * work.H * work.L * work.K * work.V)
    lanes = device.sms * device.fma_per_clock * device.clock_hz
    compute = 3.0 * elements / lanes + work.B * work.H * work.L * work.exps / device.exp2_rate
    waves = ceil(work.B * work.H * ceil(work.V / 32) / (device.sms * 8))
    chain = waves * work.tokens * TOKEN / device.clock_hz
    memory = _memory_seconds(work.moved + work.states, device)
    return LAUNCH + (3.5 if work.training else 1.0) * max(compute, chain, memory)


def token_estimate(work: TokenWork, device: Gpu) -> Estimate:
    """`token_seconds` with its interval."""
    return BOUNDS.around(token_seconds(work, device))


@dataclass(frozen=True)
class ScanWork:
    """A scan in tiles of block_t tokens and block_h channels. apart: whether something is done around the kernels."""

    work: TokenWork
    block_t: int
    block_h: int
    warps: int
    apart: bool = False


def scan_seconds(scan: ScanWork, device: Gpu) -> float:
    """Predicted seconds of a scan; where it trains, of its states again and of the gradients too."""
    work = scan.work
    values = float(work.B * work.H * work.L * work.V)
    kept = 4.0 * values * work.K / scan.block_t  # bytes of the states that tiles begin with
    apart = scan.apart * (AROUND[0] * LAUNCH + AROUND[1] * values / (device.bandwidth * MEMORY))
    total = LAUNCH + _pass_seconds(scan, FORWARD, work.moved + work.states, device) + apart
    if not work.training:
        return total
    again = LAUNCH + _pass_seconds(scan, FORWARD, work.moved + kept, device)
    slopes = LAUNCH + _pass_seconds(scan, BACKWARD, 2 * work.moved + work.states + kept, device)
    return total + again + slopes + 2 * apart


def scan_estimate(scan: ScanWork, device: Gpu) -> Estimate:
    """`scan_seconds` with the interval of what no table shows."""
    return unmeasured(scan_seconds(scan, device))


def _pass_seconds(scan: ScanWork, instructions: float, footprint: float, device: Gpu) -> float:
    """One kernel: the slowest of memory, exponentials, instructions, and tiles that wait for each other."""
    work = scan.work
    elements = float(work.B * work.H * work.L * work.K * work.V)
    programs, tiles = work.B * ceil(work.H * work.V / scan.block_h), ceil(work.L / scan.block_t)
    share = scan.block_t * scan.block_h * work.K / (32 * scan.warps)
    registers = min(255.0, REGISTERS[0] + REGISTERS[1] * share)
    fitting = int(device.registers_per_sm // (32 * scan.warps * registers))
    resident = max(1, min(device.warps_per_sm // scan.warps, fitting))
    waves = ceil(programs / (device.sms * resident))
    issue = elements * instructions / (device.sms * device.fma_per_clock * device.clock_hz)
    exps = work.B * work.H * work.L * work.V * work.exps / device.exp2_rate
    alone = share * instructions * max(1.0, 32.0 * scan.warps / device.fma_per_clock)
    chain = waves * tiles * (TOKEN + alone) / device.clock_hz
    return max(_memory_seconds(footprint, device), issue, exps, chain)


def _memory_seconds(footprint: float, device: Gpu) -> float:
    ratio = (footprint / device.l2_bytes) ** 3
    missed = max(ratio / (1 + ratio), 1 / L2_SPEED)
    return footprint * missed / (device.bandwidth * MEMORY)

"""Time of the chunkwise kernels of linear recurrences by their knobs: which settings fit, and how long one takes.

    chunk_seconds(work, knobs, device)              closed form, microseconds
    chunk_seconds(work, knobs, device, compiled)    refined by what the compiler made of the kernels: registers, spills
                                                    and shared memory

A forward is three kernels: `within` (products and decays inside a chunk, and the inverse of a delta rule), `state`
(chunk after chunk, one block for each head and slice of the values) and `output`. A backward computes the states again
and has one more kernel for each. Tiles are priced as those of the flash kernels are, with the same coefficients.

Source: Yang et al. 2024, arXiv:2412.06464, section 3.3, and arXiv:2312.06635, section 4 (chunks, two levels of them);
Dao and Gu 2024, arXiv:2405.21060, section 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from functools import lru_cache
from math import ceil

from attnc.cost_models.device import Gpu
from attnc.cost_models.device_kinds import TENSOR_TYPE_OF
from attnc.cost_models.estimate import Bounds, Estimate
from attnc.cost_models.occupancy import max_registers, occupancy
from attnc.cost_models.tile_kernels import ITEM, MMA_FLOPS, OLD_RATE, matrix_class, padded
from attnc.cost_models.tile_model import CompiledFigures, coefficients, sm_figures
from attnc.cost_models.tile_terms import TileFigures, seconds_function

__all__ = ["ChunkKnobs", "ChunkWork", "chunk_fits", "chunk_interval", "chunk_seconds", "kernels_of"]

LONGEST = 128  # tokens of a chunk
SUB = 16  # tokens of a sub-chunk: decays by channel and the inverse go block by block
OVERHEAD = 60  # registers of a thread beyond the tiles
FORWARD = ("within", "state", "output")
COLUMNS = 64  # of keys, in a tile of the launcher's
# What a kernel of the backward does beside its twin of the forward: products, and bytes.
BACKWARD = {"within": (3.0, 2.5), "state": (2.0, 1.5), "output": (3.0, 2.5)}
DATA_CENTRE = ("sm90", "sm100", "sm103")


@dataclass(frozen=True)
class Reached:
    """What measured kernels reach. share: of the closed form. start: seconds of a kernel that it does not know:
    launches beside the three, and waits for each other. bounds: of measured over predicted, by the share of `start`."""

    share: float
    start: float
    bounds: Bounds


# Kernels of flash-linear-attention, decay by token (False) or by channel (True): the gated and the Kimi delta rule in
# shared/measurements/gdn.parquet on the H100 and the RTX PRO 6000, products in bf16 (benchmarks/fit_chunks.py). Other
# architectures and rules, backwards and products in tf32 are in no table and get the figures of the nearest.
REACHED: dict[tuple[bool, bool], Reached] = {
    (True, False): Reached(0.623, 4.69e-6, Bounds((0.25,), (0.6995, 0.5603), (1.2175, 1.355))),
    (True, True): Reached(0.63, 6.74e-6, Bounds((), (0.794,), (1.3599,))),
    (False, False): Reached(0.804, 2.23e-6, Bounds((), (0.8149,), (1.2212,))),
    (False, True): Reached(0.472, 5e-8, Bounds((), (0.8482,), (1.4355,))),
}


@dataclass(frozen=True)
class ChunkWork:
    """What a recurrence has to compute.

    B, H, Hk, L, K, V: batch, heads of values and of keys, length, widths. dtype: as torch names it.
    decay: "none", "head", "token" or "channel". delta: the delta rule; low_rank: two vectors of any direction instead.
    training: the backward too. products: what lies between products of bfloat16 inputs, the states too, "input" for
    their own type or "float32".
    """

    B: int
    H: int
    Hk: int
    L: int
    K: int
    V: int
    dtype: str = "bfloat16"
    decay: str = "none"
    delta: bool = False
    low_rank: bool = False
    training: bool = False
    products: str = "input"

    @property
    def kind(self) -> str:
        return TENSOR_TYPE_OF.get(self.dtype, self.dtype)

    @property
    def item(self) -> int:
        return ITEM[self.kind]

    @property
    def narrow(self) -> bool:
        """Whether what lies between products is of the inputs' type: bfloat16, as float16 would not hold its range."""
        return self.dtype == "bfloat16" and self.products == "input"

    @property
    def between(self) -> int:
        """Bytes of an element of states, corrected values and pairs."""
        return self.item if self.narrow else 4

    def kind_between(self, device: Gpu) -> str:
        """Type in which those are multiplied; AMD's matrix units are given float32 as it is."""
        if self.narrow:
            return self.kind
        return "fp32" if self.dtype == "float32" or device.arch.startswith("gfx") else "tf32"

    @property
    def corrected(self) -> int:
        """Systems solved in a chunk: none, one by its own keys, one by other vectors (twice the products)."""
        return 2 if self.low_rank else int(self.delta)


@dataclass(frozen=True)
class ChunkKnobs:
    """chunk_size: tokens of a chunk. block_v: columns of the state that a block keeps."""

    chunk_size: int = 64
    block_v: int = 64
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class _Step:
    """One tile of a kernel: FLOP of products of inputs and of what lies between, exponentials, FP32 operations, bytes
    read, bytes kept; rows of its products; sums in float32; waits for each other."""

    flops: float
    between: float
    exps: float
    vector: float
    read: float
    written: float
    rows: int
    sums: float
    barriers: float = 1.0


def kernels_of(work: ChunkWork) -> tuple[str, ...]:
    """The kernels of a work, those of the backward with a "d" in front."""
    return (*FORWARD, *(f"d{name}" for name in reversed(FORWARD))) if work.training else FORWARD


def chunk_fits(work: ChunkWork, knobs: ChunkKnobs, device: Gpu) -> str | None:
    """Why `knobs` make no kernel on `device`, as a sentence, or None."""
    if knobs.chunk_size > LONGEST:
        return f"chunk_size={knobs.chunk_size}: kernels take chunks of up to {LONGEST} tokens. Use smaller chunks."
    for name in kernels_of(work):
        own = _launched(work, knobs, name, device)
        step = _step(work, own, name.removeprefix("d"))
        shared = _shared(work, own, name, device)
        what = f"{name} with chunk_size={knobs.chunk_size}, block_v={knobs.block_v}, warps={knobs.warps}"
        if shared > device.shared_per_block:
            return (
                f"{what}, stages={knobs.stages}: needs {shared} bytes of shared memory, a block of {device.name} has "
                f"{device.shared_per_block}. Use smaller chunks or blocks, or fewer stages."
            )
        registers, room = _registers(step, own, device), max_registers(device)
        if registers > room and name in FORWARD:
            return (
                f"{what}: needs about {registers} registers a thread, {device.name} has {room}. Use smaller chunks or "
                "blocks, or more warps."
            )
    return None


def chunk_seconds(
    work: ChunkWork,
    knobs: ChunkKnobs,
    device: Gpu,
    compiled: Mapping[str, CompiledFigures] | None = None,
    *,
    kernels: tuple[str, ...] = (),
) -> float:
    """Predicted seconds of the recurrence with these knobs, or of `kernels` alone; inf where a block does not fit.

    compiled: by kernel ("within", "state", "output"); those that are not in it are priced by closed form.
    """
    total = 0.0
    for name in kernels or kernels_of(work):
        figures = _figures(work, knobs, name, device, (compiled or {}).get(name))
        if figures is None:
            return float("inf")
        instruction, tile = figures
        reached = _reached(work, device)
        total += seconds_function()(*astuple(tile), *_constants(instruction, device)) / reached.share + reached.start
    return total


def chunk_interval(seconds: float, work: ChunkWork, device: Gpu) -> Estimate:
    """`seconds`, found by `chunk_seconds`, with the interval that holds about 80% of the measured calls."""
    reached = _reached(work, device)
    return reached.bounds.around(seconds, reached.start * len(kernels_of(work)) / seconds)


def _reached(work: ChunkWork, device: Gpu) -> Reached:
    return REACHED[device.arch in DATA_CENTRE, work.decay == "channel"]


def _figures(
    work: ChunkWork, knobs: ChunkKnobs, name: str, device: Gpu, compiled: CompiledFigures | None
) -> tuple[str, TileFigures] | None:
    forward = name.removeprefix("d")
    knobs = _launched(work, knobs, name, device)
    step = _step(work, knobs, forward)
    more, moved = BACKWARD[forward] if forward != name else (1.0, 1.0)
    chunks, slices = ceil(work.L / knobs.chunk_size), ceil(work.V / knobs.block_v)
    blocks = work.B * work.H * (1 if forward == "within" else slices)
    along = chunks if forward == "state" else 1  # tiles that one block does after each other
    grid = float(blocks * (1 if forward == "state" else chunks))
    instruction = matrix_class(device.arch, step.rows, knobs.warps)
    made: CompiledFigures = compiled or _guessed(work, step, knobs, name, device)
    held = occupancy(device, made.threads, made.registers, made.shared_bytes, 0)
    if held.blocks < 1:
        return None
    per_clock = device.sms * (device.tensor_clock_hz or device.clock_hz)
    old = OLD_RATE.get(device.arch, 1.0) if instruction == "mma" else 1.0
    pairs, between = step.flops * more, step.between * more
    units = pairs / _rate(work.kind, device) + between / _rate(work.kind_between(device), device)
    issue = (step.vector * more + step.exps) / device.warp_size
    # Instructions on elements of 4 bytes are half as long.
    issue += (pairs + between * (1 if work.narrow else 2)) / MMA_FLOPS if instruction == "mma" else 0.0
    tiles = grid * along
    return instruction, TileFigures(
        matrix=units * per_clock / old,
        exps=step.exps,
        vector=step.vector * more,
        issue=issue,
        shared=2.0 * step.read * moved * (1.0 if step.flops else work.between / work.item),  # widened on the way
        loads=step.read * moved,
        spilled=2.0 * made.threads * made.spill_bytes,  # stored and loaded again
        barriers=step.barriers * more,
        grid=grid,
        tiles=tiles,
        longest=float(along),
        resident=float(min(held.blocks, max(1, ceil(grid / device.sms)))),
        groups=knobs.warps * device.warp_size / 128,
        ahead=float(knobs.stages - 1 if along > 1 else 0),
        unique=tiles * (step.read + step.written) * moved,
        again=0.0,
        flops=tiles * (pairs + between),
        even=1.0,
    )


@dataclass(frozen=True)
class _Guess:
    """What the closed form takes a compile to give."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    threads: int
    instructions: Mapping[str, int]


def _guessed(work: ChunkWork, step: _Step, knobs: ChunkKnobs, name: str, device: Gpu) -> _Guess:
    wanted, room = _registers(step, knobs, device), max_registers(device)
    threads, shared = knobs.warps * device.warp_size, _shared(work, knobs, name, device)
    return _Guess(min(wanted, room), 4 * max(0, wanted - room), shared, threads, {})


@lru_cache(maxsize=4096)
def _step(work: ChunkWork, knobs: ChunkKnobs, kernel: str) -> _Step:
    """A chunk of one kernel, forward."""
    C, K, V = knobs.chunk_size, padded(work.K), padded(work.V)
    bv, item, mid, fixes = min(knobs.block_v, V), work.item, work.between, work.corrected
    group = work.H / work.Hk if work.Hk else 1.0
    pairs = 1 + fixes * (2 if work.low_rank else 1)  # matrices of C x C
    if kernel == "within":
        by_channel, exact = work.decay == "channel", 1 if work.narrow else 3  # tf32x3
        exps = pairs * (C * K * 2.0 + C * SUB * K / 2 if by_channel else float(C * C) * (work.decay != "none"))
        scores, solved = 2.0 * pairs * C * C * K, fixes * (2.0 * C * C * (K + V) + exact * C**3)
        read = C * item * (2 * K / group + fixes * V) + 4.0 * C * (K if by_channel else 1)
        written = C * (mid * C + fixes * item * (K + V))
        vector = 3.0 * pairs * C * C + (3.0 * pairs * C * SUB * K / 2 if by_channel else 0.0)
        given = (0.0, scores + solved) if by_channel else (scores, solved)
        return _Step(*given, exps, vector, read, written, C, pairs * C * C + fixes * C * K, 1 + 3 * fixes)
    if kernel == "state":
        flops = 2.0 * C * K * bv * (1 + fixes * (1.5 if work.low_rank else 1))
        read = C * item * (K * (1 + fixes) + bv)
        written = mid * bv * (K + fixes * C)
        return _Step(0.0, flops, C * 2.0, 2.0 * K * bv + C * bv, read, written, K, _held(work, C, bv), 1 + 2 * fixes)
    flops = 2.0 * bv * C * (K + C * (2 if work.low_rank else 1))
    read = C * (item * K / group + mid * (bv + C)) + mid * K * bv
    return _Step(0.0, flops, C * 2.0, 2.0 * C * bv, read, item * C * bv, C, C * bv)


def _rate(kind: str, device: Gpu) -> float:
    """FLOP/s of products of a type."""
    return device.tensor.get(kind) or device.fp32_flops


def _registers(step: _Step, knobs: ChunkKnobs, device: Gpu) -> int:
    """Registers that a thread would like to have: sums, and operands on their way."""
    threads = knobs.warps * device.warp_size
    return round(1.25 * step.sums / threads) + OVERHEAD


def _held(work: ChunkWork, C: int, bv: int) -> float:
    """Numbers in the registers of `state`: the state, once more where it is made anew while products read it, and what
    of a chunk is there at once. Of products in float32 as compiled for sm80, sm90 and gfx942; of narrower ones half."""
    K, fixes = padded(work.K), work.corrected
    if work.narrow:
        return K * bv + C * bv
    keys = 1 + (work.decay == "channel" and fixes > 0) + 2 * work.low_rank
    return K * bv * (3 if fixes else 2) + C * bv * (1 + fixes) + C * K * keys + C * C * fixes


def _launched(work: ChunkWork, knobs: ChunkKnobs, name: str, device: Gpu) -> ChunkKnobs:
    """The knobs that a kernel runs with: those of the backward have a schedule of their own, but for the chunks."""
    if name in FORWARD:
        return knobs
    if name == "dstate":
        return ChunkKnobs(knobs.chunk_size, 32, 4, 2)
    warps = 4 if name == "dwithin" or device.arch.startswith("gfx") else 8
    return ChunkKnobs(knobs.chunk_size, padded(work.V), warps, 2)  # all columns of a chunk, one tile after the other


def _shared(work: ChunkWork, knobs: ChunkKnobs, name: str, device: Gpu) -> int:
    """Shared memory of a block, at most, as kernels compiled for sm80, sm89, sm90 and gfx942 have it.

    Of the states all that is loaded of a chunk, once for each stage, and operands on their way to the matrix units;
    of others the operands of their largest product.
    """
    C, K, item, mid, fixes = knobs.chunk_size, padded(work.K), work.item, work.between, work.corrected
    bv, later = min(knobs.block_v, padded(work.V)), work.decay == "channel"
    amd = device.arch.startswith("gfx")
    apart = not amd and matrix_class(device.arch, C, knobs.warps) != "mma"  # operands lie in shared memory
    stages = max(1, knobs.stages - 1) if amd else knobs.stages
    if name == "state":
        loads = C * item * (K * (1 + 2 * work.low_rank) + bv) + fixes * mid * C * C + 4 * C * K * later
        return loads * stages + (mid * C * COLUMNS if amd else mid * COLUMNS * bv * apart)
    if name == "dstate":
        loads = C * (item * (K * (1 + (fixes > 0)) + bv) + 4 * K * later) + (fixes > 0) * mid * C * (K + bv)
        return loads * stages if apart else ceil(0.8 * loads * stages)
    if name == "within":
        return mid * C * C + 4 * C * 32
    if name == "dwithin":
        return 2 * mid * C * (C + COLUMNS) * (fixes > 0)
    if name == "output":
        return max(mid * COLUMNS * bv + item * C * COLUMNS, mid * C * (C + bv))
    return mid * C * 32 * (2 + (fixes > 0)) * stages + 4 * mid * C * C * apart + mid * C * 32


@lru_cache(maxsize=256)
def _constants(instruction: str, device: Gpu) -> tuple[float, ...]:
    return (*sm_figures(device), *astuple(coefficients(instruction, device)))

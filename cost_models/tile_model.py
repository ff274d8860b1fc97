"""Time of the flash kernels by their knobs: which tiles fit, and how long a setting takes.

    flash_seconds(work, tiles, device)            closed form, microseconds
    flash_seconds(work, tiles, device, compiled)  refined by what the compiler made of it: registers, spills, shared
                                                  memory and the instructions of the loop

Coefficients per class of matrix instruction are data, tile_model.json; benchmarks/fit_tiles.py fits them.

Source: Dao 2023, arXiv:2307.08691; Shah et al. 2024, arXiv:2407.08608; fitted on the tables named in tile_model.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from functools import lru_cache
from importlib.resources import files
from math import ceil
from typing import Protocol

from attnc.cost_models.device import Gpu
from attnc.cost_models.device_kinds import TENSOR_TYPE_OF
from attnc.cost_models.occupancy import Occupancy, max_registers, occupancy
from attnc.cost_models.tile_counts import Band, TileCount, document_tiles
from attnc.cost_models.tile_kernels import (
    ITEM,
    MASK_VECTOR,
    MMA_FLOPS,
    OLD_RATE,
    OTHER,
    FlashTiles,
    Tile,
    tile_of,
)
from attnc.cost_models.tile_terms import Coefficients, SmFigures, TileFigures, seconds_function

__all__ = [
    "Band",
    "FlashTiles",
    "FlashWork",
    "TileCount",
    "fits",
    "flash_seconds",
    "kernel_occupancy",
    "sm_figures",
    "tile_figures",
]

SPILL_ROOM = 1.6  # of the registers there are; beyond it a kernel moves its sums to and fro


class CompiledFigures(Protocol):
    """What is read of an ahead-of-time compile; `attnc.codegen.compile_stats.Compiled` has it."""

    @property
    def registers(self) -> int: ...
    @property
    def spill_bytes(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def instructions(self) -> Mapping[str, int]: ...


@dataclass(frozen=True)
class FlashWork:
    """What an attention has to compute.

    B, Hq, H, L, S, E, Ev: batch, query and key heads, lengths, widths. dtype: "bf16", "fp16", "fp32", "tf32", "fp8", or
    as torch names it. band: which keys a row sees. documents: equal ones packed into a sequence. counts: exact tiles
    by (block_m, block_n) where the mask is no band; overrides both.
    training: the backward too. vector, exps: operations that the score adds to a pair (a softcap: 4 and 2).
    pair_bytes: read of memory for each pair, such as a bias. value_in_key: the value is the key's first Ev columns and
    is not read again (absorbed latent attention). stored: bytes of an element of query, key and value in memory, where
    they are not those of dtype, which products are in: "fp8" only where both operands of a product are so multiplied.
    """

    B: int
    Hq: int
    H: int
    L: int
    S: int
    E: int
    Ev: int
    dtype: str = "bf16"
    band: Band = field(default_factory=Band)
    documents: float = 1.0
    counts: Callable[[int, int], TileCount] | None = None
    training: bool = False
    vector: float = 0.0
    exps: float = 0.0
    pair_bytes: float = 0.0
    value_in_key: bool = False
    stored: tuple[int, int, int] | None = None

    @property
    def kind(self) -> str:
        return TENSOR_TYPE_OF.get(self.dtype, self.dtype)

    @property
    def keys_seen(self) -> int:
        """Keys that some row sees, where the band says so."""
        if self.counts is not None or self.band.back is None or self.band.ahead is None:
            return self.S
        return min(self.S, self.L + self.band.back + self.band.ahead)

    def tile_count(self, block_m: int, block_n: int, pack: bool = False) -> TileCount:
        """Tiles per query head, or per key head where the heads of a group are packed into rows."""
        if self.counts is not None:
            return self.counts(block_m, block_n)
        if pack:  # rows of all heads of the group, one position after another
            rows = max(1, block_m * self.H // self.Hq)
            return document_tiles(self.L, self.S, rows, block_n, self.band, self.documents)
        return document_tiles(self.L, self.S, block_m, block_n, self.band, self.documents)


def fits(
    work: FlashWork,
    tiles: FlashTiles,
    device: Gpu,
    *,
    backward: bool | None = None,
    kernels: Sequence[str] | None = None,
) -> str | None:
    """Why `tiles` make no kernel on `device`, as a sentence, or None.

    backward: whether also for dq and dkv, by default as work.training. kernels: these alone.
    """
    for kernel in kernels or _kernels(work.training if backward is None else backward):
        knobs = tiles.of(kernel)
        what = f"{kernel} with block_m={knobs.block_m}, block_n={knobs.block_n}, warps={knobs.warps}"
        for name in ("block_m", "block_n", "warps"):
            value = getattr(knobs, name)
            least = 1 if name == "warps" else 16
            if value < least or value & (value - 1):
                return f"{what}: {name} is {value}, allowed are powers of two from {least}."
        tile = _tile_of(work, kernel, tiles, device)
        if knobs.warps * 256 > tile.held * tile.passed:
            return f"{what}: a warp gets less than a 16 x 16 tile; use at most {tile.held * tile.passed // 256} warps."
        if tile.shared_bytes > device.shared_per_block:
            return (
                f"{what}, stages={knobs.stages}: needs {tile.shared_bytes} bytes of shared memory, a block of "
                f"{device.name} has {device.shared_per_block}. Use smaller blocks or fewer stages."
            )
        room = max_registers(device)
        if tile.registers > SPILL_ROOM * room:
            return (
                f"{what}: needs about {tile.registers} registers a thread, {device.name} has {room}. "
                "Use smaller blocks or more warps."
            )
        held = kernel_occupancy(tile, device)
        if held.blocks < 1:
            return f"{what}: a block does not fit an SM of {device.name} for its {held.limit}. Use smaller blocks."
    return None


def kernel_occupancy(tile: Tile, device: Gpu, compiled: CompiledFigures | None = None) -> Occupancy:
    """Blocks per SM, from the compile where there is one."""
    if compiled is not None:
        return occupancy(device, compiled.threads, compiled.registers, compiled.shared_bytes, tile.columns)
    registers = min(tile.registers, max_registers(device))
    return occupancy(device, tile.threads, registers, tile.shared_bytes, tile.columns)


def flash_seconds(
    work: FlashWork,
    tiles: FlashTiles,
    device: Gpu,
    compiled: Mapping[str, CompiledFigures] | CompiledFigures | None = None,
    *,
    kernels: Sequence[str] | None = None,
) -> float:
    """Predicted seconds of the attention with these knobs; inf where a block does not fit an SM.

    compiled: of the forward, or by kernel ("forward", "dq", "dkv"). kernels: the time of these alone.
    """
    made = compiled if isinstance(compiled, Mapping) else {"forward": compiled}
    total = 0.0
    for kernel in kernels or _kernels(work.training):
        tile = _tile_of(work, kernel, tiles, device)
        figures = tile_figures(work, tiles.of(kernel), tile, device, made.get(kernel))
        if figures is None:
            return float("inf")
        total += seconds_function()(*figures, *_constants(tile.instruction, device))
        if kernel == "dq":  # delta = do . o, a pass of its own
            constants = coefficients(tile.instruction, device)
            read = 2 * work.B * work.Hq * work.L * work.Ev * max(ITEM[work.kind], 2)
            total += constants.launch + read / (device.bandwidth * constants.memory)
    if tiles.pack or tiles.splits > 1:  # the parts are merged
        constants = coefficients("mma", device)
        partial = 2 * tiles.splits * work.B * work.Hq * work.L * (work.Ev + 1) * 4
        total += constants.launch + partial * min(1.0, partial / device.l2_bytes) / (device.bandwidth * 0.8)
    return total


def _tile_of(work: FlashWork, kernel: str, tiles: FlashTiles, device: Gpu) -> Tile:
    held = None if work.stored is None else work.stored[1:]
    return tile_of(kernel, tiles, work.E, work.Ev, work.kind, device, work.value_in_key, held)


def _kernels(training: bool) -> tuple[str, ...]:
    return ("forward", "dq", "dkv") if training else ("forward",)


def tile_figures(
    work: FlashWork, knobs: FlashTiles, tile: Tile, device: Gpu, compiled: CompiledFigures | None
) -> tuple[float, ...] | None:
    """`TileFigures` of one kernel as a tuple, None where no block fits."""
    held = kernel_occupancy(tile, device, compiled)
    if held.blocks < 1:
        return None
    grid, count = _grid(work, knobs, tile)
    resident = min(held.blocks, max(1, ceil(grid / device.sms)))
    pairs = tile.held * tile.passed
    masked = count.masked / count.visited if count.visited and not knobs.pack else float(knobs.pack)
    matrix, exps, vector, issue = _pipes(work, tile, device, masked)
    spilled = 8.0 * tile.threads * max(0, tile.registers - max_registers(device))
    if compiled is not None:
        exps, vector, issue, spilled = _compiled_pipes(tile, compiled)
    total = count.visited * grid
    unique, again = _traffic(work, knobs, tile, device, total, resident)
    return (
        matrix,
        exps,
        vector,
        issue,
        tile.shared_traffic,
        tile.passing_bytes,
        spilled,
        3.0 if tile.split > 1 else 1.0,
        grid,
        total,
        max(count.longest, count.visited),
        resident,
        tile.threads / (256 if tile.instruction == "mfma" else 128),
        tile.stages - 1,
        unique,
        again + total * pairs * work.pair_bytes,
        total * pairs * 2.0 * sum(tile.flop_widths),
        min(1.0, count.visited / max(count.longest, 1e-9)) ** 2,
    )


def _grid(work: FlashWork, knobs: FlashTiles, tile: Tile) -> tuple[float, TileCount]:
    """Blocks of the kernel, and tiles of a block: in the mean, masked ones, the longest."""
    count = work.tile_count(knobs.block_m, knobs.block_n, knobs.pack)
    if tile.kernel == "dkv":
        columns = ceil(work.S / knobs.block_n)
        group, mean = work.Hq / work.H, ceil(work.L / knobs.block_m)
        scale = group / columns
        longest = min(group * mean, count.longest * group * (knobs.block_n / knobs.block_m) + group)
        return work.B * work.H * columns, TileCount(count.visited * scale, count.masked * scale, longest)
    rows = ceil(work.L * (work.Hq // work.H if knobs.pack else 1) / knobs.block_m)
    heads = work.B * (work.H if knobs.pack else work.Hq)
    scale = 1.0 / (rows * knobs.splits)
    longest = ceil(count.longest / knobs.splits)
    return heads * rows * knobs.splits, TileCount(count.visited * scale, count.masked * scale, longest)


def _pipes(work: FlashWork, tile: Tile, device: Gpu, masked: float) -> tuple[float, float, float, float]:
    """Cycles of the matrix unit at its peak, exponentials, FP32 operations, and instructions, of a tile."""
    pairs = tile.held * tile.passed
    first, second = tile.flop_widths
    per_clock = device.sms * (device.tensor_clock_hz or device.clock_hz)
    old = OLD_RATE.get(device.arch, 1.0) if tile.instruction == "mma" else 1.0
    wide = "bf16" if work.kind == "fp8" else work.kind
    repeats = tile.repeats
    matrix: float = first * repeats[0] / _rate(device, work.kind if tile.kernel == "forward" else wide)
    matrix = 2.0 * pairs * per_clock / old * (matrix + second * repeats[1] / _rate(device, wide))
    exps = tile.duplicates * pairs * (1.0 + work.exps)
    vector = tile.vector + tile.duplicates * pairs * (MASK_VECTOR * masked + work.vector)
    instructions = (vector + exps + OTHER * pairs * tile.duplicates) / device.warp_size
    if tile.instruction == "mma":
        instructions += 2.0 * pairs * (first + second) / MMA_FLOPS
    return matrix, exps, vector, instructions


def _compiled_pipes(tile: Tile, compiled: CompiledFigures) -> tuple[float, float, float, float]:
    """Exponentials, FP32 operations, instructions and spilled bytes of a tile, as compiled: a pass of the loop."""
    seen = compiled.instructions
    return (
        (seen.get("exp2", 0) + seen.get("special", 0)) * tile.threads,
        seen.get("float", 0) * tile.threads,
        sum(n for name, n in seen.items() if name != "loops") * tile.warps,
        4.0 * seen.get("local", 0) * tile.threads,
    )


def _rate(device: Gpu, kind: str) -> float:
    """FLOP/s of products; plain fp32 has no matrix unit on NVIDIA."""
    if kind in device.tensor:
        return device.tensor[kind]
    return device.fp32_flops if kind in ("fp32", "tf32") else device.tensor[device.half]


def _traffic(
    work: FlashWork, knobs: FlashTiles, tile: Tile, device: Gpu, tiles: float, resident: int
) -> tuple[float, float]:
    """Bytes of memory: what has to be moved once, and what L2 could not keep between the blocks that read it."""
    item = ITEM[work.kind]
    query, key, value = work.stored or (max(item, 2), item, item)
    rows = work.B * work.Hq * work.L * (work.E * query + work.Ev * max(item, 2))
    position = work.E * key + (0 if work.value_in_key else work.Ev * value)
    keys = work.B * work.H * work.keys_seen * position
    unique = rows + keys + work.B * work.Hq * work.L * 4
    if tile.kernel != "forward":
        unique += rows + keys // 2
    blocks = ceil(work.L / knobs.block_m) * max(1, work.Hq // work.H)
    active = min(float(work.B * work.H), max(1.0, device.sms * resident / blocks))
    footprint = active * work.keys_seen * position
    ratio = (footprint / (0.7 * device.l2_bytes)) ** 3
    together = max(1.0, min(float(device.sms * resident), blocks))
    again = max(0.0, tiles * tile.passing_bytes / together - keys) * ratio / (1 + ratio)
    return unique, again


def sm_figures(device: Gpu) -> tuple[float, ...]:
    """`SmFigures` as a tuple."""
    figures = SmFigures(
        device.sms,
        device.tensor_clock_hz or device.clock_hz,
        device.exp2_per_clock,
        device.fma_per_clock,
        device.shared_bytes_per_clock,
        device.bandwidth,
        device.l2_bytes,
        device.power_w,
    )
    return astuple(figures)


@lru_cache(maxsize=256)
def coefficients(instruction: str, device: Gpu) -> Coefficients:
    """The coefficients of a class of matrix instruction on a device.

    Where no table shows the class, its efficiency is a share of what the best dense matmul reaches there.
    """
    table = fitted_table()
    found = {f.name: float(table["classes"][instruction][f.name]) for f in fields(Coefficients)}
    if instruction in table["guessed"]:
        found["efficiency"] *= device.matmul_share()
    return Coefficients(**found)


@lru_cache(maxsize=1)
def fitted_table() -> dict:
    """The content of tile_model.json."""
    return json.loads(files("attnc.cost_models").joinpath("tile_model.json").read_text(encoding="utf-8"))


@lru_cache(maxsize=256)
def _constants(instruction: str, device: Gpu) -> tuple[float, ...]:
    """The device's figures and the coefficients, as `seconds_function` takes them."""
    return (*sm_figures(device), *astuple(coefficients(instruction, device)))


assert len(fields(TileFigures)) == 18  # `tile_figures` gives them in this order

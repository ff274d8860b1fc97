"""The tiles of the flash kernels: what they hold, move and compute, from their knobs alone.

    forward  one block of rows, over keys       S = q k^T, out += P v
    dq       one block of rows, over keys       S, dP = do v^T, dq += dS k
    dkv      one block of keys, over rows       S, dP, dv += P^T do, dk += dS^T q
    decode   forward with the heads of a group packed into rows, over a share of the keys

Registers and shared memory follow what Triton 3.6 to 3.9 makes of these loops (tests compare): accumulators, one tile
of scores, operands that stay; tiles in flight, and q where matrix instructions read it from shared memory.

Source: Dao 2023, arXiv:2307.08691, section 3; Shah et al. 2024, arXiv:2407.08608 (operands of wgmma).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil

from attnc.cost_models.device import Gpu

ITEM = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
KERNELS = ("forward", "dq", "dkv")
# Rows of one instruction of a warp; fp32 operations on a pair beside the exponential, and those of its mask.
ROWS = {"mma": 16, "wgmma": 16, "tcgen05": 32, "mfma": 32}
VECTOR = {"forward": 3.1, "dq": 3.0, "dkv": 3.0}
PACKED = {"tcgen05": 0.7, "mfma": 0.7}  # two float32 operations in one instruction, where they pair up
MASK_VECTOR = 2.5
OTHER = 2.5  # conversions, addresses and moves on a pair
WIDEN = 2.0  # FP32 operations that a number of 8 bits takes until it is one of 16
MMA_FLOPS = 4096  # of one m16n8k16
# Registers of a thread beyond the tiles, from ahead-of-time compiles of the forward loop.
OVERHEAD = {"mma": 50, "wgmma": 45, "tcgen05": 60, "mfma": 90}
# Rate of mma.sync where newer instructions make the peak: wgmma needs 64 rows and four warps (Hopper's mma.sync
# reaches about 0.62 of it, Luo et al. 2024, arXiv:2402.13499; that of Blackwell is Hopper's).
OLD_RATE = {"sm90": 0.62, "sm100": 0.27, "sm103": 0.27}


@dataclass(frozen=True)
class FlashTiles:
    """Knobs of one kernel. splits: shares of the keys in decode; pack: heads of a group are rows of one block.

    dq, dkv: of the backward kernels; without them they are as the forward's.
    """

    block_m: int
    block_n: int
    warps: int = 4
    stages: int = 2
    splits: int = 1
    pack: bool = False
    dq: FlashTiles | None = None
    dkv: FlashTiles | None = None

    def of(self, kernel: str) -> FlashTiles:
        """The knobs of "forward", "dq" or "dkv"."""
        return {"dq": self.dq, "dkv": self.dkv}.get(kernel) or self


def matrix_class(arch: str, rows: int, warps: int) -> str:
    """The matrix instruction that a block of `rows` rows and `warps` warps gets."""
    if arch.startswith("gfx"):
        return "mfma"
    wide = rows >= 64 and warps % 4 == 0
    if arch in ("sm100", "sm103") and wide:
        return "tcgen05"
    return "wgmma" if arch == "sm90" and wide else "mma"


def padded(width: int) -> int:
    """A head's width in the kernel: a power of two, plus a tail that is one and at least 16."""
    main = 1 << (width.bit_length() - 1)
    if main == width or width < 16:
        return max(16, main if main == width else 2 * main)
    return main + max(16, 1 << (width - main - 1).bit_length())


@dataclass(frozen=True)
class Tile:
    """One kernel's tile with its knobs. held, passed: rows that stay in the block, that pass by.

    E, Ev: widths of a head, padded. item: bytes of an element in products. value_in_key: values are the keys' first
    columns. stored: bytes of an element of key and of value in memory; fewer than `item`: they are widened.
    """

    kernel: str
    held: int
    passed: int
    E: int
    Ev: int
    item: int
    warps: int
    stages: int
    instruction: str
    value_in_key: bool = False
    stored: tuple[int, int] | None = None

    @cached_property
    def threads(self) -> int:
        return self.warps * (64 if self.instruction == "mfma" else 32)

    @cached_property
    def flop_widths(self) -> tuple[int, int]:
        """Widths of the products in the operands' type and in that of weights, each 2 FLOP a pair and column."""
        return {
            "forward": (self.E, self.Ev),
            "dq": (self.E, self.Ev + self.E),
            "dkv": (self.E, 2 * self.Ev + self.E),
        }[self.kernel]

    @cached_property
    def split(self) -> float:
        """Warps that find no rows of their own share those of others, at so many to a row."""
        rows = 16 if self.instruction == "mfma" and self.held < 32 else ROWS[self.instruction]
        return max(1.0, self.warps * rows / self.held)

    @cached_property
    def duplicates(self) -> float:
        """How often the softmax of a pair is computed: with mma.sync warps split the columns, else they repeat rows;
        tensor memory is read once."""
        if self.instruction == "mma":
            return 1.0 + 0.25 * (self.split - 1.0)
        return 1.0 if self.instruction == "tcgen05" else self.split

    @cached_property
    def repeats(self) -> tuple[float, float]:
        """How often the products of `flop_widths` are computed."""
        if self.instruction == "mfma":
            return self.split, self.split
        return (self.split, 1.0) if self.instruction == "wgmma" else (1.0, 1.0)

    @cached_property
    def accumulator(self) -> int:
        """Columns of float32 sums that a held row keeps."""
        return {"forward": self.Ev, "dq": self.E, "dkv": self.E + self.Ev}[self.kernel]

    @cached_property
    def vector(self) -> float:
        """FP32 operations of a tile without mask: on pairs, and on the accumulator's columns that are rescaled."""
        rescaled = self.Ev * self.held if self.kernel == "forward" else 0
        packed = PACKED.get(self.instruction, 1.0)
        widened = WIDEN * self.passed * sum(width for width, item in self._passing if item < min(self.item, 2))
        return self.duplicates * packed * (VECTOR[self.kernel] * self.held * self.passed + rescaled) + widened

    @cached_property
    def passing_bytes(self) -> float:
        """Bytes of a tile that are loaded: keys and values, or queries and output gradients."""
        return self.passed * sum(width * item for width, item in self._passing)

    @cached_property
    def _passing(self) -> tuple[tuple[int, int], ...]:
        """Columns that are loaded and their bytes: of keys, then of values."""
        key, value = self.stored or (self.item, self.item)
        return ((self.E, key),) if self.value_in_key else ((self.E, key), (self.Ev, value))

    @cached_property
    def multiplied_bytes(self) -> float:
        """Bytes of a tile that is loaded, as matrix instructions read it."""
        return self.passed * sum(width for width, _ in self._passing) * self.item

    @cached_property
    def shared_traffic(self) -> float:
        """Bytes between shared memory and the rest in one tile."""
        if self.instruction in ("wgmma", "tcgen05"):
            readers = max(1, self.warps // 4) if self.instruction == "wgmma" else 1
            own = self.held * self.E * self.item
        else:
            readers, own = min(self.warps, max(1, self.held // ROWS[self.instruction])), 0
        if self.instruction == "mma" and self.split > 1:  # weights go through shared memory to all columns' warps
            own = 3 * self.held * self.passed * self.item
        more = 1.5 if self.kernel != "forward" else 1.0  # what passes is read again for the gradient
        return (1 + readers * more) * self.multiplied_bytes + own

    @cached_property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        held = self.held * (self.E if self.kernel == "forward" else self.E + self.Ev) * self.item
        if self.instruction in ("wgmma", "tcgen05"):
            stored = self.kernel != "forward" and self.instruction == "tcgen05"
            weights = self.held * self.passed * self.item if stored else 0
            return ceil(self._flying(self.stages) + held + weights)
        if self.stages == 1:
            return (
                ceil(max(self.multiplied_bytes / 2, held))
                if self.instruction == "mfma"
                else ceil(self.multiplied_bytes / 2 + held)
            )
        flying = self._flying(self.stages - 1)
        return ceil(flying if self.instruction == "mfma" else flying + held)

    def _flying(self, tiles: int) -> float:
        """Bytes of `tiles` that are on their way; where they are widened, at least of one as it is multiplied."""
        narrow = self.passing_bytes < self.multiplied_bytes
        return max(tiles * self.passing_bytes, self.multiplied_bytes if narrow else 0.0)

    @cached_property
    def registers(self) -> int:
        """Registers that a thread would like to have; more than there are spill."""
        scores = self.held * self.passed * (1.25 if self.kernel == "forward" else 2.25)
        sums = self.held * self.accumulator
        if self.instruction == "tcgen05":
            sums //= 2  # in tensor memory, but for what is rescaled at a time
        kept = 0.0
        if self.instruction in ("mma", "mfma"):
            rows = max(self.held, ROWS["mma"] * self.warps)
            widths = self.E if self.kernel == "forward" else self.E + self.Ev
            kept = rows * widths * self.item / 4
        if self.instruction == "mfma":
            kept += self.multiplied_bytes / 4  # on its way to shared memory
        return round((scores + sums + kept) * self.duplicates / self.threads) + OVERHEAD[self.instruction]

    @cached_property
    def columns(self) -> int:
        """Columns of tensor memory."""
        if self.instruction != "tcgen05":
            return 0
        need = self.accumulator + self.passed * (1 if self.kernel == "forward" else 2)
        return max(32, 1 << (need - 1).bit_length())


def tile_of(
    kernel: str,
    tiles: FlashTiles,
    E: int,
    Ev: int,
    dtype: str,
    device: Gpu,
    value_in_key: bool = False,
    stored: tuple[int, int] | None = None,
) -> Tile:
    """The tile that a kernel's knobs make; stored: bytes of an element of key and of value, by default the type's."""
    knobs = tiles.of(kernel)
    held, passed = (knobs.block_n, knobs.block_m) if kernel == "dkv" else (knobs.block_m, knobs.block_n)
    return _tile(kernel, held, passed, E, Ev, dtype, knobs.warps, knobs.stages, device.arch, value_in_key, stored)


@lru_cache(maxsize=65536)
def _tile(
    kernel: str,
    held: int,
    passed: int,
    E: int,
    Ev: int,
    dtype: str,
    warps: int,
    stages: int,
    arch: str,
    value_in_key: bool,
    stored: tuple[int, int] | None,
) -> Tile:
    item = max(ITEM[dtype], 2) if kernel != "forward" else ITEM[dtype]
    instruction = matrix_class(arch, held, warps)
    return Tile(kernel, held, passed, padded(E), padded(Ev), item, warps, stages, instruction, value_in_key, stored)

"""Landscapes to search without a compiler or a GPU: a tiled attention with occupancy cliffs, on six GPUs.

Two fidelities that disagree as real ones do: `predict` guesses registers from the tile, `compile` gives them a kink per
setting (as a compiler's allocation has), lets some spill and refuses others.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from itertools import product
from typing import Any, ClassVar

from attnc.forms.base import Form, knob
from attnc.tuning.problem import Outcome


class Toy(Form):
    """A form without a region: only its knobs count."""

    name: ClassVar[str] = "toy"

    def refuse(self, region: Any) -> str | None:
        return None

    def is_exact(self, region: Any) -> bool:
        return True

    def cost(self, region: Any, device: Any) -> Any:
        raise NotImplementedError

    def cpu(self, *args: Any) -> Any:
        raise NotImplementedError

    def space(self, region: Any, device: Any) -> tuple[Form, ...]:
        return ()


@dataclass(frozen=True)
class Tiles(Toy):
    """Knobs of a tiled attention kernel."""

    name: ClassVar[str] = "tiles"
    block_m: int = knob(128, 16, 32, 64, 256, unit="query rows")
    block_n: int = knob(64, 16, 32, 128, 256, unit="keys")
    warps: int = knob(4, 1, 2, 8, 16, unit="warps")
    stages: int = knob(2, 1, 3, 4, 5, unit="buffers")
    splits: int = knob(1, 2, 4, 8, 16, 32, unit="parts of the keys")
    order: str = knob("heads", "rows")
    cap: int = knob(255, 168, 128, 80, unit="registers")


@dataclass(frozen=True)
class Chip:
    """Figures of a GPU, rounded: FLOP/s of bf16 tensor cores, bytes/s, bytes of shared memory per SM."""

    name: str
    sms: int
    flops: float
    bandwidth: float
    shared: int
    exps: float  # per second
    registers: int = 65536
    warps: int = 64


CHIPS = (
    Chip("a100", 108, 312e12, 2.0e12, 164 << 10, 108 * 16 * 1.41e9),
    Chip("h100", 132, 989e12, 3.35e12, 228 << 10, 132 * 16 * 1.83e9),
    Chip("l40s", 142, 181e12, 0.86e12, 100 << 10, 142 * 16 * 2.5e9, warps=48),
    Chip("b200", 148, 2250e12, 8.0e12, 228 << 10, 148 * 16 * 1.9e9),
    Chip("mi300x", 304, 1307e12, 5.3e12, 64 << 10, 304 * 16 * 2.1e9, registers=131072, warps=32),
    Chip("rtx4090", 128, 165e12, 1.0e12, 100 << 10, 128 * 16 * 2.5e9, warps=48),
)


@dataclass(frozen=True)
class Case:
    """An attention: batch, heads, query and key length, head width; causal or a window (0 is none)."""

    B: int
    H: int
    L: int
    S: int
    E: int
    causal: bool = True
    window: int = 0


CASES = (
    Case(4, 32, 1024, 1024, 64),
    Case(4, 32, 4096, 4096, 128),
    Case(1, 32, 32768, 32768, 128),
    Case(4, 32, 4096, 4096, 64, causal=False),
    Case(4, 32, 8192, 8192, 128, window=1024),
    Case(1, 8, 70, 70, 64),
    Case(1, 8, 1, 32768, 128, causal=False),
    Case(64, 8, 1, 4096, 128, causal=False),
    Case(16, 12, 512, 512, 64, causal=False),
    Case(2, 16, 2048, 2048, 256),
    Case(1, 40, 1500, 1500, 64, causal=False),
    Case(8, 4, 333, 4097, 96, causal=False),
)


def noise(*words: object) -> float:
    """A number in [-1, 1] that is the same in every process."""
    digest = sha256("|".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**47 - 1


@dataclass(frozen=True)
class Landscape:
    """A `Problem`: `case` on `chip`. compile_s: how long a compile takes, in seconds. fail: share that fails."""

    case: Case
    chip: Chip
    compile_s: float = 0.0
    fail: float = 0.0
    dtype: str = "bfloat16"
    kernel: str = "0" * 16
    compiled: list[str] = field(default_factory=list, compare=False, repr=False)

    @property
    def device(self) -> str:
        return self.chip.name

    @property
    def shape(self) -> dict[str, int]:
        return {name: int(getattr(self.case, name)) for name in ("B", "H", "L", "S", "E", "causal", "window")}

    @property
    def key(self) -> str:
        return "attention " + " ".join(f"{name}={size}" for name, size in self.shape.items())

    def space(self) -> tuple[Tiles, ...]:
        return _settings(replace(self, compile_s=0.0, fail=0.0))

    def fits(self, t: Tiles) -> bool:
        """Shared memory and registers suffice, tiles are not far larger than lengths, nor warps for a tile."""
        c = self.case
        enough = t.block_m <= max(16, 2 * c.L) and t.block_n <= max(16, 2 * c.S)
        split = t.splits == 1 or (c.L < 1024 and t.splits * t.block_n <= c.S)
        warps = 16 * t.warps <= max(t.block_m, 16) * max(1, t.block_n // 32)
        capped = t.cap == 255 or t.cap < self.registers(t)  # a cap that nothing reaches is no other kernel
        held = self.registers(t) <= 512 and self.shared(t) <= self.chip.shared
        return enough and split and warps and capped and held

    def shared(self, t: Tiles) -> int:
        return 2 * self.case.E * (t.block_m + 2 * t.block_n * t.stages)

    def registers(self, t: Tiles) -> float:
        """Of one thread: accumulator and scores in float32, and the rest."""
        return t.block_m * (self.case.E + t.block_n) / (32 * t.warps) + 32

    def time(self, t: Tiles, registers: float) -> float:
        c, chip = self.case, self.chip
        spilled = max(0.0, registers - t.cap)
        resident = max(8.0, min(registers, t.cap))
        per_sm = int(
            min(chip.registers / (resident * 32 * t.warps), chip.shared / self.shared(t), chip.warps / t.warps)
        )
        if per_sm == 0:
            per_sm, spilled = 1, spilled + 64
        rows = math.ceil(c.L / t.block_m)
        keys = self.visited(t) / t.splits
        blocks = c.B * c.H * rows * t.splits
        at_once = chip.sms * per_sm
        waves = blocks / at_once
        tail = math.ceil(waves) / waves if waves < 40 else 1.0
        if t.order == "rows" and c.causal:
            tail = 1 + (tail - 1) * 0.6
        busy = min(1.0, per_sm * t.warps * (0.6 + 0.25 * min(t.stages, 4)) / 12)
        products = 4.0 * t.block_m * t.block_n * c.E
        shape = min(1.0, t.block_m / 64) ** 0.3 * min(1.0, t.block_n / 64) ** 0.25 * min(1.0, t.block_m / (8 * t.warps))
        tile = products / (chip.flops * 0.85 * shape) + t.block_m * t.block_n / chip.exps + 2e-8 / chip.sms
        compute = blocks * keys * tile / busy * (1 + spilled / 96) * tail
        read = c.B * c.H * c.E * 2 * (2 * c.L + 2 * c.S * min(rows, 6) * (1.0 if t.order == "heads" else 1.15))
        merge = 0.0 if t.splits == 1 else 3e-6 + c.B * c.H * c.L * c.E * 8 * t.splits / chip.bandwidth
        latency = keys * (6e-7 + 4e-7 / t.stages) * math.ceil(waves)
        return max(compute, read / chip.bandwidth / min(1.0, waves + 0.2), latency) + merge + 4e-6

    def visited(self, t: Tiles) -> float:
        """Blocks of keys for a block of queries, on average."""
        c = self.case
        whole = c.S / t.block_n
        if c.window:
            return min(whole, (c.window + t.block_m) / t.block_n + 1)
        return whole / 2 + 0.5 * max(1.0, t.block_m / t.block_n) if c.causal else math.ceil(whole)

    def predict(self, form: Tiles) -> float:
        return self.time(form, self.registers(form))

    def compile(self, form: Tiles) -> Outcome:
        self.compiled.append(form.spell())
        if self.compile_s:
            time.sleep(self.compile_s)
        if self.fail and noise("fail", self.case, form) > 1 - 2 * self.fail:
            return Outcome(failure=f"{form.spell()} on {self.device}: the compiler ran out of registers; leave it out.")
        kink = 1 + 0.2 * noise("warps", form.block_m, form.warps) + 0.12 * noise(form.block_n, form.stages)
        jitter = 1 + 0.03 * noise(self.case, self.chip.name, form)
        return Outcome(self.time(form, self.registers(form) * kink + 8) * jitter)

    def measure(self, form: Tiles) -> Outcome:
        taken = self.compile(form)
        if taken.seconds is None:
            return taken
        return Outcome(taken.seconds * 1.2 * (1 + 0.05 * noise("measured", form)), error=0.01)


@cache
def _settings(landscape: Landscape) -> tuple[Tiles, ...]:
    """What is valid, the default first: `Tiles()`, else the fitting setting nearest to it in size."""
    default = Tiles()
    every = product(
        (16, 32, 64, 128, 256), (16, 32, 64, 128, 256), (1, 2, 4, 8, 16), (1, 2, 3, 4, 5), (1, 2, 4, 8, 16, 32),
        ("heads", "rows"), (255, 168, 128, 80),
    )  # fmt: skip
    found = [tiles for knobs in every if landscape.fits(tiles := Tiles(*knobs))]
    first = default if default in found else min(found, key=lambda t: abs(t.block_m * t.block_n - 4096) + t.splits)
    return (first, *(t for t in found if t != first))

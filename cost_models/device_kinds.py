"""The kinds of device: a CPU at a number of threads, a GPU by its datasheet.

Units are SI: FLOP/s, bytes/s, bytes, Hz, W. All tensor rates are dense, with FP32 accumulation.

Source: per figure in devices.toml and cpu.toml.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from attnc.cost_models.estimate import Bounds
from attnc.cost_models.figures import Figures, figure
from attnc.errors import UsageError

TENSOR_TYPES = ("fp32", "tf32", "bf16", "fp16", "fp8", "fp6", "fp4", "int8")
TENSOR_TYPE_OF = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
    "float8_e4m3fnuz": "fp8",
    "float8_e5m2fnuz": "fp8",
}
ENGINES = ("flash", "masked", "flex", "flex_scored", "composed", "composed_scored", "memory")
SOURCES = ("figures", "derived", "power", "matmul", "dies")
NAME = r"[a-z0-9][a-z0-9._-]{0,39}"
# Share of the peak that the best dense matmul reaches where none is listed, by vendor (shared/gpus.md, "Efficiency
# factors": 73 to 87% on NVIDIA, 51 to 62% on AMD, 263 of 839 on Intel).
MATMUL_SHARE = {"sm": 0.8, "gfx": 0.55, "xe": 0.32}
DEFAULT_SHARE = 0.8
# Of memory-bound kernels: share of the peak bandwidth, and a constant per launch (same).
MEMORY_SHARE, LAUNCH_S = 0.8, 3e-6


@dataclass(frozen=True)
class Engine:
    """One kernel family on a device. rate: FLOP/s of its products. elements: scores handled per second beside them."""

    rate: float = figure("number", 1e3, 1e18, "FLOP/s")
    elements: float = figure("number", 1e3, 1e18, "scores/s")
    launch_s: float = figure("number", 0, 1, "s")


@dataclass(frozen=True, kw_only=True)
class Device(ABC):
    """A target. name: as `device_named` knows it. bandwidth: of the main memory, bytes/s."""

    kind: ClassVar[str]
    name: str
    bandwidth: float = figure("number", 1e8, 1e15, "bytes/s")

    @abstractmethod
    def engine(self, name: str) -> Engine:
        """The figures of one kernel family."""

    @abstractmethod
    def speed(self, dtype: str) -> float:
        """What `dtype`, a torch name, multiplies the rates of engines with."""


@dataclass(frozen=True, kw_only=True)
class Cpu(Device):
    """A CPU at a number of threads. `dtype_speed` multiplies rates for types other than float32.

    In a file the figures are those of one thread; `bandwidth_threads` of them saturate the memory. matmul: a large
    float32 product. exps: scores per second of a softmax spelled out. launch_s: of one operation. interval: of measured
    over predicted times, holding about 80%; where none is given, a factor of two is assumed.
    """

    kind: ClassVar[str] = "cpu"
    bandwidth_threads: int = figure("integer", 1, 4096, "threads")
    matmul: float = figure("number", 1e6, 1e15, "FLOP/s")
    exps: float = figure("number", 1e6, 1e15, "scores/s")
    launch_s: float = figure("number", 0, 1, "s")
    dtype_speed: Mapping[str, float] = figure(
        "figures", 1e-3, 1e3, "times float32", names=("float64", "bfloat16", "float16"), default=Figures()
    )
    interval: Mapping[str, float] = figure(
        "figures", 1e-2, 1e2, "times the predicted time", names=("low", "high"), default=Figures()
    )
    source: tuple[tuple[str, str], ...] = figure("sources", names=SOURCES)
    engines: tuple[tuple[str, Engine], ...] = ()
    threads: int = 1

    def engine(self, name: str) -> Engine:
        return dict(self.engines)[name]

    def speed(self, dtype: str) -> float:
        return self.dtype_speed.get(dtype, 1.0)

    @property
    def bounds(self) -> Bounds:
        """Bounds of measured over predicted time."""
        return Bounds((), (self.interval.get("low", 0.5),), (self.interval.get("high", 2.0),))

    def at(self, threads: int) -> Cpu:
        """This CPU, given for one thread, at `threads`: compute scales, memory until it is saturated."""
        engines = tuple((n, Engine(e.rate * threads, e.elements * threads, e.launch_s)) for n, e in self.engines)
        busy = min(threads, self.bandwidth_threads)
        return replace(
            self,
            bandwidth=self.bandwidth * busy,
            matmul=self.matmul * threads,
            exps=self.exps * threads,
            engines=engines,
            threads=threads,
        )


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What all GPUs of one architecture share; sizes in bytes, counts per SM (CU, Xe core).

    target: Triton's; where it is None, no_target says why. capability: as torch tells it, "9.0".
    """

    target: str | None = figure("text", pattern=r"(cuda|hip|xpu):[a-z0-9]+", default=None)
    no_target: str = figure("text", default="")
    capability: str = figure("text", pattern=r"\d{1,2}\.\d", default="")
    warps_per_sm: int = figure("integer", 1, 1024, "warps")
    warp_size: int = figure("integer", 1, 1024, "threads")
    blocks_per_sm: int = figure("integer", 1, 1024, "blocks")
    registers_per_sm: int = figure("integer", 1024, 1 << 24, "32-bit registers")
    shared_per_sm: int = figure("integer", 1024, 1 << 24, "bytes")
    shared_per_block: int = figure("integer", 1024, 1 << 24, "bytes")
    l1_bytes: int = figure("integer", 1024, 1 << 24, "bytes")
    exp2_per_clock: float = figure("number", 1, 4096, "exponentials per SM and clock")
    fma_per_clock: float = figure("number", 1, 4096, "FP32 multiply-adds per SM and clock")
    shared_bytes_per_clock: float = figure("number", 1, 65536, "bytes per SM and clock")
    matrix: str = figure("text")
    limits_source: str = figure("text")
    limits_unsure: tuple[str, ...] = figure("texts", default=())


@dataclass(frozen=True, kw_only=True)
class Gpu(Limits, Device):
    """A GPU from its datasheet; per device as software sees it, which is half a package where `per_package` is 2.

    clock_hz: highest boost. tensor_clock_hz: the clock that the tensor peaks belong to. memory_bytes: decimal GB as
    sold; caches and shared memory in binary units. link_bytes: to other GPUs, both directions together, 0 without;
    host_bytes: to the host, one direction. tensor_fp16_sums: rates with FP16 accumulation where those are higher.
    dies: compute dies with an L2 each, over which programs are spread in turn; 1 where all SMs share one L2.
    matmul_seen: the best dense matmul measured by others, FLOP/s. unsure: fields to be measured or checked before they
    decide anything. The `Limits` of its architecture stand beside them.
    """

    kind: ClassVar[str] = "gpu"
    title: str = figure("text")
    arch: str = figure("text", pattern=NAME)
    sms: int = figure("integer", 1, 4096, "SMs")
    clock_hz: float = figure("number", 1e8, 1e10, "Hz")
    fp32_flops: float = figure("number", 1e9, 1e18, "FLOP/s")
    tensor: Mapping[str, float] = figure("figures", 1e9, 1e18, "FLOP/s", names=TENSOR_TYPES)
    l2_bytes: int = figure("integer", 1 << 16, 1 << 36, "bytes")
    memory_bytes: float = figure("number", 1e8, 1e14, "bytes")
    power_w: float = figure("number", 1, 1e5, "W")
    source: tuple[tuple[str, str], ...] = figure("sources", names=SOURCES)
    tensor_clock_hz: float = figure("number", 1e8, 1e10, "Hz", default=0.0)
    tensor_fp16_sums: Mapping[str, float] = figure(
        "figures", 1e9, 1e18, "FLOP/s", names=TENSOR_TYPES, default=Figures()
    )
    matmul_seen: Mapping[str, float] = figure("figures", 1e9, 1e18, "FLOP/s", names=TENSOR_TYPES, default=Figures())
    l3_bytes: int = figure("integer", 0, 1 << 40, "bytes", default=0)
    link_bytes: float = figure("number", 0, 1e15, "bytes/s", default=0.0)
    host_bytes: float = figure("number", 0, 1e15, "bytes/s", default=0.0)
    per_package: int = figure("integer", 1, 16, "devices", default=1)
    dies: int = figure("integer", 1, 64, "dies", default=1)
    also: tuple[str, ...] = figure("texts", default=())
    unsure: tuple[str, ...] = figure("texts", default=())
    note: str = figure("text", default="")

    def __hash__(self) -> int:
        return hash(self.name)  # a key of many caches; of all fields it would take longer than what they keep

    @property
    def exp2_rate(self) -> float:
        """Exponentials per second at the tensor clock."""
        return self.exp2_per_clock * self.sms * self.tensor_clock_hz

    @property
    def shared_bandwidth(self) -> float:
        """Bytes per second between shared memory and registers at the tensor clock."""
        return self.shared_bytes_per_clock * self.sms * self.tensor_clock_hz

    def matmul_share(self, dtype: str = "bf16") -> float:
        """Share of the tensor peak that a large matmul of `dtype` reaches; bf16's, or a default, where unknown."""
        for name in (dtype, "bf16"):
            if name in self.matmul_seen and name in self.tensor:
                return self.matmul_seen[name] / self.tensor[name]
        return next((share for start, share in MATMUL_SHARE.items() if self.arch.startswith(start)), DEFAULT_SHARE)

    @property
    def half(self) -> str:
        """The 16-bit type of its tensor rate: bf16, or fp16 before Ampere."""
        return "bf16" if "bf16" in self.tensor else "fp16"

    def ridge(self, dtype: str = "") -> float:
        """FLOP per byte of DRAM at which the tensor roof of `dtype`, by default `half`, meets the memory's."""
        return self.tensor[dtype or self.half] / self.bandwidth

    def engine(self, name: str) -> Engine:
        """Of a kernel family that nobody measured here: float32 products outside tensor cores, one exponential a score.

        Raises: UsageError for a family that does not exist.
        """
        if name not in ENGINES:
            raise UsageError(f"engine {name!r} of {self.name}: allowed are {', '.join(ENGINES)}. Name one of them.")
        return Engine(self.fp32_flops * self.matmul_share(), self.exp2_rate, LAUNCH_S)

    def speed(self, dtype: str) -> float:
        if dtype == "float64":
            return 0.5  # of float32, at best: no figure
        return self.tensor.get(TENSOR_TYPE_OF.get(dtype, ""), self.fp32_flops) / self.fp32_flops

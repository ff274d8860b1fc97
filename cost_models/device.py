"""Devices as tables of figures: GPUs from their datasheets, the local CPU from measurements.

`device_named("h100")` needs no GPU. Units are SI: FLOP/s, bytes/s, bytes, Hz, W. All tensor rates are dense, with FP32
accumulation. Users add devices in a file of the same layout as devices.toml, or vary a known one with `like`.

Source: per figure in devices.toml and cpu.toml.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import ClassVar, Literal, overload

import torch

from attnc.cost_models.figures import (
    Allowed,
    Figures,
    as_table,
    figure,
    figure_fields,
    read_table,
    read_toml,
    read_value,
)
from attnc.errors import UsageError, did_you_mean

TENSOR_TYPES = ("fp32", "tf32", "bf16", "fp16", "fp8", "fp6", "fp4", "int8")
TENSOR_TYPE_OF = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
}
ENGINES = ("flash", "masked", "flex", "flex_scored", "composed", "composed_scored", "memory")
SOURCES = ("figures", "derived", "power", "matmul")
NAME = r"[a-z0-9][a-z0-9._-]{0,39}"
# Share of the peak that the best dense matmul reaches where none is listed, by vendor (shared/gpus.md, "Efficiency
# factors": 73 to 87% on NVIDIA, 51 to 62% on AMD, 263 of 839 on Intel).
MATMUL_SHARE = {"sm": 0.8, "gfx": 0.55, "xe": 0.32}
# Of memory-bound kernels: share of the peak bandwidth, constant per launch, constant per peer-to-peer message (same).
MEMORY_SHARE, LAUNCH_S, MESSAGE_S = 0.8, 3e-6, 10e-6


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

    In a file the figures are those of one thread; `bandwidth_threads` of them saturate the memory.
    """

    kind: ClassVar[str] = "cpu"
    bandwidth_threads: int = figure("integer", 1, 4096, "threads")
    matmul: float = figure("number", 1e6, 1e15, "FLOP/s")
    exps: float = figure("number", 1e6, 1e15, "exponentials/s")
    launch_s: float = figure("number", 0, 1, "s")
    dtype_speed: Figures = figure(
        "figures", 1e-3, 1e3, "times float32", names=("float64", "bfloat16", "float16"), default=Figures()
    )
    source: tuple[tuple[str, str], ...] = figure("sources", names=SOURCES)
    engines: tuple[tuple[str, Engine], ...] = ()
    threads: int = 1

    def engine(self, name: str) -> Engine:
        return dict(self.engines)[name]

    def speed(self, dtype: str) -> float:
        return self.dtype_speed.get(dtype, 1.0)

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
    matmul_seen: the best dense matmul measured by others, FLOP/s. unsure: fields to be measured or checked before they
    decide anything. The `Limits` of its architecture stand beside them.
    """

    kind: ClassVar[str] = "gpu"
    title: str = figure("text")
    arch: str = figure("text", pattern=NAME)
    sms: int = figure("integer", 1, 4096, "SMs")
    clock_hz: float = figure("number", 1e8, 1e10, "Hz")
    fp32_flops: float = figure("number", 1e9, 1e18, "FLOP/s")
    tensor: Figures = figure("figures", 1e9, 1e18, "FLOP/s", names=TENSOR_TYPES)
    l2_bytes: int = figure("integer", 1 << 16, 1 << 36, "bytes")
    memory_bytes: float = figure("number", 1e8, 1e14, "bytes")
    power_w: float = figure("number", 1, 1e5, "W")
    source: tuple[tuple[str, str], ...] = figure("sources", names=SOURCES)
    tensor_clock_hz: float = figure("number", 1e8, 1e10, "Hz", default=0.0)
    tensor_fp16_sums: Figures = figure("figures", 1e9, 1e18, "FLOP/s", names=TENSOR_TYPES, default=Figures())
    matmul_seen: Figures = figure("figures", 1e9, 1e18, "FLOP/s", names=TENSOR_TYPES, default=Figures())
    l3_bytes: int = figure("integer", 0, 1 << 40, "bytes", default=0)
    link_bytes: float = figure("number", 0, 1e15, "bytes/s", default=0.0)
    host_bytes: float = figure("number", 0, 1e15, "bytes/s", default=0.0)
    per_package: int = figure("integer", 1, 16, "devices", default=1)
    also: tuple[str, ...] = figure("texts", default=())
    unsure: tuple[str, ...] = figure("texts", default=())
    note: str = figure("text", default="")

    @property
    def exp2_rate(self) -> float:
        """Exponentials per second at the tensor clock."""
        return self.exp2_per_clock * self.sms * self.tensor_clock_hz

    @property
    def shared_bandwidth(self) -> float:
        """Bytes per second between shared memory and registers at the tensor clock."""
        return self.shared_bytes_per_clock * self.sms * self.tensor_clock_hz

    def matmul_share(self, dtype: str = "bf16") -> float:
        """Share of the tensor peak that a large dense matmul of `dtype` reaches; bf16's, or a default, where unknown."""
        for name in (dtype, "bf16"):
            if name in self.matmul_seen and name in self.tensor:
                return self.matmul_seen[name] / self.tensor[name]
        return MATMUL_SHARE[re.match("sm|gfx|xe|", self.arch)[0] or "sm"]  # type: ignore[index]

    def ridge(self, dtype: str = "bf16") -> float:
        """FLOP per byte of DRAM at which the tensor roof of `dtype` meets the memory's."""
        return self.tensor[dtype] / self.bandwidth

    def engine(self, name: str) -> Engine:
        """Of a kernel family that nobody measured here: float32 products outside tensor cores, one exponential a score.

        Raises: UsageError for a family that does not exist.
        """
        if name not in ENGINES:
            raise UsageError(f"engine {name!r} of {self.name}: allowed are {', '.join(ENGINES)}. Name one of them.")
        return Engine(self.fp32_flops * self.matmul_share(), self.exp2_rate, LAUNCH_S)

    def speed(self, dtype: str) -> float:
        kind = TENSOR_TYPE_OF.get(dtype, "")
        if dtype == "float64":
            return 0.5  # of float32, at best: no figure
        rates = [self.tensor[k] for k in (kind, "fp16" if kind == "bf16" else kind) if k in self.tensor]
        return max([1.0, *(rate / self.fp32_flops for rate in rates)]) if kind != "fp32" else 1.0


# Files.


@dataclass(frozen=True)
class Table:
    """The devices of one file, or of several: `devices` by name, and what `like` and `arch` may refer to."""

    devices: Mapping[str, Device]
    raw: Mapping[str, Mapping[str, object]]
    limits: Mapping[str, Limits]


# What `like` does not take over: a variant has its own name and documents, and nobody measured it.
OWN = ("title", "also", "source", "matmul_seen", "unsure", "note")
EMPTY = Table({}, {}, {})


def load_devices(path: str | Path) -> dict[str, Device]:
    """The devices of a file laid out as devices.toml (GPUs) or cpu.toml, by name; CPUs at one thread.

    Raises: UsageError that names the file, the device, the key, what was found and what is allowed.
    """
    return dict(read_devices(Path(path), shipped()).devices)


def read_devices(path: Path, known: Table = EMPTY) -> Table:
    """The table of a file; its devices may be like those of `known` and use its architectures."""
    top = read_toml(path)
    limits = dict(known.limits)
    for name, table in as_table(top.pop("arch", {}), f"{path}: arch").items():
        limits[_named(name, f"{path}: arch")] = read_table(Limits, table, f"{path}: arch {name}")
    devices: dict[str, Device] = {}
    raw = dict(known.raw)
    for name, value in top.items():
        where = f"{path}: device {_named(name, str(path))}"
        table = _like(dict(as_table(value, where)), raw, where)
        kind = read_value(table.pop("kind", Gpu.kind), Allowed("text", names=(Gpu.kind, Cpu.kind)), f"{where}: kind")
        devices[name] = _gpu(name, table, limits, where) if kind == Gpu.kind else _cpu(name, table, where)
        raw[name] = {**table, "kind": kind}
    return Table(devices, raw, limits)


def _named(name: str, where: str) -> str:
    if re.fullmatch(NAME, name) is None:
        raise UsageError(
            f"{where}: found the name {name[:60]!r}; allowed are 1 to 40 of a-z, 0-9, '.', '_' and '-', a letter or "
            "digit first. Rename it."
        )
    return name


def _like(table: dict[str, object], known: Mapping[str, Mapping[str, object]], where: str) -> dict[str, object]:
    if "like" not in table:
        return table
    other = table.pop("like")
    if not isinstance(other, str) or other not in known:
        near = did_you_mean(other, known) if isinstance(other, str) else ""
        raise UsageError(
            f"{where}: like: found {str(other)[:60]!r}, allowed is a device that stands before it: "
            f"{', '.join(known)}.{near or ' Name one of them.'}"
        )
    return {**{key: value for key, value in known[other].items() if key not in OWN}, **table}


def _gpu(name: str, table: dict[str, object], limits: Mapping[str, Limits], where: str) -> Gpu:
    arch = table.get("arch")
    if not isinstance(arch, str) or arch not in limits:
        near = did_you_mean(arch, limits) if isinstance(arch, str) else ""
        raise UsageError(
            f"{where}: arch: found {str(arch)[:60]!r}, allowed are {', '.join(limits)}.{near or ' Name one of them.'}"
        )
    of = limits[arch]
    gpu = read_table(Gpu, table, where, name=name, **{key: getattr(of, key) for key in figure_fields(Limits)})
    gpu = replace(gpu, tensor_clock_hz=gpu.tensor_clock_hz or gpu.clock_hz)
    if not {"fp16", "bf16"} & set(gpu.tensor):
        raise UsageError(
            f"{where}: tensor: found {', '.join(gpu.tensor) or 'nothing'}, needed is bf16 or fp16. Add one."
        )
    if gpu.tensor_clock_hz > gpu.clock_hz:
        raise UsageError(
            f"{where}: tensor_clock_hz: found {gpu.tensor_clock_hz:g} Hz, allowed is at most clock_hz, "
            f"{gpu.clock_hz:g} Hz. Correct one of them."
        )
    for key, seen in gpu.matmul_seen.items():
        if seen > gpu.tensor.get(key, 0.0):
            raise UsageError(
                f"{where}: matmul_seen.{key}: found {seen:g} FLOP/s, allowed is at most tensor.{key}, "
                f"{gpu.tensor.get(key, 0.0):g} FLOP/s. Correct one of them."
            )
    fields_of = {*figure_fields(Gpu), *(f"tensor.{key}" for key in gpu.tensor)}
    for key in gpu.unsure:
        if key not in fields_of:
            raise UsageError(
                f"{where}: unsure: found {key[:60]!r}, allowed are names of fields, as sms or tensor.bf16."
            )
    return gpu


def _cpu(name: str, table: dict[str, object], where: str) -> Cpu:
    rows = as_table(table.pop("engines", {}), f"{where}: engines")
    if set(rows) != set(ENGINES):
        raise UsageError(
            f"{where}: engines: found {', '.join(rows)[:200] or 'none'}; needed are {', '.join(ENGINES)}, and no other."
        )
    engines = tuple((key, read_table(Engine, rows[key], f"{where}: engines.{key}")) for key in ENGINES)
    return read_table(Cpu, table, where, name=name, engines=engines)


@lru_cache(maxsize=1)
def shipped() -> Table:
    """The devices that attnc knows: the local CPU first, then the GPUs of devices.toml."""
    table = EMPTY
    for file in ("cpu.toml", "devices.toml"):
        with as_file(files("attnc.cost_models").joinpath(file)) as path:
            found = read_devices(path, table)
        table = Table({**table.devices, **found.devices}, found.raw, found.limits)
    return table


# Names.


@overload
def device_named(name: Literal["cpu"] = "cpu", threads: int | None = None) -> Cpu: ...
@overload
def device_named(name: str, threads: int | None = None, *, file: str | Path | None = None) -> Device: ...
def device_named(name: str = "cpu", threads: int | None = None, *, file: str | Path | None = None) -> Device:
    """The device called `name`: as in the table ("h100"), as sold ("H100 SXM") or as torch reports it.

    threads: of a CPU, by default as many as torch uses now. file: where to look first.
    Raises: UsageError for an unknown device.
    """
    devices = {**shipped().devices, **(load_devices(file) if file is not None else {})}
    device = devices.get(name) or devices.get(_spellings(devices.values()).get(_plain(name), ""))
    if device is None:
        raise UsageError(
            f"device {name!r}: no such device; known are {', '.join(devices)}."
            + (did_you_mean(name.casefold(), devices) or " Leave device out for the local CPU.")
        )
    if isinstance(device, Cpu):
        return device.at(threads if threads is not None else torch.get_num_threads())
    return device


def gpu_named(name: str, *, file: str | Path | None = None) -> Gpu:
    """`device_named` for who needs a GPU's figures. Raises: UsageError for a CPU or an unknown device."""
    device = device_named(name, file=file)
    if not isinstance(device, Gpu):
        raise UsageError(f"device {name!r}: found a {device.kind}, allowed is a GPU. Name one, as h100.")
    return device


def device_from_torch_name(name: str, capability: tuple[int, int] | None = None) -> Gpu:
    """The GPU that `torch.cuda.get_device_name` calls `name`, checked against get_device_capability.

    Raises: UsageError for one that is not in the table, or is of another architecture than its name says.
    """
    devices = shipped().devices
    found = _spellings(devices.values()).get(_plain(name))
    asked = "" if capability is None else f"{capability[0]}.{capability[1]}"
    if found is None:
        kin = [d.name for d in devices.values() if isinstance(d, Gpu) and d.capability == asked]
        hint = (
            f" Those of its capability {asked} are {', '.join(kin)}: describe it in a device file like one."
            if kin
            else ""
        )
        raise UsageError(f"device {name!r}: no such GPU in the table." + (hint or " Describe it in a device file."))
    gpu = devices[found]
    assert isinstance(gpu, Gpu)
    if asked and asked != gpu.capability:
        raise UsageError(
            f"device {name!r}: found compute capability {asked}, but {found} has {gpu.capability}. Describe it in a "
            "device file."
        )
    return gpu


VENDOR_WORDS = re.compile(r"\b(nvidia|amd|intel|r|tm|geforce|tesla|instinct|radeon|graphics|data center gpu)\b")


def _plain(name: str) -> str:
    """`name` without case, maker and punctuation."""
    words = re.sub(r"[^a-z0-9]+", " ", name.casefold())
    return "".join(VENDOR_WORDS.sub(" ", words).split())


def _spellings(devices: Iterable[Device]) -> dict[str, str]:
    """Every name of every GPU, plain, to its name in the table."""
    gpus = [d for d in devices if isinstance(d, Gpu)]
    return {_plain(spelling): gpu.name for gpu in gpus for spelling in (*gpu.also, gpu.title, gpu.name)}

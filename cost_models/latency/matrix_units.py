"""What the formulas need to know of a GPU: its figures, and the class of its matrix instruction.

A class is one generation of matrix instruction: sm80 mma, sm89 and sm120 mma with fp8, sm90 wgmma, sm100 tcgen05. A
coefficient of a class that no table shows is taken from the nearest class that one does.

Source: shared/gpus.md, "Limits per architecture"; shared/measurements/gpus.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnc.cost_models.device_kinds import Device, Gpu
from attnc.errors import UsageError

# Architecture -> where its coefficients come from: itself, else the first of these that was fitted, else the mean.
NEAREST: dict[str, tuple[str, ...]] = {
    "sm70": ("sm80", "sm89", "sm120"),
    "sm75": ("sm80", "sm89", "sm120"),
    "sm80": ("sm89", "sm120", "sm90"),
    "sm86": ("sm89", "sm120", "sm80"),
    "sm89": ("sm120", "sm80", "sm90"),
    "sm90": ("sm100", "sm120", "sm80"),
    "sm100": ("sm90", "sm120", "sm80"),
    "sm103": ("sm100", "sm90", "sm120"),
    "sm120": ("sm89", "sm90", "sm80"),
}
# L2 in two halves that both keep what both read; matrix instructions that run beside the other work of their warps;
# accumulators in a memory of their own, so that one warp multiplies while others take exponentials.
HALVED = {"sm80", "sm90", "sm100", "sm103"}
ASYNCHRONOUS = {"sm90", "sm100", "sm103"}
TENSOR_MEMORY = {"sm100", "sm103"}
DEFAULT_MATMUL_SHARE = 0.8
FP8 = {"fp8", "fp8_block"}
DTYPES = ("bf16", "fp8", "fp8_block", "bf16_kvfp8", "fp32")


@dataclass(frozen=True)
class GpuFigures:
    """Figures of one GPU in SI units; fp8 is 0 where it has none."""

    name: str
    arch: str
    bf16: float
    fp8: float
    mem: float
    l2: float
    sms: int
    clock: float
    power: float
    smem: float
    exp2_rate: float
    fma_rate: float

    def values(self, dtype: str) -> tuple[float, ...]:
        """In the order of `terms.FIGURES`, for operands of `dtype`. Raises: UsageError where it has no such type."""
        peak = self.fp8 if dtype in FP8 else self.bf16
        if not peak:
            raise UsageError(
                f"{dtype} on {self.name}: found no matrix rate for it on {self.arch}. Ask for another dtype or device."
            )
        return (
            peak,
            self.bf16,
            self.mem,
            self.l2,
            float(self.sms),
            self.clock,
            self.power,
            self.smem,
            self.exp2_rate,
            self.fma_rate,
            2.0 if self.arch in HALVED else 1.0,
            1.0 if self.arch in ASYNCHRONOUS else 0.0,
            1.0 if self.arch in TENSOR_MEMORY else 0.0,
        )


def figures_of(device: Device | GpuFigures) -> GpuFigures:
    """The figures of a GPU of the table.

    Makers other than NVIDIA reach less of their peak in the best matrix product; that share scales the peak.
    Raises: UsageError for a CPU.
    """
    if isinstance(device, GpuFigures):
        return device
    if not isinstance(device, Gpu):
        raise UsageError(f"latency on {device.name!r}: found a {device.kind}, allowed is a GPU. Name one, as h100.")
    share = 1.0 if device.arch.startswith("sm") else device.matmul_share() / DEFAULT_MATMUL_SHARE
    return GpuFigures(
        name=device.name,
        arch=device.arch,
        bf16=device.tensor.get(device.half, 0.0) * share,
        fp8=device.tensor.get("fp8", 0.0) * share,
        mem=device.bandwidth,
        l2=float(device.l2_bytes + device.l3_bytes),
        sms=device.sms,
        clock=device.clock_hz,
        power=device.power_w,
        smem=float(device.shared_per_sm),
        exp2_rate=device.exp2_per_clock,
        fma_rate=device.fma_per_clock,
    )


def figures_of_sheet(name: str, sheet: Mapping) -> GpuFigures:
    """The figures of an entry of shared/measurements/gpus.json (TFLOP/s, GB/s, MB, MHz, W, KB)."""
    arch = str(sheet["arch"])
    return GpuFigures(
        name=name,
        arch=arch,
        bf16=sheet["bf16"] * 1e12,
        fp8=(sheet["fp8"] or 0.0) * 1e12,
        mem=sheet["mem"] * 1e9,
        l2=sheet["l2"] * 2.0**20,
        sms=sheet["sms"],
        clock=sheet["clock"] * 1e6,
        power=sheet["tdp"],
        smem=sheet["smem_kb"] * 1024.0,
        exp2_rate=32.0 if arch == "sm103" else 16.0,
        fma_rate=64.0 if arch in ("sm70", "sm75", "sm80") else 128.0,
    )


def of_class(value: float | Mapping[str, float], arch: str) -> float:
    """A coefficient on `arch`: one number for all, or one for each class with their mean as "base"."""
    if not isinstance(value, Mapping):
        return value
    for name in (arch, *NEAREST.get(arch, ())):
        if name in value:
            return value[name]
    return value["base"]

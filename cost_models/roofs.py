"""The roofs of a kernel on a GPU: how long each resource alone would need, and which one binds.

Amounts are numbers, or sympy expressions of lengths and sizes, of which the times are expressions again.

Source: Williams, Waterman, Patterson 2009, "Roofline", doi:10.1145/1498765.1498785; roofs for exponentials and
shared memory: Zadouri et al. 2026, "FlashAttention-4", and shared/gpus.md, "Secondary roofs".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from sympy import Expr, Max

from attnc.cost_models.device import Gpu
from attnc.cost_models.device_kinds import LAUNCH_S, MEMORY_SHARE
from attnc.errors import UsageError

Amount: TypeAlias = float | Expr
# Between L2 and one SM (CU) per clock: the width of the path, an upper bound (NVIDIA V100 whitepaper; AMD CDNA3).
L2_BYTES_PER_CLOCK = 64.0


@dataclass(frozen=True)
class KernelWork:
    """What a kernel, or several, does. tensor: FLOP of matrix units by type, as bf16; vector_flops: FP32 outside them.

    exps: exponentials. dram_bytes, l2_bytes, shared_bytes: moved between each memory and what lies above it.
    """

    tensor: Mapping[str, Amount] = field(default_factory=dict)
    vector_flops: Amount = 0.0
    exps: Amount = 0.0
    dram_bytes: Amount = 0.0
    l2_bytes: Amount = 0.0
    shared_bytes: Amount = 0.0
    launches: int = 1


@dataclass(frozen=True)
class Bound:
    """Seconds of each roof, the roof that binds, and the time: its roof and the launches."""

    roofs: Mapping[str, float]
    binding: str
    seconds: float


def roof_seconds(work: KernelWork, gpu: Gpu, *, achievable: bool = False) -> dict[str, Amount]:
    """Seconds that each resource needs by itself; matrix products of several types share one unit.

    achievable: at the shares of the peak that large matmuls and copies reach, not at the peaks.
    Raises: UsageError for a type that the GPU's matrix units do not have.
    """
    for kind in work.tensor:
        if kind not in gpu.tensor:
            raise UsageError(
                f"roofs of {gpu.name}: found {kind} products; its matrix units have {', '.join(gpu.tensor)}. Count "
                "them as one of these, or as vector_flops."
            )
    share = {kind: gpu.matmul_share(kind) if achievable else 1.0 for kind in work.tensor}
    memory = gpu.bandwidth * (MEMORY_SHARE if achievable else 1.0)
    tensor: Amount = sum(amount / (share[kind] * gpu.tensor[kind]) for kind, amount in work.tensor.items())
    return {
        "tensor": tensor,
        "vector": work.vector_flops / gpu.fp32_flops,
        "exponentials": work.exps / gpu.exp2_rate,
        "DRAM": work.dram_bytes / memory,
        "L2": work.l2_bytes / (L2_BYTES_PER_CLOCK * gpu.sms * gpu.tensor_clock_hz),
        "shared memory": work.shared_bytes / gpu.shared_bandwidth,
    }


def bound(work: KernelWork, gpu: Gpu, *, achievable: bool = False) -> Bound:
    """The roof that binds work given in numbers; "launch" where the launches take longer than any roof."""
    roofs = {name: float(time) for name, time in roof_seconds(work, gpu, achievable=achievable).items()}
    launch = work.launches * LAUNCH_S
    binding = max(roofs, key=lambda name: roofs[name])
    return Bound(roofs, binding if roofs[binding] > launch else "launch", roofs[binding] + launch)


def bound_expression(work: KernelWork, gpu: Gpu, *, achievable: bool = False) -> Expr:
    """Seconds of work given in expressions: the largest roof, unevaluated, and the launches."""
    roofs = roof_seconds(work, gpu, achievable=achievable).values()
    return Max(*roofs, evaluate=False) + work.launches * LAUNCH_S

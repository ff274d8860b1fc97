"""Run a rendered kernel: parameters bound by name, on the GPU or under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.library import wrap_triton

from attnc.codegen.triton_text import CAPTURED_NAME, Slot, slot_of
from attnc.errors import LoweringError


def launch(
    kernel: Any,
    programs: Any,
    given: Mapping[str, Any],
    captured: Sequence[Tensor] = (),
    sizes: Sequence[Any] = (),
    buffers: Mapping[int, Tensor] | None = None,
    *,
    num_warps: int = 4,
    num_stages: int = 2,
) -> None:
    """Run `kernel` on a grid of `programs`.

    given: arguments by parameter name; those that stand for captured tensors, sizes and gradient `buffers` (by slot)
    are added. Traceable: sizes and lengths may be symbolic.
    Raises: LoweringError for CPU tensors without the interpreter.
    """
    names = kernel.arg_names
    bound = {n: given[n] if n in given else named(n, captured, sizes, buffers) for n in names}
    if any(isinstance(x, Tensor) and x.device.type == "cpu" for x in bound.values()):
        if hasattr(kernel, "device_caches"):
            raise LoweringError(
                f"run {kernel.__name__} on CPU tensors: found a kernel compiled for GPUs. Set TRITON_INTERPRET=1 "
                "before triton is imported, or use a GPU."
            )
        kernel[(programs,)](**bound)  # the interpreter's function, which torch cannot wrap
    else:
        wrap_triton(kernel)[(programs,)](**bound, num_warps=num_warps, num_stages=num_stages)


def named(
    name: str, captured: Sequence[Tensor], sizes: Sequence[Any], buffers: Mapping[int, Tensor] | None = None
) -> Any:
    """What a parameter stands for: t0 a tensor, t0_s1 its stride, t0_d1 its length, n0 a size, g0 a buffer.

    Raises: LoweringError for any other name.
    """
    if name in ("captured", "captured_grads"):
        return None  # an unfilled skeleton
    base, _, part = name.partition("_")
    number = int(base[1:]) if base[1:].isdecimal() else -1
    if base[:1] == "g" and buffers is not None and number in buffers and not part:
        return buffers[number]
    if not CAPTURED_NAME.fullmatch(name) or number >= len(sizes if base[0] == "n" else captured):
        raise LoweringError(
            f"launch a kernel: its parameter {name!r} was not given, and {len(captured)} captured tensors and "
            f"{len(sizes)} sizes do not hold it."
        )
    if base[0] == "n":
        return sizes[number]
    tensor = captured[number]
    if not part:
        return tensor
    return tensor.stride(int(part[1:])) if part[0] == "s" else tensor.shape[int(part[1:])]


def strides(name: str, x: Tensor) -> dict[str, Any]:
    """The strides of a tensor (B, heads, length, width) as parameters `name_b`, `name_h`, `name_l`, `name_e`."""
    return {f"{name}_{axis}": stride for axis, stride in zip("bhle", x.stride(), strict=True)}


def slots_of(captured: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Slot, ...]:
    """What kernels must know of captured tensors; needs: which have a gradient."""
    return tuple(slot_of(t, needs_grad=need, wide=_is_wide(t)) for t, need in zip(captured, needs, strict=True))


def _is_wide(x: Tensor) -> bool:
    """Whether offsets into `x`, or into a gradient of its shape, leave 31 bits; under symbolic lengths a guard."""
    extent = sum((length - 1) * stride for length, stride in zip(x.shape, x.stride(), strict=True))
    return bool(extent >= 1 << 31) or bool(x.numel() >= 1 << 31)

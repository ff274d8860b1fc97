"""Triton's interpreter as kernels need it, and as GPUs do it.

bfloat16, which it holds as bits: products are of numbers, not of integers, and casts round to the nearest, ties to even
as GPUs do (cvt.rn.bf16x2.f32), where it cuts the lower bits off, which doubles every error and moves results to 0.
Scans by slices, not by numbers.
"""

from __future__ import annotations

from functools import wraps

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, ScanOps, TensorHandle


def mend() -> None:
    """Make `tl.dot` and casts take bfloat16 as the numbers they are, and scans quick; once per process."""
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    if hasattr(dot, "__wrapped__"):
        return

    @wraps(dot)
    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar == tl.bfloat16 and b.dtype.scalar == tl.bfloat16:
            a, b = _widened(a), _widened(b)
        return dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    @wraps(cast)
    def cast_impl(self, src, dst_type):
        given, wanted = src.dtype.scalar, dst_type.scalar
        if given == wanted or tl.bfloat16 not in (given, wanted):
            return cast(self, src, dst_type)
        src = _widened(src) if given == tl.bfloat16 else src
        if wanted != tl.bfloat16:
            return src if wanted == tl.float32 else cast(self, src, dst_type)
        return TensorHandle(nearest_bfloat16(src.data.astype(np.float32, copy=False)), tl.bfloat16)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    ScanOps.generic_scan = scan_by_slices
    called = InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        langs = [lang for lang in (tl, tl.core) if any(value is lang for value in self.fn.__globals__.values())]
        if any(tl.core.is_builtin(lang.full) for lang in langs):  # not patched yet
            return called(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call


def _widened(x: TensorHandle) -> TensorHandle:
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def nearest_bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits of the bfloat16 nearest to float32 numbers, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32).reshape(x.shape)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def scan_by_slices(self, inputs):
    """What the scan's function gives along its axis, all other axes at once."""
    arrays = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
    results = [[x[0] for x in arrays]]
    for i in range(1, len(arrays[0])):
        pairs = zip([*results[-1], *(x[i] for x in arrays)], [*inputs, *inputs], strict=True)
        found = self.combine_fn.fn(*(self.to_tensor(y, x.dtype) for y, x in pairs))
        results.append([y.handle.data for y in (found if isinstance(found, tuple) else (found,))])
    columns = zip(*results, strict=True)
    return [self.to_tensor(np.stack(ys, self.axis), x.dtype) for ys, x in zip(columns, inputs, strict=True)]

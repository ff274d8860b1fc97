"""Triton's interpreter as kernels need it.

Products of bfloat16, which it holds as bits and multiplies as integers; scans by slices, not by numbers.
"""

from __future__ import annotations

from functools import wraps

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, ScanOps, TensorHandle


def mend() -> None:
    """Make `tl.dot` multiply bfloat16 operands as the numbers they are, and scans quick; once per process."""
    written = InterpreterBuilder.create_dot
    if hasattr(written, "__wrapped__"):
        return

    @wraps(written)
    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar == tl.bfloat16 and b.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) for x in (a, b))
        return written(self, a, b, d, input_precision, max_num_imprecise_acc)

    InterpreterBuilder.create_dot = create_dot
    ScanOps.generic_scan = scan_by_slices


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

"""Triton's interpreter as kernels need it: products of bfloat16, which it holds as bits and multiplies as integers."""

from __future__ import annotations

from functools import wraps

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def mend() -> None:
    """Make `tl.dot` multiply bfloat16 operands as the numbers they are; once per process."""
    written = InterpreterBuilder.create_dot
    if hasattr(written, "__wrapped__"):
        return

    @wraps(written)
    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar == tl.bfloat16 and b.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) for x in (a, b))
        return written(self, a, b, d, input_precision, max_num_imprecise_acc)

    InterpreterBuilder.create_dot = create_dot

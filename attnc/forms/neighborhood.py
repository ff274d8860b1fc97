"""Neighborhood attention on a grid of one to three dimensions, with strides and dilations.

Per dimension of length n, with kernel k, stride s and dilation d, q and x the coordinates of query and key:

    q mod d = x mod d,   q' = floor(q / d),  x' = floor(x / d),   n' = number of coordinates that are q modulo d
    leader  = min(s floor(q' / s) + floor(s / 2), n' - 1)
    centre  = min(max(leader, floor(k / 2)), n' - ceil(k / 2)):      centre - floor(k / 2) <= x' < centre + ceil(k / 2)
    causal:   leader = min(s floor(q' / s) + s - 1, n' - 1):         leader - k < x' <= q'

keep_ij holds where all dimensions do. Stride 1 is neighborhood attention, stride k blocked attention.

Source: Hassani et al. 2023, "Neighborhood Attention Transformer", arXiv:2204.07143, section 3.2; Hassani et al. 2025,
"Generalized Neighborhood Attention", arXiv:2504.16922, section 3.
Exact:  where the kernel is as wide as the grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from attnc.expr import ONE, ZERO, Expr, J, add, const, floordiv, maximum, minimum, mod, scale, sub
from attnc.forms.base import knob
from attnc.forms.narrowed import Frame, Narrowed
from attnc.predicate import conjunction, eq, le
from attnc.region import AttentionRegion

NUMBERS, FLAGS = r"[1-9]\d{0,5}(x[1-9]\d{0,5}){0,2}", r"[01](x[01]){0,2}"


@dataclass(frozen=True)
class Axis:
    """One dimension of the grid; inner: tokens from one coordinate to the next; is_outer: whether it is the first."""

    length: int
    inner: int
    kernel: int
    stride: int
    dilation: int
    causal: bool
    is_outer: bool


@dataclass(frozen=True)
class Neighborhood(Narrowed):
    """grid: its sizes, row-major, as "12x10", or "line": all keys; the others by dimension, one number for all.

    A line is causal where the region is.
    """

    name: ClassVar[str] = "neighborhood"
    counts_keys: ClassVar[bool] = True
    grid: str = knob("line", role="semantic", unit="sizes as 12x10", pattern=NUMBERS)
    kernel: str = knob("255", "127", "511", role="semantic", unit="sizes as 7x7", pattern=NUMBERS)
    stride: str = knob("1", "64", role="semantic", unit="steps as 2x2", pattern=NUMBERS)
    dilation: str = knob("1", role="semantic", unit="steps as 1x2", pattern=NUMBERS)
    causal: str = knob("0", role="semantic", unit="0 or 1 as 1x0x0", pattern=FLAGS)

    def axes(self, at: Frame) -> list[Axis]:
        """The dimensions of the grid, outermost first."""
        lengths = [at.keys] if self.grid == "line" else [int(n) for n in self.grid.split("x")]
        knobs = [_spread(text, len(lengths)) for text in (self.kernel, self.stride, self.dilation, self.causal)]
        found = []
        for n, (length, kernel, stride, dilation, causal) in enumerate(zip(lengths, *knobs, strict=True)):
            is_causal = bool(causal) or (self.grid == "line" and at.causal)
            found.append(Axis(length, prod(lengths[n + 1 :]), kernel, stride, dilation, is_causal, n == 0))
        return found

    def unfit(self, region: AttentionRegion, at: Frame) -> str | None:
        sizes = 1 if self.grid == "line" else self.grid.count("x") + 1
        for name in ("kernel", "stride", "dilation", "causal"):
            if (count := getattr(self, name).count("x") + 1) not in (1, sizes):
                return f"neighborhood has one {name} for each dimension, found {count} for {sizes}; write as many."
        axes = self.axes(at)
        tokens = prod(axis.length for axis in axes)
        if tokens != at.keys or (self.grid != "line" and region.shape.L != region.shape.S):
            return (
                f"neighborhood{{grid={self.grid}}} is of {tokens} tokens, found {region.shape.L} queries of {at.keys} "
                "keys; use the grid of the region."
            )
        for axis in axes:
            if not axis.causal and axis.kernel * axis.dilation > axis.length:
                return (
                    f"neighborhood takes kernels that lie in the grid, found {axis.kernel} keys {axis.dilation} apart "
                    f"in a dimension of {axis.length}; use a smaller kernel."
                )
            if axis.stride > axis.kernel:
                return (
                    f"neighborhood takes strides up to the kernel, found {axis.stride} for {axis.kernel}; beyond it a "
                    "token would not see itself."
                )
        return None

    def pattern(self, at: Frame) -> Expr:
        return conjunction(*(_along(axis, at.row) for axis in self.axes(at)))


def _spread(text: str, count: int) -> list[int]:
    numbers = [int(n) for n in text.split("x")]
    return numbers * count if len(numbers) == 1 else (numbers + numbers[-1:] * count)[:count]


def _along(axis: Axis, row: Expr) -> Expr:
    """Whether a key is in the neighborhood of a row along one dimension."""
    step, stride = const(axis.dilation), const(axis.stride)
    query, key = (floordiv(x, const(axis.inner)) for x in (row, J))
    if not axis.is_outer:
        query, key = (mod(x, const(axis.length)) for x in (query, key))
    same, last = eq(mod(sub(query, key), step), ZERO), sub(_members(axis, query), ONE)
    q, x = floordiv(query, step), floordiv(key, step)
    half, rest = axis.kernel // 2, axis.kernel - axis.kernel // 2
    ahead = axis.stride - 1 if axis.causal else axis.stride // 2  # of the leader in its group
    leader = q if axis.stride == 1 else minimum(add(scale(floordiv(q, stride), axis.stride), const(ahead)), last)
    if axis.causal:
        return conjunction(same, le(sub(leader, const(axis.kernel - 1)), x), le(x, q))
    centre = minimum(maximum(leader, const(half)), sub(last, const(rest - 1)))
    return conjunction(same, le(sub(centre, const(half)), x), le(x, add(centre, const(rest - 1))))


def _members(axis: Axis, query: Expr) -> Expr:
    """Coordinates of the dimension that are `query` modulo the dilation."""
    if axis.length % axis.dilation == 0:
        return const(axis.length // axis.dilation)
    step = const(axis.dilation)
    return floordiv(sub(const(axis.length - 1 + axis.dilation), mod(query, step)), step)

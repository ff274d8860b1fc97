"""Strided attention of the Sparse Transformer: a window and every l-th key, or the own block and summary columns.

    strided:  keep_ij = |p_i - j| <= l  or  (p_i - j) mod l = 0
    fixed:    keep_ij = floor(p_i / l) = floor(j / l)  or  j mod l >= l - columns

Both of the published heads in one softmax ("merged").

Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers", arXiv:1904.10509, sections 4.3 and 5.2.
Exact:  where l reaches over all keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnc.expr import ZERO, Expr, J, const, floordiv, mod
from attnc.forms.base import knob
from attnc.forms.narrowed import Frame, Narrowed
from attnc.predicate import disjunction, eq, le


@dataclass(frozen=True)
class Strided(Narrowed):
    """stride: l; mode: which of the two; columns: last keys of each block that all rows keep, of "fixed" alone."""

    name: ClassVar[str] = "strided"
    stride: int = knob(512, 128, 256, 1024, role="semantic", unit="positions")
    mode: str = knob("strided", "fixed", role="semantic")
    columns: int = knob(8, 32, role="semantic", unit="keys")

    @property
    def is_distinct(self) -> bool:
        return self.mode == "fixed" or self.columns == self.knobs()["columns"].choices[0]

    def pattern(self, at: Frame) -> Expr:
        by = const(self.stride)
        if self.mode == "strided":
            return disjunction(at.near(self.stride), eq(mod(at.back, by), ZERO))
        own = eq(floordiv(at.row, by), floordiv(J, by))
        return disjunction(own, le(const(self.stride - self.columns), mod(J, by)))

"""Axial attention: tokens on a grid of `width` columns attend along their row, their column, or both.

    row:     keep_ij = floor(p_i / width) = floor(j / width)
    column:  keep_ij = (p_i - j) mod width = 0
    cross:   either

Source: Ho et al. 2019, "Axial Attention in Multidimensional Transformers", arXiv:1912.12180, section 2.
Exact:  where the grid has one row (or one column).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnc.expr import ZERO, Expr, J, const, floordiv, mod
from attnc.forms.base import knob
from attnc.forms.narrowed import Frame, Narrowed
from attnc.predicate import disjunction, eq


@dataclass(frozen=True)
class Axial(Narrowed):
    """width: tokens of a row of the grid, row after row; axis: along which a token attends."""

    name: ClassVar[str] = "axial"
    width: int = knob(64, 16, 32, 128, 256, role="semantic", unit="tokens")
    axis: str = knob("row", "column", "cross", role="semantic")

    def pattern(self, at: Frame) -> Expr:
        by = const(self.width)
        along = {"row": eq(floordiv(at.row, by), floordiv(J, by)), "column": eq(mod(at.back, by), ZERO)}
        return along[self.axis] if self.axis in along else disjunction(*along.values())

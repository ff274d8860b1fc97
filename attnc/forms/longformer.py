"""Longformer: a window around each token, and first tokens that attend to all and are attended by all.

    keep_ij = (|p_i - j| <= dilation * floor(window / 2)  and  (p_i - j) mod dilation = 0)
              or  j < globals  or  p_i < globals

Global tokens are a prefix and share the projections of the others: ETC's four quadrants, GMAT's memory and the relay of
Star-Transformer (window 2, one global token) are this mask. Longformer's own global projections and global tokens
elsewhere are written with a second attention.

Source: Beltagy et al. 2020, "Longformer", arXiv:2004.05150, section 3.1; Ainslie et al. 2020, "ETC", arXiv:2004.08483,
section 3.2; Gupta and Berant 2020, "GMAT", arXiv:2006.03274; Guo et al. 2019, "Star-Transformer", arXiv:1902.09113.
Exact:  where the window reaches over all keys, with dilation 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnc.expr import Expr
from attnc.forms.base import knob
from attnc.forms.narrowed import Frame, Narrowed
from attnc.forms.sliding_window import dilated
from attnc.predicate import disjunction


@dataclass(frozen=True)
class Longformer(Narrowed):
    """window: keys around a row, half of them before it; dilation: positions between them; globals: first tokens."""

    name: ClassVar[str] = "longformer"
    window: int = knob(512, 128, 256, 1024, role="semantic", unit="keys")
    dilation: int = knob(1, 2, 4, role="semantic", unit="positions")
    globals: int = knob(1, 0, 16, 64, role="semantic", unit="tokens")

    def pattern(self, at: Frame) -> Expr:
        near = dilated(at, self.window // 2 * self.dilation, self.dilation)
        return disjunction(near, at.first(self.globals))

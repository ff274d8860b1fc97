"""Sliding window: each query attends to the keys near its own position.

    keep_ij = |p_i - j| < window * dilation  and  (p_i - j) mod dilation = 0

Under a causal mask these are `window` keys up to the row itself, `dilation` apart; without one as many lie behind it.
The local attention of LongT5 (radius r) is window = r + 1.

Source: Beltagy et al. 2020, "Longformer", arXiv:2004.05150, section 3.1; Jiang et al. 2023, "Mistral 7B",
arXiv:2310.06825, section 2; Guo et al. 2022, "LongT5", arXiv:2112.07916, section 3.1.1.
Exact:  where the window reaches over all keys, with dilation 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnc.expr import ZERO, Expr, const, mod
from attnc.forms.base import knob
from attnc.forms.narrowed import Frame, Narrowed
from attnc.predicate import conjunction, eq


@dataclass(frozen=True)
class SlidingWindow(Narrowed):
    """window: keys up to the row, itself among them; dilation: positions from one kept key to the next."""

    name: ClassVar[str] = "sliding_window"
    window: int = knob(512, 128, 256, 1024, 2048, 4096, role="semantic", unit="keys")
    dilation: int = knob(1, 2, 4, role="semantic", unit="positions")

    def pattern(self, at: Frame) -> Expr:
        return dilated(at, self.window * self.dilation - 1, self.dilation)


def dilated(at: Frame, reach: int, dilation: int) -> Expr:
    """Keys at most `reach` positions off, every `dilation`-th of them."""
    return conjunction(at.near(reach), eq(mod(at.back, const(dilation)), ZERO))

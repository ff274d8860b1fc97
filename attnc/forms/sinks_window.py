"""Sinks and a window: each query attends to the first keys of all and to the keys near its own position.

    keep_ij = j < sinks  or  |p_i - j| < window

The A-shape of MInference is the same mask, as is the cache of SimLayerKV's lazy layers. Positions stay those of the
tokens: StreamingLLM counts rotary positions inside its cache instead.

Source: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453, section 3.2;
Jiang et al. 2024, "MInference 1.0", arXiv:2407.02490, section 3.2; Zhang et al. 2024, "SimLayerKV", arXiv:2410.13846.
Exact:  where the window and the sinks reach over all keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnc.expr import Expr, J
from attnc.forms.base import knob
from attnc.forms.narrowed import Frame, Narrowed, within
from attnc.predicate import disjunction


@dataclass(frozen=True)
class SinksWindow(Narrowed):
    """sinks: first keys that every row keeps; window: keys up to the row, itself among them."""

    name: ClassVar[str] = "sinks_window"
    sinks: int = knob(4, 16, 64, 128, role="semantic", unit="keys")
    window: int = knob(512, 128, 256, 1024, 2048, 4096, role="semantic", unit="keys")

    def pattern(self, at: Frame) -> Expr:
        return disjunction(within(J, self.sinks), at.near(self.window - 1))

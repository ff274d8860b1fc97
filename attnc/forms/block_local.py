"""Block-local attention: the sequence in blocks, each of which attends to itself and to its neighbours.

    a = floor(p_i / block), c = floor(j / block):   keep_ij = |a - c| <= back  or  j < globals  or  p_i < globals

shift = "head" is BlockBERT's permutation instead: block a of head h attends to block (a + h) mod n of n.

Source: Qiu et al. 2020, "Blockwise Self-Attention for Long Document Understanding", arXiv:1911.02972, section 3.1;
Gupta and Berant 2020, "GMAT", arXiv:2006.03274 (chunked attention beside a memory).
Exact:  where one block, or `back` of them, hold all keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnc.expr import Expr, H, J, add, const, floordiv, mod, sub
from attnc.forms.base import knob
from attnc.forms.narrowed import Frame, Narrowed
from attnc.predicate import conjunction, disjunction, eq, le
from attnc.region import AttentionRegion


@dataclass(frozen=True)
class BlockLocal(Narrowed):
    """block: tokens of a block; back: neighbours on each side; globals: first tokens that attend and are attended."""

    name: ClassVar[str] = "block_local"
    counts_keys: ClassVar[bool] = True
    block: int = knob(512, 128, 256, 1024, role="semantic", unit="tokens")
    back: int = knob(0, 1, 2, role="semantic", unit="blocks")
    globals: int = knob(0, 16, role="semantic", unit="tokens")
    shift: str = knob("none", "head", role="semantic")

    @property
    def is_distinct(self) -> bool:
        return self.shift == "none" or self.back == 0

    @property
    def keeps_own(self) -> bool:
        return self.shift == "none"

    def unfit(self, region: AttentionRegion, at: Frame) -> str | None:
        if self.shift == "none" or not at.causal:
            return None
        return (
            "block_local{shift=head} attends to other blocks than the own one, found a causal mask or a cache, under "
            "which rows would keep no key; use shift=none."
        )

    def pattern(self, at: Frame) -> Expr:
        row, key = (floordiv(x, const(self.block)) for x in (at.row, J))
        if self.shift == "head":
            near = eq(mod(add(row, H), const(-(-at.keys // self.block))), key)
        elif not self.back:
            near = eq(row, key)
        else:
            near = le(sub(row, key), const(self.back))
            near = near if at.causal else conjunction(near, le(sub(key, row), const(self.back)))
        return disjunction(near, at.first(self.globals))

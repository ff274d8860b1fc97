"""BigBird: blocks near the own one, first (and last) blocks for all, and blocks drawn at random.

    a = floor(p_i / block), c = floor(j / block), n blocks:
    keep_ij = |a - c| <= floor(window / 2)  or  c < globals  or  a < globals  or  c = r_k(a) for some k < random
    without a causal mask also  c >= n - globals  or  a >= n - globals
    r_k(a) = floor(m ((A_k a + C_k) mod P) / P),   m = n, or a + 1 under a causal mask

The draw is a function of integers, the same in each call, and under a causal mask for each length. A block may be drawn
that is kept already; the authors draw others, and under dropout's seed.

Source: Zaheer et al. 2020, "Big Bird: Transformers for Longer Sequences", arXiv:2007.14062, section 2 and appendix D.
Exact:  where the window reaches over all blocks, or all blocks are global.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnc.expr import ONE, Expr, H, J, add, const, floordiv, mod, mul, scale, sub
from attnc.forms.base import knob
from attnc.forms.narrowed import Frame, Narrowed, within
from attnc.predicate import conjunction, disjunction, eq, le

P = 65521  # a prime above the number of blocks, and small enough for products in 32 bits


@dataclass(frozen=True)
class BigBird(Narrowed):
    """block: tokens of a block; window, globals (at each end), random: blocks; seed: of the draw.

    draws: one for all heads, or one for each.
    """

    name: ClassVar[str] = "bigbird"
    counts_keys: ClassVar[bool] = True
    block: int = knob(64, 128, role="semantic", unit="tokens")
    window: int = knob(3, 5, 9, role="semantic", unit="blocks")
    globals: int = knob(1, 0, 2, role="semantic", unit="blocks")
    random: int = knob(3, 0, 8, role="semantic", unit="blocks")
    seed: int = knob(1, role="semantic")
    draws: str = knob("one", "head", role="semantic")

    @property
    def is_distinct(self) -> bool:
        return self.random > 0 or self.draws == "one"

    def drawn(self, row: Expr, at: Frame) -> list[Expr]:
        """The blocks drawn for block `row` of rows."""
        count = add(row, ONE) if at.causal else const(-(-at.keys // self.block))
        found = []
        for k in range(self.random):
            step, start = (pow(base, 97 * (self.seed + k) + 5, P) for base in (17, 29))
            mixed = add(scale(row, step), const(start), *([scale(H, 7919)] if self.draws == "head" else []))
            found.append(floordiv(mul(count, mod(mixed, const(P))), const(P)))
        return found

    def pattern(self, at: Frame) -> Expr:
        row, key = (floordiv(x, const(self.block)) for x in (at.row, J))
        reach, blocks = const(self.window // 2), -(-at.keys // self.block)
        near = le(sub(row, key), reach)
        near = near if at.causal else conjunction(near, le(sub(key, row), reach))
        ends = [within(key, self.globals)]
        if not at.causal and self.globals:
            ends += [within(row, self.globals), *(le(const(blocks - self.globals), x) for x in (key, row))]
        return disjunction(near, *ends, *(eq(key, one) for one in self.drawn(row, at)))

"""Pooled window: each row attends to the keys near it, and to the mean of each block of keys, in one softmax.

    o_i = ( sum_{j near i} exp(score_ij) v_j + sum_{c in P_i} w exp(score(q_i . mean_c k)) mean_c v ) / Z_i

    near     sliding: |i - j| < window;   chunk: i // window = j // window
    P_i      all: every whole block;      outside: those without a key near i
    w        one: 1;                      count: the keys of a block, so that equal keys are pooled without error

Under a causal mask a row attends to no later key, and to the means of blocks that end at or before it. Keys behind the
last whole block are in none.

The systems as settings: LongT5's transient global attention block=16,window=128: the model itself sums up hidden
states, norms the sums and projects them as it does tokens, where a rewrite of a dense model pools keys and values;
Combiner with its fixed pattern near=chunk,pooled=outside: the model takes the largest channel for the key of a span and
weighs its values by a pooled query, where here both are means.

Source: Guo et al. 2021, "LongT5: Efficient Text-To-Text Transformer for Long Sequences", arXiv:2112.07916, section
3.2.2; Ren et al. 2021, "Combiner: Full Attention Transformer with Sparse Computation Cost", arXiv:2107.05768,
section 3.
Exact:  where every key is near and no block is pooled beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from attnc.codegen.key_lists import NONE, KeyLists, of_tiles
from attnc.cost_models.cost import Work
from attnc.expr import FLOAT, TRUE, Expr, I, J, add, const, load, mul, sub
from attnc.forms.base import knob
from attnc.forms.pooled_keys import Pooled, PooledKeys
from attnc.forms.selected import divided
from attnc.operands import Operands
from attnc.predicate import conjunction, disjunction, distances, le, logical_not, lt
from attnc.region import ITEM_BYTES, AttentionRegion

TILE = 64  # rows of a tile, and keys of a block near them


@dataclass(frozen=True)
class PooledWindow(PooledKeys):
    """block: keys of a mean; window: keys from a row to the last one near it, its own counted, or of a chunk."""

    name: ClassVar[str] = "pooled_window"
    block: int = knob(16, 64, 128, role="semantic", unit="keys")
    window: int = knob(128, 256, 512, role="semantic", unit="keys")
    near: str = knob("sliding", "chunk", role="semantic")
    blocks: str = knob("all", "outside", role="semantic")
    weight: str = knob("one", "count", role="semantic")

    def chosen_shape(self, given: Operands) -> tuple[int, ...]:
        return (0,)

    def choose(self, given: Operands) -> Tensor:
        """Nothing: positions say it all."""
        return torch.zeros(0, dtype=torch.int64, device=given.query.device)

    def pooled(self, S: int, device: torch.device) -> Pooled:
        n = S // self.block
        owner = (torch.arange(S, device=device) // self.block).clamp(max=n)
        return Pooled(owner, torch.full((n,), self.block, device=device), -(-S // TILE) * TILE)

    def unfit(self, region: AttentionRegion) -> str | None:
        s = region.shape
        if region.rule.keep == TRUE and s.text("L") != "1" and not s.is_square:
            return (
                f"pooled_window needs the positions of queries among the keys, found {s.text('L')} queries of "
                f"{s.text('S')} keys without a causal mask; leave it as written."
            )
        return super().unfit(region)

    def narrowed(self, chosen: Tensor, given: Operands) -> Operands:
        S, slot, row = given.key.shape[2], len(given.captured), _row(given)
        pooled = self.pooled(S, given.key.device)
        n, end = len(pooled.count), pooled.end
        kept = conjunction(given.rule.keep, self._near(row, J, J), lt(J, const(S)))
        if not n:
            return given._replace(rule=replace(given.rule, keep=kept))
        first = mul(sub(J, const(end)), const(self.block))
        last = add(first, const(self.block - 1))
        back = le(const(end), J)
        if given.rule.keep != TRUE:
            back = conjunction(back, le(last, row))
        if self.blocks == "outside":
            back = conjunction(back, logical_not(self._near(row, first, last)))
        rule = replace(given.rule, keep=disjunction(kept, back))
        given = pooled.extended(given)
        if self.weight == "one":
            return given._replace(rule=rule)
        wide = torch.float64 if given.key.dtype == torch.float64 else torch.float32
        added = F.pad(pooled.count.to(wide).log(), (end, 0))
        rule = replace(rule, score=add(rule.score, load(slot, (J,), FLOAT)))
        return given._replace(captured=[*given.captured, added], rule=rule)

    def _near(self, row: Expr, first: Expr, last: Expr) -> Expr:
        """Whether keys from `first` to `last` reach the near ones of `row`."""
        if self.near == "chunk":
            own = divided(row, self.window)
            return conjunction(le(divided(first, self.window), own), le(own, divided(last, self.window)))
        return conjunction(lt(sub(row, last), const(self.window)), lt(sub(first, row), const(self.window)))

    def laid(self, chosen: Tensor, given: Operands) -> tuple[Operands, Sequence[KeyLists]]:
        B, Hq, L, _ = given.query.shape
        H, S, device = given.key.shape[1], given.key.shape[2], given.query.device
        shape, tile, pooled = (B, Hq, H, L), min(TILE, L), self.pooled(S, device)
        ahead = _ahead(given)
        top = torch.arange(0, L, tile, device=device)
        low, high = top + ahead, (top + tile).clamp(max=L) - 1 + ahead
        reach = high.clamp(max=S - 1) if given.rule.keep != TRUE else torch.full_like(high, S - 1)
        if self.near == "chunk":
            low, high = low // self.window * self.window, (high // self.window + 1) * self.window - 1
        else:
            low, high = low - self.window + 1, high + self.window - 1
        low, high = low.clamp(min=0) // TILE, torch.minimum(high, reach) // TILE
        most = int((high - low).max()) + 1
        at = low.unsqueeze(-1) + torch.arange(max(most, 1), device=device)
        near = torch.where(at <= high.unsqueeze(-1), at, NONE).view(1, 1, len(top), -1)
        place = torch.arange(len(pooled.count), device=device)
        back = torch.where(pooled.last <= reach.unsqueeze(-1), pooled.end + place, NONE).view(1, 1, len(top), -1)
        lists = of_tiles(near, shape, tile, TILE, "rule")
        return self.narrowed(chosen, given), [*lists, *(of_tiles(back, shape, tile, 1, "rule") if len(place) else ())]

    def pairs(self, region: AttentionRegion) -> float:
        s = region.shape
        sides = 1 if self.near == "chunk" or region.rule.keep != TRUE else 2
        return float(s.L) * (min(s.S, sides * self.window + TILE) + s.S // self.block)

    def choosing(self, region: AttentionRegion) -> Work:
        s, item = region.shape, ITEM_BYTES.get(region.dtype, 4)
        return Work("memory", bytes=3.0 * s.B * s.H * s.S * (s.E + s.Ev) * item, launches=8)

    def keeps_all(self, region: AttentionRegion) -> bool:
        S = region.shape.S
        return self.window >= S and (self.blocks == "outside" or self.block > S)


def _ahead(given: Operands) -> int:
    """By how much the position of a row is ahead of its number."""
    L, S = given.query.shape[2], given.key.shape[2]
    least = distances(given.rule.keep)[0]
    return (S - 1 if L == 1 else 0) if least is None else -least


def _row(given: Operands) -> Expr:
    return add(I, const(_ahead(given)))

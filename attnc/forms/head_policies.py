"""Head policies: each head keeps the smallest of four sets of keys that holds enough of its attention.

    0  the first `sinks` keys and a row's own     1  and those nearer than `window`
    2  and the `heavy` keys that the last rows attend to most     3  every key
    p_h = the first of them that holds `recover` percent of the weights of the last `last` rows of head h

The policy is found on the prompt and applied to it, so that a causal model's choice reads later rows. As published, a
cache keeps by it what a later decoder finds; keys of punctuation, which need the tokens' text, are no policy here, and
the rows that are profiled are the last ones where the paper takes all, which it attends to in full.

Source: Ge et al. 2023, "Model Tells You What to Discard: Adaptive KV Cache Compression for LLMs" (FastGen),
arXiv:2310.01801, section 3.
Exact:  where recover is 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from attnc.codegen.key_lists import NONE, KeyLists, of_tiles
from attnc.codegen.selectors_near import blocks_between, never_ahead, row_positions, tile_spans
from attnc.codegen.selectors_policies import HEAVY, cheapest, heavy_columns
from attnc.cost_models.cost import Work
from attnc.expr import BOOL, INT, B, H, I, J, const, floordiv, load, sub
from attnc.forms.base import knob
from attnc.forms.selected import Selected, marked
from attnc.operands import Operands
from attnc.predicate import conjunction, disjunction, lt
from attnc.region import ITEM_BYTES, AttentionRegion

TILE = 64  # rows of a tile, and keys of a block


@dataclass(frozen=True)
class HeadPolicies(Selected):
    """recover: percent of the attention; last: rows that are profiled; sinks, window, heavy: keys of the sets.

    share: whether each query head has a policy, or those of a key head one.
    """

    name: ClassVar[str] = "head_policies"
    phases: ClassVar[tuple[str, ...]] = ("prefill", "training")
    recover: int = knob(95, 90, 99, role="semantic", unit="percent")
    sinks: int = knob(4, 64, role="semantic", unit="keys")
    window: int = knob(256, 1024, role="semantic", unit="keys")
    heavy: int = knob(256, 1024, role="semantic", unit="keys")
    last: int = knob(64, role="semantic", unit="query rows")
    share: str = knob("group", "head", role="semantic")

    def heads(self, given: Operands) -> int:
        """Heads with a policy of their own."""
        return given.query.shape[1] if self.share == "head" else given.key.shape[1]

    def chosen_shape(self, given: Operands) -> tuple[int, ...]:
        return given.query.shape[0], self.heads(given), 1 + torch.sym_min(self.heavy, given.key.shape[2])

    def choose(self, given: Operands) -> Tensor:
        """The policy of each head, then its heavy keys."""
        heavy = heavy_columns(given, self.last, self.heavy, self.heads(given))
        policy = cheapest(
            given, row_positions(given), heavy, self.last, percent=self.recover, sinks=self.sinks, window=self.window
        )
        return torch.cat([policy.unsqueeze(-1), heavy], -1)

    def tables(self, chosen: Tensor, given: Operands) -> tuple[Tensor, Tensor]:
        """How far each head sees around a row, (B, heads), and which columns it keeps, (B, heads, S)."""
        L, S = given.query.shape[2], given.key.shape[2]
        policy, heavy = chosen[..., 0], torch.where(chosen[..., :1] == HEAVY, chosen[..., 1:], NONE)
        reach = torch.tensor([1, self.window, self.window, L + S], device=chosen.device).clamp(min=1)[policy]
        return reach, marked(heavy, S) | (torch.arange(S, device=chosen.device) < self.sinks)

    def narrowed(self, chosen: Tensor, given: Operands) -> Operands:
        slot, position = len(given.captured), row_positions(given)
        head = H if self.heads(given) == given.query.shape[1] else floordiv(H, const(given.group))
        row = load(slot, (B if position.shape[0] > 1 else const(0), I), INT)
        reach, column = load(slot + 1, (B, head), INT), load(slot + 2, (B, head, J), BOOL)
        near = conjunction(lt(sub(row, J), reach), lt(sub(J, row), reach))
        rule = replace(given.rule, keep=conjunction(given.rule.keep, disjunction(near, column)))
        return given._replace(captured=[*given.captured, position, *self.tables(chosen, given)], rule=rule)

    def laid(self, chosen: Tensor, given: Operands) -> tuple[Operands, Sequence[KeyLists]]:
        (B, Hq, L, _), (heads, S) = given.query.shape, given.key.shape[1:3]
        shape, tile = (B, Hq, heads, L), min(TILE, L)
        reach, column = (x.unsqueeze(2) for x in self.tables(chosen, given))
        low, high = tile_spans(row_positions(given), tile, S)
        last = high if never_ahead(given) else high + reach - 1
        blocks = blocks_between(low - reach + 1, last.expand(B, reach.shape[1], -1), S, TILE)
        covered = marked(blocks, -(-S // TILE))
        # Columns that no block of a tile holds: not those of all keys, but as many as there are at most.
        few = int(column.sum(-1).max()) if S else 0
        at = column.squeeze(2).to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :few].unsqueeze(2)
        there = column.squeeze(2).gather(-1, at.squeeze(2)).unsqueeze(2)
        at = at.expand(-1, -1, covered.shape[2], -1)
        single = torch.where(there & ~covered.gather(-1, at // TILE), at, NONE)
        if never_ahead(given):
            single = torch.where(single <= high.unsqueeze(-1), single, NONE)
        lists = of_tiles(blocks, shape, tile, TILE, "rule")
        return self.narrowed(chosen, given), [*lists, *(of_tiles(single, shape, tile, 1, "rule") if few else ())]

    def pairs(self, region: AttentionRegion) -> float:
        s = region.shape
        return float(s.L) * min(s.S, self.sinks + self.window + self.heavy)  # of heads that do not need every key

    def choosing(self, region: AttentionRegion) -> Work:
        s, item = region.shape, ITEM_BYTES.get(region.dtype, 4)
        scores = 2.0 * s.B * s.Hq * min(self.last, s.L) * s.S
        read = 2.0 * s.B * s.H * s.S * s.E * item
        return Work("composed", 2.0 * scores * s.E, 2.0 * scores, read + 16 * scores, 24)

    def keeps_all(self, region: AttentionRegion) -> bool:
        return self.recover >= 100

"""Rectified block scores: blocks that a tile does not choose come back as one key each, their mean.

    o_i = ( sum_{j in I_i} exp(score_ij) v_j + sum_{c not in I_i} n_c exp(score(q_i . mean_c k)) mean_c v ) / Z_i

with n_c keys in block c and Z_i the sum of the same weights, over blocks of which row i and all others of its tile may
keep every key. Both parts are merged by the log-sum-exp, so that what is chosen no longer takes the weight of what is
not: the paper's rescaling of critical blocks and its return of the others in one. Each row keeps its own query, where
the paper pools queries too and asks, block by block, whether the gain exceeds the error of pooling.

Source: Liu et al. 2025, "Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation",
arXiv:2511.19835; Zhu et al. 2021, "H-Transformer-1D", arXiv:2107.11906 (pooled blocks).
Exact:  where top_k blocks are all there are, and no mass ends the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from attnc.codegen.key_lists import NONE, KeyLists, of_tiles
from attnc.codegen.selectors import last_keys
from attnc.expr import BOOL, FLOAT, J, add, const, load, sub
from attnc.forms.block_scores import BlockScores
from attnc.forms.pooled_keys import Pooled, PooledKeys
from attnc.forms.selected import divided, marked
from attnc.operands import Operands
from attnc.predicate import conjunction, disjunction, le, lt
from attnc.region import AttentionRegion


@dataclass(frozen=True)
class Rectified(PooledKeys, BlockScores):
    """The knobs of block_scores."""

    name: ClassVar[str] = "rectified"
    chooses_blocks: ClassVar[bool] = False  # pooled keys stand beside the blocks

    def pairs(self, region: AttentionRegion) -> float:
        return super().pairs(region) + float(region.shape.L) * -(-region.shape.S // self.block)

    def pooled(self, S: int, device: torch.device) -> Pooled:
        first = torch.arange(0, S, self.block, device=device)
        count = (S - first).clamp(max=self.block)
        return Pooled(torch.arange(S, device=device) // self.block, count, len(first) * self.block)

    def laid(self, chosen: Tensor, given: Operands) -> tuple[Operands, Sequence[KeyLists]]:
        _, lists = super().laid(chosen, given)
        (Hq, L), (H, S) = given.query.shape[1:3], given.key.shape[1:3]
        means = self.pooled(S, chosen.device)
        back, log = self._back(chosen, given, means), means.count.double().log()
        place = torch.arange(len(log), device=chosen.device)
        few = of_tiles(torch.where(back, means.end + place, NONE), (back.shape[0], Hq, H, L), self.rows, 1, "all")
        few = [replace(p, added=log[(p.blocks - means.end).clamp(min=0)]) for p in few]
        rule = replace(given.rule, keep=conjunction(given.rule.keep, lt(J, const(S))))
        return means.extended(given)._replace(rule=rule), [*lists, *few]

    def narrowed(self, chosen: Tensor, given: Operands) -> Operands:
        S, slot = given.key.shape[2], len(given.captured)
        means = self.pooled(S, chosen.device)
        blocks, end, place = len(means.count), means.end, self.place(chosen, given)
        table = torch.cat([marked(chosen, blocks), self._back(chosen, given, means)], -1)
        kept = conjunction(given.rule.keep, lt(J, const(S)), load(slot, (*place, divided(J, self.block)), BOOL))
        pooled = conjunction(le(const(end), J), load(slot, (*place, sub(J, const(end - blocks))), BOOL))
        added = F.pad(means.count.double().log(), (end, 0)).to(given.key.dtype)
        rule = replace(
            given.rule,
            keep=disjunction(kept, pooled),
            score=add(given.rule.score, load(slot + 1, (J,), FLOAT)),
        )
        return means.extended(given)._replace(captured=[*given.captured, table, added], rule=rule)

    def _back(self, chosen: Tensor, given: Operands, means: Pooled) -> Tensor:
        """Blocks that come back, (B, heads, tiles, blocks): not chosen, every key kept by every row of the tile."""
        last = last_keys(given)[..., :: self.rows]  # of the first row of a tile, whose prefix is the shortest
        return ~marked(chosen, len(means.count)) & (means.last <= last.unsqueeze(-1))

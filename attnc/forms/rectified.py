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
from attnc.codegen.selectors import block_means, last_keys
from attnc.expr import BOOL, FLOAT, TRUE, J, add, const, load, sub
from attnc.expr_text import spell
from attnc.forms.block_scores import BlockScores
from attnc.forms.selected import divided, is_prefix, marked
from attnc.operands import Operands
from attnc.predicate import conjunction, disjunction, le, lt
from attnc.region import AttentionRegion


@dataclass(frozen=True)
class Rectified(BlockScores):
    """The knobs of block_scores."""

    name: ClassVar[str] = "rectified"
    chooses_blocks: ClassVar[bool] = False  # pooled keys stand beside the blocks

    def unfit(self, region: AttentionRegion) -> str | None:
        keep, score = region.rule.keep, region.rule.score
        if keep != TRUE and not is_prefix(keep):
            return f"rectified pools blocks that a causal mask or none keeps, found {spell(keep)}; use block_scores."
        if score.names() - {"s"} or score.has("load") or score.has("size"):
            return f"rectified scores the product alone, found {spell(score)}; use block_scores."
        return super().unfit(region)

    def pairs(self, region: AttentionRegion) -> float:
        return super().pairs(region) + float(region.shape.L) * -(-region.shape.S // self.block)

    def laid(self, chosen: Tensor, given: Operands) -> tuple[Operands, Sequence[KeyLists]]:
        _, lists = super().laid(chosen, given)
        (Hq, L), (H, S) = given.query.shape[1:3], given.key.shape[1:3]
        back, count = self._back(chosen, given), self._counts(given.key)
        end, place = len(count) * self.block, torch.arange(len(count), device=chosen.device)
        pooled = of_tiles(torch.where(back, end + place, NONE), (back.shape[0], Hq, H, L), self.rows, 1, "all")
        pooled = [replace(p, added=count.log()[(p.blocks - end).clamp(min=0)]) for p in pooled]
        rule = replace(given.rule, keep=conjunction(given.rule.keep, lt(J, const(S))))
        return self._extended(given)._replace(rule=rule), [*lists, *pooled]

    def narrowed(self, chosen: Tensor, given: Operands) -> Operands:
        S, slot = given.key.shape[2], len(given.captured)
        back, count = self._back(chosen, given), self._counts(given.key)
        blocks, place = len(count), self.place(chosen, given)
        end = blocks * self.block
        table = torch.cat([marked(chosen, blocks), back], -1)
        kept = conjunction(given.rule.keep, lt(J, const(S)), load(slot, (*place, divided(J, self.block)), BOOL))
        pooled = conjunction(le(const(end), J), load(slot, (*place, sub(J, const(end - blocks))), BOOL))
        added = F.pad(count.log(), (end, 0)).to(given.key.dtype)
        rule = replace(
            given.rule,
            keep=disjunction(kept, pooled),
            score=add(given.rule.score, load(slot + 1, (J,), FLOAT)),
        )
        return self._extended(given)._replace(captured=[*given.captured, table, added], rule=rule)

    def folded(self, gradient: Tensor, given: Tensor) -> Tensor:
        S, count = given.shape[2], self._counts(given).to(gradient.dtype)
        shared = gradient[:, :, len(count) * self.block :] / count.unsqueeze(-1)
        return gradient[:, :, :S] + shared.repeat_interleave(self.block, 2)[:, :, :S]

    def _counts(self, key: Tensor) -> Tensor:
        """Keys of each block."""
        S = key.shape[2]
        first = torch.arange(0, S, self.block, device=key.device)
        return (S - first).clamp(max=self.block).double()

    def _back(self, chosen: Tensor, given: Operands) -> Tensor:
        """Blocks that come back, (B, heads, tiles, blocks): not chosen, every key kept by every row of the tile."""
        last = last_keys(given)[..., :: self.rows]  # of the first row of a tile, whose prefix is the shortest
        ends = self._counts(given.key).long().cumsum(0) - 1
        return ~marked(chosen, len(ends)) & (ends <= last.unsqueeze(-1))

    def _extended(self, given: Operands) -> Operands:
        """Keys and values filled up to whole blocks, then the means of the blocks."""
        spare = -given.key.shape[2] % self.block
        key, value = (
            torch.cat([F.pad(t, (0, 0, 0, spare)), block_means(t, self.block).to(t.dtype)], 2)
            for t in (given.key, given.value)
        )
        return given._replace(key=key, value=value)

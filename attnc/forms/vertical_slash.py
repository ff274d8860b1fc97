"""Vertical and slash lines: each head keeps the columns and the diagonals that the last rows attend to most.

    A = softmax of the last `last` rows
    V = the top `columns` of sum_i A_ij;   D = the top `diagonals` of sum_{i - j = o} A_ij
    o_i = softmax_{j in V or i - j in D, kept}(score_ij) v_j

The first `sinks` columns and the `window` nearest diagonals are among them. Every row keeps what the last ones choose,
as published, for prompts: the choice of a causal model then reads later rows. The A-shape of the paper is sinks_window,
its block pattern block_scores{pool=mean}.

Blocks that a diagonal crosses are attended as blocks under the mask, columns outside of them as gathered keys.

Source: Jiang et al. 2024, "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse
Attention", arXiv:2407.02490, section 3.2 and algorithm 2.
Exact:  where columns or diagonals are all there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from attnc.codegen.key_lists import NONE, KeyLists, of_tiles
from attnc.codegen.selectors import last_keys
from attnc.codegen.selectors_lines import blocks_on_diagonals, line_shares, top_lines
from attnc.cost_models.cost import Work
from attnc.expr import BOOL, B, H, I, J, add, const, floordiv, load, sub
from attnc.forms.base import knob
from attnc.forms.selected import CAUSAL, Selected, marked, scale_of
from attnc.operands import Operands
from attnc.predicate import conjunction, disjunction, distances
from attnc.region import ITEM_BYTES, AttentionRegion

TILE = 64  # rows of a tile, and keys of a block


@dataclass(frozen=True)
class VerticalSlash(Selected):
    """columns, diagonals: lines kept, sinks and window among them; last: rows that choose; share: as block_mixture."""

    name: ClassVar[str] = "vertical_slash"
    phases: ClassVar[tuple[str, ...]] = ("prefill", "training")
    columns: int = knob(1024, 128, 256, 512, 2048, role="semantic", unit="keys")
    diagonals: int = knob(1024, 128, 256, 512, 2048, 4096, role="semantic", unit="distances")
    last: int = knob(64, role="semantic", unit="query rows")
    sinks: int = knob(30, role="semantic", unit="keys")
    window: int = knob(30, 128, role="semantic", unit="keys")
    share: str = knob("head", "group", role="semantic")

    def counts(self, L: int, S: int) -> tuple[int, int]:
        """Columns and diagonals of a list."""
        least = max(self.columns, self.sinks), max(self.diagonals, self.window)
        return torch.sym_min(least[0], S), torch.sym_min(least[1], L + S - 1)

    def chosen_shape(self, given: Operands) -> tuple[int, ...]:
        (B, Hq, L, _), (heads, S) = given.query.shape, given.key.shape[1:3]
        return B, Hq if self.share == "head" else heads, sum(self.counts(L, S))

    def choose(self, given: Operands) -> Tensor:
        L, S, device = given.query.shape[2], given.key.shape[2], given.query.device
        shares = line_shares(given.query, given.key, last_keys(given), self.last, scale_of(given))
        if self.share == "group":
            shares = tuple(x.unflatten(1, (-1, given.group)).sum(2) for x in shares)
        least = distances(given.rule.keep)[0]
        nearest = min(0, L - S) if least is None else least
        place, apart = torch.arange(S, device=device), torch.arange(L + S - 1, device=device) - (S - 1)
        near = (apart >= nearest) & (apart < nearest + self.window)
        allowed = torch.ones_like(near) if least is None else apart >= least
        columns, diagonals = self.counts(L, S)
        first = place < self.sinks
        return torch.cat(
            [
                top_lines(shares[0], torch.ones_like(first), first, columns),
                top_lines(shares[1], allowed, near & allowed, diagonals),
            ],
            -1,
        )

    def tables(self, chosen: Tensor, given: Operands) -> tuple[Tensor, Tensor]:
        """Which columns and which diagonals are kept, (B, heads, S) and (B, heads, L + S - 1)."""
        L, S = given.query.shape[2], given.key.shape[2]
        columns, diagonals = chosen.split(self.counts(L, S), -1)
        return marked(columns, S), marked(diagonals, L + S - 1)

    def narrowed(self, chosen: Tensor, given: Operands) -> Operands:
        S, slot = given.key.shape[2], len(given.captured)
        head = H if self.share == "head" or given.group == 1 else floordiv(H, const(given.group))
        lines = disjunction(
            load(slot, (B, head, J), BOOL), load(slot + 1, (B, head, add(sub(I, J), const(S - 1))), BOOL)
        )
        rule = replace(given.rule, keep=conjunction(given.rule.keep, lines))
        return given._replace(captured=[*given.captured, *self.tables(chosen, given)], rule=rule)

    def laid(self, chosen: Tensor, given: Operands) -> tuple[Operands, Sequence[KeyLists]]:
        B, Hq, L, _ = given.query.shape
        heads, S = given.key.shape[1:3]
        shape, device = (B, Hq, heads, L), chosen.device
        diagonals = self.tables(chosen, given)[1]
        blocks = blocks_on_diagonals(diagonals, L, S, TILE, TILE)
        end = torch.arange(TILE, L + TILE, TILE, device=device)[: blocks.shape[2]].clamp(max=L) - 1
        least = distances(given.rule.keep)[0]
        reach = torch.full_like(end, S - 1) if least is None else end - least  # the last key of each tile
        start = torch.arange(blocks.shape[3], device=device)
        blocks = blocks & (start * TILE <= reach.unsqueeze(-1))
        single = chosen[..., : self.counts(L, S)[0]].unsqueeze(2).expand(-1, -1, blocks.shape[2], -1)
        covered = blocks.gather(-1, single.clamp(min=0) // TILE)
        single = torch.where(covered | (single > reach.unsqueeze(-1)), NONE, single)
        keeps = "causal" if given.rule.keep == CAUSAL and L == S else "rule"
        return self.narrowed(chosen, given), [
            *of_tiles(torch.where(blocks, start, NONE), shape, TILE, TILE, "rule"),
            *of_tiles(single, shape, TILE, 1, keeps),
        ]

    def pairs(self, region: AttentionRegion) -> float:
        s = region.shape
        columns, diagonals = self.counts(s.L, s.S)
        # A tile takes every block of keys that a diagonal crosses: two, where no other diagonal shares them.
        return float(s.L) * min(s.S, columns + 2 * diagonals * TILE)

    def choosing(self, region: AttentionRegion) -> Work:
        s, item = region.shape, ITEM_BYTES.get(region.dtype, 4)
        scores = float(s.B * s.Hq * min(self.last, s.L)) * s.S
        return Work("composed", 2.0 * scores * s.E, 2.0 * scores, float(s.B * s.H * s.S * s.E * item) + 16 * scores, 16)

    def keeps_all(self, region: AttentionRegion) -> bool:
        s = region.shape
        return self.columns >= s.S or self.diagonals >= s.L + s.S - 1

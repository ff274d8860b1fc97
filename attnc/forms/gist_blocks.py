"""Gist blocks: each query attends to the gists of all blocks, to its own block, and to those whose gist suits it best.

    block c: keys c block .. (c + 1) block - 1, the last `gists` of them written by the model to sum up the others
    g_ic = q_i . mean of the gists of c;    I_i = the blocks with the top_k largest g_ic, its own among them
    o_i = softmax over the keys of I_i and the gists of every block, kept(score_ij) v_j

With gists=0 the sequence holds none: the call supplies what stands for each block, summaries (B, H, blocks, E), which
is scored and not attended. A query inside a block scores only blocks before it, which are complete.

Source: Mao et al. 2026, "Simplified Sparse Attention via Gist Tokens", arXiv:2604.20920. One level: its gists of gists
are left out.
Exact:  where top_k blocks are all there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from attnc.codegen.key_lists import NONE, KeyLists, of_tiles
from attnc.codegen.selectors import block_means
from attnc.codegen.selectors_blocks import wide
from attnc.codegen.selectors_hash import logs_of_counts
from attnc.expr import BOOL, FLOAT, J, const, load, mod, sub
from attnc.forms.base import knob
from attnc.forms.block_mixture import BlockMixture
from attnc.forms.selected import divided, marked
from attnc.operands import Operands
from attnc.predicate import conjunction, disjunction, distances, le, where
from attnc.region import AttentionRegion

TILE = 64  # rows that take the gists together


@dataclass(frozen=True)
class GistBlocks(BlockMixture):
    """The knobs of block_mixture; block: keys of a block, its gists among them; gists: of a block, 0: supplied."""

    name: ClassVar[str] = "gist_blocks"
    chooses_blocks: ClassVar[bool] = False  # gists stand beside the blocks
    block: int = knob(64, 17, 33, role="semantic", unit="keys")
    top_k: int = knob(8, 4, 16, role="semantic", unit="blocks")
    pick: str = knob("row", role="semantic")
    gists: int = knob(1, 0, role="semantic", unit="keys")

    def tensors(self, width: int, weights: Mapping[str, Tensor]) -> list[Tensor]:
        return [] if self.gists else [weights["summaries"]]

    def unfit(self, region: AttentionRegion) -> str | None:
        s = region.shape
        if self.gists > self.block:
            return f"gist_blocks holds its gists in blocks, found {self.gists} in blocks of {self.block}; use fewer."
        if not self.gists and not s.has_lengths:
            return f"gist_blocks{{gists=0}} takes summaries of one length, found {s.text('S')} keys; use dynamic=False."
        found, wanted = dict(region.weights).get("summaries"), (s.B, s.H, -(-s.S // self.block), s.E)
        if self.gists or (found is not None and tuple(found) == wanted):
            return super().unfit(region)
        return (
            f"gist_blocks{{gists=0}} needs summaries (B, H, blocks, E) = {wanted} of the call, found {found or 'none'}"
            "; block_mixture takes the means of the keys."
        )

    def summaries(self, given: Operands) -> Tensor:
        if not self.gists:
            return wide(given.captured[-1])
        S = given.key.shape[2]
        whole = S // self.block * self.block
        gists = given.key[:, :, :whole].unflatten(2, (-1, self.block))[:, :, :, -self.gists :]
        found = wide(gists).mean(3)  # a block that is not complete is scored by its mean, where no mask is
        return found if whole == S else torch.cat([found, block_means(given.key[:, :, whole:], self.block)], 2)

    def narrowed(self, chosen: Tensor, given: Operands) -> Operands:
        return self._ruled(chosen, given, held=False)

    def _ruled(self, chosen: Tensor, given: Operands, *, held: bool) -> Operands:
        """The choice as a mask; held: a gist of a chosen block, which `laid` holds twice, weighs half."""
        if not self.gists:
            return super().narrowed(chosen, given)
        table = marked(chosen, -(-given.key.shape[2] // self.block))
        block = load(len(given.captured), (*self.place(chosen, given), divided(J, self.block)), BOOL)
        gist = le(const(self.block - self.gists), mod(J, const(self.block)))
        rule = replace(given.rule, keep=conjunction(given.rule.keep, disjunction(block, gist)))
        captured = [*given.captured, table]
        if held:
            times = where(conjunction(block, gist), const(2), const(1))
            rule = replace(rule, score=sub(rule.score, load(len(captured), (times,), FLOAT)))
            captured.append(logs_of_counts(2, given.key))
        return given._replace(captured=captured, rule=rule)

    def laid(self, chosen: Tensor, given: Operands) -> tuple[Operands, Sequence[KeyLists]]:
        same, lists = super().laid(chosen, given)
        if not self.gists:
            return same, lists
        (B, Hq, L, _), (H, S), device = given.query.shape, given.key.shape[1:3], chosen.device
        at = torch.arange(S, device=device)
        at = at[at % self.block >= self.block - self.gists]
        tile, least = min(TILE, L), distances(given.rule.keep)[0]
        end = torch.arange(tile, L + tile, tile, device=device).clamp(max=L) - 1
        reach = torch.full_like(end, S - 1) if least is None else end - least
        gists = torch.where(at <= reach.unsqueeze(-1), at, NONE).view(1, 1, len(end), -1)
        more = of_tiles(gists, (B, Hq, H, L), tile, 1, "rule") if len(at) else []
        return self._ruled(chosen, given, held=True), [*lists, *more]

    def pairs(self, region: AttentionRegion) -> float:
        s = region.shape
        return super().pairs(region) + float(s.L) * (s.S // self.block) * self.gists

"""Token top-k: each query attends to the single keys that score highest, by the true score or by a small indexer.

    exact     I_i = the top_k keys with the largest score_ij; heads that choose together: the largest summed weights
    indexer   I_i = the top_k keys with the largest sum_h w_ih relu(a_ih . b_j), one list for all heads
    blocks    the indexer looks only inside the `blocks` blocks of keys with the best mean b, a row's own being one
    heads     the indexer sums only the `heads` heads with the largest |w_ih| mean_c relu(a_ih . mean_c b), over blocks

The indexer's tensors stand behind the captured ones of the rule: a (B, HI, L, DI), b (B, S, DI), w (B, L, HI). A
factor of the products changes no order and is left out. The systems as settings: the oracle scorer=exact; DeepSeek's
sparse attention scorer=indexer,top_k=2048; HISA blocks=64,block=128 beside it; MISA heads=8: its statistic of blocks is
taken to be the mean above. Neither of the last two reads a block that a row does not keep whole, but for its own.

Source: DeepSeek-AI 2025, "DeepSeek-V3.2", arXiv:2512.02556, equation 1; Xu et al. 2026, arXiv:2603.28458 (HISA); Zhou
et al. 2026, arXiv:2605.07363 (MISA).
Exact:  where top_k keys are all there are, and no blocks are chosen before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnc.codegen.selectors import block_means, joined, last_keys, positions_of
from attnc.codegen.selectors_blocks import wide
from attnc.codegen.selectors_tokens import (
    at_pairs,
    best_keys,
    exact_scores,
    index_candidates,
    index_scores,
    pieces,
    routed_heads,
)
from attnc.cost_models.cost import Work
from attnc.forms.base import knob
from attnc.forms.token_lists import TokenLists
from attnc.operands import Operands
from attnc.region import ITEM_BYTES, AttentionRegion

WEIGHTS = ("index_query", "index_key", "index_weight")


@dataclass(frozen=True)
class TokenTopK(TokenLists):
    """top_k: keys of a row, those that stay among them; sinks, window: first and last keys that stay, 0: none.

    share: whether each query head chooses, those of a key head together, or all; an indexer chooses for all.
    blocks, heads: of the indexer, 0: all; block: keys whose index keys are averaged for either.
    """

    name: ClassVar[str] = "token_top_k"
    top_k: int = knob(2048, 64, 256, 512, 1024, role="semantic", unit="keys")
    scorer: str = knob("exact", "indexer", role="semantic")
    sinks: int = knob(0, 4, role="semantic", unit="keys")
    window: int = knob(0, 64, role="semantic", unit="keys")
    share: str = knob("head", "group", "all", role="semantic")
    blocks: int = knob(0, 64, role="semantic", unit="blocks")
    block: int = knob(128, role="semantic", unit="keys")
    heads: int = knob(0, 8, role="semantic", unit="heads")

    @property
    def indexed(self) -> bool:
        """Whether an indexer chooses."""
        return self.scorer == "indexer"

    @property
    def is_distinct(self) -> bool:
        return (not self.indexed or self.share == "head") and (self.blocks + self.heads > 0 or self.block == 128)

    def kept_blocks(self, S: int) -> int:
        return torch.sym_min(max(self.top_k, self.sinks + self.window), S)

    def keeps_all(self, region: AttentionRegion) -> bool:
        S = region.shape.S
        return super().keeps_all(region) and (not self.blocks or self.blocks * self.block >= S)

    def choice_heads(self, given: Operands) -> int:
        if self.indexed:
            return 1
        return {"head": given.query.shape[1], "group": given.key.shape[1], "all": 1}[self.share]

    def sharing(self, region: AttentionRegion) -> int:
        return region.shape.group if self.indexed or self.share != "head" else 1

    def tensors(self, width: int, weights: Mapping[str, Tensor]) -> list[Tensor]:
        return [weights[name] for name in WEIGHTS] if self.indexed else []

    def unfit(self, region: AttentionRegion) -> str | None:
        if not self.indexed:
            if self.blocks or self.heads:
                return (
                    f"token_top_k scores every key in every head where scorer=exact, found blocks={self.blocks}, "
                    f"heads={self.heads}; use scorer=indexer, or 0 for both."
                )
            return None
        s, given = region.shape, dict(region.weights)
        if not s.has_lengths:
            return (
                f"token_top_k{{scorer=indexer}} takes index tensors of one length, found {s.text('L')} x "
                f"{s.text('S')}; use scorer=exact, or dynamic=False."
            )
        HI, DI = (tuple(given.get("index_query", ())) + (0,) * 4)[1:4:2]
        wanted = dict(zip(WEIGHTS, ((s.B, HI, s.L, DI), (s.B, s.S, DI), (s.B, s.L, HI)), strict=True))
        if {name: tuple(given[name]) for name in WEIGHTS if name in given} == wanted:
            return None
        return (
            f"token_top_k{{scorer=indexer}} needs index_query (B, HI, L, DI) = ({s.B}, HI, {s.L}, DI), index_key "
            f"({s.B}, {s.S}, DI) and index_weight ({s.B}, {s.L}, HI) of the call, found {given or 'none'}; "
            "a model without an indexer can take scorer=exact."
        )

    def choose(self, given: Operands) -> Tensor:
        last, heads = last_keys(given), self.choice_heads(given)
        last, own = (joined(x, heads, "amax") for x in (last, positions_of(given, last)))
        width = given.captured[-3].shape[1] if self.indexed else given.query.shape[1]
        each = given.query.shape[0] * width * given.key.shape[2]
        pick = self._indexed_piece if self.indexed else self._exact_piece
        spans = pieces(given.query.shape[2], each, given.query.device)
        found = [pick(given, a, b, own[..., a:b], last[..., a:b]) for a, b in spans]
        return torch.cat(found, 2)

    def _exact_piece(self, given: Operands, first: int, end: int, own: Tensor, last: Tensor) -> Tensor:
        score, keep = exact_scores(given, first, end, self.choice_heads(given))
        count = self.kept_blocks(given.key.shape[2])
        return best_keys(score, keep, count, own=own, sinks=self.sinks, window=self.window)

    def _indexed_piece(self, given: Operands, first: int, end: int, own: Tensor, last: Tensor) -> Tensor:
        query, key, weight = (wide(t) for t in given.captured[-3:])
        query, weight, S, at = query[:, :, first:end].transpose(1, 2), weight[:, first:end], key.shape[1], None
        if self.heads:
            pooled = block_means(key.unsqueeze(1), self.block).squeeze(1)
            query, weight = routed_heads(query, pooled, weight, last.squeeze(1), self.block, S, self.heads)
        if self.blocks:
            stay = {"sinks": self.sinks, "window": self.window}
            at, score = index_candidates(query, key, weight, own, last, self.block, self.blocks, **stay)
        else:
            score = index_scores(query, key, weight).unsqueeze(1)
        keep = at_pairs(given, given.rule.keep, first, end, None if at is None else at.clamp(min=0))
        return best_keys(
            score, joined(keep, 1, "any"), self.kept_blocks(S), own=own, sinks=self.sinks, window=self.window, at=at
        )  # fmt: skip

    def choosing(self, region: AttentionRegion) -> Work:
        s, item = region.shape, ITEM_BYTES.get(region.dtype, 4)
        if not self.indexed:
            scores = float(s.B * s.Hq * s.L) * s.S
            read = float(s.B * s.H * s.S * s.E * item)
            return Work("composed", 2.0 * scores * s.E, 4.0 * scores, read + 16 * scores, 16)
        index = dict(region.weights).get("index_query", (s.B, 64, s.L, 128))
        pairs = float(s.B * s.L) * min(s.S, self.blocks * self.block or s.S)
        pairs += float(s.B * s.L) * -(-s.S // self.block) if self.blocks or self.heads else 0.0
        heads = min(self.heads or index[1], index[1])
        read = float(s.B * s.S * index[3] * item)
        return Work("composed", 2.0 * pairs * heads * index[3], (heads + 4.0) * pairs, read + 16 * pairs, 16)

"""Page bounds: a decoded query attends to the pages of keys whose bound on its product is largest.

    u_ip = sum_c max(q_ic max_{j in p} k_jc, q_ic min_{j in p} k_jc)  >=  q_i . k_j for every key j of page p

Pages are formed of the keys that a row may keep, so that rows of several sequences, or of several positions, choose
each for itself. The bounds are formed at each call: every key is read once, what is saved is the rest.

Source: Tang et al. 2024, "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", arXiv:2406.10774,
algorithm 1.
Exact:  where top_k pages are all there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from attnc.codegen.selectors import joined, last_keys, positions_of
from attnc.codegen.selectors_blocks import bounds
from attnc.codegen.selectors_tokens import at_pairs
from attnc.cost_models.cost import Work
from attnc.expr_text import spell
from attnc.forms.base import knob
from attnc.forms.selected import ScoredBlocks, ends
from attnc.operands import Operands
from attnc.region import ITEM_BYTES, AttentionRegion
from attnc.rule_attention import lowered


@dataclass(frozen=True)
class PageBounds(ScoredBlocks):
    """block: keys of a page; top_k: pages of a row; sinks, window: keys whose pages stay; 0: none, as published.

    share: whether each query head chooses, or those of a key head together, by the largest of their bounds.
    """

    name: ClassVar[str] = "page_bounds"
    phases: ClassVar[tuple[str, ...]] = ("decode",)
    block: int = knob(16, 32, 64, role="semantic", unit="keys")
    top_k: int = knob(64, 32, 128, 256, role="semantic", unit="pages")
    sinks: int = knob(0, 16, role="semantic", unit="keys")
    window: int = knob(0, 1, role="semantic", unit="keys")
    share: str = knob("head", "group", role="semantic")

    def unfit(self, region: AttentionRegion) -> str | None:
        rule = region.rule
        if self.sinks and self.window == 0 and not (ends(rule.keep) and lowered(rule.score) is None):
            return (
                "page_bounds with sinks and window=0 may choose no key that a row keeps, found the mask "
                f"{spell(rule.keep)} and the scores {spell(rule.score)}; use window=1."
            )
        return None

    def choose(self, given: Operands) -> Tensor:
        last, heads = last_keys(given), self.choice_heads(given)
        score = joined(bounds(given.query, given.key, last, self.block), heads, "amax")
        if not ends(given.rule.keep):  # a page of which a row keeps nothing is none of its pages
            keep = joined(at_pairs(given, given.rule.keep, 0, given.query.shape[2]), heads, "any")
            kept = F.pad(keep, (0, -keep.shape[-1] % self.block)).unflatten(-1, (-1, self.block)).any(-1)
            score = score.masked_fill(~kept, -torch.inf)
        return self.best(score, positions_of(given, last), last, given)

    def choosing(self, region: AttentionRegion) -> Work:
        s, item = region.shape, ITEM_BYTES.get(region.dtype, 4)
        scores = float(s.B * s.Hq * s.L) * -(-s.S // self.block)
        return Work("composed", 4.0 * scores * s.E, 2.0 * scores, 2.0 * s.B * s.H * s.S * s.E * item, 20)

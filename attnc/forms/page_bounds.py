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

from torch import Tensor

from attnc.codegen.selectors import joined, last_keys, positions_of
from attnc.codegen.selectors_blocks import bounds
from attnc.cost_models.cost import Work
from attnc.expr import TRUE
from attnc.expr_text import spell
from attnc.forms.base import knob
from attnc.forms.selected import ScoredBlocks, is_prefix
from attnc.operands import Operands
from attnc.region import ITEM_BYTES, AttentionRegion


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
        if self.window == 0 and region.rule.keep != TRUE and not is_prefix(region.rule.keep):
            return (
                "page_bounds with window=0 may choose no key that a row keeps, found the mask "
                f"{spell(region.rule.keep)}; use window=1."
            )
        return None

    def choose(self, given: Operands) -> Tensor:
        last = last_keys(given)
        score = joined(bounds(given.query, given.key, last, self.block), self.choice_heads(given), "amax")
        return self.best(score, positions_of(given, last), last, given)

    def choosing(self, region: AttentionRegion) -> Work:
        s, item = region.shape, ITEM_BYTES.get(region.dtype, 4)
        scores = float(s.B * s.Hq * s.L) * -(-s.S // self.block)
        return Work("composed", 4.0 * scores * s.E, 2.0 * scores, 2.0 * s.B * s.H * s.S * s.E * item, 20)

"""Cache eviction: each query finds a cache of a bounded size, from which every later query drops a key for good.

    h2o        cache of heavy + recent keys of a key head; the least sum of weights so far leaves, not the recent ones
    tova       one cache of heavy + recent keys for all heads; the least mean weight of the last row leaves
    h2o_local  the first: sums of weights over all keys, not those of the cache; the recent keys beside heavy ones

Over a whole sequence the evictions of a decoder that starts at its first token are simulated: row t attends to what its
cache holds then, its own key added. Each step depends on earlier rows and keys only, so that the result is causal; the
steps run one after the other. Decoding with a cache of the past is refused: what was dropped is not in it.

Source: Zhang et al. 2023, "H2O: Heavy-Hitter Oracle for Efficient Generative Inference", arXiv:2306.14048, algorithm 1;
Oren et al. 2024, "Transformers are Multi-State RNNs", arXiv:2401.06104, section 3.2 (tova).
Exact:  where the cache holds every key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnc.codegen.selectors_eviction import evicted, local_hitters
from attnc.cost_models.cost import Work
from attnc.expr_text import spell
from attnc.forms.base import knob
from attnc.forms.token_lists import TokenLists
from attnc.operands import Operands
from attnc.predicate import distances
from attnc.region import ITEM_BYTES, AttentionRegion


@dataclass(frozen=True)
class CacheEviction(TokenLists):
    """heavy: keys held for their weights; recent: last keys before a row that stay; tova has none of these, but a cache
    of both together."""

    name: ClassVar[str] = "cache_eviction"
    phases: ClassVar[tuple[str, ...]] = ("prefill", "training")
    policy: str = knob("h2o", "tova", "h2o_local", role="semantic")
    heavy: int = knob(256, 64, 1024, role="semantic", unit="keys")
    recent: int = knob(256, 64, 1024, role="semantic", unit="keys")

    def kept_blocks(self, S: int) -> int:
        return self.heavy + self.recent + 1

    def choice_heads(self, given: Operands) -> int:
        return 1 if self.policy == "tova" else given.key.shape[1]

    def unfit(self, region: AttentionRegion) -> str | None:
        s, least = region.shape, distances(region.rule.keep)[0]
        if not s.is_square:
            return (
                f"cache_eviction drops keys from the first token on, found {s.text('L')} queries of {s.text('S')} "
                "keys; use token_top_k or page_bounds there."
            )
        if least is None or least < 0:
            return (
                f"cache_eviction keeps no key behind a row, found the mask {spell(region.rule.keep)}; "
                "use it for causal attention."
            )
        return None

    def choose(self, given: Operands) -> Tensor:
        size = self.heavy + self.recent
        if self.policy == "h2o_local":
            return local_hitters(given, self.heavy, self.recent)
        if self.policy == "tova":
            return evicted(given, size, 0, together=True, summed=False)
        return evicted(given, size, self.recent, together=False, summed=True)

    def choosing(self, region: AttentionRegion) -> Work:
        s, item = region.shape, ITEM_BYTES.get(region.dtype, 4)
        pairs = float(s.B * s.Hq * s.L) * min(s.S, self.heavy + self.recent + 1)
        read = pairs / s.group * s.E * item
        return Work("composed", 2.0 * pairs * s.E, 4.0 * pairs, 3 * read + 8 * pairs, 24 * s.L)

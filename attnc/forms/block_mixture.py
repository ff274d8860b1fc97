"""Block mixture: each query attends to the blocks of keys whose mean it scores highest, and to its own block.

    g_ic = q_i . mean_{j in block c} k_j;   I_i = the blocks with the top_k largest g_ic among those before its own,
    its own block included in the count;    o_i = softmax_{j in I_i, kept}(score_ij) v_j

With `mass` a row stops earlier (VMoBA): at the first blocks, the best before the others, that hold `mass` percent of
softmax_c(scale g_ic) over the blocks that it may keep whole; with pick=head, of all rows of a head together, the
largest pairs of a row and a block first. That looks at later rows: the choice of a causal model is then not causal.

Rows are sorted by the block they chose, so that neighbouring rows may choose as they like; parts are merged by the
log-sum-exp.

Source: Lu et al. 2025, "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv:2502.13189, equations 1 to 8;
mass and pick: Wu et al. 2025, "VMoBA", arXiv:2506.23858, section 3.
Exact:  where top_k blocks are all there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnc.codegen.selectors import block_means, block_shares, joined, last_keys, positions_of
from attnc.codegen.selectors_blocks import products
from attnc.cost_models.cost import Work
from attnc.forms.base import knob
from attnc.forms.selected import ScoredBlocks, scale_of
from attnc.operands import Operands
from attnc.region import ITEM_BYTES, AttentionRegion


@dataclass(frozen=True)
class BlockMixture(ScoredBlocks):
    """block: keys averaged; top_k: blocks of a row at most, its own among them; sinks, window: keys whose blocks stay.

    share: whether each query head chooses ("head"), or those of a key head together, by the sum of their scores.
    mass: percent of the softmax over blocks at which a row, or a head, has enough; 0: all of top_k.
    """

    name: ClassVar[str] = "block_mixture"
    block: int = knob(512, 64, 128, 256, 1024, role="semantic", unit="keys")
    top_k: int = knob(3, 2, 4, 6, 8, 12, 16, role="semantic", unit="blocks")
    sinks: int = knob(0, 64, role="semantic", unit="keys")
    window: int = knob(1, 512, role="semantic", unit="keys")
    share: str = knob("head", "group", role="semantic")
    mass: int = knob(0, role="semantic", unit="percent")
    pick: str = knob("row", "head", role="semantic")

    @property
    def is_distinct(self) -> bool:
        return self.mass > 0 or self.pick == "row"

    def keeps_all(self, region: AttentionRegion) -> bool:
        return super().keeps_all(region) and (self.mass in (0, 100) or self.kept_blocks(region.shape.S) == 1)

    def summaries(self, given: Operands) -> Tensor:
        """What stands for the keys of each block, (B, H, blocks, E), float32 or float64."""
        return block_means(given.key, self.block)

    def choose(self, given: Operands) -> Tensor:
        mean = self.summaries(given)
        score, last = products(given.query.to(mean.dtype), mean), last_keys(given)
        own, score = positions_of(given, last), joined(score, self.choice_heads(given), "sum")
        if self.mass:
            score = score * (scale_of(given) * score.shape[1] / given.query.shape[1])
            score = block_shares(score, joined(last, score.shape[1], "amax"), self.block, given.key.shape[2])
        return self.best(score, own, last, given, mass=self.mass, together=self.pick == "head")

    def choosing(self, region: AttentionRegion) -> Work:
        s, item = region.shape, ITEM_BYTES.get(region.dtype, 4)
        scores = float(s.B * s.Hq * s.L) * -(-s.S // self.block)
        return Work("composed", 2.0 * scores * s.E, 4.0 * scores, float(s.B * s.H * s.S * s.E * item), 12)

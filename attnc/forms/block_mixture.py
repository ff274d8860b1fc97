"""Block mixture: each query attends to the blocks of keys whose mean it scores highest, and to its own block.

    g_ic = q_i . mean_{j in block c} k_j;   I_i = the blocks with the top_k largest g_ic among those before its own,
    its own block included in the count;    o_i = softmax_{j in I_i, kept}(score_ij) v_j

Rows are sorted by the block they chose, so that neighbouring rows may choose as they like; parts are merged by the
log-sum-exp.

Source: Lu et al. 2025, "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv:2502.13189, equations 1 to 8.
Exact:  where top_k blocks are all there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnc.codegen.selectors import block_means, last_keys, positions_of, top_blocks
from attnc.cost_models.cost import Work
from attnc.forms.base import knob
from attnc.forms.selected import BlockSelected, always_blocks
from attnc.operands import Operands
from attnc.region import ITEM_BYTES, AttentionRegion


@dataclass(frozen=True)
class BlockMixture(BlockSelected):
    """block: keys averaged; top_k: blocks of a row, its own among them; sinks, window: keys whose blocks stay.

    share: whether each query head chooses ("head"), or those of a key head together, by the sum of their scores.
    """

    name: ClassVar[str] = "block_mixture"
    block: int = knob(512, 64, 128, 256, 1024, role="semantic", unit="keys")
    top_k: int = knob(3, 2, 4, 6, 8, 12, 16, role="semantic", unit="blocks")
    sinks: int = knob(0, 64, role="semantic", unit="keys")
    window: int = knob(1, 512, role="semantic", unit="keys")
    share: str = knob("head", "group", role="semantic")

    @property
    def block_keys(self) -> int:
        return self.block

    def kept_blocks(self, S: int) -> int:
        always = always_blocks(self.sinks, self.window, self.block)
        return min(max(self.top_k, always), -(-S // self.block))

    def choice_heads(self, given: Operands) -> int:
        return given.key.shape[1] if self.share == "group" else given.query.shape[1]

    def choose(self, given: Operands) -> Tensor:
        query, mean = given.query, block_means(given.key, self.block)
        B, _, L, _ = query.shape
        score = query.to(mean.dtype).reshape(B, mean.shape[1], -1, query.shape[-1]) @ mean.mT
        score = score.view(B, mean.shape[1], given.group, L, -1)
        score = score.sum(2) if self.share == "group" else score.flatten(1, 2)
        last = last_keys(given)
        own = positions_of(given, last)
        if self.share == "group" and last.shape[1] > 1:
            last, own = (x.unflatten(1, (-1, given.group)).amax(2) for x in (last, own))
        return top_blocks(
            score, own, last, self.block, self.kept_blocks(given.key.shape[2]), sinks=self.sinks, window=self.window
        )

    def choosing(self, region: AttentionRegion) -> Work:
        s, item = region.shape, ITEM_BYTES.get(region.dtype, 4)
        scores = float(s.B * s.Hq * s.L) * -(-s.S // self.block)
        return Work("composed", 2.0 * scores * s.E, 4.0 * scores, float(s.B * s.H * s.S * s.E * item), 12)

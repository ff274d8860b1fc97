"""Memory blocks: each query attends to the first keys, the last ones, and the blocks whose representatives suit it.

    r_m = mean_{n = 1 .. window} q_{m+n} . k_m;    a block is represented by its `keys` keys with the largest r_m
    g_ic = q_i . sum_{m represents c} k_m;         the top_k blocks with the largest g_ic, those of the first `sinks`
                                                   and of the last `window` keys among them

A block is chosen for a query only when all of its keys lie more than `window` before it, so that r_m reads no query
that is later than the one that chooses. Decoding would need the queries of the prompt: it is refused. Each row chooses
for itself where the paper lets chunks of rows choose together.

Source: Xiao et al. 2024, "InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory",
arXiv:2402.04617, equations 1 and 2. Positions are not remapped: keys keep those they have.
Exact:  where top_k blocks are all there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnc.codegen.selectors import joined, last_keys, positions_of
from attnc.codegen.selectors_blocks import products, representatives
from attnc.cost_models.cost import Work
from attnc.forms.base import knob
from attnc.forms.selected import ScoredBlocks
from attnc.operands import Operands
from attnc.region import ITEM_BYTES, AttentionRegion


@dataclass(frozen=True)
class MemoryBlocks(ScoredBlocks):
    """block: keys of a block; keys: those that represent it; top_k: blocks of a row, those that stay among them.

    share: whether each query head chooses, or those of a key head together, by the sum of their scores.
    """

    name: ClassVar[str] = "memory_blocks"
    phases: ClassVar[tuple[str, ...]] = ("prefill", "training")
    block: int = knob(128, 64, role="semantic", unit="keys")
    keys: int = knob(4, 1, 8, role="semantic", unit="keys")
    top_k: int = knob(48, 16, 32, 96, role="semantic", unit="blocks")
    sinks: int = knob(128, 0, role="semantic", unit="keys")
    window: int = knob(4096, 1024, role="semantic", unit="keys")
    share: str = knob("head", "group", role="semantic")

    def unfit(self, region: AttentionRegion) -> str | None:
        s = region.shape
        if not s.is_square:
            return (
                f"memory_blocks ranks keys by the queries behind them, found {s.text('L')} queries of "
                f"{s.text('S')} keys; use page_bounds or block_mixture there."
            )
        return None

    def choose(self, given: Operands) -> Tensor:
        last = last_keys(given)
        few = representatives(given.query, given.key, self.block, self.keys, self.window)
        score = joined(products(given.query.to(few.dtype), few), self.choice_heads(given), "sum")
        return self.best(score, positions_of(given, last), last, given)

    def choosing(self, region: AttentionRegion) -> Work:
        s, item = region.shape, ITEM_BYTES.get(region.dtype, 4)
        scores = float(s.B * s.Hq * s.L) * -(-s.S // self.block)
        return Work("composed", 2.0 * scores * s.E, 4.0 * scores, 8.0 * s.B * s.H * s.S * s.E * item, 24)

"""Block scores: tiles of query rows choose blocks of keys by a cheap estimate of the attention they give them.

    pool           share of block c for tile t
    mean           softmax_c(scale mean_{i in t} q_i . mean_{j in c} k_j)
    antidiagonal   sum_{a in t, c' in c} softmax_{c'}(scale / s sum_n q_{as+n} . k_{c's+s-1-n}), s = stride
    last           mean over the last `rows` rows of sum_{j in c} softmax_j(scale q_i . k_j), for every tile

The systems as settings: FlexPrefill's query-aware map pool=mean,top_k=...,mass=95,pick=head; DHSA with chunks of one
length pool=mean (the factors sqrt(length) are then one constant, which changes no order); BiFormer's regions pool=mean,
rows=block,sinks=0,window=0, without a mask; XAttention pool=antidiagonal,stride=16,mass=90; UniPrefill's choice of
tokens pool=last,rows=128,block=64,mass=99,sinks=128,window=128,share=all, for one attention, not for those behind it.

Source: Lai et al. 2025, arXiv:2502.20766, section 3.2 (mean, mass over all tiles); Xu et al. 2025, arXiv:2503.16428,
section 2.1 (antidiagonal); Zhu et al. 2023, arXiv:2303.08810, equations 3 to 6 (regions); Xiong et al. 2025,
arXiv:2510.24606 (DHSA); Fan et al. 2026, arXiv:2605.06221 (UniPrefill).
Exact:  where top_k blocks are all there are, and no mass ends the list.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnc.codegen.selectors_blocks import antidiagonal_shares, last_shares, mean_shares
from attnc.cost_models.cost import Work
from attnc.forms.base import knob
from attnc.forms.row_tiles import RowTiles
from attnc.forms.selected import scale_of
from attnc.operands import Operands
from attnc.region import ITEM_BYTES, AttentionRegion


@dataclass(frozen=True)
class BlockScores(RowTiles):
    """pool: the estimate; stride: of antidiagonals, cut to a divisor of rows and block.

    pick: whether a mass is one of each tile ("row"), or of all tiles of a head together, the largest shares first.
    """

    name: ClassVar[str] = "block_scores"
    pool: str = knob("mean", "antidiagonal", "last", role="semantic")
    stride: int = knob(16, role="semantic", unit="keys")
    pick: str = knob("row", "head", role="semantic")

    @property
    def is_distinct(self) -> bool:
        return (self.pool == "antidiagonal" or self.stride == 16) and (self.mass > 0 or self.pick == "row")

    @property
    def together(self) -> bool:
        return self.pick == "head"

    @property
    def step(self) -> int:
        """The stride that divides a tile and a block."""
        return math.gcd(self.stride, self.rows, self.block)

    def shares(self, given: Operands, rows: Tensor, tiles: Tensor) -> Tensor:
        query, key, scale = given.query, given.key, scale_of(given)
        if self.pool == "antidiagonal":
            return antidiagonal_shares(query, key, rows, self.rows, self.block, scale, self.step)
        if self.pool == "last":
            return last_shares(query, key, rows, self.rows, self.block, scale)
        return mean_shares(query, key, tiles, self.rows, self.block, scale)

    def choosing(self, region: AttentionRegion) -> Work:
        s, item = region.shape, ITEM_BYTES.get(region.dtype, 4)
        pairs = {
            "mean": -(-s.L // self.rows) * -(-s.S // self.block),
            "antidiagonal": -(-s.L // self.step) * -(-s.S // self.step),
            "last": min(self.rows, s.L) * s.S,
        }[self.pool]
        width = s.E * (self.step if self.pool == "antidiagonal" else 1)
        scores = float(s.B * s.Hq * pairs)
        read = float(s.B * (s.H * s.S + s.Hq * s.L) * s.E * item)
        return Work("composed", 2.0 * scores * width, 2.0 * scores, 2 * read + 16 * scores, 16)

"""Forms that give one list of key blocks to each tile of neighbouring query rows, by a share of each block.

    I_t = the blocks of tile t that are always kept, then those of the largest shares, until there are `top_k` of them
          or they hold `mass` percent of the shares;   o_i = softmax_{j in I_t(i), kept}(score_ij) v_j

Rows of a tile choose together, so that a row's choice depends on later rows of its tile: so the systems are published,
for prompts. Their results are causal in what is attended, not in what is chosen.

Source: Lai et al. 2025, "FlexPrefill", arXiv:2502.20766, section 3; Xu et al. 2025, "XAttention", arXiv:2503.16428.
Exact:  where top_k blocks are all there are, and no mass ends the list.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from attnc.codegen.selectors import joined, last_keys, positions_of
from attnc.codegen.selectors_blocks import of_tiles
from attnc.expr import TRUE
from attnc.expr_text import spell
from attnc.forms.base import knob
from attnc.forms.selected import ScoredBlocks
from attnc.operands import Operands
from attnc.region import AttentionRegion


@dataclass(frozen=True)
class RowTiles(ScoredBlocks):
    """rows: query rows of a tile; block: keys of a block; top_k: blocks of a tile at most; mass: percent; 0: no bound.

    sinks, window: keys whose blocks stay; window 0: not even the tile's own. share: whether each query head chooses,
    those of a key head together, or all, by the mean of their shares.
    """

    rows: int = knob(128, role="semantic", unit="query rows")
    block: int = knob(128, 64, role="semantic", unit="keys")
    top_k: int = knob(16, 64, role="semantic", unit="blocks")
    mass: int = knob(0, 90, role="semantic", unit="percent")
    sinks: int = knob(1, 0, role="semantic", unit="keys")
    window: int = knob(1, 0, role="semantic", unit="keys")
    share: str = knob("head", "group", "all", role="semantic")

    @abstractmethod
    def shares(self, given: Operands, rows: Tensor, tiles: Tensor) -> Tensor:
        """Shares of the blocks, (B, Hq or fewer, tiles or 1, blocks); rows, tiles: last keys that each may keep."""

    @property
    def least(self) -> int:
        """Share in 1/10000 that a block must have; 0: any."""
        return 0

    @property
    def together(self) -> bool:
        """Whether the mass is one of all tiles of a head."""
        return False

    @property
    def tile_rows(self) -> int:
        return self.rows

    def keeps_all(self, region: AttentionRegion) -> bool:
        return super().keeps_all(region) and self.mass in (0, 100) and not self.least

    def unfit(self, region: AttentionRegion) -> str | None:
        if self.window == 0 and region.rule.keep != TRUE:
            return (
                f"{self.name} with window=0 may choose no key that a row keeps, found the mask "
                f"{spell(region.rule.keep)}; use window=1."
            )
        return None

    def choose(self, given: Operands) -> Tensor:
        rows = last_keys(given)
        last, own = (of_tiles(x, self.rows) for x in (rows, positions_of(given, rows)))
        share = joined(self.shares(given, rows, last), self.choice_heads(given), "mean")
        share = share.expand(-1, -1, last.shape[-1], -1)
        return self.best(share, own, last, given, mass=self.mass, least=self.least, together=self.together)

"""Gated blocks: tiles of query rows choose blocks of keys by a small learned gate.

    g_tc = softmax_c((mean_{i in t} q_i W_q) . ([max k, min k, mean k]_{block c} W_k) / sqrt(G))

Blocks whose share is at least `least` are kept, at most top_k. The gate's weights are supplied by the user
(`Options.weights`): gate_query (Hq, E, G) and gate_key (H, 3 E, G). Query and key are taken as the attention gets them,
with their positions. share=group gives the heads of a key head one gate, the softmax of the sum of their products:
with rows=1 that of SeerAttention-R, which does not pool the query.

Source: Gao et al. 2024, "SeerAttention", arXiv:2410.13276, section 3.1; Gao et al. 2025, "SeerAttention-R",
arXiv:2506.08889 (decoding).
Exact:  where top_k blocks are all there are, and no bound ends the list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnc.codegen.selectors_blocks import gate_shares
from attnc.cost_models.cost import Work
from attnc.forms.base import knob
from attnc.forms.row_tiles import RowTiles
from attnc.operands import Operands
from attnc.region import ITEM_BYTES, AttentionRegion
from attnc.rule_attention import run_masks

WEIGHTS = ("gate_query", "gate_key")


@dataclass(frozen=True)
class GatedBlocks(RowTiles):
    """floor: share in 1/10000 below which a block is not kept; 0: any."""

    name: ClassVar[str] = "gated_blocks"
    floor: int = knob(0, 40, role="semantic", unit="1/10000 of the softmax")

    @property
    def least(self) -> int:
        return self.floor

    def tensors(self, width: int, weights: Mapping[str, Tensor]) -> list[Tensor]:
        return [weights[name] for name in WEIGHTS]

    def unfit(self, region: AttentionRegion) -> str | None:
        s, given = region.shape, dict(region.weights)
        place, gate = region.path or region.key, given.get("gate_query", (0,))[-1]
        wanted = {"gate_query": (s.Hq, s.E, gate), "gate_key": (s.H, 3 * s.E, gate)}
        found = {name: tuple(given[name]) for name in WEIGHTS if name in given}
        if found != wanted:
            return (
                f"gated_blocks needs weights gate_query (Hq, E, G) = ({s.Hq}, {s.E}, G) and gate_key (H, 3 E, G) = "
                f"({s.H}, {3 * s.E}, G), found {found or 'none'} for {place!r}; pass them in options['weights']."
            )
        if run_masks(region.rule.score):
            return "gated_blocks takes no mask that is added to the scores at run time; use a boolean mask."
        return super().unfit(region)

    def shares(self, given: Operands, rows: Tensor, tiles: Tensor) -> Tensor:
        to_query, to_key = given.captured[-2:]
        joint = self.share == "group"
        return gate_shares(
            given.query, given.key, tiles, self.rows, self.block, (to_query, to_key), joint=joint
        )  # fmt: skip

    def choosing(self, region: AttentionRegion) -> Work:
        s, item = region.shape, ITEM_BYTES.get(region.dtype, 4)
        tiles, blocks, gate = -(-s.L // self.rows), -(-s.S // self.block), s.E
        flops = 2.0 * s.B * gate * (s.Hq * tiles * s.E + 3 * s.H * blocks * s.E + s.Hq * tiles * blocks)
        read = float(s.B * (3 * s.H * s.S + s.Hq * s.L) * s.E * item)
        return Work("composed", flops, 2.0 * s.B * s.Hq * tiles * blocks, read, 20)

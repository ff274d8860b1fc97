"""Tiles of a mask of the run: a mask that arrives as a tensor is looked at once, and tiles that it empties are skipped.

    o_i = softmax_j(score_ij where keep_ij) v_j  over the blocks of keys that some of i's `rows` neighbours keep

Whether that pays is not in the graph: it is offered where the mask is an input, and by how many of its tiles it kept on
the inputs at hand. Another mask is taken as it is, sparse or not, and nothing is compiled again. A mask is classified
once: a tensor that comes back, not written in between, keeps its lists.

Source: Dong et al. 2024, "Flex Attention", arXiv:2412.05496, section 4 (block masks, made once for many calls).
Exact:  always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from attnc.codegen.key_lists import NONE, KeyLists, of_tiles
from attnc.codegen.tiles import classify
from attnc.cost_models.cost import Work
from attnc.cost_models.device import Device, Gpu
from attnc.expr_text import spell
from attnc.forms.base import knob
from attnc.forms.selected import BlockSelected
from attnc.operands import Operands
from attnc.region import AttentionRegion

MOST_KEPT = 0.35  # share of the tiles above which skipping the others does not pay (2048 tokens, 4 heads of 64)
READ = 32.0  # bytes moved to read one pair of a mask at places that are computed, whole tiles counted too
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # mask -> its version, and its lists by what was asked


@dataclass(frozen=True)
class KeptTiles(BlockSelected):
    """Attention over the tiles of `rows` query rows and `block` keys that a mask of the run does not empty."""

    name: ClassVar[str] = "kept_tiles"
    approximates: ClassVar[bool] = False
    rows: int = knob(64, 32, 128, 256, unit="query rows")
    block: int = knob(64, 32, 128, 256, unit="keys")

    @property
    def block_keys(self) -> int:
        return self.block

    @property
    def tile_rows(self) -> int:
        return self.rows

    def kept_blocks(self, S: int) -> int:
        return -(-S // self.block)

    def choice_heads(self, given: Operands) -> int:
        return given.query.shape[1] if "h" in given.rule.keep.names() else 1

    def untargeted(self, device: Device) -> str | None:
        if isinstance(device, Gpu):
            return f"kept_tiles is lowered for the CPU, found the device {device.name}; use flash{{skip=table}}."
        return None

    def concerns(self, region: AttentionRegion) -> bool:
        return region.tiles_kept is not None

    def unfit(self, region: AttentionRegion) -> str | None:
        if region.tiles_kept is None:
            return (
                "kept_tiles looks once at a mask that is an input of the graph, found "
                f"{spell(region.rule.keep)} of no such mask; use dense."
            )
        if region.tiles_kept > MOST_KEPT:
            return (
                f"kept_tiles skips tiles that a mask empties, found {region.tiles_kept:.0%} of them kept on the inputs "
                f"at hand, at most {MOST_KEPT:.0%} pays; use dense."
            )
        return None

    def is_exact(self, region: AttentionRegion) -> bool:
        return self.refuse(region) is None

    def pairs(self, region: AttentionRegion) -> float:
        s = region.shape
        return float(s.L) * s.S * (1.0 if region.tiles_kept is None else region.tiles_kept)

    def gathered(self, region: AttentionRegion) -> float:
        return self.pairs(region) / self.rows

    def choosing(self, region: AttentionRegion) -> Work:
        s = region.shape
        return Work("memory", bytes=READ * s.B * s.Hq * self.pairs(region), launches=40)

    def choose(self, given: Operands) -> Tensor:
        keep = given.rule.keep
        slots = {x.args[0] for x in keep.walk() if x.op == "load"}
        mask = given.captured[slots.pop()] if len(slots) == 1 else None
        if mask is None or mask.is_inference():  # inference tensors do not count what is written to them
            return self._classified(given)
        asked = (self.rows, self.block, keep, tuple(given.query.shape[:3]), given.key.shape[2], tuple(given.sizes))
        version, lists = _known.get(mask, (None, {}))
        if version != mask._version:
            lists = {}
            _known[mask] = mask._version, lists
        if asked not in lists:
            lists[asked] = self._classified(given)
        return lists[asked].clone()  # what an operator gives may be written over

    def _classified(self, given: Operands) -> Tensor:
        (B, Hq, L, _), S, keep = given.query.shape, given.key.shape[2], given.rule.keep
        heads = self.choice_heads(given)
        tiles = classify(
            keep, L, S, self.rows, self.block, B=B, Hq=Hq, captured=given.captured, sizes=given.sizes,
            device=given.query.device,
        )  # fmt: skip
        may, must = (t.expand(B, heads, *t.shape[2:]) for t in (tiles.may, tiles.must))
        count = may.shape[-1]
        blocks = torch.arange(count, device=may.device)
        whole = must & ((blocks + 1) * self.block <= S)  # none that is filled up
        return torch.where(may, torch.where(whole, blocks + count, blocks), NONE).sort(-1, descending=True).values

    def laid(self, chosen: Tensor, given: Operands) -> tuple[Operands, Sequence[KeyLists]]:
        """Blocks that all rows of a tile keep whole, which the choice numbers from their count on, take no mask."""
        (B, Hq, L, _), (_, H, S, _) = given.query.shape, given.key.shape
        shape, count = (B, Hq, H, L), -(-S // self.block)
        whole, rest = torch.where(chosen >= count, chosen - count, NONE), torch.where(chosen < count, chosen, NONE)
        parts = (whole, "all"), (rest, "rule")
        return given, [x for part, keeps in parts for x in of_tiles(part, shape, self.rows, self.block, keeps)]


def share_kept(given: Operands) -> float:
    """The share of the tiles, of the default size, that the mask does not empty."""
    form = KeptTiles()
    return float((form._classified(given) >= 0).float().mean())

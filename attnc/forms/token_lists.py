"""Forms that choose single keys: each row attends to a list of tokens of its own.

    o_i = softmax_{j in I_i, kept}(score_ij) v_j,   I_i = at most `kept_blocks` keys

A choice is (B, heads, L, n) positions of keys, NONE for none: blocks of one key. What scores keys takes query rows in
pieces, so that no (L, S) tensor is in memory. The rows of a key head that choose together are a tile; each tile gathers
its keys one by one, which costs a prompt more than attending to all of them does.

Source: DeepSeek-AI 2025, "DeepSeek-V3.2", arXiv:2512.02556, section 2 (a token selector, attention to what it selects).
Exact:  where the lists hold every key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from attnc.codegen.key_lists import KeyLists, listed
from attnc.cost_models.cost import Cost
from attnc.cost_models.device import Device
from attnc.forms.selected import BlockSelected
from attnc.operands import Operands
from attnc.region import ITEM_BYTES, AttentionRegion

SINGLE = 2  # a gathered key costs so many times what its bytes do in one piece


@dataclass(frozen=True)
class TokenLists(BlockSelected):
    """A form whose choice is single keys."""

    chooses_blocks: ClassVar[bool] = True

    @property
    def block_keys(self) -> int:
        return 1

    def laid(self, chosen: Tensor, given: Operands) -> tuple[Operands, Sequence[KeyLists]]:
        B, Hq, L, _ = given.query.shape
        return given, [listed(chosen, (B, Hq, given.key.shape[1], L), 1, 1)]

    def sharing(self, region: AttentionRegion) -> int:
        """Query heads that gather one list together."""
        return region.shape.group

    def cost(self, region: AttentionRegion, device: Device) -> Cost:
        s, item, cost = region.shape, ITEM_BYTES.get(region.dtype, 4), super().cost(region, device)
        read = s.B * s.Hq * (s.L + self.pairs(region) / self.sharing(region)) * (s.E + s.Ev) * item
        first = replace(cost.works[0], bytes=float(read))  # of keys those that were gathered, not all
        return Cost((first, *cost.works[1:]))

    def gathered(self, region: AttentionRegion) -> float:
        return SINGLE * self.pairs(region) / self.sharing(region)

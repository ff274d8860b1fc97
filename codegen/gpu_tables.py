"""Lists of visited tiles for kernels, sorted on the device inside the graph: no length of a list reaches the host.

Per block its masked tiles come first, then the ones kept whole, then what is not visited; counts say how many.

Source: Dong et al. 2024, "Flex Attention", arXiv:2412.05496, section 4 (partial and full blocks).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnc.codegen.tiles import Tiles


@dataclass(frozen=True)
class BlockLists:
    """Visited blocks of every block, as kernels read them.

    order:  int32 (B or 1, Hq or 1, blocks, other blocks), masked ones, full ones, the rest.
    counts: int32 (B or 1, Hq or 1, blocks, 2), of masked and of full ones.
    """

    order: torch.Tensor
    counts: torch.Tensor

    @property
    def strides(self) -> tuple[int, int]:
        """Rows of `order` from one batch entry and from one head to the next; 0 where one list serves all."""
        B, H, blocks, _ = self.order.shape
        return (0 if B == 1 else H * blocks), (0 if H == 1 else blocks)


def block_lists(tiles: Tiles, L, S, *, by_keys: bool = False) -> BlockLists:
    """The key blocks of every query block, or (by_keys) the query blocks of every key block.

    L, S: lengths, may be symbolic. A tile that reaches beyond them is masked.
    """
    device = tiles.may.device
    rows = (torch.arange(tiles.may.shape[-2], device=device) + 1) * tiles.block_m <= L
    columns = (torch.arange(tiles.may.shape[-1], device=device) + 1) * tiles.block_n <= S
    full = tiles.full & rows[:, None] & columns
    masked = tiles.may & ~full
    if by_keys:
        full, masked = full.mT, masked.mT
    rank = 2 - 2 * masked.int() - full.int()
    order = rank.argsort(dim=-1, stable=True).int().contiguous()
    return BlockLists(order, torch.stack([masked.sum(-1), full.sum(-1)], -1).int().contiguous())

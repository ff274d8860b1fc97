"""Attention over chosen keys as tiles: a few query rows of one key head, each tile with its own list of key blocks.

    tile t:  rows rows[t, :] of the queries  x  keys blocks[t, n] * width + 0 .. width - 1 of the key head place[t]

Whatever chooses keys at run time ends here: a list of blocks for each tile of rows (`listed`), or rows sorted by the
block they chose (`sorted_by_block`), which is the cheaper way where neighbouring rows choose different blocks. What
several tiles give to a row is merged by the log-sum-exp.

Source: Yuan et al. 2025, "Native Sparse Attention", arXiv:2502.11089, section 3.4 (the rows of a group against a list
of blocks); Lu et al. 2025, "MoBA", arXiv:2502.13189, algorithm 1 (rows sorted by block, parts merged).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

NONE = -1  # in place of a row or a block that a tile does not have
CHUNK = 16  # a tile of rows sorted by block is a multiple of it
CLASSES = 16  # lists of different lengths are run in about as many kinds


@dataclass(frozen=True)
class KeyLists:
    """Tiles of one kind.

    rows:   (T, m) int64, positions in (B, Hq, L) laid flat, NONE where a tile has fewer rows; no number twice. A row
            that is in several tiles is another part of itself in each: part * B * Hq * L + position.
    blocks: (T, n) int64, blocks of `width` keys, NONE where a tile has fewer; no block twice in a tile.
    place:  (T,) int64, position of the tile's key head in (B, H) laid flat.
    width:  keys of a block.
    keeps:  "all": every row keeps every key of the blocks of its tile; "diagonal": the tiles are all rows in their
            order, and row n of a tile keeps its first n + 1 keys; "rule": the rule is read. Only the last takes a mask,
            and "all" one of the blocks where a tile has fewer.
    added:  (T, n * width), added to the score of each key, or None.
    parts:  in how many tiles a row may be.
    heads:  query heads that each row stands for, its own and those `apart` positions behind it, and behind that one.
    """

    rows: Tensor
    blocks: Tensor
    place: Tensor
    width: int
    keeps: str = "rule"
    added: Tensor | None = None
    parts: int = 1
    heads: int = 1
    apart: int = 0

    def __len__(self) -> int:
        return self.rows.shape[0]

    def part(self, first: int, last: int) -> KeyLists:
        """Tiles first .. last - 1."""
        added = None if self.added is None else self.added[first:last]
        return replace(
            self, rows=self.rows[first:last], blocks=self.blocks[first:last], place=self.place[first:last], added=added
        )

    def spread(self) -> KeyLists:
        """The same with a row for each query head."""
        if self.heads == 1:
            return self
        rows, head = self.rows.unsqueeze(-1), torch.arange(self.heads, device=self.rows.device)
        rows = torch.where(rows < 0, NONE, rows + head * self.apart).flatten(1)
        return replace(self, rows=rows, heads=1, apart=0)

    @property
    def keys(self) -> Tensor:
        """Positions of the keys, (T, n * width); those of a block that is not there are negative."""
        within = torch.arange(self.width, device=self.blocks.device)
        return (self.blocks.unsqueeze(-1) * self.width + within).flatten(1)


def listed(
    index: Tensor, shape: tuple[int, int, int, int], tile_m: int, width: int, *, keeps: str = "rule"
) -> KeyLists:
    """One tile for each list of `index` (B, heads, tiles of tile_m rows, n); NONE pads a list.

    shape: B, Hq, H, L. heads: Hq, H (the rows of a group share a list, and a tile) or 1 (all heads do).
    """
    B, Hq, H, L = shape
    # A tile's rows are those of one head where their order says what they keep, else of all heads that share a list.
    heads, tiles = (Hq if index.shape[1] == Hq or keeps == "diagonal" else H), index.shape[2]
    index = index if index.shape[1] in (1, heads) else index.repeat_interleave(Hq // H, 1)
    index = index.expand(B, heads, *index.shape[2:])
    group = Hq // heads
    device = index.device
    i = torch.arange(tiles * tile_m, device=device).view(tiles, 1, tile_m)
    head = torch.arange(Hq, device=device).view(heads, 1, group, 1)
    b = torch.arange(B, device=device).view(B, 1, 1, 1, 1)
    rows = torch.where(i < L, (b * Hq + head) * L + i, NONE)
    place = b.view(B, 1) * H + torch.arange(heads, device=device) * H // heads
    return KeyLists(
        rows.reshape(B * heads * tiles, group * tile_m),
        index.reshape(B * heads * tiles, -1),
        place.unsqueeze(-1).expand(B, heads, tiles).reshape(-1),
        width,
        keeps,
    )


def sorted_by_block(
    chosen: Tensor, shape: tuple[int, int, int, int], blocks: int, width: int, *, tile: int = 0, keeps: str = "rule"
) -> list[KeyLists]:
    """Tiles of rows that chose the same block of their key head, those of like numbers of rows together.

    chosen: (B, Hq or H, L, n), the blocks of each row, or of those of a group, NONE for no block. shape: B, Hq, H, L.
    Each block's rows are cut into tiles of like size, of at most `tile` rows; 0: of as many as it has keys, or 256.
    """
    B, Hq, H, L = shape
    heads, n = chosen.shape[1], chosen.shape[-1]
    device, group = chosen.device, Hq // heads
    place = torch.arange(B * heads, device=device).view(B, heads, 1, 1) * H // heads
    count = B * H * blocks
    bucket, order = torch.where(chosen < 0, count, place * blocks + chosen).flatten().int().sort(stable=True)
    counts = torch.bincount(bucket, minlength=count + 1)[:count]
    found = int(counts.sum())
    step = max(1, CHUNK // group)
    tile = max(step, (tile or max(256, width)) // group)
    tiles = -(-counts // tile)
    size = -(-counts // (tiles.clamp(min=1) * step)) * step  # of each tile of a bucket
    size, by_size = size.sort(stable=True)
    slots = (tiles[by_size] * size).cumsum(0)
    first = torch.empty_like(counts)
    first[by_size] = slots - tiles[by_size] * size
    at = torch.repeat_interleave(first - (counts.cumsum(0) - counts), counts)
    row = order[:found] // n
    row = row // L * (group * L) + row % L if group > 1 else row
    laid = torch.full((int(slots[-1]),), NONE, device=device)
    laid[torch.arange(found, device=device) + at] = row if n == 1 else order[:found] % n * (B * Hq * L) + row
    lists, ends = [], torch.searchsorted(size, size.unique(), right=True).tolist()
    for start, end in zip([0, *ends], ends, strict=False):
        rows, many = laid[int(first[by_size[start]]) : int(slots[end - 1])], int(size[start])
        if many:
            owner = torch.repeat_interleave(by_size[start:end], tiles[by_size[start:end]])
            tiled = rows.view(-1, many), (owner % blocks).unsqueeze(-1), owner // blocks
            lists.append(KeyLists(*tiled, width, keeps, parts=n, heads=group, apart=L if group > 1 else 0))
    return lists


def of_rows(chosen: Tensor, shape: tuple[int, int, int, int], blocks: int, width: int, keeps: str) -> list[KeyLists]:
    """Tiles of rows that chose blocks each for itself, or for its group.

    chosen: (B, Hq or H or 1, L, n). keeps: "all", "causal" (row i keeps j <= i, as many keys as rows) or "rule".
    """
    B, _, H, L = shape
    chosen = chosen.expand(B, H if chosen.shape[1] == 1 else -1, L, -1)
    if keeps != "causal":
        return sorted_by_block(chosen, shape, blocks, width, keeps=keeps)
    before = (chosen + 1) * width <= torch.arange(1, L + 1, device=chosen.device).unsqueeze(-1)  # the block is whole
    kinds = ((before, "all"), (~before, "rule"))
    return [
        lists
        for which, kind in kinds
        for lists in sorted_by_block(torch.where(which, chosen, NONE), shape, blocks, width, keeps=kind)
    ]


def of_tiles(chosen: Tensor, shape: tuple[int, int, int, int], tile_m: int, width: int, keeps: str) -> list[KeyLists]:
    """Tiles of `tile_m` rows with lists of their own, those of like length together.

    chosen: (B, Hq or H or 1, tiles, n). keeps: "all", "causal" (row i keeps j <= i, as many keys as rows) or "rule".
    """
    if keeps != "causal":
        return ragged(listed(chosen, shape, tile_m, width, keeps=keeps))
    first = torch.arange(chosen.shape[2], device=chosen.device).unsqueeze(-1) * tile_m
    before = (chosen + 1) * width <= first + 1  # every row of the tile keeps every key of the block
    parts = (("all", before), ("rule", ~before))
    return [
        lists
        for kind, which in parts
        for lists in ragged(listed(torch.where(which, chosen, NONE), shape, tile_m, width, keeps=kind))
    ]


def near_rows(
    shape: tuple[int, int, int, int], width: int, near: int, first: int, device: torch.device
) -> list[KeyLists]:
    """What every row keeps of its own block, of the `near` before it and of the `first` ones, row i keeping j <= i.

    shape: B, Hq, H, L, as many keys as rows. No list takes a mask.
    """
    own = torch.arange(-(-shape[3] // width), device=device).view(1, 1, -1, 1)
    start = torch.arange(first, device=device)
    before = torch.cat(
        [own - torch.arange(1, near + 1, device=device), torch.where(start < own - near, start, NONE)], -1
    )
    return [
        listed(own, shape, width, width, keeps="diagonal"),
        *ragged(listed(before.clamp(min=NONE), shape, width, width, keeps="all")),
    ]


def ragged(lists: KeyLists) -> list[KeyLists]:
    """The same tiles with few places that no block fills: those with like numbers of blocks together."""
    blocks = lists.blocks.sort(-1, descending=True).values
    counts = (blocks >= 0).sum(-1)
    step = max(1, blocks.shape[-1] // CLASSES)
    classes = -(-counts // step)
    found = []
    for one in classes.unique().tolist():
        if one:
            at = (classes == one).nonzero().squeeze(-1)
            most = int(counts[at].max())
            found.append(
                replace(lists, rows=lists.rows[at], blocks=blocks[at, :most].contiguous(), place=lists.place[at])
            )
    return found


def kept_by(lists: KeyLists, shape: tuple[int, int, int, int], S: int) -> Tensor:
    """Which keys the tiles hold for each row, (B, Hq, L, S) boolean, whatever the rule keeps of them."""
    B, Hq, _, L = shape
    kept = torch.zeros(B * Hq * L + 1, S + 1, dtype=torch.bool, device=lists.rows.device)  # a last one for NONE
    keys, rows = lists.keys, lists.spread().rows
    keys = torch.where((keys < 0) | (keys >= S), S, keys)
    rows = torch.where(rows < 0, B * Hq * L, rows % (B * Hq * L))
    kept[rows.unsqueeze(-1), keys.unsqueeze(1)] = True
    return kept[:-1, :-1].view(B, Hq, L, S)


def in_blocks(table: Tensor, width: int) -> Tensor:
    """(B, H, S, E) as (B * H * blocks, width, E), filled up with zeros."""
    spare = -table.shape[2] % width
    table = F.pad(table, (0, 0, 0, spare)) if spare else table
    return table.reshape(-1, width, table.shape[-1])

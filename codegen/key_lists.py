"""Attention over chosen keys as tiles: a few query rows of one key head, each tile with its own list of key blocks.

    tile t:  rows rows[t, :] of the queries  x  keys blocks[t, n] * width + 0 .. width - 1 of the key head place[t]

Whatever chooses keys at run time ends here: a list of blocks for each tile of rows (`listed`), or rows sorted by the
block they chose (`sorted_by_block`), which is the cheaper way where neighbouring rows choose different blocks. A row
is in one tile of a `KeyLists` at most; what several of them give is merged by the log-sum-exp.

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

    rows:   (T, m) int64, positions in (B, Hq, L) laid flat, NONE where a tile has fewer rows; no row twice.
    blocks: (T, n) int64, blocks of `width` keys, NONE where a tile has fewer; no block twice in a tile.
    place:  (T,) int64, position of the tile's key head in (B, H) laid flat.
    width:  keys of a block.
    keeps:  "all": every row keeps every key of the blocks of its tile; "diagonal": row n of a tile keeps its first
            n + 1 keys; "rule": the rule is read. Only the last takes a mask, and "all" one of the blocks where a tile
            has fewer.
    added:  (T, n * width), added to the score of each key, or None.
    """

    rows: Tensor
    blocks: Tensor
    place: Tensor
    width: int
    keeps: str = "rule"
    added: Tensor | None = None

    def __len__(self) -> int:
        return self.rows.shape[0]

    def part(self, first: int, last: int) -> KeyLists:
        """Tiles first .. last - 1."""
        added = None if self.added is None else self.added[first:last]
        return replace(
            self, rows=self.rows[first:last], blocks=self.blocks[first:last], place=self.place[first:last], added=added
        )

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
    chosen: Tensor, shape: tuple[int, int, int, int], blocks: int, width: int, *, tile: int = 256, keeps: str = "rule"
) -> KeyLists:
    """Tiles of rows that chose the same block of their key head.

    chosen: (B, Hq, L), one block for each row, NONE for no block. shape: B, Hq, H, L.
    Each block's rows are cut into tiles of at most `tile`; the last one of a block is padded.
    """
    B, Hq, H, L = shape
    device = chosen.device
    place = torch.arange(B * Hq, device=device).view(B, Hq, 1) * H // Hq
    bucket = (place * blocks + chosen).flatten()
    rows = torch.arange(B * Hq * L, device=device)
    there = chosen.flatten() >= 0
    if not bool(there.all()):
        bucket, rows = bucket[there], rows[there]
    bucket, order = bucket.sort(stable=True)
    rows = rows[order]
    counts = torch.bincount(bucket, minlength=B * H * blocks)
    most = int(counts.max()) if rows.numel() else 0
    tile = max(CHUNK, min(tile, -(-most // CHUNK) * CHUNK))
    tiles = -(-counts // tile)  # of each bucket
    first_row, first_tile = counts.cumsum(0) - counts, tiles.cumsum(0) - tiles
    within = torch.arange(rows.numel(), device=device) - first_row[bucket]
    laid = rows.new_full((int(tiles.sum()), tile), NONE)
    laid[first_tile[bucket] + within // tile, within % tile] = rows
    owner = torch.repeat_interleave(torch.arange(counts.numel(), device=device), tiles)
    return KeyLists(laid, (owner % blocks).unsqueeze(-1), owner // blocks, width, keeps)


def of_rows(chosen: Tensor, shape: tuple[int, int, int, int], blocks: int, width: int, keeps: str) -> list[KeyLists]:
    """Tiles of rows that chose blocks each for itself, one block after the other.

    chosen: (B, Hq or H or 1, L, n). keeps: "all", "causal" (row i keeps j <= i, as many keys as rows) or "rule".
    """
    B, Hq, H, L = shape
    if chosen.shape[1] not in (1, Hq):
        chosen = chosen.repeat_interleave(Hq // H, 1)
    chosen = chosen.expand(B, Hq, L, chosen.shape[-1])
    if keeps != "causal":
        return [sorted_by_block(one, shape, blocks, width, keeps=keeps) for one in chosen.unbind(-1)]
    i = torch.arange(L, device=chosen.device)
    found = []
    for one in chosen.unbind(-1):
        before = (one + 1) * width <= i + 1  # every key of the block is kept
        kinds = (before, "all"), (~before, "rule")
        for which, kind in kinds:
            part = torch.where(which, one, NONE)
            if bool((part >= 0).any()):
                found.append(sorted_by_block(part, shape, blocks, width, keeps=kind))
    return found


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
    keys = lists.keys
    keys = torch.where((keys < 0) | (keys >= S), S, keys)
    rows = torch.where(lists.rows < 0, B * Hq * L, lists.rows)
    kept[rows.unsqueeze(-1), keys.unsqueeze(1)] = True
    return kept[:-1, :-1].view(B, Hq, L, S)


def in_blocks(table: Tensor, width: int) -> Tensor:
    """(B, H, S, E) as (B * H * blocks, width, E), filled up with zeros."""
    spare = -table.shape[2] % width
    table = F.pad(table, (0, 0, 0, spare)) if spare else table
    return table.reshape(-1, width, table.shape[-1])

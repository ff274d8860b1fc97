"""What the selected family costs on a GPU where kernels walk its lists, and the tiles that they take there.

    seconds = arranging + forward (+ merging of parts) (+ dq + dk and dv, of the transposed lists)

A kernel's time is that of a flash kernel that visits as many tiles, the list's rows and keys instead of the mask's.
Keys that the L2 cannot hold are read anew by each list; a gathered key costs no more than its bytes.

Source: Yuan et al. 2025, "Native Sparse Attention", arXiv:2502.11089, section 3.4; the model of attnc.cost_models.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import product
from math import ceil, inf
from typing import Any

from attnc.codegen.gpu_key_lists import KERNELS, LEAST, SHARE, ListKnobs, is_listed, pieces_of
from attnc.cost_models.device import Gpu
from attnc.cost_models.device_kinds import LAUNCH_S
from attnc.cost_models.tile_model import CompiledFigures, FlashTiles, FlashWork, TileCount, fits, flash_seconds
from attnc.forms.flash import WIDEST, work_of
from attnc.forms.generated import DTYPES
from attnc.region import ITEM_BYTES, AttentionRegion

PREFIX = dict(zip(KERNELS, ("", "dq_", "dkv_"), strict=True))
ROLE = dict(zip(KERNELS, ("forward", "dq", "dkv"), strict=True))  # in the model of tiles
TILE = ("block_m", "block_n", "warps", "stages")
CHOICES = ((16, 32, 64, 128), (16, 32, 64, 128), (2, 4, 8), (1, 2, 3, 4))
QUICK = {  # where nothing was tuned
    "list_forward": ((16, 64, 128), (32, 64, 128), (4, 8), (2, 3)),
    "list_dq": ((16, 64), (32, 64), (4, 8), (2,)),
    "list_dkv": ((32, 64), (32, 64), (4, 8), (2,)),
}
SORT_BYTES = 160.0  # that sorting a choice moves, counting and placing included
MEMORY = 0.8  # share of the bandwidth of plain passes


@dataclass(frozen=True)
class Layout:
    """The tiles of a choice, of one key head.

    lists: each with `rows` rows and `keys` keys in blocks of `width`; parts: of a row.
    chosen: pairs of a row and a block where rows are sorted by block, `blocks` of them.
    """

    lists: int
    rows: int
    keys: int
    width: int
    chosen: int = 0
    blocks: int = 0
    parts: int = 1

    @classmethod
    def of(cls, shape: tuple[int, ...], rows: int, width: int, region: AttentionRegion) -> Layout:
        """Of a choice of this shape (B, heads, tiles, n); rows: query rows of a list of one head."""
        s, (_, heads, tiles, n) = region.shape, shape
        sharing = 1 if heads == s.Hq else s.group
        if is_listed(sharing, rows, width, s.L):
            return cls(tiles * s.group // sharing, sharing * rows, n * width, width)
        return cls(0, 0, width, width, s.L * s.group * n, ceil(s.S / width), n)

    def programs(self, block_m: int) -> int:
        """Of the forward and of dq."""
        if self.chosen:
            return ceil(self.chosen / block_m) + self.blocks
        return self.lists * ceil(self.rows / block_m)

    def cut(self, heads: int, block_m: int) -> Layout:
        """As the forward cuts lists of few rows, `heads` key heads in all."""
        if self.parts > 1:
            return self
        pieces = pieces_of(heads * self.programs(block_m), self.keys)
        return replace(self, lists=self.lists * pieces, keys=ceil(self.keys / pieces), parts=pieces)

    @property
    def pairs(self) -> float:
        """Pairs of a row and a block."""
        return float(self.chosen or self.lists * self.rows * (self.keys // self.width))


@dataclass(frozen=True)
class _Lists:
    """Tiles that a kernel visits, of one key head."""

    layout: Layout
    kernel: str
    S: int

    def __call__(self, block_m: int, block_n: int) -> TileCount:
        x = self.layout
        if self.kernel != KERNELS[2]:
            longest = ceil(x.keys / block_n)
            return TileCount(x.programs(block_m) * longest, x.programs(block_m) * longest, longest)
        visited = x.pairs * ceil(x.width / block_n) / block_m
        mean = visited / ceil(self.S / block_n)
        most = max(mean, min(2.0 * mean, SHARE / block_m))  # some blocks are chosen more than others
        return TileCount(visited, visited, most * block_m / block_n)


def knobs_of(text: str) -> ListKnobs:
    """The schedule that a knob spells: rows x keys x warps x stages, of the forward or of all kernels, "/" between."""
    given: dict[str, Any] = {}
    for prefix, part in zip(PREFIX.values(), text.split("/"), strict=False):
        given |= {prefix + name: int(value) for name, value in zip(TILE, part.split("x"), strict=True)}
    return ListKnobs(**given)


def text_of(knobs: ListKnobs, training: bool = True) -> str:
    """The knob that `knobs_of` reads."""
    every = ["x".join(str(getattr(knobs, prefix + name)) for name in TILE) for prefix in PREFIX.values()]
    return "/".join(every if training else every[:1])


def unfit(region: AttentionRegion) -> str | None:
    """Why no kernel walks the lists of `region`."""
    s = region.shape
    if region.dtype not in DTYPES or max(s.E, s.Ev) > WIDEST:
        return f"kernels of lists take {', '.join(DTYPES)} and heads of up to {WIDEST}, found {region.dtype}, E={s.E}"
    return None


def kernel_seconds(
    layout: Layout,
    region: AttentionRegion,
    gpu: Gpu,
    knobs: ListKnobs,
    kernel: str,
    compiled: CompiledFigures | None = None,
) -> float:
    """Predicted time of one of KERNELS alone, refined by what was compiled; inf where its tile does not fit."""
    s, tile = region.shape, knobs.of(kernel, layout.rows or knobs.block_m, layout.width)
    layout = layout.cut(s.B * s.H, tile.block_m) if kernel == KERNELS[0] else layout
    rows = ceil(s.L * s.group / tile.block_m) if kernel == KERNELS[2] else layout.programs(tile.block_m)
    tiles = FlashTiles(tile.block_m, tile.block_n, tile.warps, tile.stages)
    read_once = s.S if layout.chosen or kernel == KERNELS[2] else min(s.S, layout.lists * layout.keys)
    whole = replace(_bare(region), Hq=s.H, L=rows * tile.block_m, S=read_once, counts=_Lists(layout, kernel, s.S))
    role = (ROLE[kernel],)
    if fits(whole, tiles, gpu, kernels=role) is not None:
        return inf
    item = ITEM_BYTES.get(region.dtype, 4)
    active = max(1.0, min(float(s.B * s.H), 2.0 * gpu.sms / max(1, rows)))
    missed = max(0.0, 1.0 - 0.7 * gpu.l2_bytes / (active * s.S * (s.E + s.Ev) * item))
    read = s.B * s.H * whole.tile_count(tile.block_m, tile.block_n).visited
    read *= (tile.block_m if kernel == KERNELS[2] else tile.block_n) * (s.E + s.Ev) * item * missed
    if kernel == KERNELS[1] and layout.width < LEAST:  # sums of float32 that are added one by one
        read += 2.0 * s.B * s.H * layout.lists * ceil(layout.rows / tile.block_m) * layout.keys * (s.E + s.Ev) * 4
    made = {} if compiled is None else {role[0]: compiled}
    return max(flash_seconds(whole, tiles, gpu, made, kernels=role), read / (gpu.bandwidth * MEMORY))


@lru_cache(maxsize=512)
def _bare(region: AttentionRegion) -> FlashWork:
    return replace(work_of(region), training=False, counts=None)


def around(layout: Layout, region: AttentionRegion, gpu: Gpu) -> float:
    """Predicted time of what stands around the kernels: tables, parts that are merged or added, sums of gradients."""
    s = region.shape
    rows = float(s.B * s.Hq * s.L)
    lists = float(s.B * s.H) * (layout.chosen or layout.lists * layout.keys // layout.width)
    moved = SORT_BYTES * lists if layout.chosen else 24.0 * lists
    launches = 16 if layout.chosen else 5
    if layout.parts > 1:
        moved += 2.0 * layout.parts * rows * (s.Ev + 1) * 4
        launches += 1
    if region.training:
        moved += 2.0 * rows * s.Ev * 4 + (3.0 * layout.parts * rows * s.E * 4 if layout.parts > 1 else 0.0)
        moved += 4.0 * s.B * s.H * s.S * (s.E + s.Ev) * 4 + (SORT_BYTES * lists if layout.width >= LEAST else 0.0)
        launches += 16
    return launches * LAUNCH_S + moved / (gpu.bandwidth * MEMORY)


@lru_cache(maxsize=512)
def best_lists(layout: Layout, region: AttentionRegion, gpu: Gpu) -> tuple[float, ListKnobs]:
    """The least predicted time among QUICK, kernel by kernel, and its schedule; inf where none fits."""
    knobs, total = ListKnobs(), around(layout, region, gpu)
    if unfit(region) is not None:
        return inf, knobs
    for kernel in _kernels(layout, region):
        tried = [_with(knobs, kernel, values) for values in product(*QUICK[kernel])]
        offers = [(kernel_seconds(layout, region, gpu, one, kernel), n) for n, one in enumerate(tried)]
        seconds, n = min(offers)
        total, knobs = total + seconds, tried[n]
    return total, knobs


def list_seconds(layout: Layout, region: AttentionRegion, gpu: Gpu, knobs: ListKnobs) -> float:
    """Predicted time of all kernels with this schedule, and of what stands around them."""
    every = (kernel_seconds(layout, region, gpu, knobs, kernel) for kernel in _kernels(layout, region))
    return around(layout, region, gpu) + sum(every) if unfit(region) is None else inf


@lru_cache(maxsize=512)
def list_settings(
    layout: Layout, region: AttentionRegion, gpu: Gpu, kernel: str = KERNELS[0], count: int = 8
) -> tuple[ListKnobs, ...]:
    """The `count` schedules of one of KERNELS that are predicted fastest, of all that fit, the others at their best."""
    start = best_lists(layout, region, gpu)[1]
    tried = (_with(start, kernel, values) for values in product(*CHOICES))
    offers = {one: kernel_seconds(layout, region, gpu, one, kernel) for one in tried if _is_apart(layout, one, kernel)}
    return tuple(sorted((one for one in offers if offers[one] < inf), key=lambda one: offers[one])[:count])


def _is_apart(layout: Layout, knobs: ListKnobs, kernel: str) -> bool:
    """Whether no smaller tile is the same, since lists have no more rows, or blocks no more keys."""
    tile, prefix = knobs.of(kernel, layout.rows or knobs.block_m, layout.width), PREFIX[kernel]
    return (tile.block_m, tile.block_n) == (getattr(knobs, prefix + "block_m"), getattr(knobs, prefix + "block_n"))


def _kernels(layout: Layout, region: AttentionRegion) -> tuple[str, ...]:
    """The kernels that a region runs: atomics of dq take the place of the transposed lists of single keys."""
    if not region.training:
        return KERNELS[:1]
    return KERNELS[:2] if layout.width < LEAST else KERNELS


def _with(knobs: ListKnobs, kernel: str, values: tuple[int, ...]) -> ListKnobs:
    given: dict[str, Any] = {PREFIX[kernel] + name: value for name, value in zip(TILE, values, strict=True)}
    return replace(knobs, **given)


assert {f.name for f in fields(ListKnobs)} > {prefix + name for prefix in PREFIX.values() for name in TILE}

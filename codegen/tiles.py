"""Tiles of a mask: which blocks of query rows and keys hold a kept pair, and which are kept whole.

    may[b, h, m, n]  = some pair of tile (m, n) may be kept,   must[b, h, m, n] = all pairs are

Classified by interval bounds in vectorised torch operations: once, at compile time, from the predicate alone, or inside
the graph from lengths and tensors known at run time only. Bounds are safe (see `attnc.intervals`).

Source: Dong et al. 2024, "Flex Attention", arXiv:2412.05496, section 4 (block masks; ours never evaluate the mask).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch.utils._python_dispatch import _disable_current_modes

from attnc.expr import BOOL, FALSE, FLOAT, TRUE, Expr
from attnc.intervals import Bound, bounds
from attnc.predicate import rebuild
from attnc.reading import Axis, read


@dataclass(frozen=True)
class Tiles:
    """Tile classes, boolean, (B or 1, Hq or 1, query blocks, key blocks)."""

    may: torch.Tensor
    must: torch.Tensor
    block_m: int
    block_n: int
    is_static: bool = False

    @property
    def partial(self) -> torch.Tensor:
        return self.may & ~self.must

    @property
    def full(self) -> torch.Tensor:
        return self.may & self.must

    def pairs(self, L: int, S: int) -> float:
        """Pairs (i, j) inside visited tiles, per head; a concrete number, so only for tiles that are not traced."""
        rows = _widths(L, self.block_m, self.may.shape[-2])
        cols = _widths(S, self.block_n, self.may.shape[-1])
        per_head = (self.may.double() * rows[:, None] * cols[None, :]).sum((-1, -2))
        return float(per_head.mean())


def _widths(length: int, block: int, count: int) -> torch.Tensor:
    starts = torch.arange(count, dtype=torch.float64) * block
    return (length - starts).clamp(min=0, max=block)


def blocks(length, block: int):
    """Number of blocks, the last one possibly ragged; also for a symbolic length."""
    return (length + block - 1) // block


def classify(
    keep: Expr,
    L,
    S,
    block_m: int,
    block_n: int,
    *,
    B: int = 1,
    Hq: int = 1,
    captured: Sequence[torch.Tensor] | None = None,
    sizes: Sequence = (),
    device: torch.device | str = "cpu",
) -> Tiles:
    """Classify every tile of `keep`.

    Shapes: one class per batch entry and head where `keep` depends on them and `captured` is given (or it has no
            lookups), else one for all. Lengths and sizes may be symbolic.
    """
    names = keep.names()
    known = captured is not None or not keep.has("load")
    per = {"b": B if "b" in names and known else 1, "h": Hq if "h" in names and known else 1}
    box: dict[str, Bound] = {}
    for name, count in (("b", B), ("h", Hq)):
        if per[name] == count:
            at = torch.arange(count, device=device).view([-1 if n == name else 1 for n in "bhij"])
            box[name] = (at, at)
        else:
            box[name] = (0, count - 1)
    for dim, (name, length, block) in ((2, ("i", L, block_m)), (3, ("j", S, block_n))):
        low = torch.arange(blocks(length, block), device=device) * block
        along = [-1 if d == dim else 1 for d in range(4)]
        box[name] = (low.view(along), (low + (block - 1)).clamp(max=length - 1).view(along))
    lengths = {"b": B, "h": Hq, "i": L, "j": S}
    tables = None if captured is None else _TableBounds(captured, sizes, lengths, {"i": block_m, "j": block_n}, device)
    found = bounds(keep, box, sizes, tables)
    may, must = found if found is not None else (True, False)
    shape = (per["b"], per["h"], blocks(L, block_m), blocks(S, block_n))
    return Tiles(_filled(may, shape, device), _filled(must, shape, device), block_m, block_n)


def _filled(flag, shape, device) -> torch.Tensor:
    if not isinstance(flag, torch.Tensor):
        return torch.full(shape, bool(flag), device=device)
    return flag.expand(shape)


@dataclass(frozen=True)
class _TableBounds:
    """Least and greatest captured values that a tile can read."""

    captured: Sequence[torch.Tensor]
    sizes: Sequence
    lengths: dict
    block: dict[str, int]
    device: torch.device | str

    def __call__(self, x: Expr) -> Bound | None:
        used = [sorted(a.names()) for a in x.args[1:]]
        live = [n for names in used for n in names]
        if (
            any(len(names) > 1 for names in used)
            or len(set(live)) != len(live)
            or any(a.has("load") for a in x.args[1:])
        ):
            return None
        table = self.captured[x.args[0]]
        for d in reversed(range(len(used))):
            table = self._along(table, d, "".join(used[d]), x.args[1 + d])
        table = table.permute(sorted(range(len(live)), key=lambda k: "bhij".index(live[k])))
        for d, name in enumerate("bhij"):
            if name not in live:
                table = table.unsqueeze(d)
        low = high = table
        for d, name in enumerate("bhij"):
            if name in live and name in self.block:
                low, high = (self._reduced(t, d, name, top) for t, top in ((low, False), (high, True)))
        if x.kind == BOOL:
            return high, low
        if x.kind == FLOAT:  # NaN compares false, and must not make a tile look empty or full
            return low.nan_to_num(nan=-torch.inf, neginf=-torch.inf, posinf=torch.inf), high.nan_to_num(
                nan=torch.inf, neginf=-torch.inf, posinf=torch.inf
            )
        return low, high

    def _along(self, table: torch.Tensor, d: int, name: str, index: Expr) -> torch.Tensor:
        every = torch.arange(self.lengths[name] if name else 1, device=self.device)
        at = read(index, {name: Axis(every)}, (), self.sizes)
        if not name:
            return table.select(d, at)  # type: ignore[arg-type]  # a number without coordinates
        assert isinstance(at, torch.Tensor)
        return table.index_select(d, at.clamp(0, table.shape[d] - 1))

    def _reduced(self, table: torch.Tensor, d: int, name: str, top: bool) -> torch.Tensor:
        block, length = self.block[name], self.lengths[name]
        count = blocks(length, block)
        at = torch.arange(count * block, device=self.device).clamp(max=length - 1)
        table = table.index_select(d, at).unflatten(d, (count, block))
        if table.dtype == torch.bool:
            return table.any(d + 1) if top else table.all(d + 1)
        return table.amax(d + 1) if top else table.amin(d + 1)


@lru_cache(maxsize=512)
def static_tiles(
    keep: Expr, L: int, S: int, block_m: int, block_n: int, *, B: int = 1, Hq: int = 1, sizes: tuple[int, ...] = ()
) -> Tiles:
    """Classes known at compile time, as real CPU tensors, also while a graph is being traced."""
    with _disable_current_modes():
        return replace(classify(keep, L, S, block_m, block_n, B=B, Hq=Hq, sizes=sizes), is_static=True)


@lru_cache(maxsize=512)
def visited(
    keep: Expr, L: int, S: int, block_m: int, block_n: int, *, B: int = 1, Hq: int = 1, sizes: tuple[int, ...] = ()
) -> tuple[tuple[tuple[int, bool], ...], ...]:
    """For each query block its visited key blocks, each with whether all heads and entries keep the whole tile."""
    with _disable_current_modes():
        tiles = classify(keep, L, S, block_m, block_n, B=B, Hq=Hq, sizes=sizes)
        may = tiles.may.flatten(0, 1).any(0).tolist()
        must = tiles.must.flatten(0, 1).all(0).tolist()
    return tuple(
        tuple((n, full) for n, (seen, full) in enumerate(zip(row, whole, strict=True)) if seen)
        for row, whole in zip(may, must, strict=True)
    )


@lru_cache(maxsize=512)
def kept_keys(
    keep: Expr, rows: tuple[int, int], keys: tuple[int, int], *, B: int = 1, Hq: int = 1, sizes: tuple[int, ...] = ()
) -> tuple[int, int, bool]:
    """Of keys (first, end) those that some of the rows (first, end) may keep, as a run, and whether all rows keep all
    of it."""
    with _disable_current_modes():
        at = torch.arange(*keys)
        box = {**_box(rows, keys, B, Hq), "j": (at, at)}
        may, must = (torch.as_tensor(flag).expand(len(at)) for flag in bounds(keep, box, sizes) or (True, False))
        some = at[may].tolist()
        if not some:
            return keys[0], keys[0], True
        first, end = some[0], some[-1] + 1
        return first, end, bool(must[first - keys[0] : end - keys[0]].all())


@lru_cache(maxsize=512)
def decided(
    keep: Expr, rows: tuple[int, int], keys: tuple[int, int], *, B: int = 1, Hq: int = 1, sizes: tuple[int, ...] = ()
) -> Expr:
    """A mask that is the same for rows (first, end) and keys (first, end), without the comparisons that say the same of
    all of them."""
    box = _box(rows, keys, B, Hq)

    def constant(x: Expr) -> Expr | None:
        if x.op not in ("le", "eq", "le2", "eq2"):
            return None
        may, must = bounds(x, box, sizes) or (True, False)
        return FALSE if not may else TRUE if must else None

    return rebuild(keep, constant)


def _box(rows: tuple[int, int], keys: tuple[int, int], B: int, Hq: int) -> dict[str, Bound]:
    return {"b": (0, B - 1), "h": (0, Hq - 1), "i": (rows[0], rows[1] - 1), "j": (keys[0], keys[1] - 1)}

"""Launch attention over tiles with their own key lists on GPUs: lists of known shape, parts merged, two backwards.

Choices are arranged without a word to the host (`of_choice`): the shapes of all tables follow from those of the
operands, what is not there is NONE. Rows that share a list with enough others to fill a tile are one, each part of a
row final; others are sorted by the block that they chose, a part of a row for each choice, merged by the log-sum-exp.
The gradients of keys take the transposed lists, which are a sort; of single keys, where a block fills no tile, atomics,
unless torch is to be deterministic.

Runs as it is on CPU tensors under Triton's interpreter.

Source: Yuan et al. 2025, arXiv:2502.11089, section 3.4; Lu et al. 2025, arXiv:2502.13189, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnc.codegen.gpu_decode import combine_constants
from attnc.codegen.gpu_flash import LOG2E, Launch, add_sink_grads, plain_scale, sweeps_of, widths
from attnc.codegen.key_lists import NONE, KeyLists, listed
from attnc.codegen.launch import launch, strides
from attnc.codegen.tiles import blocks
from attnc.expr import TRUE
from attnc.operands import Operands
from attnc.rule_attention import AttentionRule

KERNELS = ("list_forward", "list_dq", "list_dkv")
LEAST = 16  # rows, or keys, of the smallest product
FILLED = 8  # rows that share a list from which on each list is a tile; below, rows are sorted by their blocks
SHARE = 16384  # rows of a program of dk and dv: blocks that all rows choose take as many as they need
MERGED = 16  # rows of a program that merges parts
PROGRAMS = 256  # of the forward; lists are cut where there are fewer
# What is rendered from a skeleton, a rule and the names of kernels.
Kernels = Callable[[str, AttentionRule, tuple[str, ...]], ModuleType]


@dataclass(frozen=True)
class ListKnobs:
    """Schedule of the three kernels: forward, dq (dq_) and dk with dv (dkv_). precision: as of `FlashKnobs`.

    Tiles are no larger than what a list has: a tile of 16 rows for lists that 8 share.
    """

    block_m: int = 128
    block_n: int = 64
    warps: int = 4
    stages: int = 2
    dq_block_m: int = 64
    dq_block_n: int = 64
    dq_warps: int = 4
    dq_stages: int = 2
    dkv_block_m: int = 64
    dkv_block_n: int = 64
    dkv_warps: int = 4
    dkv_stages: int = 2
    precision: str = "ieee"

    def of(self, kernel: str, rows: int, width: int) -> Launch:
        """Of one of KERNELS, for tiles of `rows` rows and blocks of `width` keys."""
        prefix = {"list_forward": "", "list_dq": "dq_", "list_dkv": "dkv_"}[kernel]
        m, n, warps, stages = (getattr(self, prefix + name) for name in ("block_m", "block_n", "warps", "stages"))
        if kernel == "list_dkv":  # rows of all tiles that list a block
            return Launch(m, min(n, _power(width)), warps, stages)
        return Launch(min(m, _power(rows)), n, warps, stages)


def _power(n: int) -> int:
    return max(LEAST, 1 << (n - 1).bit_length())


@dataclass(frozen=True)
class Arranged:
    """Lists as kernels take them: as `KeyLists`, but a row may be in `parts` tiles, in each as another part.

    rows: part * B * Hq * L + row. whole: whether every row is there.
    """

    rows: Tensor
    blocks: Tensor
    place: Tensor
    width: int
    keeps: str = "rule"
    added: Tensor | None = None
    parts: int = 1
    whole: bool = False

    def packed(self, x: Operands) -> Tensor:
        """The rows as part << 48 | head << 32 | position."""
        B, Hq, L, _ = x.query.shape
        head, part = self.rows // L % Hq, self.rows // (B * Hq * L)
        return torch.where(self.rows < 0, NONE, (part << 48) | (head << 32) | self.rows % L)

    @cached_property
    def counts(self) -> Tensor:
        """Places of each list behind which nothing is, (T,) int32."""
        at = torch.arange(1, self.blocks.shape[1] + 1, device=self.blocks.device, dtype=torch.int32)
        return torch.where(self.blocks < 0, 0, at).amax(-1) if len(at) else self.place.new_zeros(len(self.place)).int()


def of_lists(lists: KeyLists) -> Arranged:
    """What any layout gives, as kernels take it."""
    rows = lists.spread().rows
    rows, listed_blocks, place = (t.contiguous() for t in (rows, lists.blocks, lists.place))  # views of one head
    return Arranged(rows, listed_blocks, place, lists.width, lists.keeps, lists.added, lists.parts)


def of_choice(
    chosen: Tensor, shape: tuple[int, int, int, int], tile_m: int, width: int, S: int, tile: int = 128
) -> Arranged:
    """The tiles of a choice (B, Hq or H or 1, tiles of tile_m rows, n) of blocks, their shapes known from its own.

    tile: rows of a tile of sorted ones.
    """
    _, Hq, H, L = shape
    if is_listed(1 if chosen.shape[1] == Hq else Hq // H, tile_m, width, L):
        return replace(of_lists(listed(chosen, shape, tile_m, width)), whole=True)
    per_row = chosen.repeat_interleave(tile_m, 2)[:, :, :L] if tile_m > 1 else chosen
    if per_row.shape[1] not in (1, Hq):
        per_row = per_row.repeat_interleave(Hq // H, 1)
    return sorted_rows(per_row, shape, -(-S // width), width, tile)


def is_listed(sharing: int, tile_m: int, width: int, L: int) -> bool:
    """Whether each list is a tile: it has enough rows, its blocks are too small to gather rows for, or L is."""
    return sharing * tile_m >= FILLED or width < LEAST or L * tile_m < LEAST


def sorted_rows(chosen: Tensor, shape: tuple[int, int, int, int], blocks: int, width: int, tile: int) -> Arranged:
    """Tiles of `tile` rows sorted by the block that they chose, one part of a row for each of its choices.

    chosen: (B, Hq or 1, L, n). There are as many tiles as there may be: those of no rows are NONE throughout.
    """
    B, Hq, H, L = shape
    device, parts = chosen.device, chosen.shape[-1]
    chosen = chosen.expand(B, Hq, L, parts).movedim(-1, 0)
    head = torch.arange(B * Hq, device=device).view(B, Hq, 1) * H // Hq
    buckets = B * H * blocks
    bucket = torch.where(chosen < 0, buckets, head * blocks + chosen).flatten()
    bucket, rows = bucket.sort(stable=True)
    start = torch.searchsorted(bucket, torch.arange(buckets + 1, device=device))
    tiles = (start[1:] - start[:-1] + (tile - 1)) // tile
    last = tiles.cumsum(0)
    count = rows.numel() // tile + buckets
    owner = torch.searchsorted(last, torch.arange(count, device=device), right=True)
    at = torch.arange(rows.numel(), device=device)
    safe = bucket.clamp(max=buckets - 1)
    to = ((last - tiles)[safe]) * tile + at - start[safe]
    laid = rows.new_full((count * tile + 1,), NONE)
    laid[torch.where(bucket < buckets, to, count * tile)] = rows
    owned = owner.clamp(max=buckets - 1)
    block = torch.where(owner < buckets, owned % blocks, NONE)
    laid = laid[:-1].view(count, tile)
    return Arranged(laid, block.unsqueeze(-1), owned // blocks, width, parts=parts)


def pieces_of(programs: int, keys: int) -> int:
    """Pieces that lists of `keys` keys are cut into, for as many programs as fill a device."""
    return max(1, min(-(-PROGRAMS // max(1, programs)), keys // 128))


def cut(lists: Arranged, rows: int, block_m: int) -> Arranged:
    """The same tiles with their lists cut, a part for each piece, where programs are few; rows: of all heads and
    entries."""
    T, n = lists.blocks.shape
    pieces = pieces_of(T * blocks(lists.rows.shape[1], block_m), n * lists.width)
    if pieces < 2 or lists.parts > 1 or lists.keeps == "diagonal":
        return lists
    each = -(-n // pieces)
    pieces = -(-n // each)
    spare = pieces * each - n
    part = torch.arange(pieces, device=lists.rows.device).view(-1, 1)
    moved = lists.rows.unsqueeze(1) + part * rows
    added = lists.added
    if added is not None:
        added = torch.nn.functional.pad(added, (0, spare * lists.width)).reshape(T * pieces, -1)
    return replace(
        lists,
        rows=torch.where(lists.rows.unsqueeze(1) < 0, NONE, moved).flatten(0, 1),
        blocks=torch.nn.functional.pad(lists.blocks, (0, spare), value=NONE).reshape(T * pieces, each),
        place=lists.place.repeat_interleave(pieces),
        added=added,
        parts=pieces,
    )


def forward(
    kernels: Kernels, x: Operands, every: Sequence[Arranged], knobs: ListKnobs, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Attend each row to the keys of its tiles, under the rule.

    Shapes: as `Operands` -> out (B, Hq, L, Ev) of `dtype`, the query's when left out, lse (B, Hq, L) float32, natural,
    with the sink.
    A row without keys gives 0 and lse -inf, or the sink.
    """
    B, Hq, L, _ = x.query.shape
    Ev = int(x.value.shape[3])
    out = x.query.new_empty(B, Hq, L, Ev, dtype=dtype or x.query.dtype)
    lse = x.query.new_empty(B, Hq, L, dtype=torch.float32)
    every = [cut(lists, B * Hq * L, knobs.of(KERNELS[0], lists.rows.shape[1], 1).block_m) for lists in every]
    parts = sum(lists.parts for lists in every)
    if parts == 1:
        if not every[0].whole or 0 in every[0].blocks.shape:
            out.zero_()
            lse.copy_(_sink(x))
        _attend(kernels, x, every[0], knobs, out.unsqueeze(0), lse, final=True)
        return out, lse
    part = x.query.new_empty(parts, B, Hq, L, Ev, dtype=torch.float32)
    part_lse = x.query.new_full((parts, B, Hq, L), -torch.inf, dtype=torch.float32)
    first = 0
    for lists in every:
        end = first + lists.parts
        _attend(kernels, x, lists, knobs, part[first:end], part_lse[first:end], final=False)
        first = end
    given = {
        "p_parts": part, "p_part_lse": part_lse, "p_out": out, "p_lse": lse, **strides("o", out),
        "Hq": Hq, "L": L, "ROWS": B * Hq * L, "SPLITS": parts, **combine_constants(Ev, MERGED),
    }  # fmt: skip
    merge = kernels("flash_decode", x.rule, ("flash_combine",)).flash_combine
    launch(merge, blocks(B * Hq * L, MERGED), given, x.captured, x.sizes, num_warps=4, num_stages=1)
    return out, lse


def _attend(
    kernels: Kernels, x: Operands, lists: Arranged, knobs: ListKnobs, out: Tensor, lse: Tensor, *, final: bool
) -> None:
    """Run the forward of one layout into its parts of out (parts, B, Hq, L, Ev) and lse."""
    given = {"p_out": out, "p_lse": lse, "o_p": out.stride(0), **strides("o", out[0]), "FINAL": final}
    _run(kernels, x, lists, knobs, KERNELS[0], given)


def _sink(x: Operands) -> Tensor:
    """The sink's logits, broadcastable to (B, Hq, L); -inf where there is none."""
    if x.rule.sink is None:
        return torch.full((), -torch.inf, device=x.query.device)
    B, Hq, L, _ = x.query.shape
    return x.tensor(x.rule.sink).expand(B, Hq, L, 1)[..., 0]


def backward(
    kernels: Kernels,
    x: Operands,
    every: Sequence[Arranged],
    knobs: ListKnobs,
    attended: tuple[Tensor, Tensor],
    grad_out: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of query, key, value and of the captured tensors that `needs` names; the lists are constants.

    attended: what `forward` gave.
    """
    out, lse = attended
    lse2 = torch.where(lse == -torch.inf, torch.inf, lse * LOG2E)  # no key: every weight is exp2(-inf)
    buffers = {n: torch.zeros_like(t, dtype=torch.float32, memory_format=torch.contiguous_format)
               for n, (t, need) in enumerate(zip(x.captured, needs, strict=True)) if need}  # fmt: skip
    if sweeps_of(x.rule, buffers) > 1:  # the rounded out is not enough, and no program of dq has a row's whole list
        out, _ = forward(kernels, x, every, knobs, torch.float32)
    delta = (grad_out.float() * out.float()).sum(-1)
    parts = sum(lists.parts for lists in every)
    dtype = x.query.dtype if parts == 1 else torch.float32
    dq = x.query.new_zeros((parts, *x.query.shape), dtype=dtype)
    dk, dv = (t.new_zeros(t.shape, dtype=torch.float32) for t in (x.key, x.value))
    known = {"p_do": grad_out, "p_lse": lse2, "p_delta": delta, "p_dk": dk, "p_dv": dv, **strides("o", grad_out)}
    first = 0
    for lists in every:
        end = first + lists.parts
        scatter = lists.width < LEAST and not torch.are_deterministic_algorithms_enabled()
        into = dq[first:end]
        given = known | {"p_dq": into, "d_p": into.stride(0), **strides("d", into[0]), "SCATTER": scatter}
        _run(kernels, x, lists, knobs, KERNELS[1], given, buffers)
        if not scatter:
            _run(kernels, x, lists, knobs, KERNELS[2], known | _transposed(lists, x))
        first = end
    if x.rule.sink is not None:
        add_sink_grads(x, x.rule.sink, buffers, delta, lse)
    total = dq[0] if parts == 1 else dq.sum(0).to(x.query.dtype)
    learned = [buffer.to(x.captured[n].dtype) for n, buffer in buffers.items()]
    return total, dk.to(x.key.dtype), dv.to(x.value.dtype), learned


def _transposed(lists: Arranged, x: Operands) -> dict[str, Any]:
    """The tiles that list each block of keys, in programs of at most SHARE rows; one each, to be deterministic."""
    (B, H, S, _), n = x.key.shape, lists.blocks.shape[1]
    count = blocks(S, lists.width)
    buckets, entries = B * H * count, lists.blocks.numel()
    bucket = torch.where(lists.blocks < 0, buckets, lists.place.unsqueeze(-1) * count + lists.blocks)
    bucket, order = bucket.flatten().sort(stable=True)
    start = torch.searchsorted(bucket, torch.arange(buckets + 1, device=bucket.device))
    alone = torch.are_deterministic_algorithms_enabled()
    share = max(1, entries if alone else SHARE // lists.rows.shape[1])
    first, size = start[:-1], start[1:] - start[:-1]
    last = blocks(size, share).cumsum(0)
    each = torch.arange(blocks(entries, share) + buckets, device=bucket.device)
    owner = torch.searchsorted(last, each, right=True).clamp(max=buckets - 1)
    begin = first[owner] + (each - (last - blocks(size, share))[owner]) * share  # behind its end where there is none
    placed = lists.keeps == "diagonal" or lists.added is not None
    return {
        "p_order": (order // n).int(), "p_columns": (order % n).int() if placed else None, "BLOCKS": count,
        "p_block": owner, "p_first": begin, "p_end": torch.minimum(begin + share, start[owner + 1]),
    }  # fmt: skip


def _run(
    kernels: Kernels,
    x: Operands,
    lists: Arranged,
    knobs: ListKnobs,
    kernel: str,
    given: dict[str, Any],
    buffers: dict[int, Tensor] | None = None,
) -> None:
    query, key, value, captured, sizes, rule = x
    if lists.keeps != "rule":
        rule = replace(rule, keep=TRUE)
    (B, Hq, L, E), (_, H, S, _), Ev = query.shape, key.shape, int(value.shape[3])
    (T, M), n = lists.rows.shape, lists.blocks.shape[1]
    tile = knobs.of(kernel, M, lists.width)
    programs = T * blocks(M, tile.block_m)
    if kernel == "list_dkv":
        programs = len(given["p_block"]) * blocks(lists.width, tile.block_n)
    if 0 in (programs, L, S, n):
        return
    given = given | {
        "p_q": query, "p_k": key, "p_v": value,
        "p_rows": lists.packed(x), "p_blocks": lists.blocks, "p_place": lists.place, "p_counts": lists.counts,
        "p_added": None if lists.added is None else lists.added.float().contiguous(),
        **strides("q", query), **strides("k", key), **strides("v", value),
        "B": B, "Hq": Hq, "H": H, "L": L, "S": S, "N": n, "WIDE": _is_wide(given.get("p_do", query), query, key, value),
        **constants_of(rule, int(E), Ev, knobs, tile, M, lists.width, diagonal=lists.keeps == "diagonal"),
    }  # fmt: skip
    found = getattr(kernels("key_lists", rule, (kernel,)), kernel)
    launch(found, programs, given, captured, sizes, buffers, num_warps=tile.warps, num_stages=tile.stages)


def _is_wide(*tensors: Tensor) -> bool:
    """Whether offsets inside a batch entry leave 31 bits."""
    inside = (sum((n - 1) * step for n, step in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in tensors)
    return bool(max(inside) >= 1 << 31)


def constants_of(
    rule: AttentionRule, E: int, Ev: int, knobs: ListKnobs, tile: Launch, rows: int, width: int, *, diagonal: bool
) -> dict[str, Any]:
    """The compile-time arguments that all kernels have; rows: of a tile of the lists; width: keys of a block."""
    (e_main, e_tail), (ev_main, ev_tail) = widths(E), widths(Ev)
    return {
        "E": E, "E_MAIN": e_main, "E_TAIL": e_tail, "EV": Ev, "EV_MAIN": ev_main, "EV_TAIL": ev_tail,
        "SCALE": plain_scale(rule), "PRECISION": knobs.precision, "M": rows, "WIDTH": width, "DIAGONAL": diagonal,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
    }  # fmt: skip

"""FlexAttention called as a higher-order operator, with functions and block masks written from index expressions.

    out_i = sum_j softmax_j(score(factor * q_i . k_j, b, h, i, j) where keep(b, h, i, j)) v_j

The operator is called below its public face, so that our own tile classes are its block mask and `create_block_mask`
(which evaluates the whole mask) never runs. A sink is one further key with value 0, in a block of its own.

Source: Dong et al. 2024, "Flex Attention", arXiv:2412.05496; torch/_inductor/kernel/flex/flex_cpu.py (forward only,
float32 and half types, no log-sum-exp under Inductor on CPU).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._higher_order_ops.flex_attention import flex_attention as flex_operator
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import _disable_current_modes

from attnc.codegen.tiles import Tiles, classify, static_tiles
from attnc.expr import Expr, J, const, load, maximum, sub
from attnc.operands import Operands
from attnc.predicate import conjunction, disjunction, eq, le, rebuild, where
from attnc.reading import picked, read
from attnc.rule_attention import linear_score


def flex(given: Operands, *, block_m: int, block_n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend through FlexAttention; rows that keep no key give 0.

    Shapes: query (B, Hq, L, E), key (B, H, S, E), value (B, H, S, Ev) -> out (B, Hq, L, Ev), lse (B, Hq, L).
    Under Inductor on CPU lse may not be used: its template has no such output.
    """
    if given.rule.sink is not None:
        given = _with_sink(given, given.rule.sink, block_n)
    query, key, value, captured, sizes, rule = given
    keep, score = rule.keep, rule.score
    linear = linear_score(score)
    factor, rest = (1.0, None) if linear is None else linear
    tiles = tile_classes(given, block_m=block_m, block_n=block_n)

    masking, scoring = (_Reads(e, captured, sizes, query.device) for e in (keep, score))

    def mask_mod(b, h, i, j, *buffers):
        return _scalar(read(keep, _axes(b, h, i, j), *masking.split(buffers)), j)

    def score_mod(s, b, h, i, j, *buffers):
        found = scoring.split(buffers)
        if rest is None:
            return read(score, _axes(b, h, i, j), *found, score=s)
        if rest.is_const:
            return s + rest.value if rest.value else s
        return s + read(rest, _axes(b, h, i, j), *found)

    mask = block_mask(tiles, query.shape[2], key.shape[2], mask_mod, query.device)
    mask_buffers = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in masking.buffers)
    out, lse, *_ = flex_operator(
        query, key, value, score_mod, mask.as_tuple(), factor, _options(query), scoring.buffers, mask_buffers
    )
    return out, (lse * math.log(2.0)).detach()


def _options(query: torch.Tensor) -> dict:
    on_gpu = query.device.type != "cpu"
    return {
        "PRESCALE_QK": False,
        "ROWS_GUARANTEED_SAFE": False,
        "BLOCKS_ARE_CONTIGUOUS": False,
        "WRITE_DQ": True,
        "OUTPUT_LOGSUMEXP": on_gpu,
        "OUTPUT_MAX": False,
    }


class _Reads:
    """The tensors and run-time sizes that an expression reads: a function of FlexAttention takes them as buffers.

    Sizes go in as tensors without dimensions. As symbols they meet a fault of Inductor's CPU template (torch 2.13): it
    renames its tile sizes by replacing text, and "ks1" is also the beginning of "ks14".
    """

    def __init__(self, e: Expr, captured: Sequence[torch.Tensor], sizes: Sequence, device: torch.device) -> None:
        self.slots = sorted({x.args[0] for x in e.walk() if x.op == "load"})
        named = sorted({int(x.args[0][1:]) for x in e.walk() if x.op == "size"})
        self.known = {n: sizes[n] for n in named if isinstance(sizes[n], int)}
        self.open = [n for n in named if n not in self.known]
        held = (torch.full((), sizes[n], dtype=torch.int64, device=device) for n in self.open)
        self.buffers = (*(captured[slot] for slot in self.slots), *held)

    def split(self, buffers: tuple) -> tuple[Any, Any]:
        """Tensors by slot and sizes by number, from the buffers as the function receives them."""
        count = len(self.slots)
        tables = dict(zip(self.slots, buffers[:count], strict=True))
        return tables, self.known | dict(zip(self.open, buffers[count:], strict=True))


def _axes(b, h, i, j):
    return {name: picked(name, at) for name, at in (("b", b), ("h", h), ("i", i), ("j", j))}


def _scalar(keep, like: torch.Tensor) -> torch.Tensor:
    return keep if isinstance(keep, torch.Tensor) else like.new_full((), bool(keep), dtype=torch.bool)


def _with_sink(given: Operands, sink: Expr, block_n: int) -> Operands:
    """The same behind one more block of keys, whose first is the sink and whose others are never kept.

    A whole block, and in front: the classes of all other tiles stay as they are, and no length is mentioned.
    """
    moved = sub(J, const(block_n))

    def move(x: Expr) -> Expr | None:
        if x.op == "load":  # positions in front of the table are not kept, but are read
            return load(x.args[0], tuple(rebuild(a, inside.get) for a in x.args[1:]), x.kind)
        return moved if x == J else None

    inside = {J: maximum(moved, const(0))}
    at_sink, rule = eq(J, const(0)), given.rule
    keep = disjunction(at_sink, conjunction(le(const(block_n), J), rebuild(rule.keep, move)))
    score = where(at_sink, sink, rebuild(rule.score, move))
    key, value = (F.pad(t, (0, 0, block_n, 0)) for t in (given.key, given.value))
    return given._replace(key=key, value=value, rule=replace(rule, keep=keep, score=score, sink=None))


def tile_classes(given: Operands, *, block_m: int, block_n: int) -> Tiles:
    """Constants where lengths and sizes are numbers and the mask has no lookups, else operations in the graph."""
    (B, Hq, L, _), S, keep = given.query.shape, given.key.shape[2], given.rule.keep
    sizes, names = tuple(given.sizes), keep.names()
    counts = {"B": B if "b" in names else 1, "Hq": Hq if "h" in names else 1}
    numbers = (L, S, *sizes, *counts.values())
    if not keep.has("load") and all(isinstance(n, int) for n in numbers):
        return static_tiles(keep, L, S, block_m, block_n, sizes=sizes, **counts)
    return classify(
        keep, L, S, block_m, block_n, captured=given.captured, sizes=sizes, device=given.query.device, **counts
    )


def block_mask(tiles: Tiles, L, S, mask_mod, device: torch.device) -> BlockMask:
    """FlexAttention's block mask from tile classes."""
    if tiles.is_static:
        # Written into the graph as numbers: a real tensor cannot enter a graph of fake ones.
        parts = [torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in _numbers(tiles)]
    else:
        parts = _lists(tiles)
    counts, order, full_counts, full_order = parts
    return BlockMask.from_kv_blocks(
        counts,
        order,
        full_counts,
        full_order,
        BLOCK_SIZE=(tiles.block_m, tiles.block_n),
        mask_mod=mask_mod,
        seq_lengths=(L, S),
        compute_q_blocks=False,
    )


def _lists(tiles: Tiles) -> list[torch.Tensor]:
    return [t for flags in (tiles.partial, tiles.full) for t in _listed(flags)]


def _numbers(tiles: Tiles) -> list[list]:
    with _disable_current_modes():
        return [t.tolist() for t in _lists(tiles)]


def _listed(flags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per query block the number of marked key blocks and their indices, marked ones first, in ascending order."""
    counts = flags.sum(-1, dtype=torch.int32)
    order = torch.argsort((~flags).to(torch.int32), dim=-1, stable=True).to(torch.int32)
    return counts, order

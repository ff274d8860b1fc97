"""Attention over tiles with their own key lists on the CPU: batched flash calls over gathered rows and keys.

    out_i = sum_p exp(lse_pi - lse_i) out_pi over the tiles p that hold row i,   lse_i = log sum_p exp(lse_pi) (+ sink)

Tiles are run in pieces that fit a cache, so that memory beyond the outputs does not grow with the length. Where rows
keep every key of their tile, and stand at a level l_i that an earlier part gave them, a tile is two products and
exp(score - l_i), added up as it is: no maximum, no division. The backward runs the same pieces with the merged out and
lse: d s_ij = exp(s_ij - lse_i) (d out_i . v_j - d out_i . out_i) holds for each tile alone. Scores that are not linear
in the product run composed, in both directions.

Source: Dao 2023, "FlashAttention-2", arXiv:2307.08691, section 3.1; Liu et al. 2023, arXiv:2310.01889 (merging).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from attnc.codegen.cpu_row_sums import RowSums
from attnc.codegen.cpu_scores import factor_of, is_zero
from attnc.codegen.derivative import derivative, lookup_slopes
from attnc.codegen.key_lists import NONE, KeyLists, in_blocks
from attnc.codegen.triton_text import Slot
from attnc.expr import BOOL, SCORE, TRUE, Expr
from attnc.operands import Operands
from attnc.reading import as_tensor, picked, read
from attnc.rule_attention import AttentionRule, linear_score

PIECE = 24 << 20  # bytes of gathered operands and of a mask at a time
FEW = 64  # bytes of a pair that a rule may hold beside its mask before pieces grow smaller
NARROW = 128  # keys of a tile up to which two products beat the flash kernel, whose scores never leave the cache
WHOLE = 4 << 20  # where no mask is read, bytes of operands, scores and results at a time
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True)
class Tables:
    """The operands laid flat: rows of queries, blocks of keys and values."""

    query: Tensor
    key: Tensor
    value: Tensor
    blocks: int  # of a key head
    pair: int  # bytes that reading the rule holds for each pair

    @classmethod
    def of(cls, operands: Operands, width: int) -> Tables:
        query, key, value = operands[:3]
        rows = query.reshape(-1, query.shape[-1])
        pair = _bytes_of_pair(operands.rule)
        return cls(rows, in_blocks(key, width), in_blocks(value, width), -(-key.shape[2] // width), pair)

    @property
    def width(self) -> int:
        """Of heads, as the kernel takes them: one for keys and values."""
        return max(self.key.shape[-1], self.value.shape[-1])


@lru_cache(maxsize=256)
def _bytes_of_pair(rule: AttentionRule) -> int:
    """Of the values of all parts of a rule that differ from pair to pair; a part is kept until the whole is read."""
    nodes = (x for e in (rule.keep, rule.score) for x in e.walk())
    found = ((x, x.names()) for x in nodes)
    return sum(1 if x.kind == BOOL else 8 for x, names in found if "s" in names or ("j" in names and len(names) > 1))


def _widened(t: Tensor, width: int) -> Tensor:
    return t if t.shape[-1] == width else torch.nn.functional.pad(t, (0, width - t.shape[-1]))


def forward(operands: Operands, every: Sequence[KeyLists]) -> tuple[Tensor, Tensor]:
    """Attend each row to the keys of its tiles, under the rule.

    Shapes: as `Operands` -> out (B, Hq, L, Ev), lse (B, Hq, L), natural, float32 (float64 for float64), with the sink.
    A row without keys gives 0 and lse -inf, or the sink.
    """
    query, bias, in_order = operands.query, _bias(operands), None
    is_plain = bias is not None and is_zero(bias)
    has_own = is_plain and len(every) > 0 and every[0].keeps == "diagonal"
    sums = RowSums(operands, unset=has_own)
    if has_own:
        _add_own(operands, sums, every[0].width)
    for lists in every[has_own:]:
        tables = Tables.of(operands, lists.width)
        is_narrow = lists.blocks.shape[1] * lists.width <= NARROW and query.dtype in (torch.float32, torch.float64)
        is_whole = is_plain and lists.keeps == "all" and lists.added is None and not bool((lists.blocks < 0).any())
        if not (is_narrow and is_whole):
            for tile in _pieces(lists, tables):
                sums.add(tile := _single(tile, sums.count), *_run(operands, tables, tile))
            continue
        if in_order is None:
            in_order = query.unflatten(1, (-1, sums.group)).transpose(2, 3).reshape(-1, query.shape[-1])
        for tile in _pieces(lists, tables, WHOLE):
            key, value = (t.index_select(0, _blocks(tables, tile)) for t in (tables.key, tables.value))
            if not sums.add_whole(tile, in_order, key, value, factor_of(operands.rule)):
                sums.add(tile := _single(tile, sums.count), *_run(operands, tables, tile))
    out, lse = sums.result()
    if operands.rule.sink is not None:
        total = torch.logaddexp(lse, _sink(operands).to(lse.dtype))
        out, lse = out * (lse - total).exp().unsqueeze(-1), total
    return out.to(query.dtype), lse


def _add_own(operands: Operands, sums: RowSums, width: int) -> None:
    """The first part of every row: the keys of its block of `width` up to itself."""
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in operands[:3])
    (B, _, L, E), H, group = query.shape, key.shape[1], sums.group
    most = max(E, value.shape[-1])
    for b, h in itertools.product(range(B), range(H)):
        for first, end in ((0, L // width * width), (L // width * width, L)):
            if first == end:
                continue
            each = min(width, end - first)
            q = query[b, h * group : (h + 1) * group, first:end].unflatten(1, (-1, each)).transpose(0, 1)
            k, v = (t[b, h, first:end].unflatten(0, (-1, 1, each)) for t in (key, value))
            q, k, v = (_widened(t, most) for t in (q, k, v))
            out, lse = _flash(q, k, v, 0.0, True, scale=factor_of(operands.rule))
            sums.put(((b * H + h) * L + first) * group, out[..., : value.shape[-1]], lse)


def _sink(operands: Operands) -> Tensor:
    """The sink's logits, (B, Hq, L)."""
    assert operands.rule.sink is not None
    B, Hq, L, _ = operands.query.shape
    return operands.tensor(operands.rule.sink).expand(B, Hq, L, 1)[..., 0]


def _single(tile: KeyLists, count: int) -> KeyLists:
    """Tiles of a row for each of the `count` query rows, numbered as they are."""
    tile = tile.spread()
    return tile if tile.parts == 1 else replace(tile, rows=torch.where(tile.rows < 0, NONE, tile.rows % count))


def _pieces(lists: KeyLists, tables: Tables, most: int | None = None) -> Iterator[KeyLists]:
    m, n = lists.rows.shape[1] * lists.heads, lists.blocks.shape[1] * lists.width
    item = tables.query.element_size()
    each = (2 * (m + n) * tables.width + (m * n if lists.keeps == "rule" or most else 0)) * item
    each += 0 if most else m * n * max(0, tables.pair - FEW)
    step = max(1, (most or PIECE) // max(each, 1))
    for first in range(0, len(lists), step):
        yield lists.part(first, first + step)


def _blocks(tables: Tables, tile: KeyLists) -> Tensor:
    """Which blocks of all key heads tiles have, (T * n,); one that is not there is the first."""
    return (tile.place.unsqueeze(-1) * tables.blocks + tile.blocks.clamp(min=0)).flatten()


def _gathered(tables: Tables, tile: KeyLists) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows (T, 1, m, E), keys and values (T, 1, n * width, E), of one E, and which blocks they are, (T * n,)."""
    at = _blocks(tables, tile)
    T, m = tile.rows.shape
    query = tables.query.index_select(0, tile.rows.clamp(min=0).flatten()).view(T, 1, m, -1)
    key, value = (t.index_select(0, at).view(T, 1, -1, t.shape[-1]) for t in (tables.key, tables.value))
    return _widened(query, tables.width), _widened(key, tables.width), _widened(value, tables.width), at


def _run(operands: Operands, tables: Tables, tile: KeyLists) -> tuple[Tensor, Tensor]:
    """out (T, m, Ev) and lse (T, m) of each tile alone; 0 and -inf for a row without keys."""
    query, key, value, _ = _gathered(tables, tile)
    width = operands.value.shape[-1]
    bias = _bias(operands)
    if bias is None:
        out, lse = _composed(operands, tile, query, key, value)
        return out[..., :width], lse
    mask = _mask(operands, tile, bias)
    causal = tile.keeps == "diagonal"
    out, lse = _flash(query, key, value, 0.0, causal, attn_mask=mask, scale=factor_of(operands.rule))
    out, lse = out.squeeze(1)[..., :width], lse.squeeze(1)
    if mask is None:
        return out, lse
    alive = (mask > -torch.inf).any(-1).squeeze(1)
    return torch.where(alive.unsqueeze(-1), out, 0.0), torch.where(alive, lse, -torch.inf)


def _bias(operands: Operands) -> Expr | None:
    """What is added to `factor * s`; None where the score is not linear in the product."""
    parts = linear_score(operands.rule.score)
    return None if parts is None else parts[1]


def _at(operands: Operands, tile: KeyLists, e: Expr, score: Tensor | None = None) -> Tensor:
    """`e` at every pair of the tiles, broadcastable to (T, 1, m, n * width)."""
    _, Hq, L, _ = operands.query.shape
    rows = tile.rows.clamp(min=0).view(len(tile), 1, -1, 1)
    keys = tile.keys.clamp(0, operands.key.shape[2] - 1).view(len(tile), 1, 1, -1)
    axes = {"b": rows // (Hq * L), "h": rows // L % Hq, "i": rows % L, "j": keys}
    found = read(
        e, {name: picked(name, at) for name, at in axes.items()}, operands.captured, operands.sizes, score=score
    )
    return as_tensor(found, operands.query if score is None else score)


def _keep(operands: Operands, tile: KeyLists) -> Tensor | None:
    """Pairs of the tiles that the rule keeps, broadcastable to (T, 1, m, n * width); None where it is all of them."""
    if tile.keeps == "diagonal" or (tile.keeps == "all" and not bool((tile.blocks < 0).any())):
        return None
    keys, S = tile.keys.view(len(tile), 1, 1, -1), operands.key.shape[2]
    there = (keys >= 0) & (keys < S)
    if operands.rule.keep == TRUE or tile.keeps == "all":
        return there
    return there & _at(operands, tile, operands.rule.keep)


def _mask(operands: Operands, tile: KeyLists, bias: Expr) -> Tensor | None:
    """What is added to the scores, (T, 1, 1 or m, n * width), -inf where nothing is kept; None for nothing."""
    keep, dtype = _keep(operands, tile), operands.query.dtype
    added = None if is_zero(bias) else _at(operands, tile, bias).to(dtype)
    if tile.added is not None:
        own = tile.added.view(len(tile), 1, 1, -1).to(dtype)
        added = own if added is None else added + own
    if keep is None:
        return added
    return torch.where(keep, torch.zeros((), dtype=dtype) if added is None else added, -torch.inf)


def _scores(operands: Operands, tile: KeyLists, query: Tensor, key: Tensor) -> Tensor:
    """Scores (T, 1, m, n * width) of the rule, -inf where nothing is kept; half types in float32."""
    raw = query @ key.mT
    raw = raw.float() if raw.dtype in (torch.bfloat16, torch.float16) else raw
    scores = _at(operands, tile, operands.rule.score, raw)
    if tile.added is not None:
        scores = scores + tile.added.view(len(tile), 1, 1, -1)
    keep = _keep(operands, tile)
    if tile.keeps == "diagonal":
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return scores if keep is None else torch.where(keep, scores, -torch.inf)


def _composed(operands: Operands, tile: KeyLists, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    scores = _scores(operands, tile, query, key)
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1)).exp()
    return (weights.to(value.dtype) @ value).squeeze(1), lse.squeeze(1)


def backward(
    grad: Tensor, operands: Operands, every: Sequence[KeyLists], out: Tensor, lse: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of query, key, value, and of the captured tensors that `needs` names; the lists are constants.

    Shapes: grad and out (B, Hq, L, Ev), lse (B, Hq, L), of `forward`.
    """
    query, key, value = operands[:3]
    most = max(key.shape[-1], value.shape[-1])
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    flat_grad, flat_out = (_widened(t, most).reshape(-1, most) for t in (grad, out))
    level = torch.where(lse == -torch.inf, 0.0, lse).flatten()
    dq = query.new_zeros(level.numel(), most, dtype=wide)
    learned = [torch.zeros_like(t, dtype=wide) for t, need in zip(operands.captured, needs, strict=True) if need]
    totals: list[Tensor] = [torch.zeros_like(t, dtype=wide) for t in (key, value)]
    for lists in every:
        tables = Tables.of(operands, lists.width)
        dk, dv = torch.zeros_like(tables.key, dtype=wide), torch.zeros_like(tables.value, dtype=wide)
        for tile in (_single(tile, level.numel()) for tile in _pieces(lists, tables)):
            rows, gone = tile.rows.clamp(min=0), tile.rows < 0
            given = flat_grad[rows].masked_fill(gone.unsqueeze(-1), 0.0)
            height = level[rows].masked_fill(gone, torch.inf)  # a row that is not there has no weights
            parts = _run_backward(operands, tables, tile, given, flat_out[rows], height, needs)
            dq.index_add_(0, rows.flatten(), parts[0].to(wide))
            at = _blocks(tables, tile)
            for total, more in zip((dk, dv), parts[1:3], strict=True):
                total.index_add_(0, at, more[..., : total.shape[-1]].reshape(-1, *total.shape[1:]).to(wide))
            for total, more in zip(learned, parts[3], strict=True):
                total += more
        for n, found in enumerate((dk, dv)):
            shape = totals[n].shape
            totals[n] += found.view(shape[0], shape[1], -1, shape[3])[:, :, : shape[2]]
    learned = _sink_backward(grad, operands, out, lse, needs, learned)
    dq = dq.view(*query.shape[:3], most)[..., : query.shape[-1]]
    captured = [t for t, need in zip(operands.captured, needs, strict=True) if need]
    return (
        dq.to(query.dtype),
        totals[0].to(key.dtype),
        totals[1].to(value.dtype),
        [found.to(t.dtype) for found, t in zip(learned, captured, strict=True)],
    )


def _run_backward(
    operands: Operands, tables: Tables, tile: KeyLists, grad: Tensor, out: Tensor, lse: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of a piece's rows (T * m, E), keys and values (T, 1, n * width, E), and of captured tensors."""
    query, key, value, _ = _gathered(tables, tile)
    grad, out, lse = grad.unsqueeze(1), out.unsqueeze(1), lse.unsqueeze(1)
    bias = _bias(operands)
    if bias is not None and not any(needs):
        mask = _mask(operands, tile, bias)
        dq, dk, dv = _flash_backward(
            grad, query, key, value, out, lse, 0.0, tile.keeps == "diagonal", attn_mask=mask,
            scale=factor_of(operands.rule),
        )  # fmt: skip
        return dq.flatten(0, 2), dk, dv, []
    scores = _scores(operands, tile, query, key)
    weights = (scores - lse.unsqueeze(-1)).exp()
    inner = (grad * out).sum(-1, keepdim=True)
    slope = weights * ((grad @ value.mT).to(weights.dtype) - inner)
    raw = (query @ key.mT).to(slope.dtype)

    def at(e: Expr) -> Tensor:
        return _at(operands, tile, e, raw)

    score = operands.rule.score
    learned = _learned(operands, score, slope, at, needs)
    inward = (slope * at(derivative(score, SCORE))).to(query.dtype)
    return (inward @ key).flatten(0, 2), inward.mT @ query, weights.mT.to(grad.dtype) @ grad, learned


def _learned(
    operands: Operands, e: Expr, slope: Tensor, at: Callable[[Expr], Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients of the captured tensors that `needs` names, `slope` being that of `e`; at: reads an expression."""
    slots = [Slot(t.dtype, t.dim(), need) for t, need in zip(operands.captured, needs, strict=True)]
    found = {n: torch.zeros_like(t, dtype=slope.dtype) for n, t in enumerate(operands.captured) if needs[n]}
    for lookup, inner in lookup_slopes(e, slots):
        table = operands.captured[lookup.args[0]]
        places = [
            torch.as_tensor(at(x), device=table.device).clamp(0, size - 1)
            for x, size in zip(lookup.args[1:], table.shape, strict=True)
        ]
        shape = torch.broadcast_shapes(*(place.shape for place in places)) if places else ()
        given = (slope * at(inner)).sum_to_size(shape)
        total = found[lookup.args[0]]
        if places:
            total.index_put_(tuple(place.long() for place in places), given, accumulate=True)
        else:
            total += given
    return list(found.values())


def _sink_backward(
    grad: Tensor, operands: Operands, out: Tensor, lse: Tensor, needs: Sequence[bool], learned: list[Tensor]
) -> list[Tensor]:
    if operands.rule.sink is None or not any(needs):
        return learned
    B, Hq, L, _ = operands.query.shape
    share = (_sink(operands).to(lse.dtype) - lse).exp()
    slope = -(share * (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)).view(B, Hq, L, 1)
    more = _learned(operands, operands.rule.sink, slope, operands.tensor, needs)
    return [total + one for total, one in zip(learned, more, strict=True)]

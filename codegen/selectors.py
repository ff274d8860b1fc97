"""What chooses blocks of keys: a score of each block for each row, and the best of them beside those always kept.

    mean_c = mean of the keys of block c

Source: Lu et al. 2025, "MoBA", arXiv:2502.13189, equations 4 to 6.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from attnc.codegen.key_lists import NONE
from attnc.expr import BOOL, TRUE, ZERO, B, H, I, J, load
from attnc.operands import Operands
from attnc.predicate import conjunction, disjunction, distances
from attnc.reading import as_tensor, picked, read
from attnc.rule_attention import MASKING, lowered

READ = 1 << 24  # pairs of a mask read at a time
CACHED = 1 << 18  # scores of blocks ranked at a time


def last_keys(given: Operands) -> Tensor:
    """Position of the last key that each row may keep, broadcastable to (B, Hq, L); -1 where it keeps none."""
    L, S, device = given.query.shape[2], given.key.shape[2], given.query.device
    rows = torch.arange(L, device=device).view(1, 1, L)
    keep = given.rule.keep
    if keep == TRUE:
        return torch.full_like(rows, S - 1)
    least = distances(keep)[0]
    if least is not None:  # i - j >= least
        return (rows - least).clamp(max=S - 1)
    return _last_read(given, rows)


def _last_read(given: Operands, rows: Tensor) -> Tensor:
    """`last_keys`, from the mask itself."""
    (B, Hq, L, _), S = given.query.shape, given.key.shape[2]
    if not all(isinstance(n, int) for n in (B, L, S)):  # in a graph, which has no loop over rows
        return _last_of(given, rows, S)
    step = max(1, READ // (S * B * Hq))
    return torch.cat([_last_of(given, rows[..., n : n + step], S) for n in range(0, L, step)], 2)


def with_masks_of_scores(given: Operands) -> Operands:
    """The operands with keys that a mask of the run takes out, by what it adds to their scores, as keys not kept.

    For what chooses keys alone: a row that keeps none is left as it is, for its scores then say what it gives. The
    tensors that stand behind those of the rule stay the last ones.
    """
    rule = given.rule
    added = lowered(rule.score)
    if added is None:
        return given
    high = ~(given.tensor(added) <= -MASKING)
    parts = (rule.score, rule.keep, rule.sink or TRUE)
    slot = 1 + max(x.args[0] for e in parts for x in e.walk() if x.op == "load")
    there = load(slot, tuple(ZERO if n == 1 else at for n, at in zip(high.shape, (B, H, I, J), strict=True)), BOOL)
    captured = [*given.captured[:slot], high, *given.captured[slot:]]
    masked = given._replace(captured=captured, rule=replace(rule, keep=conjunction(rule.keep, there)))
    rows = torch.arange(given.query.shape[2], device=high.device).view(1, 1, -1)
    lost = _last_read(masked, rows) < 0
    captured.insert(slot + 1, lost)
    left = load(slot + 1, (*(ZERO if n == 1 else at for n, at in zip(lost.shape, (B, H), strict=False)), I), BOOL)
    return given._replace(captured=captured, rule=replace(rule, keep=conjunction(rule.keep, disjunction(there, left))))


def _last_of(given: Operands, rows: Tensor, S: int) -> Tensor:
    B, Hq, device = given.query.shape[0], given.query.shape[1], rows.device
    positions = torch.arange(S, device=device).view(1, 1, 1, S)
    at = {
        "b": torch.arange(B, device=device).view(B, 1, 1, 1),
        "h": torch.arange(Hq, device=device).view(Hq, 1, 1),
        "i": rows.unsqueeze(-1),
        "j": positions,
    }
    keep = read(given.rule.keep, {n: picked(n, x) for n, x in at.items()}, given.captured, given.sizes)
    keep = as_tensor(keep, given.query)
    found = torch.where(keep, positions, -1).amax(-1)
    return found.expand(*found.shape[:2], rows.shape[-1])


def positions_of(given: Operands, last: Tensor) -> Tensor:
    """Position among the keys of each row itself, broadcastable to (B, Hq, L): the last it keeps, or its own number."""
    L, S = given.query.shape[2], given.key.shape[2]
    if distances(given.rule.keep)[0] is not None or L == 1:
        return last
    rows = torch.arange(L, device=last.device).view(1, 1, L) + (S - L if S > L else 0)
    return torch.minimum(rows, last)


def joined(x: Tensor, heads: int, how: str) -> Tensor:
    """(B, 1 or Hq, ...) for `heads` heads that choose; how: "sum", "mean", "amax" or "any" of those in one."""
    return x if x.shape[1] <= heads else getattr(x.unflatten(1, (heads, -1)), how)(2)


def block_means(key: Tensor, block: int) -> Tensor:
    """Mean of the keys of each block: (B, H, S, E) -> (B, H, blocks, E), float32 or float64; the last may be short."""
    key = key if key.dtype == torch.float64 else key.float()
    S = key.shape[2]
    filled = F.pad(key, (0, 0, 0, -S % block)).unflatten(2, (-1, block))
    first = torch.arange(filled.shape[2], device=key.device) * block
    return filled.sum(3) / (S - first).clamp(max=block).unsqueeze(-1)


def allowed_blocks(blocks: int, last: Tensor, block: int) -> Tensor:
    """Which blocks begin at or before `last`: (..., blocks)."""
    return torch.arange(blocks, device=last.device) * block <= last.unsqueeze(-1)


def always_kept(blocks: int, own: Tensor, block: int, *, sinks: int, window: int) -> Tensor:
    """Which blocks each row keeps whatever they score, (..., blocks): those of the first `sinks` keys, its own, and as
    many before it as `window` - 1 keys may reach into; window 0: not its own either."""
    place, at = torch.arange(blocks, device=own.device), own.unsqueeze(-1) // block
    near = (place >= at - near_blocks(window, block)) & (place <= at) & (window > 0)
    return (place * block < sinks) | near


def near_blocks(window: int, block: int) -> int:
    """Blocks before a row's own that a window is rounded up to."""
    return -(-(window - 1) // block) if window else 0


def block_shares(score: Tensor, last: Tensor, block: int, whole: int = 0) -> Tensor:
    """Softmax of the scores (B, heads, T, blocks) over the blocks that each row may keep; 0 elsewhere.

    whole: number of keys; only blocks of which a row may keep every key then count. 0: those that begin in time. What
    is formed of all keys of a block says something about keys behind a row that ends in it.
    """
    if whole:
        last = torch.where(last >= whole - 1, whole + block, last) - block + 1
    allowed = allowed_blocks(score.shape[-1], last, block)
    return score.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)


def top_blocks(
    score: Tensor,
    own: Tensor,
    last: Tensor,
    block: int,
    count: int,
    *,
    sinks: int = 0,
    window: int = 1,
    mass: int = 0,
    least: int = 0,
    together: bool = False,
) -> Tensor:
    """The `count` best blocks of each row, those always kept among them and first, NONE where fewer are kept, last.

    score: (B, heads, T, blocks), shares of blocks where there is a mass or a least one. own, last: positions of the row
    and of the last key it may keep, broadcastable to (B, heads, T). sinks, window: as `always_kept`.
    mass: percent of a row's shares; once the blocks hold it, no further one is kept. together: of those of all rows of
    a head, the largest first. least: share of a block in 1/10000 below which it is not kept. 0: no bound.
    """
    heads, T, blocks = score.shape[1:]
    options: dict[str, Any] = {"sinks": sinks, "window": window, "mass": mass, "least": least, "together": together}
    if together or not is_known(last):
        return _top_blocks(score, own, last, block, count, **options)
    step, found = max(1, CACHED // max(score.shape[0] * heads * blocks, 1)), []
    own, last = (x.expand(*x.shape[:-1], T) for x in (own, last))
    for n in range(0, T, step):
        at = slice(n, n + step)
        seen = begun(last[..., at], block, blocks)
        found.append(_top_blocks(score[:, :, at, :seen], own[..., at], last[..., at], block, count, **options))
    return torch.cat(found, 2)


def is_known(x: Tensor) -> bool:
    """Whether numbers can be read off `x` at no cost: it lies on the CPU, and is not that of a graph."""
    return x.device.type == "cpu" and not isinstance(x, FakeTensor) and not torch.compiler.is_compiling()


def begun(last: Tensor, block: int, blocks: int) -> int:
    """Into how many of the first blocks any of the rows reaches that end at `last`; one at least."""
    return max(1, min(blocks, int(last.max()) // block + 1))


def _top_blocks(
    score: Tensor, own: Tensor, last: Tensor, block: int, count: int, *, sinks: int, window: int, mass: int, least: int,
    together: bool,
) -> Tensor:  # fmt: skip
    blocks = score.shape[-1]
    allowed = allowed_blocks(blocks, last, block)
    forced = always_kept(blocks, own, block, sinks=sinks, window=window)
    forced &= allowed
    score = score.nan_to_num(0.0).masked_fill_(~allowed, -torch.inf)
    has_bound = bool(least) or 0 < mass < 100
    ranked = score.masked_fill(forced, torch.inf) if has_bound else score.masked_fill_(forced, torch.inf)
    best, at = ranked.topk(min(count, blocks), -1)
    kept = best > -torch.inf
    if has_bound:
        share, free = score.clamp(min=0.0).gather(-1, at), best == torch.inf
        if least:
            kept &= free | (share >= least / 10000)
        if 0 < mass < 100:
            whole = score.clamp(min=0.0).sum((2, 3) if together else -1, keepdim=True)
            kept &= free | (_held(share, free, together) < mass / 100 * whole)
    at = at.masked_fill_(~kept, NONE)
    return at if count <= blocks else F.pad(at, (0, count - blocks), value=NONE)


def _held(share: Tensor, free: Tensor, together: bool) -> Tensor:
    """What the places before each one hold, (B, heads, T, n): those of its row, or all larger ones of its head."""
    if not together:
        return share.cumsum(-1) - share
    ranked = torch.where(free, 1.0 + share, share).flatten(2)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    flat = share.flatten(2).gather(-1, order).double()
    return torch.zeros_like(flat).scatter(-1, order, flat.cumsum(-1) - flat).view_as(share)

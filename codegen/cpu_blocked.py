"""Block-sparse attention in plain ATen: a few batched calls over the visited tiles, differentiable, on any CPU.

    out_i = sum_{j in visited blocks of i} softmax_j(score_ij where keep_ij) v_j

Each group of query blocks (`attnc.codegen.cpu_groups`) gathers its key blocks and runs one flash call; whole tiles go
in without a mask where they are the larger share. Masks are read on the visited tiles only, once for all blocks of a
group that repeat the same pattern. Scores that are not linear in the product run composed, tile by tile.

Source: Zaheer et al. 2020, "Big Bird", arXiv:2007.14062, appendix D; Beltagy et al. 2020, arXiv:2004.05150, sec. 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from attnc.codegen.cpu_composed import composed
from attnc.codegen.cpu_flash import Part, flash
from attnc.codegen.cpu_groups import Group, grouped, is_run
from attnc.codegen.cpu_scores import additive, constant_bias, factor_of, is_zero
from attnc.codegen.tiles import blocks, decided, kept_keys, visited
from attnc.expr import Expr, I, J, add, const
from attnc.operands import Operands
from attnc.predicate import rebuild
from attnc.reading import Axis, as_tensor, picked, read
from attnc.rule_attention import AttentionRule, linear_score


@dataclass(frozen=True)
class Problem:
    """The tensors and facts that all groups share."""

    given: Operands
    block_m: int
    block_n: int

    @property
    def query(self) -> torch.Tensor:
        return self.given.query

    @property
    def rule(self) -> AttentionRule:
        return self.given.rule

    @property
    def S(self) -> int:  # noqa: N802  the house's name of the key length
        return self.given.key.shape[2]

    @property
    def facts(self) -> dict[str, Any]:
        """What the bounds of a mask are taken over, beside rows and keys."""
        sizes = tuple(self.given.sizes) if all(isinstance(n, int) for n in self.given.sizes) else ()
        return {"B": self.query.shape[0], "Hq": self.query.shape[1], "sizes": sizes}

    def span(self, group: Group) -> tuple[int, int]:
        """The first row of a group, and where the last one ends."""
        return group.rows[0] * self.block_m, min((group.rows[-1] + 1) * self.block_m, self.query.shape[2])

    def keep(self, group: Group, at: Sequence[int]) -> Expr:
        """The mask at positions `at` of the group's visits, without what is the same throughout."""
        seen = [row[n] for row in group.cols for n in at if row[n] >= 0]
        keys = min(seen) * self.block_n, min((max(seen) + 1) * self.block_n, self.S)
        return decided(self.rule.keep, self.span(group), keys, **self.facts)

    @property
    def ragged(self) -> int | None:
        """The block of keys that ends beyond S."""
        return self.S // self.block_n if self.S % self.block_n else None


def blocked(
    given: Operands, *, block_m: int, block_n: int, limit: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend block by block, in about `limit` groups; rows that keep no key give 0 and lse -inf (or the sink).

    Shapes: query (B, Hq, L, E), key (B, H, S, E), value (B, H, S, Ev) -> out (B, Hq, L, Ev), lse (B, Hq, L).
            L and S are numbers; sizes that are not leave their tiles partial.
    """
    query, key, _, _, sizes, rule = given
    B, Hq, L, _ = query.shape
    S = key.shape[2]
    names = rule.keep.names()
    known = tuple(sizes) if all(isinstance(n, int) for n in sizes) else ()
    visits = visited(
        rule.keep, L, S, block_m, block_n, sizes=known, B=B if "b" in names else 1, Hq=Hq if "h" in names else 1
    )
    problem = Problem(given, block_m, block_n)
    groups = grouped(visits, bool(L % block_m), problem.ragged, limit or most_groups(rule))
    outs, lses = [], []
    order: list[int] = []
    for group in groups:
        out, lse = _run(problem, group)
        outs.append(out)
        lses.append(lse)
        order += group.rows
    if is_run(order):
        return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, 2), torch.cat(lses, 2))
    at = _rows_in_order(order, L, block_m, query.device)
    return torch.cat(outs, 2).index_select(2, at), torch.cat(lses, 2).index_select(2, at)


def most_groups(rule: AttentionRule) -> int:
    """Into how many groups the query blocks are split: a composed one is several kernels, each a second to compile."""
    return 8 if linear_score(rule.score) is None else 16


def _rows_in_order(order: list[int], L: int, block_m: int, device: torch.device) -> torch.Tensor:
    """Where each query row is found after the groups are joined."""
    start, found = {}, 0
    for block in order:
        start[block] = found
        found += min(block_m, L - block * block_m)
    firsts = torch.tensor([start[m] for m in range(len(order))], device=device)
    return (firsts[:, None] + torch.arange(block_m, device=device)).flatten()[:L]


def _run(p: Problem, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    B, Hq = p.query.shape[:2]
    if not group.width:
        return _nothing(p, group)
    query, rows = _queries(p, group)
    nb = 1 if group.shared else len(group.rows)
    # A ragged key block is padded where blocks are batched, and the padding has to be masked.
    full = [
        n for n, whole in enumerate(group.full) if whole and (group.shared or all(c[n] != p.ragged for c in group.cols))
    ]
    sink = None if p.rule.sink is None else value_at(p.given, p.rule.sink, rows, None)
    bias = constant_bias(p.rule, p.given.captured)
    if bias is None:
        out, lse = _composed(p, group, query, rows, len(full) == group.width, sink)
    else:
        parts = _still(p, group, rows, bias)
        moving = range(group.still, group.width)
        full = [n for n in full if n in moving]
        # Merging two parts costs about as much as masking a thousand keys.
        split = (
            is_zero(bias)
            and 2 * len(full) >= len(moving)
            and (len(full) == len(moving) or len(full) * p.block_n >= 1024)
        )
        if split:
            parts.append(Part(*_keys(p, group, full)))
        rest = [n for n in moving if not (split and n in full)]
        if rest:
            mask = _mask(p, group, rest, rows, bias)
            parts.append(Part(*_keys(p, group, rest), mask))
        out, lse = flash(
            query,
            parts,
            factor_of(p.rule),
            sink=None if sink is None else merged(sink, B, nb),
            never_empty=p.rule.empty == "never",
        )
    if group.shared:
        return out, lse
    out = out.view(B, nb, Hq, -1, out.shape[-1]).transpose(2, 3).reshape(B, -1, Hq, out.shape[-1]).transpose(1, 2)
    return out, lse.view(B, nb, Hq, -1).transpose(1, 2).reshape(B, Hq, -1)


def _still(p: Problem, group: Group, rows: torch.Tensor, bias: Expr) -> list[Part]:
    """The keys that all query blocks see while the others move along, no more of each run than some row keeps."""
    nb, parts = len(group.rows), []
    for lo, hi in _runs(group.cols[0][: group.still]):
        first, end, whole = kept_keys(p.rule.keep, p.span(group), (lo * p.block_n, min(hi * p.block_n, p.S)), **p.facts)
        if first == end:
            continue
        cols = torch.arange(first, end, device=p.query.device)[None]
        mask = None if whole and is_zero(bias) else _added(p, rows, cols, p.rule.keep, bias, nb)
        seen = (t.narrow(2, first, end - first).unsqueeze(1) for t in (p.given.key, p.given.value))
        key, value = (t.expand(-1, nb, -1, -1, -1).flatten(0, 1) for t in seen)
        parts.append(Part(key, value, mask))
    return parts


def _nothing(p: Problem, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """Query blocks that see no key."""
    B, Hq, L, _ = p.query.shape
    count = sum(min(p.block_m, L - m * p.block_m) for m in group.rows)
    out = p.query.new_zeros(B, Hq, count, p.given.value.shape[-1])
    lse = torch.full((B, Hq, count), -torch.inf, dtype=_lse_dtype(p.query), device=p.query.device)
    if p.rule.sink is not None:
        i = torch.cat([torch.arange(m * p.block_m, min((m + 1) * p.block_m, L)) for m in group.rows])
        sink = value_at(p.given, p.rule.sink, i.to(p.query.device)[None], None)
        lse = sink[:, 0].detach().to(lse.dtype).expand(lse.shape)
    return out, lse


def _lse_dtype(query: torch.Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _queries(p: Problem, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """The group's query rows, (B or B * blocks, Hq, rows, E), and their positions, (1 or blocks, rows)."""
    _, Hq, L, E = p.query.shape
    bm, first, count = p.block_m, group.rows[0], len(group.rows)
    starts = torch.tensor([m * bm for m in group.rows], device=p.query.device)
    rows = starts[:, None] + torch.arange(bm, device=p.query.device)
    if group.stride == 1:
        last = min((first + count) * bm, L)
        query = p.query.narrow(2, first * bm, last - first * bm)
        rows = torch.arange(first * bm, last, device=p.query.device)
    elif group.stride is not None:
        query = windows(p.query, first * bm, bm, group.stride * bm, count).flatten(2, 3)
    else:
        query = p.query.index_select(2, rows.flatten())
    if group.shared:
        return query, rows.view(1, -1)
    query = query.unflatten(2, (count, bm)).transpose(1, 2)
    return query.reshape(-1, Hq, bm, E), rows.view(-1, bm)


def windows(t: torch.Tensor, first: int, width: int, step: int, count: int) -> torch.Tensor:
    """(B, H, count, width, E): rows first + step * n ... of `t` (B, H, rows, E), one strided view."""
    span = t.narrow(2, first, (count - 1) * step + width)
    return span.unfold(2, width, step).transpose(3, 4)


def _keys(p: Problem, group: Group, at: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of positions `at` of the group's visits, (B or B * blocks, H, width, E)."""
    return _gathered(p, group, at, p.given.key), _gathered(p, group, at, p.given.value)


def _gathered(p: Problem, group: Group, at: list[int], table: torch.Tensor) -> torch.Tensor:
    bn, S = p.block_n, p.S
    if group.shared:
        cols = [group.cols[0][n] for n in at]
        runs = _runs(cols)
        pieces = [table.narrow(2, lo * bn, min(hi * bn, S) - lo * bn) for lo, hi in runs]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)
    count, nb = blocks(S, bn), len(group.rows)
    if S % bn:
        table = F.pad(table, (0, 0, 0, count * bn - S))
    table = table.unflatten(2, (count, bn))  # (B, H, count, bn, E)
    step = group.step
    if step is not None and min(at) >= group.still:
        firsts = [group.cols[0][n] for n in at]
        if is_run(firsts):
            view = windows(table.flatten(2, 3), firsts[0] * bn, len(at) * bn, step * bn, nb)
            return view.transpose(1, 2).flatten(0, 1)
        slices = [table[:, :, lo : lo + (nb - 1) * step + 1 : step] for lo in firsts]
        picked_blocks = torch.cat(slices, 3)  # (B, H, nb, len(at) * bn, E)
    else:
        flat = [max(cols[n], 0) for cols in group.cols for n in at]
        chosen = table.index_select(2, torch.tensor(flat, device=table.device))
        picked_blocks = chosen.unflatten(2, (nb, len(at))).flatten(3, 4)
    picked_blocks = picked_blocks.transpose(1, 2)
    return picked_blocks.reshape(-1, *picked_blocks.shape[2:])


def _runs(cols: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive numbers as half-open ranges."""
    runs: list[tuple[int, int]] = []
    for n in cols:
        if runs and runs[-1][1] == n:
            runs[-1] = (runs[-1][0], n + 1)
        else:
            runs.append((n, n + 1))
    return runs


def _columns(p: Problem, group: Group, at: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Key positions, (1 or blocks, width), and which of them exist, or None where all do."""
    device, bn = p.query.device, p.block_n
    index = torch.arange(bn, device=device)
    if group.shared:
        seen = [group.cols[0][n] for n in at]
        pieces = [torch.arange(lo * bn, min(hi * bn, p.S), device=device) for lo, hi in _runs(seen)]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces))[None], None
    if group.step is not None and min(at) >= group.still:
        firsts = torch.cat([index + group.cols[0][n] * bn for n in at])
        moves = torch.arange(len(group.rows), device=device) * (group.step * bn)
        cols = firsts + moves[:, None]
    else:
        numbers = torch.tensor([[row[n] for n in at] for row in group.cols], device=device)
        cols = torch.where(numbers[:, :, None] < 0, p.S, numbers[:, :, None] * bn + index).flatten(1)
    dead = any(n < 0 or n == p.ragged for row in group.cols for n in row)
    return (cols.clamp(max=p.S - 1), cols < p.S) if dead else (cols, None)


def _repeats(p: Problem, group: Group, e: Expr, at: Sequence[int]) -> bool:
    """Whether `e` is the same at visits `at` of every block of the group, moved along."""
    step = group.step
    if step is None or group.stride is None or e.has("load") or min(at) < group.still:
        return False
    along = {I: add(I, const(group.stride * p.block_m)), J: add(J, const(step * p.block_n))}
    return rebuild(e, along.get) == e


def value_at(
    given: Operands, e: Expr, rows: torch.Tensor, cols: torch.Tensor | None, score: torch.Tensor | None = None
):
    """`e` at (B, blocks, Hq, rows, cols); the last dimension is left out without `cols`."""
    axes: dict[str, Axis] = {}
    B, Hq = given.query.shape[:2]
    device, rank = given.query.device, 4 if cols is None else 5
    for dim, (name, at) in enumerate((("b", torch.arange(B, device=device)), ("h", torch.arange(Hq, device=device)))):
        axes[name] = picked(name, at.view([-1 if d == 2 * dim else 1 for d in range(rank)]))
    nb, R = rows.shape
    axes["i"] = picked("i", rows.view((1, nb, 1, R) + (() if cols is None else (1,))))
    if cols is not None:
        axes["j"] = picked("j", cols.view(1, cols.shape[0], 1, 1, -1))
    value = read(e, axes, given.captured, given.sizes, score=score)
    value = as_tensor(value, given.query, rank)
    return value.view((1,) * (rank - value.dim()) + tuple(value.shape))


def merged(t: torch.Tensor, B: int, nb: int) -> torch.Tensor:
    """(B, blocks, ...) as (B * blocks, ...), left at 1 where it is the same for all."""
    if t.shape[0] == 1 and t.shape[1] == 1:
        return t[0]
    return t.expand(B, nb, *t.shape[2:]).reshape(B * nb, *t.shape[2:])


def _mask(p: Problem, group: Group, at: list[int], rows: torch.Tensor, bias: Expr) -> torch.Tensor:
    cols, exist = _columns(p, group, at)
    keep = p.keep(group, at)
    if exist is None and _repeats(p, group, keep, at) and _repeats(p, group, bias, at):
        rows, cols = rows[:1], cols[:1]
    return _added(p, rows, cols, keep, bias, 1 if group.shared else len(group.rows), exist)


def _added(
    p: Problem, rows: torch.Tensor, cols: torch.Tensor, mask: Expr, bias: Expr, nb: int,
    exist: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """What is added to the scores of `rows` and `cols`, -inf where nothing is kept."""
    keep = value_at(p.given, mask, rows, cols)
    keep = keep if exist is None else keep & exist.view(1, exist.shape[0], 1, 1, -1)
    added = None if is_zero(bias) else value_at(p.given, bias, rows, cols)
    return merged(additive(keep, added, p.query.dtype), p.query.shape[0], nb)


def _composed(
    p: Problem,
    group: Group,
    query: torch.Tensor,
    rows: torch.Tensor,
    full: bool,
    sink: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, nb = p.query.shape[0], 1 if group.shared else len(group.rows)
    at = list(range(group.width))
    cols, exist = _columns(p, group, at)
    key, value = _keys(p, group, at)

    def score(raw: torch.Tensor) -> torch.Tensor:
        return value_at(p.given, p.rule.score, rows, cols, raw.unflatten(0, (B, nb))).flatten(0, 1)

    keep: torch.Tensor | bool = True
    if not full or exist is not None:
        mask = p.keep(group, at)
        same = exist is None and _repeats(p, group, mask, at)
        keep = value_at(p.given, mask, rows[:1] if same else rows, cols[:1] if same else cols)
        keep = keep if exist is None else keep & exist.view(1, exist.shape[0], 1, 1, -1)
        keep = merged(as_tensor(keep, query), B, nb)
    out, lse, _ = composed(query, key, value, score, keep, sink=None if sink is None else merged(sink, B, nb))
    return out, lse

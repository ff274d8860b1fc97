"""Rows of attention under way, to which tiles with their own key lists add what they give.

    out_i = sum_p exp(lse_pi - level_i) out_pi / sum_p exp(lse_pi - level_i),  lse_i = level_i + log of the divisor

Source: Liu et al. 2023, "Ring Attention", arXiv:2310.01889 (parts merged by the log-sum-exp).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnc.codegen.key_lists import KeyLists
from attnc.operands import Operands

REACH = 30.0  # how far above its level the lse of a part may be: exp of it times many parts is no overflow


class RowSums:
    """Rows under way: sum_p exp(lse_p - level) out_p and sum_p exp(lse_p - level), against a level of each row.

    A level is the first lse, and moves only where a later one is far above it: what is added is then scaled and added
    in one pass each, where a running average reads and writes every row several times. The heads of a group lie side by
    side, (B, H, L, Hq / H): what they chose together is one run of numbers. unset: `put` gives each row a first part.
    """

    def __init__(self, operands: Operands, *, unset: bool = False) -> None:
        query, width = operands.query, operands.value.shape[-1]
        self.shape, self.group = query.shape[:3], operands.group
        self.count, self.length = self.shape.numel(), self.shape[2]
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        # The last ones take what tiles give for rows that they do not have. All lie where the query does.
        make = query.new_empty if unset else query.new_zeros
        self.out = make(self.count + self.group, width, dtype=wide)
        self.total = query.new_zeros(self.count + self.group, dtype=wide)
        self.level = query.new_full((self.count + self.group,), -torch.inf, dtype=wide)
        self.level[self.count :] = torch.inf

    def rows(self, tile: KeyLists) -> Tensor:
        """Where the rows of tiles lie, (T * m,), in units of the heads that they stand for."""
        L, group = self.length, self.group
        at = tile.rows % self.count
        if group > 1:
            unit = at // (group * L) * L + at % L
            at = unit if tile.heads > 1 else unit * group + at // L % group
        return torch.where(tile.rows < 0, self.count // tile.heads, at).flatten()

    def add(self, tile: KeyLists, part: Tensor, lse: Tensor) -> None:
        """Add tiles, `part` (T, m, Ev) being written over, to the rows they hold."""
        rows = self.rows(tile)
        part, lse = part.flatten(0, 1).to(self.out.dtype), lse.flatten().to(self.out.dtype)
        level = self.level.index_select(0, rows)
        above = lse > level + REACH
        if bool(above.any()):
            self._raise(rows[above], lse[above], tile.parts)
            level = self.level.index_select(0, rows)
        share = (lse - torch.where(level == -torch.inf, 0.0, level)).exp()
        self.out.index_add_(0, rows, part.mul_(share.unsqueeze(-1)))
        self.total.index_add_(0, rows, share)

    def _raise(self, rows: Tensor, lse: Tensor, parts: int) -> None:
        at, to = rows, lse
        if parts > 1:  # a row may be here more than once
            at = rows.unique()
            to = self.level.scatter_reduce(0, rows, lse, "amax").index_select(0, at)
        level = self.level.index_select(0, at)
        self.level.index_copy_(0, at, to)
        if bool((level == -torch.inf).all()):  # nothing is in these rows yet
            return
        for held in (self.out, self.total):
            scale = (level - to).exp().view(-1, *[1] * (held.dim() - 1))
            held.index_copy_(0, at, held.index_select(0, at) * scale)

    def add_whole(self, tile: KeyLists, query: Tensor, key: Tensor, value: Tensor, scale: float) -> bool:
        """Add tiles whose rows keep every key, of which `key` and `value` (T * n, width, E) are; query: all rows, in
        the order of the sums. False, and nothing added, where a row has no level or is far above it."""
        rows, T, heads = self.rows(tile), len(tile), tile.heads
        query = query.view(-1, heads * query.shape[-1])
        query = query.index_select(0, rows.clamp(max=len(query) - 1)).view(T, -1, key.shape[-1])
        level = self.level.view(-1, heads).index_select(0, rows).view(T, -1, 1)
        key, value = (t.view(T, -1, t.shape[-1]) for t in (key, value))
        scores = query.new_empty(T, query.shape[1], key.shape[1])
        scores.baddbmm_(query, key.mT, beta=0, alpha=scale).sub_(level).exp_()
        total = scores.sum(-1)
        if bool((total > math.exp(REACH)).any()):
            return False
        self.out.view(-1, heads * value.shape[-1]).index_add_(0, rows, (scores @ value).view(len(rows), -1))
        self.total.view(-1, heads).index_add_(0, rows, total.view(len(rows), -1))
        return True

    def put(self, at: int, part: Tensor, lse: Tensor) -> None:
        """The first part (n, heads of a group, m, Ev) of n * m rows of all heads of a group, from `at` on."""
        end = at + lse.numel()
        self.out[at:end] = part.transpose(1, 2).flatten(0, 2)
        self.level[at:end] = lse.transpose(1, 2).flatten()
        self.total[at:end] = 1.0

    def result(self) -> tuple[Tensor, Tensor]:
        """out (B, Hq, L, Ev) and lse (B, Hq, L): 0 and -inf for a row without keys."""
        out, total, level = self.out[: self.count], self.total[: self.count], self.level[: self.count]
        out, lse = out.div_(torch.where(total == 0, 1.0, total).unsqueeze(-1)), level + total.log()
        B, Hq, L = self.shape
        laid = [t.view(B, -1, L, self.group, *t.shape[1:]).transpose(2, 3) for t in (out, lse)]
        return laid[0].reshape(B, Hq, L, -1).contiguous(), laid[1].reshape(B, Hq, L).contiguous()

"""Random programs that build a boolean mask the ways models do; one strategy, `programs()`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Data:
    """What a program may read: positions (L, 1) and (1, S), document ids and padding (B, S), a table of blocks."""

    rows: Tensor
    cols: Tensor
    ids: Tensor
    padding: Tensor
    table: Tensor


Program = Callable[[Data], Tensor]
small = st.integers(-9, 40)
width = st.integers(1, 12)


def _compare(a: int, c: int, shift: int, kind: str) -> Program:
    compare = {"le": torch.le, "lt": torch.lt, "ge": torch.ge, "gt": torch.gt, "eq": torch.eq, "ne": torch.ne}[kind]
    return lambda x: compare(x.rows * a + shift, x.cols * c)


def _triangle(offset: int, upper: bool, offset_rows: int) -> Program:
    def build(x: Data) -> Tensor:
        full = torch.ones(x.rows.shape[0] + offset_rows, x.cols.shape[1], dtype=torch.bool)
        shape = full.triu(offset) if upper else full.tril(offset)
        return shape[offset_rows:]

    return build


LEAVES = st.one_of(
    st.builds(_compare, st.integers(-2, 3), st.integers(-2, 3), small,
              st.sampled_from(["le", "lt", "ge", "gt", "eq", "ne"])),
    st.builds(_triangle, st.integers(-5, 5), st.booleans(), st.integers(0, 3)),
    width.map(lambda c: lambda x: x.rows // c == x.cols // c),
    width.map(lambda c: lambda x: (x.rows - x.cols) % c == 0),
    width.map(lambda c: lambda x: (x.rows - x.cols).abs() <= c),
    width.map(lambda c: lambda x: torch.div(x.rows, c, rounding_mode="floor") >= x.cols // c),
    width.map(lambda c: lambda x: (x.cols < c).expand(x.rows.shape[0], -1)),
    width.map(lambda c: lambda x: torch.minimum(x.rows, x.cols) < c),
    width.map(lambda c: lambda x: (x.rows.float() - x.cols.float()) < float(c)),
    st.just(lambda x: x.ids[:, None, : x.rows.shape[0], None] == x.ids[:, None, None, :]),
    st.just(lambda x: x.ids[:, x.rows[:, 0] % x.ids.shape[1]][:, None, :, None] >= x.ids[:, None, None, :]),
    st.just(lambda x: x.padding[:, None, None, :].bool()),
    st.just(lambda x: (1.0 - x.padding[:, None, None, :].to(torch.float32)) * LOWEST >= -1.0),
    width.map(lambda c: lambda x: x.table[(x.rows // c).clamp(max=6), (x.cols // c).clamp(max=6)]),
    st.just(lambda x: torch.diff(x.cols, prepend=x.cols[:, :1] - 1) == 1),
)


def _filled(p: Program, q: Program) -> Program:
    def build(x: Data) -> Tensor:
        scores = torch.zeros(x.rows.shape[0], x.cols.shape[1]).masked_fill(~p(x), LOWEST)
        return (torch.where(q(x), scores, LOWEST) > -1.0)

    return build


def _product(p: Program, q: Program) -> Program:
    return lambda x: (p(x).to(torch.int64) * q(x).long()).bool()


def _transposed(p: Program) -> Program:
    return lambda x: p(x).transpose(-1, -2).contiguous().mT


def _joined(p: Program, q: Program) -> Program:
    """The first columns of one mask, the others of the other."""
    def build(x: Data) -> Tensor:
        shape = torch.broadcast_shapes(p(x).shape, q(x).shape, (x.rows.shape[0], x.cols.shape[1]))
        a, c = p(x).expand(shape), q(x).expand(shape)
        half = x.cols.shape[1] // 2
        return torch.cat([a[..., :half], c[..., half:]], dim=-1)

    return build


def programs() -> st.SearchStrategy[Program]:
    """Masks over (B, 1, L, S), or broadcastable to it."""
    def grow(inner: st.SearchStrategy[Program]) -> st.SearchStrategy[Program]:
        return st.one_of(
            st.builds(lambda p, q: lambda x: p(x) & q(x), inner, inner),
            st.builds(lambda p, q: lambda x: p(x) | q(x), inner, inner),
            st.builds(lambda p, q: lambda x: p(x).logical_xor(q(x)), inner, inner),
            st.builds(lambda p, q, r: lambda x: torch.where(p(x), q(x), r(x)), inner, inner, inner),
            inner.map(lambda p: lambda x: ~p(x)),
            st.builds(_filled, inner, inner),
            st.builds(_product, inner, inner),
            inner.map(_transposed),
            st.builds(_joined, inner, inner),
        )

    return st.recursive(LEAVES, grow, max_leaves=6)

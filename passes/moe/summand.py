"""One term of a block's output: an expert's output, what multiplies it, and what it is summed over."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attnc.expr import Expr
from attnc.passes.moe.hidden import Hidden
from attnc.passes.moe.products import Weighted
from attnc.passes.moe.rows import Element


@dataclass(frozen=True)
class Scatter:
    """Rows that are added where they belong: row `row` of `extent` goes to `key`, asked for is `target`."""

    row: Expr
    extent: Expr
    key: Expr
    target: Expr
    keys: fx.Node


@dataclass(frozen=True)
class Unit:
    """The output of one feed-forward at one element: its second product and its hidden units."""

    second: Weighted
    hidden: Hidden

    def __hash__(self) -> int:
        return hash(self.second.node)


@dataclass(frozen=True)
class Summand:
    """One term of the sum.

    unit:    the feed-forward; None where the term is `source`, the block's input itself.
    factors: what it is multiplied by, not settled. scale: constants among them.
    over:    coordinates that are summed, with their extents.
    biased, gained, norm, dropout: what is done to the expert's output first: a bias, a factor for each channel, a norm.
    latent:  a product with one more weight that the whole sum goes through.
    """

    unit: Unit | None
    source: Element | None = None
    factors: tuple[Element, ...] = ()
    scale: float = 1.0
    over: tuple[tuple[Expr, Expr], ...] = ()
    scatter: Scatter | None = None
    biased: bool = False
    gained: bool = False
    norm: str = ""
    dropout: float = 0.0
    latent: Weighted | None = None

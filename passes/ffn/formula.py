"""The formula of a hidden unit: its terms, and the projections of the input that are its operands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from attnc.expr import Expr, terms_of
from attnc.passes.ffn.flow import FACTORS, MASKS, QUOTIENTS, SUMS
from attnc.passes.ffn.products import Weighted
from attnc.passes.views import Index


@dataclass(frozen=True)
class Ref:
    """The value of the term at this position."""

    at: int


@dataclass(frozen=True)
class Term:
    """One value of the formula.

    kind:  operand, learned (a parameter), number, constant (a call on those two), call, row (a reduction over the
           hidden axis), norm (a call that joins a hidden unit and a row), step (a norm, convolution or dropout:
           `name`, passes its argument on).
    bent:  whether a nonlinear function has been applied. rowwise: whether it is one number for each token.
    mixed: whether a convolution over tokens lies behind a nonlinear function.
    """

    kind: str
    target: Any = None
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    name: str = ""
    bent: bool = False
    rowwise: bool = False
    mixed: bool = False


@dataclass(frozen=True)
class Operand:
    """One projection of the input: which features of which product, for which token.

    feature: position among the product's outputs, an expression of the hidden coordinates.
    source:  the node that the product reads, behind views, and the index of the token there.
    updates: pairs of products with weights whose result is added, low-rank updates of the same weight.
    """

    product: Weighted
    feature: Expr
    tokens: Index
    source: tuple[fx.Node, Index]
    bias: fx.Node | None = None
    updates: tuple[tuple[Weighted, Weighted], ...] = ()


@dataclass
class Formula:
    """The terms of one hidden unit in order of computation, the last one the unit itself."""

    terms: list[Term] = field(default_factory=list)
    operands: list[Operand] = field(default_factory=list)
    nodes: dict[fx.Node, None] = field(default_factory=dict)
    bent: dict[fx.Node, None] = field(default_factory=dict)  # nodes behind a nonlinear function
    dropout: float = 0.0
    shifted: bool = False  # whether token positions may be off by a constant, behind a convolution

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal keys compute equal functions."""
        return tuple((t.kind, str(t.target), t.args, t.kwargs, t.name) for t in self.terms)


def is_constant(term: Term) -> bool:
    return term.kind in ("learned", "number", "constant")


def bends(name: str, args: tuple[Any, ...], terms: list[Term]) -> bool:
    live = [t for t in terms if not is_constant(t)]
    if name in SUMS:
        return False
    if name in FACTORS:
        return len(live) > 1
    if name in QUOTIENTS:
        return len(live) > 1 or not (isinstance(args[0], Ref) and not is_constant(terms[0]))
    return name not in MASKS - {"where"} and not (name == "where" and is_constant(terms[0]))


def refs_of(values: Any) -> list[Ref]:
    if isinstance(values, Ref):
        return [values]
    if isinstance(values, list | tuple):
        return [ref for value in values for ref in refs_of(value)]
    return []


def frozen(values: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in values.items())


def layout_of(feature: Expr) -> tuple[int, int] | None:
    """(step, offset) where the feature is `step * j + offset` of one hidden coordinate, or None."""
    constant, terms = terms_of(feature)
    if len(terms) != 1 or terms[0][0].op != "var":
        return None
    return int(terms[0][1]), int(constant)

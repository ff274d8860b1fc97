"""The hidden units of experts: which products they are made of, and by what formula.

Read backwards from the data of the second product at one element, so that halves, alternating columns and biases are
known by their indices. The formula is named by `passes.ffn.unit`, which serves dense feed-forwards too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from attnc.expr import Expr, terms_of
from attnc.passes.ffn.flow import DROPOUTS, is_dropping, is_elementwise
from attnc.passes.ffn.formula import Formula, Ref, Term
from attnc.passes.graph import Unliftable, op_name, shape_of, tensor_of
from attnc.passes.moe.products import Weighted, contraction, is_weight, weighted
from attnc.passes.moe.rows import CASTS, Element, Rows, is_single
from attnc.passes.views import broadcast_index


@dataclass
class Hidden:
    """A hidden unit.

    firsts: its first products, by operand; features: which of their outputs. biased: operands with a bias.
    factors: what multiplies it beside: routing weights.
    """

    formula: Formula = field(default_factory=Formula)
    firsts: list[Weighted] = field(default_factory=list)
    features: list[Expr] = field(default_factory=list)
    biased: set[int] = field(default_factory=set)
    factors: list[Element] = field(default_factory=list)
    dropout: float = 0.0


class HiddenReader:
    """Reads one hidden unit of the second product `second`. Raises: Unliftable."""

    def __init__(self, rows: Rows, second: Weighted, col: str) -> None:
        self.rows, self.second, self.col = rows, second, col
        self.hidden = Hidden()
        self._memo: dict[Element, int] = {}

    def run(self) -> Hidden:
        self.rows.ranges.declare(self.second.inner.args[0], self.second.width)
        self._read(self.second.data)
        if not self.hidden.firsts:
            raise Unliftable("no product with weights stands before it", self.second.node)
        return self.hidden

    def _add(self, term: Term) -> int:
        self.hidden.formula.terms.append(term)
        return len(self.hidden.formula.terms) - 1

    def _read(self, at: Element) -> int:
        if at not in self._memo:
            self._memo[at] = self._term(at)
        return self._memo[at]

    def _term(self, at: Element) -> int:
        node = at.node
        if is_weight(node):
            return self._learned(at)
        if contraction(node) is not None:
            return self._operand(at)
        self.rows.check(node)
        if op_name(node) in CASTS and tensor_of(node.args[0]) is not None:
            return self._read(Element(node.args[0], at.index))
        if op_name(node) in DROPOUTS and is_dropping(node):
            self.hidden.dropout = float(node.args[1])
            return self._read(Element(node.args[0], at.index))
        if op_name(node) in ("index", "index_select", "embedding") and is_weight(node.args[0]):
            return self._add(Term("learned", name="vector"))
        behind = self.rows.behind(at)
        if behind is not None:
            return self._read(behind)
        if is_elementwise(node) and isinstance(node.target, OpOverload):
            return self._call(at)
        raise Unliftable(f"{op_name(node) or node.op} stands between the products of the experts", node)

    def _learned(self, at: Element) -> int:
        if not is_single(at.node):
            return self._add(Term("learned", name="vector"))
        known = self.rows.number(at.node, at.index)
        return self._add(Term("number", args=(known.value,)) if known.is_const else Term("learned", name=at.node.name))

    def _operand(self, at: Element) -> int:
        """A first product: rows as the second's, a feature that depends on the hidden unit alone."""
        dot = contraction(at.node)
        single = dot is not None and len(dot.contracted) == 1
        found = weighted(self.rows, dot, at.index, self.second.inner, self.col) if dot is not None and single else None
        if found is None:
            raise Unliftable("a product of two activations stands between the products of the experts", at.node)
        feature = next((e for e in at.index if self.second.inner.names() & e.names()), None)
        if feature is None or feature.names() != self.second.inner.names():
            raise Unliftable("the second product does not run over the features of the first", at.node)
        position = len(self.hidden.firsts)
        self.hidden.firsts.append(found)
        self.hidden.features.append(feature)
        self.hidden.formula.operands.append(found)  # type: ignore[arg-type]  # counted only
        if found.bias is not None:
            self.hidden.biased.add(position)
        return self._add(Term("operand", name=str(position)))

    def _call(self, at: Element) -> int:
        node, outer = at.node, shape_of(at.node)
        beside = self._beside(at)
        if beside is not None:
            return beside

        def term(argument: fx.Node) -> Ref:
            if tensor_of(argument) is None:
                raise Unliftable("a number known at run time only is part of the experts", argument)
            return Ref(self._read(Element(argument, broadcast_index(at.index, shape_of(argument), outer))))

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), term)
        biased = self._with_bias(node, args)
        if biased is not None:
            return biased
        return self._add(Term("call", functional(node.target), args, tuple(kwargs.items())))

    def _with_bias(self, node: fx.Node, args: tuple[Any, ...]) -> int | None:
        refs = [x for x in args if isinstance(x, Ref)]
        if op_name(node) not in ("add", "add_") or node.kwargs or len(refs) != 2 or len(args) != 2:
            return None
        for one, other in (refs, refs[::-1]):
            term = self.hidden.formula.terms[one.at]
            if term.kind == "operand" and self.hidden.formula.terms[other.at].kind == "learned":
                self.hidden.biased.add(int(term.name))
                return one.at
        return None

    def _beside(self, at: Element) -> int | None:
        """A factor that is the same for every hidden unit of a row and no weight: the routing weight."""
        node = at.node
        if op_name(node) != "mul" or len(node.args) != 2 or not all(tensor_of(x) is not None for x in node.args):
            return None
        outer, inner = shape_of(node), self.second.inner.names()
        sides = [Element(x, broadcast_index(at.index, shape_of(x), outer)) for x in node.args]
        for factor, value in (sides, sides[::-1]):
            free = not any(e.names() & inner for e in factor.index)
            if free and not is_weight(factor.node) and any(e.names() & inner for e in value.index):
                self.hidden.factors.append(factor)
                return self._read(value)
        return None


def functional(target: OpOverload) -> OpOverload:
    """The operator that returns what an in-place one writes."""
    name = target._schema.name.split("::")[-1]
    if not name.endswith("_") or name.endswith("__"):
        return target
    return getattr(getattr(torch.ops.aten, name[:-1]), target._schema.overload_name or "default")


def layout(hidden: Hidden, inner: Expr, width: int) -> str:
    """Where the operands are: "one" product alone, two "separate" ones, "halves" or "interleaved" columns of one."""
    if len(hidden.firsts) == 1:
        return "one"
    if len({first.node for first in hidden.firsts}) == len(hidden.firsts):
        return "separate"
    steps = []
    for feature in hidden.features:
        constant, terms = terms_of(feature)
        if len(terms) != 1 or terms[0][0] != inner:
            return "other"
        steps.append((int(terms[0][1]), int(constant)))
    known = {"halves": [(1, 0), (1, width)], "interleaved": [(2, 0), (2, 1)]}
    return next((name for name, place in known.items() if place == sorted(steps)), "other")

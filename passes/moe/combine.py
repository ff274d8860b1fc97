"""The output of a block as a sum: which expert's output, times which factors, summed over what.

    out[t, c] = sum over terms of  factor * ... * second[row, c]

`Sums.of` takes an element of the output apart: reductions become summed coordinates, lookups and views move the index,
scattered rows remember where they go. What is no sum of weighted expert outputs is refused with its node.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from attnc.expr import ONE, ZERO, Expr, var
from attnc.passes.ffn.flow import DROPOUTS, is_dropping
from attnc.passes.graph import Unliftable, integer, op_name, shape_of, tensor_of
from attnc.passes.moe.hidden import HiddenReader
from attnc.passes.moe.norms import normed
from attnc.passes.moe.products import Contraction, contraction, contractions, is_weight, weighted
from attnc.passes.moe.rows import CASTS, Element, Rows
from attnc.passes.moe.rules import RULES
from attnc.passes.moe.summand import Summand, Unit
from attnc.passes.views import Index

MOST_EXPANDED = 1024  # pieces of a stack that are taken apart one by one
_ZEROS = ("zeros", "zeros_like", "new_zeros")


class _Expand(Exception):
    """Raised where a piece of a stack is asked for by a summed coordinate; the sum is then written out."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Sums:
    """Takes outputs of one graph apart; one instance for each graph. Raises: Unliftable."""

    def __init__(self, rows: Rows, col: str = "c") -> None:
        self.rows, self.col = rows, var(col)
        self._count = 0
        self.inputs: set[fx.Node] = set()  # the block's input: a term of its own where experts are the identity
        self.floor = -1  # what was computed before the block's input is no term
        self._units: dict[tuple[Contraction, Index], Unit | None] = {}
        self._memo: dict[Element, list[Summand] | Unliftable] = {}
        self.seen: dict[object, Any] = {}  # what users of the sums have worked out about their terms

    def begin(self, inputs: set[fx.Node], floor: int) -> None:
        """Take the sums of another block: its inputs, and the place in the graph before which nothing is a term."""
        self.inputs, self.floor = inputs, floor
        self._memo.clear()

    def of(self, node: fx.Node, index: Index) -> list[Summand]:
        """The summands of element `index`; its last coordinate is the channel."""
        at = Element(node, index)
        if at not in self._memo:
            try:
                self._memo[at] = self._take(at)
            except Unliftable as exc:
                self._memo[at] = exc
        found = self._memo[at]
        if isinstance(found, Unliftable):
            raise found
        return found

    def out(self, axis: int, extent: Expr) -> Expr:
        """The coordinate of an axis of the output."""
        self.rows.ranges.declare(f"o{axis}", extent)
        return var(f"o{axis}")

    def fresh(self, extent: Expr) -> Expr:
        """A new coordinate that runs over `extent`."""
        self._count += 1
        name = f"m{self._count}"
        self.rows.ranges.declare(name, extent)
        return var(name)

    def unit(self, dot: Contraction, index: Index) -> Unit | None:
        """The feed-forward whose second product is `dot`; None where it is no product with a weight."""
        key = (dot, index)
        if key not in self._units:
            self._count += 1
            second = weighted(self.rows, dot, index, self.col, f"f{self._count}")
            hidden = None if second is None else HiddenReader(self.rows, second, f"d{self._count}").run()
            self._units[key] = None if second is None or hidden is None else Unit(second, hidden)
        return self._units[key]

    def _take(self, at: Element) -> list[Summand]:
        node, name = at.node, op_name(at.node)
        if node in self.inputs:
            return [Summand(None, at)]
        if name in _ZEROS or (name in ("full", "full_like", "new_full") and _fill(node) == 0):
            return []
        if self.rows.facts.order[node] <= self.floor:
            raise Unliftable("what was computed before the block's input is a term of the sum", node)
        self.rows.check(node)
        if name in CASTS and tensor_of(node.args[0]) is not None:
            return self.of(node.args[0], at.index)
        if name in DROPOUTS and is_dropping(node):
            return [replace(s, dropout=float(node.args[1])) for s in self.of(node.args[0], at.index)]
        ways = contractions(node)
        if ways:
            return self._any_of(at, ways)
        if name in ("cat", "stack"):
            return self._piece(at)
        rule = RULES.get(name)
        found = rule(self, at) if rule is not None else None
        if found is not None:
            return found
        behind = self.rows.behind(at)
        if behind is not None:
            return self.of(behind.node, behind.index)
        return self._normed(at)

    def _any_of(self, at: Element, ways: list[Contraction]) -> list[Summand]:
        """A product by the first way in which it is a term."""
        first, *others = ways
        try:
            return self._joined(at, first) if first.summed or first.beside else self._product(at, first)
        except Unliftable as exc:
            sum_of_rows = contraction(at.node) if not others else None
            if not others and (sum_of_rows is None or len(sum_of_rows.contracted) == 1):
                raise
            try:
                return self._any_of(at, others) if sum_of_rows is None else self._contracted(at, sum_of_rows)
            except Unliftable:
                raise exc from None

    def _joined(self, at: Element, dot: Contraction) -> list[Summand]:
        """An einsum that takes the second product, multiplies it by other operands and sums."""
        outs = [x for x in dot.out_labels if x not in dot.summed]
        if len(outs) != len(at.index):
            raise Unliftable("an operand of the einsum has axes of its own", at.node)
        where = dict(zip(outs, at.index, strict=True))
        over = [(label, dot.extent(label)) for label in dot.summed]
        where |= {label: self.fresh(extent) for label, extent in over}
        unit = self.unit(dot, tuple(where[x] for x in dot.out_labels))
        if unit is None:
            raise Unliftable("a product of activations is no sum of expert outputs", at.node)
        factors = []
        for node, labels in dot.beside:
            place = zip(labels, shape_of(node), strict=True)
            factors.append(Element(node, tuple(ZERO if extent == ONE else where[x] for x, extent in place)))
        if not all(map(self.is_free, factors)):
            raise Unliftable("the channels of the sum are multiplied by an operand", at.node)
        return [Summand(unit, factors=tuple(factors), over=tuple((where[x], extent) for x, extent in over))]

    def _product(self, at: Element, dot: Contraction) -> list[Summand]:
        """A feed-forward's second product; weights times rows; or a projection of the whole sum."""
        try:
            unit = self.unit(dot, at.index)
            return self._contracted(at, dot) if unit is None else [Summand(unit)]
        except Unliftable as exc:
            if not any(map(is_weight, (dot.left, dot.right))):
                return self._contracted(at, dot)
            try:
                return self._projected(at, dot)
            except Unliftable:
                raise exc from None

    def _projected(self, at: Element, dot: Contraction) -> list[Summand]:
        """A product with one more weight, after the sum."""
        self._count += 1
        outer = weighted(self.rows, dot, at.index, self.col, f"l{self._count}")
        if outer is None or outer.expert is not None or outer.bias is not None:
            raise Unliftable("a projection of the sum with a bias or many weights", at.node)
        self.rows.ranges.declare(outer.inner.args[0], outer.width)
        col, self.col = self.col, outer.inner
        try:
            below = self.of(outer.data.node, outer.data.index)
        finally:
            self.col = col
        if any(s.latent is not None for s in below):
            raise Unliftable("the sum goes through two projections", at.node)
        return [replace(s, latent=outer) for s in below]

    def _normed(self, at: Element) -> list[Summand]:
        found = normed(at.node)
        if found is None:
            raise Unliftable(f"{op_name(at.node) or at.node.op} is no sum of expert outputs", at.node)
        name, source, dims = found
        if dims != 1 or at.index[-1] != self.col:
            raise Unliftable(f"a {name} over more than the channels", at.node)
        below = self.of(source, at.index)
        if len(below) != 1 or below[0].factors or below[0].over or below[0].unit is None:
            raise Unliftable(f"a {name} of what is no single expert's output", at.node)
        return [replace(below[0], norm=name, gained=False)]

    def _contracted(self, at: Element, dot: Contraction) -> list[Summand]:
        """A product of factors and rows, summed over slots or experts."""
        where = dict(zip(dot.out_labels, at.index, strict=True))
        over = []
        for label in dot.contracted:
            labels, operand = (dot.left_labels, dot.left) if label in dot.left_labels else (dot.right_labels, dot.right)
            extent = shape_of(operand)[labels.index(label)]
            where[label] = self.fresh(extent)
            over.append((where[label], extent))
        if dot.bias is not None:
            raise Unliftable("a product with an addend is no sum of expert outputs", at.node)
        sides = [Element(x, dot.at(side, where)) for x, side in ((dot.left, "left"), (dot.right, "right"))]
        for factor, rows in (sides, sides[::-1]):
            if self.is_free(factor) and not self.is_free(rows):
                return self.summed(rows, over, factor)
        raise Unliftable("a product of two activations is no sum of expert outputs", at.node)

    def is_free(self, at: Element) -> bool:
        """Whether an element is the same for all channels."""
        return not any(e.names() & self.col.names() for e in at.index)

    def _piece(self, at: Element) -> list[Summand]:
        """One piece of tensors joined along an axis."""
        node, joined = at.node, op_name(at.node)
        dim = int(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(at.index)
        position = at.index[dim]
        if not position.is_const:
            if position.op == "var" and position.args[0].startswith("m"):
                raise _Expand(position.args[0])
            raise Unliftable(f"the {joined} of rows is read by position", node)
        number = int(position.value)
        if joined == "stack":
            return self.of(node.args[0][number], at.index[:dim] + at.index[dim + 1 :])
        for part in node.args[0]:
            extent = shape_of(part)[dim]
            if not extent.is_const or number < int(extent.value):
                where = at.index[:dim] + (integer(number),) + at.index[dim + 1 :]
                return self.of(part, where)
            number -= int(extent.value)
        raise Unliftable("a piece beyond the end", node)

    def summed(self, rows: Element, over: list[tuple[Expr, Expr]], *factors: Element) -> list[Summand]:
        """The sum of `rows` times `factors` over coordinates; written out where its terms differ in kind."""
        try:
            below = self.of(rows.node, rows.index)
            return [replace(s, over=(*over, *s.over), factors=(*s.factors, *factors)) for s in below]
        except _Expand as stack:
            at = next((k for k, (e, _) in enumerate(over) if e.args[0] == stack.name), None)
            extent = None if at is None else over[at][1]
            if at is None or extent is None or not extent.is_const or extent.value > MOST_EXPANDED:
                raise
            rest = over[:at] + over[at + 1 :]
            pieces = ([_fixed(x, over[at][0], k) for x in (rows, *factors)] for k in range(int(extent.value)))
            return [s for piece in pieces for s in self.summed(piece[0], rest, *piece[1:])]


def _fixed(at: Element, coordinate: Expr, number: int) -> Element:
    return Element(at.node, tuple(integer(number) if e == coordinate else e for e in at.index))


def _fill(node: fx.Node) -> Any:
    return node.args[2 if op_name(node) == "new_full" else 1]

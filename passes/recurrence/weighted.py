"""Elements of the weights of a causal product, sums from the start of a sequence and powers of a distance included.

A decay written as a difference of two such sums, or as one sum that starts behind another token, is then the same.

Source: Dao and Gu 2024, arXiv:2405.21060, listing 1 (segment sums).
"""

from __future__ import annotations

import math
from typing import ClassVar

from torch import fx

from attnc.expr import Expr, J, load, mul, scale, sub, to_float, unary, var
from attnc.passes.graph import GraphFacts, op_name, shape_of, tensor_of
from attnc.passes.masks import Leaf, Lift
from attnc.passes.views import Index, broadcast_index
from attnc.predicate import logical_not, lt

TOTALS = 1 << 16  # slots from here on are sums, not captured tensors


class Weighted(Lift):
    """A lift of weights that also reads sums from the start of a sequence.

    totals: (node, axis) of what is summed up, by slot beyond those of the captured tensors.
    """

    deepest: ClassVar[int] = 24  # asked at every product of a graph, also those of loops

    def __init__(self, facts: GraphFacts, end: fx.Node, leaf: Leaf) -> None:
        super().__init__(facts, end, lambda node, index: leaf(node, index) or self._own(node, index))
        self.totals: list[tuple[fx.Node, int]] = []
        self._sums = 0

    def _own(self, node: fx.Node, index: Index) -> Expr | None:
        if op_name(node) == "pow" and len(node.args) == 2:
            return self._power(node, index)
        if op_name(node) != "cumsum" or not isinstance(node.args[0], fx.Node):
            return None
        value, source = tensor_of(node), tensor_of(node.args[0])
        if value is None or source is None or not source.is_floating_point() or not self.reads(node):
            return None
        dim = int(node.args[1]) % value.dim()
        self._sums += 1
        step = var(f"step{self._sums}")
        self.ranges.declare(step.args[0], shape_of(node)[dim])
        inner = self.element(node.args[0], index[:dim] + (step,) + index[dim + 1 :])
        start = self._from(inner, step)
        if start is None:
            return None
        added, first = start
        load_at = [x for x in added.walk() if x.op == "load"]
        if added.op != "load" or len(load_at) != 1 or step not in added.args[1:]:
            return None
        at = added.args[1:]
        total = self.captured[added.args[0]], at.index(step)
        if total not in self.totals:
            self.totals.append(total)
        slot = self.totals.index(total) + TOTALS
        end = load(slot, tuple(index[dim] if x == step else x for x in at), added.kind)
        if first is None:
            return end
        return sub(end, load(slot, tuple(first if x == step else x for x in at), added.kind))

    def _from(self, inner: Expr, step: Expr) -> tuple[Expr, Expr | None] | None:
        """What is summed and the position behind which it starts: `where(j < step, x[step], 0)`."""
        if inner.op != "where":
            return inner, None
        p, yes, no = inner.args
        if yes.is_const:
            p, yes, no = logical_not(p), no, yes
        if no.is_const and no.value == 0 and p == lt(J, step):
            return yes, J
        return None

    def _power(self, node: fx.Node, index: Index) -> Expr | None:
        """A decay to the power of a distance."""
        base, exponent = (
            self.element(x, broadcast_index(index, shape_of(x), shape_of(node))) if isinstance(x, fx.Node)
            else self.element(x, ()) for x in node.args
        )  # fmt: skip
        if exponent.is_const or (base.is_const and base.value <= 0):
            return None
        if base.is_const:
            return unary("exp", scale(to_float(exponent), math.log(base.value)))
        if base.op != "load":
            source = node.args[0]
            if not isinstance(source, fx.Node) or tensor_of(source) is None:
                return None
            base = self.capture(source, broadcast_index(index, shape_of(source), shape_of(node)))
        if base.names() & {"i", "j"}:
            return None
        return unary("exp", mul(unary("log", base), to_float(exponent)))

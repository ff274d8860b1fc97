"""Lift tensors of scores and masks to index expressions: what is element (b, h, i, j)?

A `Lift` pulls an element through the graph, operator by operator: `where(kv <= q, 0, finfo.min)[b, 0, i, j]` becomes
`where(j <= i, 0, min)`, whatever views, lookups and casts lie between. What the tables do not know becomes a lookup
into the tensor itself (a *captured* tensor), so run-time data is never proven from one input's values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import fx

from attnc import predicate
from attnc.expr import (
    BOOL,
    FLOAT,
    INT,
    ZERO,
    Expr,
    add,
    among,
    const,
    listing,
    load,
    scale,
    to_float,
    unary,
    var,
)
from attnc.passes.elementwise import RULES
from attnc.passes.graph import GraphFacts, Unliftable, integer, op_name, tensor_of
from attnc.passes.views import Index, Ranges, through

Leaf = Callable[[fx.Node, Index], "Expr | None"]
_CASTS = ("to", "_to_copy", "long", "int", "type_as")
_PLACE = var("place")  # of a number in its list


def kind_of(dtype: torch.dtype) -> str:
    return BOOL if dtype == torch.bool else FLOAT if dtype.is_floating_point else INT


class Lift:
    """One lift: the captured tensors it needs and the rules by which elements are pulled through operators.

    facts, end: the graph and the node at which captured tensors will be read.
    leaf:       asked first at every node; returns an expression to stop there (the product `s`, a body's argument).
    """

    deepest: ClassVar[int] = 96  # operators one behind another; a loop over tokens that was written out is no mask

    def __init__(self, facts: GraphFacts, end: fx.Node, leaf: Leaf = lambda node, index: None) -> None:
        self.facts, self.end, self.leaf = facts, end, leaf
        self.ranges = Ranges()
        self.captured: list[fx.Node] = []
        self.implied: dict[Expr, Expr] = {}  # a condition -> one from which it follows
        self._memo: dict[tuple[fx.Node, Index], Expr] = {}
        self._opaque: set[fx.Node] = set()
        self._depth = 0

    def element(self, node: Any, index: Index) -> Expr:
        """Element `index` of the value of `node`, which may also be a Python or symbolic number."""
        if not isinstance(node, fx.Node):
            return self._number(node)
        value = node.meta.get("val")
        if value is None and node.op == "get_attr":
            value = _attribute(self.facts.graph, node)
        if not isinstance(value, torch.Tensor):
            return self._scalar(node, value)
        key = (node, index)
        if key not in self._memo:
            if self._depth == self.deepest:
                raise Unliftable(f"more than {self.deepest} operators one behind another", node)
            self._depth += 1
            try:
                self._memo[key] = self._lift(node, value, index)
            finally:
                self._depth -= 1
        return self._memo[key]

    def _lift(self, node: fx.Node, value: torch.Tensor, index: Index) -> Expr:
        found = self.leaf(node, index)
        if found is not None:
            return found
        if node in self._opaque:
            return self._lookup(node, value, index)
        if not self.facts.unchanged(node, node, self.end):
            raise Unliftable("a tensor of the mask is modified in place before the attention reads it", node)
        if not self.reads(node):
            return self.capture(node, index)
        if op_name(node) == "detach" and self.facts.needs_grad(node.args[0]):
            return self.capture(node, index)
        view = through(node, index, self.ranges)
        if view is not None:
            return self.element(*view)
        known = self._constant(node, value, index)
        if known is not None:
            return known
        rule = RULES.get(op_name(node))
        result = rule(self, node, index) if rule is not None else None
        if result is None:
            return self.capture(node, index)
        return self._as_kind(result, node, value, index)

    def _as_kind(self, e: Expr, node: fx.Node, value: torch.Tensor, index: Index) -> Expr:
        """`e` with the kind of the node's dtype; a dtype that cannot hold the value exactly stops the lift."""
        wanted = kind_of(value.dtype)
        if wanted == FLOAT and e.kind == INT and not e.is_const and value.dtype in (torch.float16, torch.bfloat16):
            return self.capture(node, index)
        if wanted == INT and e.kind != BOOL and value.dtype in (torch.int8, torch.uint8, torch.int16):
            return self.capture(node, index)
        if wanted == e.kind:
            return e
        if wanted == BOOL:
            return predicate.truth(e)
        if wanted == FLOAT:
            return to_float(e)
        return unary("trunc", e) if e.kind == FLOAT else predicate.num(e)

    def reads(self, node: fx.Node) -> bool:
        """Whether the inputs of `node` still hold, at the end, what it read.

        An input that was written before `node` read it is no longer what made it: it will be looked up.
        """
        written = [x for x in node.all_input_nodes if not self.facts.unchanged(x, x, self.end)]
        if not all(self.facts.unchanged(x, node, self.end) for x in written):
            return False
        self._opaque.update(written)
        return True

    def capture(self, node: fx.Node, index: Index) -> Expr:
        """A lookup into the tensor that `node` is."""
        value = tensor_of(node)
        if value is None:
            raise Unliftable("a constant of the graph that is no number", node)
        if not self.facts.unchanged(node, node, self.end):
            raise Unliftable("a tensor of the mask is modified in place before the attention reads it", node)
        return self._lookup(node, value, index)

    def _lookup(self, node: fx.Node, value: torch.Tensor, index: Index) -> Expr:
        if node not in self.captured:
            self.captured.append(node)
        at = tuple(ZERO if s == 1 else x for s, x in zip(value.shape, index, strict=True))
        return load(self.captured.index(node), at, kind_of(value.dtype))

    def on_list(self, node: fx.Node, index: Index, axis: int) -> Expr | None:
        """Whether `index[axis]` is one of the numbers that `node` holds along `axis`, for the rest of `index`.

        None where that cannot be said: their number is symbolic, the position is data of the run, or views on the way
        to where the numbers are made break the lists up.
        """
        extent = tensor_of(node).shape[axis]  # type: ignore[union-attr]
        if not isinstance(extent, int) or index[axis].has("load") or index[axis].kind != INT:
            return None
        self.ranges.declare("place", const(extent))
        at, found = (*index[:axis], _PLACE, *index[axis + 1 :]), None
        while self.facts.unchanged(node, node, self.end):
            if at[-1] == _PLACE and not any("place" in e.names() for e in at[:-1]):
                found = node, at[:-1]
            step = self._behind(node, at)
            if step is None or not self.facts.unchanged(step[0], node, self.end):
                break
            node, at = step
        if found is None:
            return None
        listed = self.capture(found[0], (*found[1], ZERO))
        return among(index[axis], listing(listed.args[0], listed.args[1:-1], extent))

    def _behind(self, node: fx.Node, at: Index) -> tuple[fx.Node, Index] | None:
        """Where the integers of a view or a cast come from."""
        if op_name(node) in _CASTS and isinstance(node.args[0], fx.Node):
            given = tensor_of(node.args[0])
            wide = given is not None and kind_of(given.dtype) == INT and given.dtype in (torch.int32, torch.int64)
            return (node.args[0], at) if wide else None
        return through(node, at, self.ranges)

    def settled(self, e: Expr) -> Expr:
        """`e` without conditions that follow from others beside them."""

        def leaf(x: Expr) -> Expr | None:
            if x.op not in ("and", "or"):
                return None
            sides = {(p if x.op == "and" else predicate.logical_not(p)): p for p in x.args}
            kept = [p for side, p in sides.items() if self.implied.get(side) not in sides]
            if len(kept) == len(x.args):
                return None
            join = predicate.conjunction if x.op == "and" else predicate.disjunction
            return join(*(predicate.rebuild(p, leaf) for p in kept))

        return predicate.rebuild(e, leaf) if self.implied else e

    def _number(self, value: Any) -> Expr:
        if isinstance(value, bool | int | float):
            return const(value)
        if isinstance(value, torch.SymInt):
            return integer(value)
        raise Unliftable(f"an operand is a {type(value).__name__}", self.end)

    def _scalar(self, node: fx.Node, value: Any) -> Expr:
        if op_name(node) in ("_local_scalar_dense", "item") and tensor_of(node.args[0]) is not None:
            return self.element(node.args[0], ())
        if isinstance(value, torch.SymInt | int) and not isinstance(value, bool):
            return integer(value)
        raise Unliftable("a run-time number that is no tensor element and no size", node)

    def _constant(self, node: fx.Node, value: torch.Tensor, index: Index) -> Expr | None:
        """Constants of the graph that are one number or 0, 1, 2, ..."""
        table = getattr(value, "constant", None)
        if node.op == "get_attr":
            table = _attribute(self.facts.graph, node)
        if table is None or isinstance(table, torch._subclasses.FakeTensor) or table.numel() == 0:
            return None
        if table.numel() == 1:
            return const(table.item())
        if table.dim() == 1 and table.numel() <= 65536 and not table.is_floating_point():
            steps = table.to(torch.int64)
            first, step = int(steps[0]), int(steps[1] - steps[0])
            if torch.equal(steps, first + step * torch.arange(len(steps))) and table.dtype != torch.bool:
                return add(scale(index[0], step), const(first))
            if table.dtype == torch.bool and bool((table == table[0]).all()):
                return const(bool(table[0]))
        return None


def _attribute(graph: fx.Graph, node: fx.Node) -> Any:
    found: Any = graph.owning_module
    for part in str(node.target).split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, torch.Tensor) else None

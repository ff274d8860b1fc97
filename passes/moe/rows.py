"""Rows of an expert product: which token, which slot and which expert a row stands for, whatever sorted the rows.

Every dispatch makes rows of (token, slot) pairs, `slot` counting the chosen experts of a token. `Rows.settle` follows
an element through views, casts and lookups to the tensor that holds it; sorting permutations and their inverses are
known for what they are, so that an index into sorted rows becomes the index of the pair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnc.expr import ONE, ZERO, Expr, add, const, load, mul
from attnc.passes.graph import GraphFacts, Unliftable, op_name, shape_of, tensor_of
from attnc.passes.indexing import RULES as INDEXING
from attnc.passes.masks import Lift, kind_of
from attnc.passes.moe.lengths import Lengths
from attnc.passes.views import Index, Ranges, join_heads, through
from attnc.predicate import lt

CASTS = ("to", "_to_copy", "type_as", "float", "half", "bfloat16", "double", "int", "long", "bool")


@dataclass(frozen=True)
class Element:
    """Element `index` of what `node` holds."""

    node: fx.Node
    index: Index

    @property
    def flat(self) -> Expr:
        """Its position in row-major order."""
        return flat(self.index, shape_of(self.node))

    @property
    def lead(self) -> Expr:
        """Its position in row-major order, without the last axis."""
        return flat(self.index[:-1], shape_of(self.node)[:-1])


def is_single(node: Any) -> bool:
    """Whether `node` is a tensor of one element, whatever lengths of others are unknown."""
    return tensor_of(node) is not None and all(extent == ONE for extent in shape_of(node))


def flat(index: Index, shape: tuple[Expr, ...]) -> Expr:
    """Row-major position of `index` in a tensor of `shape`."""
    offset = ZERO
    for position, extent in zip(index, shape, strict=True):
        offset = add(mul(offset, extent), position)
    return join_heads(offset)


class _Lookups(Lift):
    """A lift that asks for no lengths: rows of a loop over experts have lengths known at run time only."""

    def _lookup(self, node: fx.Node, value: torch.Tensor, index: Index) -> Expr:
        if node not in self.captured:
            self.captured.append(node)
        at = tuple(ZERO if extent == ONE else x for extent, x in zip(shape_of(node), index, strict=True))
        return load(self.captured.index(node), at, kind_of(value.dtype))


class Rows:
    """Elements of one graph, followed to where they come from; one instance for each graph."""

    def __init__(self, facts: GraphFacts) -> None:
        self.facts = facts
        self.lift = _Lookups(facts, next(iter(reversed(facts.graph.nodes))), self._leaf)
        self.lift.ranges = self.ranges = Lengths()

    def settle(self, node: Any, index: Index, stop: Callable[[Element], bool] = lambda at: False) -> Element:
        """The element behind views, casts and lookups; `stop` ends the walk earlier."""
        here = Element(node, index)
        while not stop(here):
            behind = self.behind(here)
            if behind is None:
                break
            here = behind
        return here

    def behind(self, at: Element) -> Element | None:
        """One step of `settle`; None where the node is no view, cast or lookup."""
        node, index = at.node, at.index
        self.check(node)
        if op_name(node) in CASTS and tensor_of(node.args[0]) is not None:
            return Element(node.args[0], index)
        view = through(node, index, self.ranges)
        if view is not None:
            return Element(*view)
        rule = _LOOKUPS.get(op_name(node))
        return None if rule is None else rule(self, node, index)

    def check(self, node: fx.Node) -> None:
        """Raises: Unliftable where an input of `node` was written between its making and the node."""
        for source in node.all_input_nodes:
            if order_of(source) is None and not self.facts.unchanged(source, source, node):
                raise Unliftable("a tensor of the block is modified in place before it is read", source)

    def number(self, node: Any, index: Index) -> Expr:
        """Element of an integer tensor as an index expression."""
        return self.lift.element(node, index)

    def loaded(self, e: Expr) -> fx.Node | None:
        """The tensor that an expression is an element of, where it is nothing else."""
        return self.lift.captured[e.args[0]] if e.op == "load" else None

    def _leaf(self, node: fx.Node, index: Index) -> Expr | None:
        """Permutations and their inverses, which cancel; sorted numbers as the numbers they were."""
        before = sorted_from(node)
        if before is not None:
            return self.number(before[0], self._unsorted(before[1], index))
        key = inverse_of(node)
        if key is not None:
            return self._permuted(node, index, lambda by: order_of(by) is key)
        key = order_of(node)
        if key is not None:
            return self._permuted(node, index, lambda by: inverse_of(by) is key)
        return self._quotient(node, index)

    def _quotient(self, node: fx.Node, index: Index) -> Expr | None:
        """A position divided by a number, rounded towards zero: positions are not negative."""
        if op_name(node) != "div" or node.kwargs.get("rounding_mode") != "trunc" or not isinstance(node.args[1], int):
            return None
        e = self.number(node.args[0], index)
        by = self.loaded(e)
        return self.ranges.floordiv(e, const(node.args[1])) if by is not None and order_of(by) is not None else None

    def _permuted(self, node: fx.Node, index: Index, cancels: Callable[[fx.Node], bool]) -> Expr:
        """Element of a permutation; its inverse, where it is looked up by that, is undone."""
        by = self.loaded(index[0]) if len(index) == 1 else None
        if by is not None and cancels(by):
            return index[0].args[1]
        value = tensor_of(node)
        assert value is not None
        return self.lift._lookup(node, value, index)

    def _unsorted(self, order: fx.Node, index: Index) -> Index:
        """Where the element at `index` of a sorted tensor stood before."""
        return (*index[:-1], self.number(order, index))


# --------------------------------------------------------------------------------------------------------------------
# Sorting
# --------------------------------------------------------------------------------------------------------------------


def order_of(node: Any) -> fx.Node | None:
    """The sort, argsort or topk whose indices, or values, `node` holds."""
    if op_name(node) == "getitem" and op_name(node.args[0]) in ("sort", "topk"):
        return node.args[0]
    return node if op_name(node) == "argsort" else None


def sorted_from(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(tensor before, its order) where `node` holds sorted integers along the last axis."""
    value = tensor_of(node)
    if op_name(node) != "getitem" or node.args[1] != 0 or op_name(node.args[0]) != "sort" or value is None:
        return None
    sort = node.args[0]
    if value.dtype.is_floating_point or not _runs_last(sort, value.dim()):
        return None
    order = next((u for u in sort.users if op_name(u) == "getitem" and u.args[1] == 1), None)
    return None if order is None else (sort.args[0], order)


def _runs_last(sort: fx.Node, rank: int) -> bool:
    stable = sort.target._schema.overload_name == "stable"
    dim = sort.kwargs.get("dim", sort.args[1] if len(sort.args) > 1 and not stable else -1)
    return isinstance(dim, int) and dim % max(rank, 1) == rank - 1


def inverse_of(node: Any) -> fx.Node | None:
    """The sort that the permutation in `node` undoes: written by index, by scatter, or sorted again."""
    name, args = op_name(node), list(getattr(node, "args", ()))
    if name == "argsort":
        return _permutation(args[0])
    if name == "index_put" and len(args[1]) == 1 and _counts(args[2]):
        return _permutation(args[1][0])
    if name == "scatter" and len(args) == 4 and _counts(args[3]):
        return _permutation(args[2])
    return None


def _permutation(node: Any) -> fx.Node | None:
    value = tensor_of(node)
    while op_name(node) in CASTS:
        node = node.args[0]
    values = op_name(node) == "getitem" and node.args[1] == 0
    return order_of(node) if value is not None and value.dim() == 1 and not values else None


def _counts(node: Any) -> bool:
    """0, 1, 2, ..."""
    while op_name(node) in CASTS:
        node = node.args[0]
    return op_name(node) == "arange" and (len(node.args) == 1 or (len(node.args) == 2 and node.args[0] == 0))


# --------------------------------------------------------------------------------------------------------------------
# Lookups
# --------------------------------------------------------------------------------------------------------------------


class _Asked:
    """Stands in for a lift while an indexing rule runs: notes which element of the source the rule asks for."""

    def __init__(self, rows: Rows, source: fx.Node) -> None:
        self.rows, self.source = rows, source
        self.ranges: Ranges = rows.ranges
        self.at: Index | None = None

    def element(self, node: Any, index: Index) -> Expr:
        if node is not self.source:
            return self.rows.number(node, index)
        self.at = tuple(map(_unwrapped, index))
        return ZERO

    def on_list(self, node: fx.Node, index: Index, axis: int) -> Expr | None:
        return None


def _unwrapped(position: Expr) -> Expr:
    """A position without the turn of negative ones: the element is the same."""
    if position.op == "where" and position.args[0] == lt(position.args[2], ZERO):
        return position.args[2]
    return position


def _looked_up(rows: Rows, node: fx.Node, index: Index) -> Element | None:
    source, *keys = node.args
    flat_keys = keys[0] if isinstance(keys[0], (list, tuple)) else keys[-1:]
    tables = [tensor_of(k) for k in flat_keys if k is not None]
    if not isinstance(source, fx.Node) or any(t is None or t.dtype == torch.bool for t in tables):
        return None
    asked = _Asked(rows, source)
    INDEXING[op_name(node)](asked, node, index)
    return None if asked.at is None else Element(source, asked.at)


def _embedded(rows: Rows, node: fx.Node, index: Index) -> Element | None:
    table, keys = node.args[:2]
    return Element(table, (rows.number(keys, index[:-1]), index[-1]))


def _gathered(rows: Rows, node: fx.Node, index: Index) -> Element | None:
    source, dim, keys = node.args[:3]
    d = int(dim) % len(index)
    return Element(source, (*index[:d], rows.number(keys, index), *index[d + 1 :]))


def _sorted(rows: Rows, node: fx.Node, index: Index) -> Element | None:
    before = sorted_from(node)
    return None if before is None else Element(before[0], rows._unsorted(before[1], index))


_LOOKUPS: dict[str, Callable[[Rows, fx.Node, Index], Element | None]] = {
    "index": _looked_up,
    "index_select": _looked_up,
    "embedding": _embedded,
    "gather": _gathered,
    "getitem": _sorted,
}

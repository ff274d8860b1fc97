"""Comparisons with the k-th largest score: what is among the k largest is at least the smallest of them.

    x >= topk(x, k).values.min()     follows from     its position being in topk(x, k).indices

The reverse does not hold: of several scores that equal the k-th, a list names k in all and a comparison keeps each. So
the comparison is no list; it is superfluous beside one, as MoBA's public code has it.

Source: Lu et al. 2025, "MoBA", arXiv:2502.13189, and its reference code (`moba_naive`), where both stand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import fx

from attnc import predicate
from attnc.expr import Expr, const
from attnc.passes.graph import op_name, shape_of, tensor_of
from attnc.passes.views import Index, Ranges, broadcast_index, through


class Lift(Protocol):
    """What is read of a lift, see `attnc.passes.masks.Lift`."""

    ranges: Ranges
    implied: dict[Expr, Expr]

    def element(self, node: Any, index: Index) -> Expr: ...

    def on_list(self, node: fx.Node, index: Index, axis: int) -> Expr | None: ...


def compared(rule: Callable, scores: int) -> Callable:
    """`rule` of a comparison whose argument number `scores` may be compared with the k-th largest of its own."""

    def apply(lift: Lift, node: fx.Node, index: Index) -> Expr:
        _note(lift, node, index, node.args[scores], node.args[1 - scores])
        return rule(lift, node, index)

    return apply


def _note(lift: Lift, node: fx.Node, index: Index, scores: Any, level: Any) -> None:
    """Tell the lift that `scores >= level` follows from a list, where it does."""
    if tensor_of(scores) is None or tensor_of(level) is None:
        return
    at, place = (broadcast_index(index, shape_of(x), shape_of(node)) for x in (scores, level))
    top, row = _least(level, place, lift.ranges)
    if top is None:
        return
    source, where = _behind(scores, at, lift.ranges, top.args[0])
    positions = next((user for user in top.users if op_name(user) == "getitem" and user.args[1] == 1), None)
    if source is not top.args[0] or where[:-1] != row or positions is None:
        return
    listed = lift.on_list(positions, where, len(where) - 1)
    if listed is not None:
        lift.implied[predicate.le(lift.element(level, place), lift.element(scores, at))] = listed


def _least(level: fx.Node, place: Index, ranges: Ranges) -> tuple[fx.Node | None, Index]:
    """The `topk` along the last axis whose smallest value `level[place]` is, and the index but for that axis."""
    node, at = _behind(level, place, ranges, None)
    smallest = node.args[0] if op_name(node) == "getitem" and node.args[1] == 0 else node
    if op_name(smallest) in ("min", "amin") and len(smallest.args) > 1 and tensor_of(smallest.args[0]) is not None:
        given = smallest.args[0]
        rank, dims = len(shape_of(given)), smallest.args[1]
        dims = [dims] if isinstance(dims, int) else list(dims)
        if [d % rank for d in dims] != [rank - 1]:
            return None, ()
        at = (*at[: rank - 1], const(-1))
        node, at = _behind(given, at, ranges, None)
    top = node.args[0] if op_name(node) == "getitem" and node.args[1] == 0 else None
    if not isinstance(top, fx.Node) or op_name(top) != "topk":
        return None, ()
    asked: list[Any] = list(top.args[1:])
    count, dim, largest, is_sorted = asked + [-1, True, True][len(asked) - 1 :]
    last = const(-1) if at[-1] == const(-1) else const(count - 1) if is_sorted and isinstance(count, int) else None
    along = dim % len(at) == len(at) - 1 and largest and not top.kwargs
    return (top, at[:-1]) if along and at[-1] == last else (None, ())


def _behind(node: fx.Node, at: Index, ranges: Ranges, end: fx.Node | None) -> tuple[fx.Node, Index]:
    """Where an element of a view comes from, or its place in `end` where that is on the way."""
    while node is not end:
        step = through(node, at, ranges)
        if step is None:
            break
        node, at = step
    return node, at

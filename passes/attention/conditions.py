"""Masks of the run over the columns of a softmax: what is known of them before the run, and views that are put off.

A mask that rows, keys and a constant pattern make together is true nowhere where one of them is a constant that is
false: columns that padding made up, keys that are too far off. Such columns are no keys, whatever the run brings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import eq, ge, gt, le, lt, ne
from typing import Any

import torch
from torch import fx

from attnc.passes.attention.codes import Codes, is_constant, moves
from attnc.passes.attention.rules import LOWEST
from attnc.passes.graph import GraphFacts, op_name, tensor_of

Views = tuple[fx.Node, ...]  # of an operand of element-wise operators, the first first
# What else than arithmetic is written out again over all pairs.
LOGIC = ("logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not", "__and__", "__or__",
         "__invert__", "gt", "ge", "lt", "le", "eq", "ne")  # fmt: skip
CASTS = ("to", "_to_copy", "type_as", "float")


@dataclass(frozen=True)
class Lowered:
    """`node` holds numbers where `condition` is true (or false: inverted) and `fill` elsewhere, which masks.

    other: the numbers. views: what puts `node` into the axes of the scores.
    """

    node: fx.Node
    condition: fx.Node
    inverted: bool
    other: Any
    fill: float
    views: Views

    def moved(self, image: Mapping[fx.Node, fx.Node]) -> Lowered:
        """The same in another subgraph."""
        node, condition, other = (image.get(x, x) for x in (self.node, self.condition, self.other))
        return Lowered(node, condition, self.inverted, other, self.fill, tuple(image[x] for x in self.views))


def lowered(node: fx.Node, views: Views) -> Lowered | None:
    """`node` as a choice by a mask of the run, where its losing side is so low that it has no weight."""
    name, args = op_name(node), node.args
    if name not in ("where", "masked_fill", "masked_fill_") or len(args) != 3:
        return None
    mask, data, fill = (args[1], args[0], args[2]) if name != "where" else args
    inverted = name != "where"
    if not isinstance(mask, fx.Node) or is_constant(mask):
        return None
    if not inverted and _is_low(data):
        data, fill, inverted = fill, data, True
    return Lowered(node, mask, inverted, data, float(fill), views) if _is_low(fill) else None


def _is_low(fill: Any) -> bool:
    return isinstance(fill, int | float) and float("-inf") < fill <= LOWEST


def is_laid(node: fx.Node) -> bool:
    """Whether `node` is a view, with the columns last, of what element-wise operators compute."""
    if not _keeps_columns(node) or is_constant(node):
        return False
    core = node
    while _keeps_columns(core):
        core = core.args[0]
    return not moves(core) and op_name(core) in ("where", "masked_fill", "add", "sub", "mul", *CASTS, *LOGIC)


def _keeps_columns(node: Any) -> bool:
    name, value = op_name(node), tensor_of(node)
    if name not in ("transpose", "permute", "unsqueeze") or value is None:
        return False
    rank = value.dim()
    dims = node.args[1] if name == "permute" else node.args[1:]
    found = [int(d) % rank for d in dims]
    return found[-1] == rank - 1 if name == "permute" else rank - 1 not in found


def viewed(t: Any, views: Views, call: Callable[..., Any] = lambda target, *args: target(*args)) -> Any:
    """`t`, which broadcasts with what `views` are taken of, behind them; `call` computes, on tensors or on nodes."""
    for view in views:
        given = tensor_of(view.args[0])
        assert given is not None
        held = tensor_of(t) if isinstance(t, fx.Node) else t
        assert held is not None
        for _ in range(given.dim() - held.dim()):
            t = call(torch.ops.aten.unsqueeze.default, t, 0)
        t = call(view.target, t, *view.args[1:])
    return t


class Known:
    """What elements are in every run: numbers, NaN where it takes the run to know."""

    def __init__(self, facts: GraphFacts, has_columns: Callable[[Any], bool], *, padded: bool) -> None:
        self.facts, self.has_columns, self.padded = facts, has_columns, padded

    def of(self, node: Any, reader: fx.Node, views: Views) -> torch.Tensor:
        """Of `node`, as `reader` reads it, behind `views`."""
        if not isinstance(node, fx.Node):
            return torch.tensor(float(node), dtype=torch.float64)
        if not self.has_columns(node):
            return torch.tensor(torch.nan, dtype=torch.float64)
        if is_laid(node):
            return self.of(node.args[0], node, (node, *views))
        name, value = op_name(node), tensor_of(node)
        assert value is not None
        if not is_constant(node):
            if value.dtype == torch.bool and name in _RULES:
                return _RULES[name]([self.of(x, node, views) for x in node.args])
            if name in CASTS and (value.dtype == torch.bool or value.dtype.is_floating_point):
                given = self.of(node.args[0], node, views)
                return _truth(given) if value.dtype == torch.bool else given
        found = Codes(self.facts, node, self.facts.order[reader], padded=self.padded)
        numbers = torch.tensor([torch.nan, *reversed(found.constants)], dtype=torch.float64)
        return viewed(numbers[torch.where(found.codes < 0, found.codes, -len(numbers))], views)


def _truth(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isnan(), x, (x != 0).double())


def _both(x: Sequence[torch.Tensor]) -> torch.Tensor:
    a, b = map(_truth, x)
    return torch.where((a == 0) | (b == 0), 0.0, a * b)


def _not(x: Sequence[torch.Tensor]) -> torch.Tensor:
    return 1 - _truth(x[0])


def _either(x: Sequence[torch.Tensor]) -> torch.Tensor:
    return 1 - _both([1 - _truth(a) for a in x])


def _compared(holds: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def apply(x: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.where(x[0].isnan() | x[1].isnan(), torch.nan, holds(x[0], x[1]).double())

    return apply


_RULES: dict[str, Callable[[Sequence[torch.Tensor]], torch.Tensor]] = {
    **dict.fromkeys(("logical_and", "bitwise_and", "__and__", "mul"), _both),
    **dict.fromkeys(("logical_or", "bitwise_or", "__or__"), _either),
    **dict.fromkeys(("logical_not", "bitwise_not", "__invert__"), _not),
    **{rule.__name__: _compared(rule) for rule in (gt, ge, lt, le, eq, ne)},
}

"""Which value each weight meets: the values of its own key once, whatever way both take to their product."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from math import prod

import torch
from torch import fx

from attnc.passes.attention.codes import Codes, aligned, moves, rows
from attnc.passes.attention.columns import Columns
from attnc.passes.attention.places import CHANNEL, TOKEN, Place, affine, along, placed, tokens
from attnc.passes.graph import Unliftable, shape_of
from attnc.passes.products import Product


class Meeting:
    """Weights of `columns`, behind the nodes `weights`, at their product with the values.

    value: what the values are cut from. whole: whether each weight meets a value once, those of no key one of padding,
    and nothing else does. steps: along each axis of the product's result, through the rows of the scores
    in order (keys' axes, then rows) and the channels.
    """

    def __init__(self, columns: Columns, weights: list[fx.Node], final: Product) -> None:
        self.columns, self.weights, self.final = columns, weights, final
        self.facts, self.shape, self.main = columns.facts, columns.shape, columns.main
        self.value = self._values()

    def moved(
        self, image: Mapping[fx.Node, fx.Node], columns: Columns, weights: list[fx.Node], final: Product
    ) -> Meeting:
        """The same of another subgraph, with its own columns, weights and product."""
        other = copy(self)
        other.columns, other.main, other.weights, other.final = columns, columns.main, weights, final
        other.value = self.value.moved(image)
        return other

    def _values(self) -> Place:
        """The place of the values, where each weight meets the value of its own key, once."""
        p, order = self.final, self.facts.order
        weights = Codes(self.facts, p.left, order[p.node])
        values = Codes(self.facts, p.right, order[p.node], padded=self.columns.padded)
        if list(weights.sources) != [self._moved_from()]:
            raise Unliftable("the weights meet the values beside something else", p.left)
        met = aligned(weights.codes, p.left_labels, (*p.out_labels, p.contracted))
        width = p.right_labels.index(p.col)
        base = rows(values.codes, width, p.right)
        rest = [x for x in p.right_labels if x != p.col]
        value = aligned(base, rest, (*p.out_labels, p.contracted))
        met, value = torch.broadcast_tensors(met, value)
        kept = met >= 0
        lost = {weights.constant(int(code)) for code in met[~kept].unique()}
        if lost - {0.0}:
            raise Unliftable("weights are padded with something other than zero", p.left)
        numbers = torch.full(self.shape, -1)
        count = torch.bincount(met[kept], minlength=prod(self.shape)).view(self.shape)
        self.whole = bool(kept.all()) and bool((count == 1).all())
        if bool((count[self.main.valid.expand(self.shape)] != 1).any()):
            raise Unliftable("a weight meets no value, or several", p.node)
        numbers.view(-1)[met[kept]] = value[kept]
        self._rows(met, kept)
        return self._value_place(values, numbers)

    def _moved_from(self) -> fx.Node:
        """The last node of the weights that is no view of another."""
        return next(node for node in reversed(self.weights) if not moves(node))

    def _value_place(self, values: Codes, numbers: torch.Tensor) -> Place:
        valid = self.main.valid.expand(self.shape)
        if bool((numbers[valid] < 0).any()):
            raise Unliftable("a weight meets a constant in place of a value", self.final.right)
        source, numbers = self.columns.one_source(values, numbers, valid, self.final.right)
        step, count, token = tokens(source, numbers, valid)
        if not torch.equal(token[valid], self.main.token[valid]):
            raise Unliftable("weights meet values of other keys than theirs", self.final.node)
        apart = along(numbers - step * token, valid, source)
        around = {axis: apart[axis] for axis in self.main.around}
        if any(by for axis, by in enumerate(apart) if axis not in around):
            raise Unliftable("values have axes that keys have not", source)
        width = int(shape_of(self.final.node)[self.final.out_labels.index(self.final.col)].value)
        extents = dict(enumerate(self.shape[:-1])) | {TOKEN: count, CHANNEL: width}
        return placed(source, around | {TOKEN: step, CHANNEL: 1}, extents)

    def _rows(self, met: torch.Tensor, kept: torch.Tensor) -> None:
        """Note which row of the scores each row of the output is."""
        columns = self.shape[-1]
        row = torch.where(kept, met.div(columns, rounding_mode="floor"), -1)
        high = row.amax(-1)
        low = torch.where(kept, row, torch.iinfo(torch.int64).max).amin(-1)
        if not torch.equal(low, high):
            raise Unliftable("weights of several rows meet in one row of the output", self.final.node)
        p = self.final
        col = p.out_labels.index(p.col)
        if high.shape[col] != 1:
            raise Unliftable("the weights differ from channel to channel", p.node)
        places = self._canonical().flatten()[high.squeeze(col)]
        width = int(shape_of(p.node)[col].value)
        channels = torch.arange(width).view([-1 if d == col else 1 for d in range(high.dim())])
        numbers = (places * width).unsqueeze(col) + channels
        layout = affine(numbers)
        if layout is None or layout[0] != 0:
            raise Unliftable("rows of the output do not follow one another", p.node)
        self.steps = layout[1]

    def _canonical(self) -> torch.Tensor:
        """The place of each row of the scores where the axes that keys have come first, then the rows in order."""
        order = [*self.main.around, *self.main.inner]
        sizes = [self.shape[axis] for axis in order]
        places = torch.arange(prod(sizes)).view(sizes)
        return places.permute([order.index(axis) for axis in range(len(order))])

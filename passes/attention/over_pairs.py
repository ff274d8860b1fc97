"""An attention over chunks of keys, written over all pairs of rows and keys.

The element-wise operators of its scores stand again with operands over all keys: numbers of keys as they are, tables
by the distance of row and key. Masks of the run are chosen last, so that each is one mask.

A row that such a mask leaves no key is the mean of its columns in chunks, those that padding made up among them; the
output takes it from there. Scores beyond SWALLOWED, which the mask's number does not swallow, are not considered then.

Source: Guo et al. 2022, "LongT5", arXiv:2112.07916, section 3.1 (three blocks of keys, a bias by distance).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import fx

from attnc.passes.attention.absorb import Emitter
from attnc.passes.attention.codes import moves
from attnc.passes.attention.columns import POINTWISE, Columns, Table, plain_name
from attnc.passes.attention.conditions import CASTS, Views, is_laid, viewed
from attnc.passes.attention.meeting import Meeting
from attnc.passes.attention.places import CHANNEL, TOKEN, Place
from attnc.passes.graph import Unliftable, op_name, tensor_of
from attnc.passes.products import product

aten = torch.ops.aten
INF = float("inf")
SWALLOWED = 256.0  # scores up to this are nothing beside a mask that is added


class Writing:
    """An attention over chunks, written over all pairs."""

    def __init__(self, columns: Columns, meeting: Meeting) -> None:
        self.columns, self.meeting, self.main = columns, meeting, columns.main
        self.facts, self.anchor, self.final = columns.facts, columns.anchor, meeting.final
        self.weights, self.shape = meeting.weights, columns.shape
        self.emit = Emitter(self.facts.graph, self.anchor)

    def run(self) -> tuple[fx.Node, fx.Node]:
        """The softmax over all pairs, and the result."""
        self._private()
        self._lost_rows()
        mode = getattr(tensor_of(self.anchor), "fake_mode", None)
        graph = self.facts.graph
        before = set(graph.nodes)
        try:
            with graph.inserting_before(self.final.node), mode or nullcontext():
                return self._written()
        except Unliftable:
            for node in reversed(graph.nodes):
                if node not in before:
                    graph.erase_node(node)
            raise

    def _private(self) -> None:
        """Refuse where something else reads what is computed on the way, and note all of it."""
        assert self.main.query is not None
        begins = {
            self.main.query.source,
            self.meeting.value.source,
            *(band.key.source for band in self.columns.bands.values() if not isinstance(band, Table)),
        }
        inside, stack = {self.final.node}, [self.final.node]
        while stack:
            node = stack.pop()
            for x in self.facts.sources(node):
                cut = moves(x) or product(x) is not None or plain_name(x) in POINTWISE or op_name(x) == "softmax"
                if (
                    x not in inside
                    and x not in begins
                    and x.op == "call_function"
                    and (cut or self._is_only(x, inside))
                ):
                    inside.add(x)
                    stack.append(x)
        on_the_way = {*self.weights, self.main.node, self.anchor.args[0]}
        readers = {u for node in on_the_way for u in node.users if u not in inside and (u.users or u.op == "output")}
        if readers:
            names = ", ".join(sorted(u.name for u in readers))
            raise Unliftable(f"keys in chunks, and the weights or scores are also read by {names}", self.anchor)
        self.inside = inside

    def _is_only(self, node: fx.Node, inside: set[fx.Node]) -> bool:
        return all(u in inside for u in node.users)

    def _written(self) -> tuple[fx.Node, fx.Node]:
        emit, main = self.emit, self.main
        self._pairs()
        given = self._over_pairs(self.columns.scores, self.anchor, ())
        if self.columns.lowered:
            given = self._lowered(given)
        again = emit(self.anchor.target, given, *self.anchor.args[1:], **self.anchor.kwargs)
        node, held, lost = again, self.anchor, []
        for one in self.weights[1:]:
            if self._loses_rows(one):
                lost.append(one)
            else:
                node = self._same(one, {held: node})
            held = one
        weights = emit(
            aten.reshape.default,
            emit(aten.permute.default, node, self.columns.order(keys=True)),
            self.columns.sizes(-1),
        )
        out = emit(aten.matmul.default, weights, self._laid(self.meeting.value, (*main.around, TOKEN, CHANNEL)))
        for one in lost:
            out = emit(aten.masked_fill.Scalar, out, self._of_rows(one.args[1]), 0.0)
        result = self._restored(out)
        if self.columns.may_lose:
            result = self._uniform_where_lost(result, out)
        return again, result

    def _loses_rows(self, node: fx.Node) -> bool:
        """Whether `node` sets all weights of some rows to zero, which can as well be done to the output."""
        if op_name(node) != "masked_fill" or node.args[2] != 0 or not isinstance(node.args[1], fx.Node):
            return False
        mask = tensor_of(node.args[1])
        return mask is not None and mask.dim() == len(self.shape) and mask.shape[-1] == 1

    def _of_rows(self, mask: fx.Node) -> fx.Node:
        """A mask over the axes of the scores, in the order of the product with the values."""
        sizes = [self.shape[axis] if axis in self.main.inner else -1 for axis in range(len(self.shape) - 1)]
        mask = self.emit(aten.expand.default, mask, [*sizes, 1])
        mask = self.emit(aten.permute.default, mask, self.columns.order(keys=True))
        kept = len(self.main.around)
        return self.emit(aten.flatten.using_ints, mask, kept, -2) if len(self.main.inner) > 1 else mask

    def _laid(self, place: Place, axes: tuple[int, ...]) -> fx.Node:
        """A source by its axes, those it lacks of size one."""
        node = self.emit(aten.reshape.default, place.source, list(place.extents))
        present = [axis for axis in axes if axis in place.axes]
        order = [place.axes.index(axis) for axis in present]
        if order != list(range(len(order))):
            node = self.emit(aten.permute.default, node, order)
        for at, axis in enumerate(axes):
            if axis not in place.axes:
                node = self.emit(aten.unsqueeze.default, node, at)
        return node

    def _pairs(self) -> None:
        """The product of all queries and keys, masked, in the axes of the scores."""
        emit, main = self.emit, self.main
        assert main.query is not None
        rows = self._laid(main.query, (*main.around, *main.inner, CHANNEL))
        rows = emit(aten.reshape.default, rows, self.columns.sizes(-1))
        keys = self._laid(main.key, (*main.around, CHANNEL, TOKEN))
        scores = emit(aten.matmul.default, rows, keys)
        order = self.columns.order(keys=True)
        sizes = [self.shape[axis] for axis in order[:-1]]
        scores = emit(aten.reshape.default, scores, [*sizes, main.keys])
        scores = emit(aten.permute.default, scores, [order.index(axis) for axis in range(len(order))])
        self.inside_window = self._between(*self.columns.window)
        below = main.fills or not (self.columns.masks or self.columns.lowered)
        self.scores = emit(aten.where.ScalarOther, self.inside_window, scores, float("-inf")) if below else scores

    def _back(self) -> tuple[fx.Node, list[int]]:
        """How far each key is behind each row, and the axes of the scores of which that has more than one."""
        main, emit = self.main, self.emit
        device, length = tensor_of(self.anchor).device, self.columns.sizes(0)[-2]  # type: ignore[union-attr]
        sizes = [self.shape[axis] if axis in main.inner else 1 for axis in range(len(self.shape) - 1)]
        row = emit(aten.arange.default, length, device=device)
        return emit(
            aten.sub.Tensor, emit(aten.arange.default, main.keys, device=device), emit(aten.unsqueeze.default, row, 1)
        ), sizes

    def _between(self, low: int, high: int) -> fx.Node:
        """Which keys are between `low` and `high` behind a row, as a mask over its axes and all keys."""
        emit, (back, sizes) = self.emit, self._back()
        back = emit(aten.reshape.default, back, [*sizes, self.main.keys])
        return emit(aten.__and__.Tensor, emit(aten.ge.Scalar, back, low), emit(aten.le.Scalar, back, high))

    def _over_pairs(self, node: Any, reader: fx.Node, views: Views) -> Any:
        """`node`, which has columns, over all keys."""
        columns = self.columns
        if not isinstance(node, fx.Node):
            return node
        if not columns.has_columns(node):
            if not self.facts.unchanged(node, node, self.final.node):
                raise Unliftable("a mask of the scores is changed in place", node)
            return viewed(node, views, self.emit)
        if (node, reader, views) in columns.bands:
            band = columns.bands[node, reader, views]
            if isinstance(band, Table):
                return self._by_distance(node, band, views)
            return self.scores if band is self.main else self._laid(band.key, (*range(len(self.shape) - 1), TOKEN))
        if node in columns.masks:
            data = columns.masked(node)[0]  # type: ignore[index]
            return self.emit(aten.where.ScalarOther, self.inside_window, self._over_pairs(data, node, views), -INF)
        if is_laid(node):
            return self._over_pairs(node.args[0], node, (node, *views))
        if node in columns.lowered:
            other = self._over_pairs(columns.lowered[node].other, node, views)
            return other if isinstance(other, fx.Node) else self._number(other, node)
        return self._same(node, {x: self._over_pairs(x, node, views) for x in node.all_input_nodes})

    def _number(self, number: float, like: fx.Node) -> fx.Node:
        value = tensor_of(like)
        assert value is not None
        return self.emit(aten.full.default, [1], number, dtype=value.dtype, device=value.device)

    def _by_distance(self, node: fx.Node, table: Table, views: Views) -> fx.Node:
        """Numbers of distances over all pairs; what lies outside of the window is no pair."""
        emit, main, (low, high) = self.emit, self.main, self.columns.window
        if table.between is not None:
            return self._between(*table.between)
        if table.column < 0:
            return self._number(table.constant, node)
        if not self.facts.unchanged(node, node, self.final.node):
            raise Unliftable("a table of distances is changed in place", node)
        line = viewed(node, views, emit)
        for _ in range(len(self.shape) - tensor_of(line).dim()):  # type: ignore[union-attr]
            line = emit(aten.unsqueeze.default, line, 0)
        for axis in sorted(main.inner, reverse=True):
            line = emit(aten.select.int, line, axis, table.row if axis == main.inner[-1] else 0)
        line = emit(aten.slice.Tensor, line, -1, table.column, table.column + high - low + 1)
        back, _ = self._back()
        place = emit(aten.clamp.default, emit(aten.sub.Scalar, back, low), 0, high - low)
        spread = emit(aten.index.Tensor, line, [*(None for _ in main.around), place])
        sizes = [*tensor_of(line).shape[:-1], *(self.shape[axis] for axis in main.inner), main.keys]  # type: ignore[union-attr]
        order = self.columns.order(keys=True)
        spread = emit(aten.reshape.default, spread, sizes)
        return emit(aten.permute.default, spread, [order.index(axis) for axis in range(len(order))])

    def _lowered(self, scores: fx.Node) -> fx.Node:
        """`scores` with the masks of the run, and the window, chosen last."""
        emit, kept = self.emit, self.inside_window
        for low in self.columns.lowered.values():
            condition = self._over_pairs(low.condition, low.node, low.views)
            condition = emit(aten.logical_not.default, condition) if low.inverted else condition
            kept = emit(aten.logical_and.default, condition, kept)
        fill = min(low.fill for low in self.columns.lowered.values())
        for one in (self.main.node, self.columns.scores):
            dtype = tensor_of(one).dtype  # type: ignore[union-attr]
            if fill < torch.finfo(dtype).min:
                raise Unliftable(f"{fill:g} masks keys in chunks, and {dtype} ends before it", one)
        return emit(aten.where.ScalarOther, kept, scores, fill)

    def _same(self, node: fx.Node, given: dict[fx.Node, Any]) -> fx.Node:
        """The element-wise operator `node` on other operands, not in place."""
        if plain_name(node) == "type_as":
            return self.emit(aten.to.dtype, given[node.args[0]], tensor_of(node).dtype)  # type: ignore[union-attr]
        target: Any = node.target
        if op_name(node).endswith("_") and not op_name(node).startswith("__"):
            target = getattr(getattr(aten, plain_name(node)), target._overloadname)
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda x: given.get(x, x))
        return self.emit(target, *args, **kwargs)

    def _uniform_where_lost(self, result: fx.Node, out: fx.Node) -> fx.Node:
        """`result` with the mean of a row's columns where masks of the run leave it no key, as it is written."""
        emit, p = self.emit, self.final
        (low,) = self.columns.lowered.values()
        kept = viewed(low.condition, low.views, emit)
        if low.inverted:
            kept = emit(aten.logical_not.default, kept)
        rows = self._of_rows(emit(aten.logical_not.default, emit(aten.any.dim, kept, -1, True)))
        lost = self._restored(emit(aten.expand.default, rows, list(tensor_of(out).shape)))  # type: ignore[union-attr]
        mean = emit(aten.mean.dim, p.right, [p.right_labels.index(p.contracted)], True)
        labels = [p.row if label == p.contracted else label for label in p.right_labels]
        mean = emit(aten.permute.default, mean, [labels.index(label) for label in p.out_labels])
        return emit(aten.where.self, lost, mean, result)

    def _lost_rows(self) -> None:
        """Refuse rows that masks of the run may leave without a key, but where the mean of all columns is written."""
        if not self.columns.may_lose:
            return
        scores, values = tensor_of(self.anchor), self.columns.lowered.values()
        assert scores is not None
        if len(values) > 1 or self.columns.masks or not self.meeting.whole:
            raise Unliftable(
                "a row may lose all its keys in chunks, and its weights are not those of one mask", self.anchor
            )
        if self.facts.needs_grad(self.anchor):
            raise Unliftable(
                "a row may lose all its keys in chunks, and its gradient is that of all columns", self.anchor
            )
        if not all(moves(one) or plain_name(one) in CASTS for one in self.weights[1:]):
            raise Unliftable("a row may lose all its keys in chunks, and its weights are changed", self.anchor)
        (low,) = values
        if -low.fill * torch.finfo(scores.dtype).eps < 2 * SWALLOWED:
            raise Unliftable(
                f"a row may lose all its keys in chunks, and {low.fill:g} leaves something of its scores", self.anchor
            )

    def _restored(self, out: fx.Node) -> fx.Node:
        """The output in the axes of the product that the chunks end in."""
        wanted, steps = tensor_of(self.final.node).shape, self.meeting.steps  # type: ignore[union-attr]
        order = sorted(range(len(wanted)), key=lambda d: -steps[d] if wanted[d] > 1 else 1)
        size = 1
        for d in reversed([d for d in order if wanted[d] > 1]):
            if steps[d] != size:
                raise Unliftable("rows of the output do not follow one another", self.final.node)
            size *= wanted[d]
        node = self.emit(aten.reshape.default, out, [wanted[d] for d in order])
        return self.emit(aten.permute.default, node, [order.index(d) for d in range(len(order))])

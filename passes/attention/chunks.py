"""Attention written over chunks of keys, found as what it computes: every row over the keys that its columns are.

    scores[b, i, h, c] = q[b, i, h] . k[b, key(i, c), h]   ->   over c: softmax, sum with v[b, key(i, c), h]

Where an element of the scores comes from, and which value a weight meets, is counted at the region's own size
(`codes`): keys of one row that differ, columns without a key that hold -inf, and each weight at the value of its own
key make it an attention over the pairs that stand in `key`. It is then written beside the chunks as such, over all
pairs and with the mask that `key` is, so that it is lifted like any other; the chunks stay until a form replaces both.

Source: Beltagy et al. 2020, "Longformer", arXiv:2004.05150, section 3.1 and appendix A (sliding chunks).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from attnc.passes.attention.absorb import Emitter
from attnc.passes.attention.codes import is_constant, moves
from attnc.passes.attention.columns import POINTWISE, Columns, plain_name
from attnc.passes.attention.meeting import Meeting
from attnc.passes.attention.places import CHANNEL, TOKEN, Place
from attnc.passes.graph import GraphFacts, NoMatch, Unliftable, op_name, shape_of, tensor_of
from attnc.passes.products import Product, product
from attnc.passes.views import is_view

aten = torch.ops.aten
_CUTS = ("as_strided", "unfold", "pad", "constant_pad_nd", "index", "gather", "copy_")


@dataclass
class Unrolled:
    """An attention over chunks, and the same over all pairs beside it.

    anchor, out: its softmax and what it ends in. again, result: those of the one over all pairs. nodes: all that it
    computes. operands: what queries, keys and values are cut from.
    """

    anchor: fx.Node
    out: fx.Node
    again: fx.Node
    result: fx.Node
    nodes: frozenset[fx.Node]
    operands: tuple[fx.Node, ...]

    @property
    def columns(self) -> int:
        """Columns of a row of the scores as written."""
        return int(shape_of(self.anchor)[-1].value)


class Counted:
    """What was counted of the subgraphs of one graph so far: layers that repeat are counted once."""

    def __init__(self, facts: GraphFacts) -> None:
        self.facts = facts
        self._known: dict[str, tuple[list[fx.Node], tuple[Columns, Meeting] | NoMatch]] = {}

    def of(self, anchor: fx.Node, weights: list[fx.Node], final: Product) -> tuple[Columns, Meeting] | NoMatch:
        """The columns of the softmax `anchor`, and how they meet the values."""
        nodes, text = self._text(final.node)
        if text not in self._known:
            self._known[text] = nodes, self._count(anchor, weights, final)
        others, found = self._known[text]
        image = dict(zip(others, nodes, strict=True))
        if isinstance(found, NoMatch):
            return NoMatch(found.reason, image.get(found.node, anchor))
        columns = found[0].moved(image)
        return columns, found[1].moved(image, columns, weights, final)

    def _count(self, anchor: fx.Node, weights: list[fx.Node], final: Product) -> tuple[Columns, Meeting] | NoMatch:
        try:
            with _disable_current_modes():
                columns = Columns(self.facts, anchor)
                return columns, Meeting(columns, weights, final)
        except Unliftable as exc:
            return exc.no_match

    def _text(self, out: fx.Node) -> tuple[list[fx.Node], str]:
        """What `out` is counted from, in order, and all that counting asks of it."""
        facts, seen, stack = self.facts, {out}, [out]
        while stack:
            node = stack.pop()
            through = moves(node) or product(node) is not None or plain_name(node) in (*POINTWISE, "softmax")
            if through or is_constant(node):
                fresh = [x for x in facts.sources(node) if x not in seen]
                seen.update(fresh)
                stack += fresh
        nodes = sorted(seen, key=facts.order.__getitem__)
        place = {node: at for at, node in enumerate(nodes)}
        lines = []
        for node in nodes:
            value = tensor_of(node)
            layout = "" if value is None else f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.device.type}"
            given = fx.node.map_arg((node.args, node.kwargs), lambda x: f"%{place.get(x)}")
            kept = bool(facts.writes.get(facts.root(node))), facts.needs_grad(node)
            own = "" if node.op == "placeholder" else f"{node.target} {given}"
            lines.append(f"{node.op} {own} {layout} {kept}")
        return nodes, "\n".join(lines)


def in_chunks(facts: GraphFacts, anchor: fx.Node, counted: Counted | None = None) -> Unrolled | NoMatch | None:
    """The attention over chunks around the softmax `anchor`, now written beside it; None where it has none."""
    if op_name(anchor) == "scaled_dot_product_attention":
        return None
    try:
        last = _weights(anchor)
        final = _meeting(last)
        if final is None or not _is_cut(facts, anchor, final):
            return None
        found = (counted or Counted(facts)).of(anchor, last, final)
        return found if isinstance(found, NoMatch) else _Writing(*found).run()
    except Unliftable as exc:
        return exc.no_match


def _weights(anchor: fx.Node) -> list[fx.Node]:
    """The softmax and the element-wise operators behind it that read it alone."""
    found = [anchor]
    while True:
        users = [u for u in found[-1].users if u.users or u.op == "output"]
        if len(users) != 1 or plain_name(users[0]) not in POINTWISE or users[0].args[0] is not found[-1]:
            return found
        found.append(users[0])


def _meeting(weights: list[fx.Node]) -> Product | None:
    """The one product that the weights reach by views and copies, oriented to have them on its left."""
    node = weights[-1]
    while True:
        users = [u for u in node.users if u.users or u.op == "output"]
        if len(users) != 1:
            return None
        found = product(users[0])
        if found is not None:
            if (found.left is node) == (found.right is node):
                return None
            return found if found.left is node else found.swapped()
        if not moves(users[0]) or users[0].args[0] is not node:
            return None
        node = users[0]


def _is_cut(facts: GraphFacts, anchor: fx.Node, final: Product) -> bool:
    """Whether something before the scores or values cuts them into chunks."""
    stack, seen = [anchor.args[0], final.left, final.right], set()
    while stack:
        node = stack.pop()
        if node in seen or not isinstance(node, fx.Node) or node is anchor:
            continue
        seen.add(node)
        if op_name(node) in _CUTS or overlaps(node):
            return True
        if moves(node) or product(node) is not None or plain_name(node) in POINTWISE:
            stack += facts.sources(node)
    return False


def overlaps(node: fx.Node) -> bool:
    """Whether `node` holds elements of one tensor several times, as chunks of it that overlap."""
    if op_name(node) in ("as_strided", "unfold"):
        return True
    if op_name(node) not in ("cat", "stack"):
        return is_view(node) and isinstance(node.args[0], fx.Node) and overlaps(node.args[0])
    parts = [x.args[0] for x in node.all_input_nodes if op_name(x) in ("slice", "narrow", "select") and x.args]
    return len(parts) > 1 and len(set(map(_uncut, parts))) < len(parts)


def _uncut(node: Any) -> Any:
    while op_name(node) in ("slice", "narrow", "select"):
        node = node.args[0]
    return node


class _Writing:
    """An attention over chunks, written over all pairs."""

    def __init__(self, columns: Columns, meeting: Meeting) -> None:
        self.columns, self.meeting, self.main = columns, meeting, columns.main
        self.facts, self.anchor, self.final = columns.facts, columns.anchor, meeting.final
        self.weights, self.shape = meeting.weights, columns.shape
        self.emit = Emitter(self.facts.graph, self.anchor)

    def run(self) -> Unrolled:
        self._private()
        mode = getattr(tensor_of(self.anchor), "fake_mode", None)
        with self.facts.graph.inserting_before(self.final.node), mode or nullcontext():
            return self._written()

    def _private(self) -> None:
        """Refuse where something else reads what is computed on the way, and note all of it."""
        assert self.main.query is not None
        begins = {
            self.main.query.source,
            self.meeting.value.source,
            *(band.key.source for band in self.columns.bands.values()),
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

    def _written(self) -> Unrolled:
        emit, main = self.emit, self.main
        self._pairs()
        given = self._over_pairs(self.columns.scores, self.anchor)
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
        assert main.query is not None
        operands = tuple(dict.fromkeys([main.query.source, main.key.source, self.meeting.value.source]))
        return Unrolled(self.anchor, self.final.node, again, result, frozenset(self.inside), operands)

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
        self.inside_window = self._kept()
        below = main.fills or not self.columns.masks
        self.scores = emit(aten.where.ScalarOther, self.inside_window, scores, float("-inf")) if below else scores

    def _kept(self) -> fx.Node:
        """Which keys the columns of a row name, as a mask over its axes and all keys."""
        main, emit = self.main, self.emit
        device, length = tensor_of(self.anchor).device, self.columns.sizes(0)[-2]  # type: ignore[union-attr]
        sizes = [self.shape[axis] if axis in main.inner else 1 for axis in range(len(self.shape) - 1)]
        row = emit(aten.reshape.default, emit(aten.arange.default, length, device=device), [*sizes, 1])
        back = emit(aten.sub.Tensor, emit(aten.arange.default, main.keys, device=device), row)
        low, high = self.columns.window
        return emit(aten.__and__.Tensor, emit(aten.ge.Scalar, back, low), emit(aten.le.Scalar, back, high))

    def _over_pairs(self, node: Any, reader: fx.Node) -> Any:
        """`node`, which has columns, over all keys."""
        if not isinstance(node, fx.Node) or not self.columns.has_columns(node):
            if isinstance(node, fx.Node) and not self.facts.unchanged(node, node, self.final.node):
                raise Unliftable("a mask of the scores is changed in place", node)
            return node
        if (node, reader) in self.columns.bands:
            band = self.columns.bands[node, reader]
            if band is self.main:
                return self.scores
            return self._laid(band.key, (*range(len(self.shape) - 1), TOKEN))
        if node in self.columns.masks:
            data = self.columns.masked(node)[0]  # type: ignore[index]
            return self.emit(aten.where.ScalarOther, self.inside_window, self._over_pairs(data, node), float("-inf"))
        return self._same(node, {x: self._over_pairs(x, node) for x in node.all_input_nodes})

    def _same(self, node: fx.Node, given: dict[fx.Node, Any]) -> fx.Node:
        """The element-wise operator `node` on other operands, not in place."""
        if plain_name(node) == "type_as":
            return self.emit(aten.to.dtype, given[node.args[0]], tensor_of(node).dtype)  # type: ignore[union-attr]
        target: Any = node.target
        if op_name(node).endswith("_") and not op_name(node).startswith("__"):
            target = getattr(getattr(aten, plain_name(node)), target._overloadname)
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda x: given.get(x, x))
        return self.emit(target, *args, **kwargs)

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

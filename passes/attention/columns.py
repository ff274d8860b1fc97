"""The columns of a softmax: which query and which key each is the product of, and what masks say of it.

Columns without a key must hold -inf; all masks that have columns must name the keys that the scores name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import fx

from attnc.passes.attention.codes import Codes, is_constant, moves
from attnc.passes.attention.conditions import CASTS, LOGIC, Known, Lowered, Views, is_laid, lowered, viewed
from attnc.passes.attention.places import CHANNEL, TOKEN, Place, along, placed, tokens
from attnc.passes.graph import GraphFacts, Unliftable, op_name, shape_of, tensor_of

# What is written out again over all pairs, as it stands: its operands have the axes of the scores.
POINTWISE = ("add", "sub", "rsub", "mul", "div", "neg", "masked_fill", "where", "to", "_to_copy", "type_as", "float",
             "tanh", "clamp", "maximum", "minimum", "dropout")  # fmt: skip
Site = tuple[fx.Node, fx.Node, Views]  # what has columns, who reads it, and what puts it into the axes of the scores


@dataclass
class Band:
    """Columns of the scores: which row and key each is the product of.

    token: the key of each column, where it has one (valid). key, query: what keys and rows are cut from, no query where
    columns are numbers of their keys alone. fills: what columns without a key hold.
    """

    node: fx.Node
    valid: torch.Tensor
    token: torch.Tensor
    key: Place
    query: Place | None
    around: tuple[int, ...]  # axes that keys have too
    inner: tuple[int, ...]  # axes that count the rows, the slowest first
    fills: set[float] = field(default_factory=set)

    def moved(self, image: Mapping[fx.Node, fx.Node]) -> Band:
        """The same columns of another subgraph."""
        query = None if self.query is None else self.query.moved(image)
        return replace(self, node=image[self.node], key=self.key.moved(image), query=query)

    @property
    def keys(self) -> int:
        return self.key.extents[self.key.axes.index(TOKEN)]


@dataclass(frozen=True)
class Table:
    """Columns that are the same for all pairs of one distance.

    row, column: where its numbers of all distances follow one another, the row of the innermost axis; else constants,
    all `constant`, or true between the distances `between`.
    """

    row: int = 0
    column: int = -1
    constant: float = 0.0
    between: tuple[int, int] | None = None


def plain_name(node: fx.Node) -> str:
    """The operator's name, written in place or not."""
    return op_name(node).removesuffix("_") if not op_name(node).startswith("__") else op_name(node)


class Columns:
    """The columns of one softmax.

    shape: of the scores. bands: what has columns. main: the product of queries and keys. window: how far before and
    behind a row its first and last keys are. kept: by constant masks, which stand at `masks`, and by what is known of
    masks of the run, which stand at `lowered`. may_lose: whether these may leave a row without a key. padded: as of
    `Codes`.
    """

    def __init__(self, facts: GraphFacts, anchor: fx.Node, *, padded: bool = False) -> None:
        scores, dim = anchor.args[:2]
        assert isinstance(scores, fx.Node)
        self.facts, self.anchor, self.scores, self.padded = facts, anchor, scores, padded
        self.shape = tuple(int(x.value) for x in shape_of(anchor) if x.is_const)
        if len(self.shape) != len(shape_of(anchor)):
            raise Unliftable("keys in chunks, and a length that is known at run time only", anchor)
        if int(dim) % len(self.shape) != len(self.shape) - 1:
            raise Unliftable("keys in chunks, and a softmax over another axis than the last", anchor)
        self.kept = torch.ones((), dtype=torch.bool)
        self.masks: set[fx.Node] = set()
        self.lowered: dict[fx.Node, Lowered] = {}
        self.certain = torch.ones((), dtype=torch.bool)  # columns that masks of the run keep for certain
        sites = dict.fromkeys(self._banded(scores, anchor))
        found = {at: Codes(facts, at[0], facts.order[at[1]], padded=padded) for at in sites}
        pairs = [at for at, codes in found.items() if bool((codes.codes >= codes.total).any())]
        if len(pairs) != 1:
            raise Unliftable(f"keys in chunks, and {len(pairs)} products of queries and keys, one is allowed", scores)
        self.main = self._band(pairs[0], found[pairs[0]])
        self._only_keys()
        self.window = self._window()
        self.bands = {at: self.main if at == pairs[0] else self._other(at, codes) for at, codes in found.items()}
        self._agree()
        self.may_lose = bool(self.lowered) and not bool((self.main.valid & self.certain).any(-1).all())

    def moved(self, image: Mapping[fx.Node, fx.Node]) -> Columns:
        """The columns of a softmax whose subgraph equals this one's, node by node."""
        other = copy(self)
        other.anchor, other.scores = image[self.anchor], image[self.scores]
        other.masks = {image[node] for node in self.masks}
        other.lowered = {image[node]: low.moved(image) for node, low in self.lowered.items()}
        other.main = self.main.moved(image)
        other.bands = {
            (image[a], image[b], tuple(image[view] for view in views)): other.main
            if band is self.main
            else band.moved(image)
            if isinstance(band, Band)
            else band
            for (a, b, views), band in self.bands.items()
        }
        return other

    def order(self, *, keys: bool) -> list[int]:
        """Axes of the scores: those that keys have too, those that count rows, and the columns where asked."""
        order = [*self.main.around, *self.main.inner]
        return [*order, len(order)] if keys else order

    def sizes(self, last: int) -> list[int]:
        """Sizes of a tensor of the axes that keys have too, all rows, and `last`."""
        rows = prod(self.shape[axis] for axis in self.main.inner)
        return [*(self.shape[axis] for axis in self.main.around), rows, last]

    def _banded(self, node: fx.Node, reader: fx.Node, views: Views = (), *, added: bool = True) -> Iterator[Site]:
        """What has columns below the element-wise operators of the scores.

        added: whether `node` is at most cast and added to on its way to the softmax.
        """
        if not self.has_columns(node):
            return
        masked = self.masked(node)
        if masked is not None:
            kept = Codes(self.facts, masked[1], self.facts.order[node])
            self.kept = self.kept & viewed(kept.codes == kept.code(float(masked[2])), views)
            self.masks.add(node)
            yield from self._banded(masked[0], node, views, added=added)
            return
        if is_laid(node):
            yield from self._banded(node.args[0], node, (node, *views), added=added)
            return
        name = plain_name(node)
        if name not in (*POINTWISE, *LOGIC) or moves(node) or is_constant(node):
            yield node, reader, views
            return
        low = lowered(node, views) if added else None
        if low is not None:
            self._note(low)
        added = added and (low is not None or name in CASTS or (name == "add" and not node.kwargs))
        for x in node.all_input_nodes:
            if not (name == "type_as" and x is node.args[1]):
                yield from self._banded(x, node, views, added=added and (low is None or x is not low.condition))

    def _note(self, low: Lowered) -> None:
        """Take what is known of a mask of the run."""
        if self.lowered.setdefault(low.node, low).views != low.views:
            raise Unliftable("one mask is read in two orders of its axes", low.node)
        known = Known(self.facts, self.has_columns, padded=self.padded).of(low.condition, low.node, low.views)
        self.kept = self.kept & (known != low.inverted)
        self.certain = self.certain & (known == (not low.inverted))

    def masked(self, node: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
        """(scores, mask, what the mask says of those kept) where `node` sets others to -inf by a constant mask."""
        name, args = op_name(node), node.args
        if name not in ("where", "masked_fill") or len(args) != 3 or not moves(node):
            return None
        mask, data, fill = (args[1], args[0], args[2]) if name == "masked_fill" else args
        keeps = name == "where"
        if keeps and not isinstance(data, fx.Node):
            data, fill, keeps = fill, data, False
        if fill != float("-inf") or not isinstance(data, fx.Node) or not isinstance(mask, fx.Node):
            return None
        return data, mask, keeps

    def has_columns(self, node: fx.Node) -> bool:
        value = tensor_of(node)
        return value is not None and value.dim() > 0 and value.shape[-1] == self.shape[-1] > 1

    def _other(self, at: Site, found: Codes) -> Band | Table:
        """What is no product: a table of distances, or numbers of keys."""
        codes = viewed(found.codes, at[2])
        codes = codes.view([1] * (len(self.shape) - codes.dim()) + list(codes.shape))
        table = self._table(codes.expand(self.shape), found)
        again = [axis for axis in self.main.inner[:-1] if self.shape[axis] > 1]
        if table is None and again and all(codes.shape[axis] == 1 for axis in again) and bool((codes >= 0).any()):
            raise Unliftable("a bias is no function of the distance of row and key", at[0])
        return self._band(at, found) if table is None else table

    def _table(self, codes: torch.Tensor, found: Codes) -> Table | None:
        """`codes` by distance, where the columns of keys have one number for each."""
        main, (low, high) = self.main, self.window
        rows = torch.arange(prod(self.shape[axis] for axis in main.inner))
        sizes = [n if axis in main.inner else 1 for axis, n in enumerate(self.shape[:-1])]
        apart = (main.token - rows.view(*sizes, 1) - low).expand(self.shape)
        valid = main.valid.expand(self.shape)
        count, order = high - low + 1, self.order(keys=True)
        place = torch.where(valid, apart, count).permute(order).flatten(len(main.around))
        values = codes.permute(order).flatten(len(main.around))
        by = values.new_zeros(*values.shape[:-1], count + 1).scatter_(-1, place, values)
        if not torch.equal(by.gather(-1, place)[place < count], values[place < count]):
            return None
        by = by[..., :-1]
        if bool((by < 0).all()):
            return self._constant(by, found)
        inner = main.inner[-1]
        for row in range(self.shape[inner]):
            start = (valid & (apart == 0)).select(inner, row).flatten(0, -2).any(0).nonzero()
            if len(start) and int(start[0]) + count <= self.shape[-1]:
                line = codes.narrow(-1, int(start[0]), count).permute(order).flatten(len(main.around), -2)
                step = row + torch.arange(0, line.shape[-2], self.shape[inner])
                if torch.equal(line[..., step, :], by.unsqueeze(-2).expand_as(line[..., step, :])):
                    return Table(row, int(start[0]))
        return None

    def _constant(self, by: torch.Tensor, found: Codes) -> Table | None:
        flat = by.flatten(0, -2) if by.dim() > 1 else by.unsqueeze(0)
        if not torch.equal(flat, flat[:1].expand_as(flat)):
            return None
        values = [found.constant(int(code)) for code in flat[0]]
        if len(set(values)) == 1:
            return Table(constant=values[0])
        true = [at for at, x in enumerate(values) if x]
        if set(values) != {0.0, 1.0} or true != list(range(true[0], true[-1] + 1)):
            return None
        return Table(between=(self.window[0] + true[0], self.window[0] + true[-1]))

    def _band(self, at: Site, found: Codes) -> Band:
        node = at[0]
        codes, total = viewed(found.codes, at[2]), found.total
        codes = codes.view([1] * (len(self.shape) - codes.dim()) + list(codes.shape))
        valid = codes >= 0
        if not bool(valid.any()):
            raise Unliftable("columns of the scores that are constants", node)
        paired = bool((codes >= total).any())
        if paired and bool((valid & (codes < total)).any()):
            raise Unliftable("some columns are products and some are not", node)
        left, right = (codes // total - 1, codes % total) if paired else (None, codes)
        if left is not None and not self._keys_are(right, valid):
            left, right = right, left
        lost = ~valid & (self.kept if paired else torch.ones_like(valid))
        fills = {found.constant(int(code)) for code in codes[lost].unique()}
        valid = valid & self.kept if paired else valid
        if paired and not bool(valid.any(-1).all()):
            raise Unliftable("a row of the scores has no key", node)
        source, numbers = self.one_source(found, right, valid, node)
        step, count, token = tokens(source, numbers, valid)
        apart = along(numbers - step * token, valid, source)
        extents = dict(enumerate(codes.shape[:-1])) | {TOKEN: count, CHANNEL: 1}
        around = tuple(axis for axis, by in enumerate(apart) if by or extents[axis] == 1)
        if left is None:
            key = placed(source, {axis: by for axis, by in enumerate(apart) if by} | {TOKEN: step}, extents)
            return Band(node, valid, token, key, None, around, (), fills)
        first, numbers = self.one_source(found, left, valid, node)
        steps = along(numbers, valid, first)
        inner = tuple(sorted((axis for axis in extents if axis >= 0 and axis not in around), key=lambda a: -steps[a]))
        widths = [tensor_of(x).numel() for x in (source, first)]  # type: ignore[union-attr]
        sides = ({axis: apart[axis] for axis in around} | {TOKEN: step}, dict(enumerate(steps)))
        keys, queries = (
            placed(x, by | {CHANNEL: 1}, extents | {CHANNEL: n // prod(extents[a] for a in by if by[a])})
            for x, by, n in zip((source, first), sides, widths, strict=True)
        )
        return Band(node, valid, token, keys, queries, around, inner, fills)

    def _keys_are(self, right: torch.Tensor, valid: torch.Tensor) -> bool:
        """Whether it is the right rows that differ from column to column."""
        both = valid[..., 1:] & valid[..., :-1]
        return bool((right[..., 1:] != right[..., :-1])[both].any())

    def one_source(
        self, found: Codes, codes: torch.Tensor, valid: torch.Tensor, node: fx.Node
    ) -> tuple[fx.Node, torch.Tensor]:
        """The source of all columns and their numbers in it."""
        known = codes[valid]
        source = found.source_of(int(known.min()))
        if found.source_of(int(known.max())) is not source:
            raise Unliftable("the columns come from several tensors", node)
        return source, codes - found.sources[source]

    def _only_keys(self) -> None:
        """Columns without a key are lost."""
        main = self.main
        if main.fills - {float("-inf")}:
            found = ", ".join(f"{x:g}" for x in sorted(main.fills))
            raise Unliftable(
                f"columns of the scores that have no key hold {found}, and only -inf is no weight", main.node
            )

    def _agree(self) -> None:
        """All that has numbers of keys names the same."""
        main = self.main
        for band in self.bands.values():
            if isinstance(band, Table):
                continue
            valid, token = (x.expand(main.valid.shape) for x in (band.valid, band.token))
            if not bool((valid | ~main.valid).all()) or not torch.equal(token[main.valid], main.token[main.valid]):
                raise Unliftable("a mask of the scores names other keys than the scores do", band.node)

    def _window(self) -> tuple[int, int]:
        """How far before and behind a row its first and last keys are."""
        main = self.main
        table = torch.zeros((*self.shape[:-1], main.keys), dtype=torch.int64)
        table.scatter_add_(-1, main.token.expand(self.shape), main.valid.expand(self.shape).long())
        if int(table.max()) > 1:
            raise Unliftable("a key stands twice in a row of the scores", main.node)
        table = table.permute(self.order(keys=True)).reshape(self.sizes(main.keys))
        first = table[(0,) * len(main.around)]
        if not bool((table == first).all()):
            raise Unliftable("heads or sequences name keys of their own", main.node)
        apart = torch.arange(main.keys) - torch.arange(len(first)).unsqueeze(1)
        low, high = (int(x) for x in apart[first > 0].aminmax())
        if not torch.equal(first > 0, (apart >= low) & (apart <= high)):
            raise Unliftable(
                f"the keys of a row are no window: between {-low} before and {high} behind are not all", main.node
            )
        if list(main.inner) != sorted(main.inner):
            raise Unliftable("rows in another order than their axes", main.node)
        return low, high

"""Attention written over chunks of keys, found as what it computes: every row over the keys that its columns are.

    scores[b, i, h, c] = q[b, i, h] . k[b, key(i, c), h]   ->   over c: softmax, sum with v[b, key(i, c), h]

Where an element of the scores comes from, and which value a weight meets, is counted at the region's own size
(`codes`): keys of one row that differ, columns without a key that hold -inf, and each weight at the value of its own
key make it an attention over the pairs that stand in `key`. It is then written beside the chunks as such, over all
pairs and with the mask that `key` is, so that it is lifted like any other; the chunks stay until a form replaces both.

Source: Beltagy et al. 2020, "Longformer", arXiv:2004.05150, section 3.1 and appendix A (sliding chunks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from attnc.passes.attention.codes import is_constant, is_padded, moves
from attnc.passes.attention.columns import POINTWISE, Columns, plain_name
from attnc.passes.attention.conditions import LOGIC
from attnc.passes.attention.meeting import Meeting
from attnc.passes.attention.over_pairs import Writing
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
            self._known[text] = nodes, self._count(anchor, weights, final, nodes)
        others, found = self._known[text]
        image = dict(zip(others, nodes, strict=True))
        if isinstance(found, NoMatch):
            return NoMatch(found.reason, image.get(found.node, anchor))
        columns = found[0].moved(image)
        return columns, found[1].moved(image, columns, weights, final)

    def _count(
        self, anchor: fx.Node, weights: list[fx.Node], final: Product, nodes: list[fx.Node]
    ) -> tuple[Columns, Meeting] | NoMatch:
        """Of all elements; failing that, of what is padded to whole chunks as tensors of their own."""
        found = self._tried(anchor, weights, final, padded=False)
        if isinstance(found, NoMatch) and any(map(is_padded, nodes)):
            again = self._tried(anchor, weights, final, padded=True)
            return found if isinstance(again, NoMatch) else again
        return found

    def _tried(
        self, anchor: fx.Node, weights: list[fx.Node], final: Product, *, padded: bool
    ) -> tuple[Columns, Meeting] | NoMatch:
        try:
            with _disable_current_modes():
                columns = Columns(self.facts, anchor, padded=padded)
                return columns, Meeting(columns, weights, final)
        except Unliftable as exc:
            return exc.no_match

    def _text(self, out: fx.Node) -> tuple[list[fx.Node], str]:
        """What `out` is counted from, in order, and all that counting asks of it."""
        facts, seen, stack = self.facts, {out}, [out]
        while stack:
            node = stack.pop()
            through = moves(node) or product(node) is not None or plain_name(node) in (*POINTWISE, *LOGIC, "softmax")
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
        return found if isinstance(found, NoMatch) else _written(*found)
    except Unliftable as exc:
        return exc.no_match


def _written(columns: Columns, meeting: Meeting) -> Unrolled:
    main, writing = columns.main, Writing(columns, meeting)
    assert main.query is not None
    operands = tuple(dict.fromkeys([main.query.source, main.key.source, meeting.value.source]))
    again, result = writing.run()
    return Unrolled(columns.anchor, meeting.final.node, again, result, frozenset(writing.inside), operands)


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

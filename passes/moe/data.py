"""What experts read: the block's input behind views, sorting, routing weights and one-hot dispatch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attnc.expr import ZERO, Expr, var
from attnc.passes.graph import op_name, shape_of, tensor_of
from attnc.passes.moe.products import contraction, is_weight
from attnc.passes.moe.rows import CASTS, Element, Rows
from attnc.passes.moe.run import inputs
from attnc.passes.moe.summand import Unit
from attnc.passes.views import Ranges, broadcast_index, through

_ANY = Ranges()
SELECTIONS = ("topk", "sort", "argsort", "argmax", "max", "scatter", "one_hot", "softmax", "gather")
ROW = "t'"  # a token of the input, where all are summed with a mask


@dataclass(frozen=True)
class Data:
    """x: the input at the first product. factors: routing weights that multiply it.

    mask: where tokens reach the rows of experts by a product with a mask, its element at token ROW.
    """

    x: Element
    factors: tuple[Element, ...] = ()
    mask: Element | None = None


def origin(node: fx.Node) -> fx.Node:
    """The node behind views and casts."""
    while True:
        value = tensor_of(node)
        if op_name(node) in CASTS and node.args and tensor_of(node.args[0]) is not None:
            node = node.args[0]
            continue
        index = tuple(ZERO for _ in range(value.dim())) if value is not None else ()
        behind = through(node, index, _ANY) if value is not None else None
        if behind is None:
            return node
        node = behind[0]


def data_of(rows: Rows, unit: Unit, token: Expr | None = None) -> Data:
    """What the first product of a feed-forward reads.

    token: where it should be; views beyond the one that shows it are not followed, as lengths may be symbols.
    """
    first = unit.hidden.firsts[0]
    inner = first.inner.names()

    def there(at: Element) -> bool:
        return token is not None and at.lead == token

    at = rows.settle(first.data.node, first.data.index, there)
    sent = _dispatched(rows, at, inner)
    if sent is not None:
        return sent
    if op_name(at.node) == "mul" and all(tensor_of(a) is not None for a in at.node.args):
        outer = shape_of(at.node)
        sides = [Element(x, broadcast_index(at.index, shape_of(x), outer)) for x in at.node.args]
        for factor, x in (sides, sides[::-1]):
            free = not any(e.names() & inner for e in factor.index)
            if free and any(e.names() & inner for e in x.index) and _is_routed(rows, factor.node, x.node):
                return Data(rows.settle(x.node, x.index, there), (factor,))
    return Data(at)


def _dispatched(rows: Rows, at: Element, inner: frozenset[str]) -> Data | None:
    """The input where rows of experts are a product of a mask and all tokens."""
    dot = contraction(at.node)
    if dot is None or len(dot.contracted) != 1 or dot.bias is not None:
        return None
    where = dict(zip(dot.out_labels, at.index, strict=True)) | {dot.contracted[0]: var(ROW)}
    rows.ranges.declare(ROW, dot.extent(dot.contracted[0]))
    sides = [Element(x, dot.at(side, where)) for x, side in ((dot.left, "left"), (dot.right, "right"))]
    for mask, x in (sides, sides[::-1]):
        names = frozenset().union(*(e.names() for e in mask.index)) - {ROW}
        apart = names and not names & inner and all(e.names() <= inner | {ROW} for e in x.index)
        if apart and not is_weight(mask.node) and _is_routed(rows, mask.node, x.node):
            shown = rows.settle(x.node, x.index, lambda here: here.lead == var(ROW))
            return Data(shown, (), rows.settle(mask.node, mask.index))
    return None


def _is_routed(rows: Rows, factor: fx.Node, x: fx.Node) -> bool:
    """Whether `factor` comes from a choice that was made after `x`."""
    floor = rows.facts.order[origin(x)]
    stack, seen = [factor], set()
    while stack:
        node = stack.pop()
        if node in seen or rows.facts.order[node] <= floor:
            continue
        seen.add(node)
        if op_name(node) in SELECTIONS:
            return True
        if contraction(node) is None:
            stack += inputs(node)
    return False

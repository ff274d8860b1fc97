"""Products with weights, experts' included: which operand is the weight, and whose expert's matrix an element meets.

`contraction` names the axes of every product, `weighted` says for one element of its output what data and which weight
matrix it is the product of. A matrix may be one of many: gathered by expert ids, taken in turn by sorted groups of
rows, paired with an axis of the output, or picked by a number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attnc.expr import ONE, ZERO, Expr, var
from attnc.passes.ffn.flow import VIEWS
from attnc.passes.graph import integer, op_name, shape_of, tensor_of
from attnc.passes.moe.rows import CASTS, Element, Rows, inverse_of, order_of, sorted_from
from attnc.passes.views import Index, broadcast_index

X = var("x")  # the expert, as a coordinate of a gathered weight


@dataclass(frozen=True)
class Contraction:
    """out[out_labels] = sum over `contracted` of left * right, plus `bias` broadcast to out; `offsets` end the groups.

    beside, summed: further operands with their labels, and labels that the whole is summed over; `out_labels` then
    has the summed labels too.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    out_labels: tuple[str, ...]
    left_labels: tuple[str, ...]
    right_labels: tuple[str, ...]
    contracted: tuple[str, ...]
    bias: fx.Node | None = None
    offsets: fx.Node | None = None
    beside: tuple[tuple[fx.Node, tuple[str, ...]], ...] = ()
    summed: tuple[str, ...] = ()

    def extent(self, label: str) -> Expr:
        """The length of an axis."""
        for node, labels in ((self.left, self.left_labels), (self.right, self.right_labels), *self.beside):
            if label in labels and (extent := shape_of(node)[labels.index(label)]) != ONE:
                return extent
        return ONE

    def at(self, side: str, where: dict[str, Expr]) -> Index:
        """Index into the left or right operand at the labelled positions `where`."""
        node, labels = (self.left, self.left_labels) if side == "left" else (self.right, self.right_labels)
        return tuple(
            ZERO if extent == ONE and label not in self.contracted else where[label]
            for label, extent in zip(labels, shape_of(node), strict=True)
        )


@dataclass(frozen=True)
class Weighted:
    """One element of a product of data and a weight matrix.

    data:    the data operand (not settled) at this element; its contracted position is `inner`, of extent `width`.
    weight:  the weight at this element, `X` standing for an expert that is looked up.
    expert:  which matrix: an element of a tensor of expert ids, a coordinate, a number; None where there is only one.
    count:   how many matrices there are. columns: outputs of one matrix.
    grouped: whether rows are sorted into groups, one for each expert.
    bias:    what is added, None for nothing.
    """

    node: fx.Node
    data: Element
    inner: Expr
    width: Expr
    weight: Element
    expert: Element | Expr | None
    count: int
    columns: int
    grouped: bool = False
    bias: Element | None = None


def contraction(node: Any) -> Contraction | None:
    """`node` as a product of two tensors, or None."""
    rule = _PRODUCTS.get(op_name(node))
    return rule(node) if rule is not None and tensor_of(node) is not None else None


def contractions(node: Any) -> list[Contraction]:
    """The ways in which `node` is a product of two tensors, summed and multiplied by others where it is an einsum."""
    dot = contraction(node)
    if dot is not None and len(dot.contracted) == 1:
        return [dot]
    terms = _terms(node) if op_name(node) == "einsum" else None
    return [] if terms is None else list(_pairs(node, *terms))


def is_weight(node: Any) -> bool:
    """Whether `node` holds inputs of the graph or constants, at most viewed, cast, scaled or put together."""
    stack, seen = [node], set()
    while stack:
        at = stack.pop()
        if at in seen:
            continue
        seen.add(at)
        if not isinstance(at, fx.Node) or len(seen) > 256:
            return False
        if at.op in ("placeholder", "get_attr"):
            continue
        if at.op != "call_function" or not _keeps_weights(at):
            return False
        stack += at.all_input_nodes
    return True


def _keeps_weights(node: fx.Node) -> bool:
    name = op_name(node)
    return name in VIEWS or name in CASTS or name in ("stack", "cat", "set_", "mul", "add", "sub", "div")


def holds_many(node: fx.Node) -> bool:
    """Whether `node` holds weights with a third axis, or weights looked up by ids, views and casts aside."""
    if tensor_of(node) is None or len(shape_of(node)) < 3:
        return False
    if is_weight(node):
        return True
    while (op_name(node) in VIEWS or op_name(node) in CASTS) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return op_name(node) in ("index", "index_select", "embedding") and is_weight(node.args[0])


def weighted(rows: Rows, dot: Contraction, index: Index, col: Expr, inner: str) -> Weighted | None:
    """Element `index` of a product as data times weight, `col` being the weight's own axis; None where it is none."""
    where = dict(zip(dot.out_labels, index, strict=True)) | {dot.contracted[0]: var(inner)}
    for side in ("right",) if dot.offsets is not None else ("right", "left"):
        found = _sided(rows, dot, side, where | {"expert": X}, col, var(inner))
        if found is not None:
            bias = None
            if dot.bias is not None:
                bias = Element(dot.bias, broadcast_index(index, shape_of(dot.bias), shape_of(dot.node)))
            return replace(found, bias=bias)
    return None


def _sided(rows: Rows, dot: Contraction, side: str, where: dict[str, Expr], col: Expr, inner: Expr) -> Weighted | None:
    """The product with its weight on one side."""
    operand, labels = (dot.right, dot.right_labels) if side == "right" else (dot.left, dot.left_labels)
    data, other = (dot.left, "left") if side == "right" else (dot.right, "right")
    extents = dict(zip(labels, shape_of(operand), strict=True))
    columns = [label for label in labels if where[label].names() & col.names()]
    found = _weight(rows, operand, dot.at(side, where))
    if found is None or len(columns) != 1 or not any(col.names() & e.names() for e in found[0].index):
        return None
    base, key, count = found
    expert: Element | Expr | None = key
    if dot.offsets is not None:
        expert, count = _grouped(rows, dot.offsets, where["row"], extents["expert"]), _number(extents["expert"])
        if expert is None:
            return None
    elif key is None:
        expert = _paired(base, inner, col)
        own = [] if expert is None else [extents[x] for x in labels if where[x].names() & expert.names()]
        count = math.prod(_number(e) for e in own)
    width = extents[dot.contracted[0]]
    element = Element(data, dot.at(other, where))
    sizes = count, _number(extents[columns[0]])
    return Weighted(dot.node, element, inner, width, base, expert, *sizes, dot.offsets is not None)


def _number(extent: Expr) -> int:
    return int(extent.value) if extent.is_const else 0


def _weight(rows: Rows, node: fx.Node, index: Index) -> tuple[Element, Element | None, int] | None:
    """The weight behind `node`, the tensor of ids it is gathered by, and how many matrices that chooses from."""
    key: Element | None = None
    count = 1
    at = Element(node, index)
    while True:
        looked = _lookup(at)
        if looked is not None and is_weight(at.node.args[0]):
            if key is not None:
                return None
            at, key = looked
            count = _number(shape_of(at.node)[at.index.index(X)])
            continue
        if at.node.op in ("placeholder", "get_attr"):
            break
        behind = rows.behind(at) if looked is None else None
        if behind is None:
            break
        at = behind
    if not is_weight(at.node):
        return None
    return at, None if key is None else ids_of(rows, key), count


def _lookup(at: Element) -> tuple[Element, Element] | None:
    """(source at X, key) where `at` is gathered along one axis by a tensor of integers."""
    name, args, index = op_name(at.node), at.node.args, at.index
    if name == "index":
        places = [d for d, k in enumerate(args[1]) if k is not None]
        if len(places) != 1:
            return None
        d, key = places[0], args[1][places[0]]
    elif name == "index_select":
        d, key = int(args[1]) % len(index), args[2]
    elif name == "embedding":
        d, key = 0, args[1]
    else:
        return None
    value = tensor_of(key)
    if value is None or value.dtype in (torch.bool, torch.uint8):
        return None
    rank = value.dim()
    return Element(args[0], (*index[:d], X, *index[d + rank :])), Element(key, index[d : d + rank])


def ids_of(rows: Rows, at: Element) -> Element:
    """The tensor of expert ids behind views and the sorting of rows, not behind other lookups."""

    def stop(here: Element) -> bool:
        if op_name(here.node) not in ("index", "index_select", "gather", "embedding"):
            return False
        keys = [k for k in here.node.all_input_nodes if k is not here.node.args[0]]
        return not all(order_of(k) is not None or inverse_of(k) is not None for k in keys)

    return rows.settle(at.node, at.index, stop)


def _paired(base: Element, inner: Expr, col: Expr) -> Expr | None:
    """The coordinate that picks the matrix: what the weight's index holds beside its row and column."""
    own = inner.names() | col.names()
    coordinates = [e for e in base.index if e.names() and not e.names() & own]
    if coordinates:
        return coordinates[0] if len(coordinates) == 1 else None
    others = frozenset().union(*(e.names() for e in base.index)) - own
    return var(next(iter(others))) if len(others) == 1 else None


def _grouped(rows: Rows, offsets: fx.Node, row: Expr, count: Expr) -> Element | None:
    """The expert of a row, where `offsets` are the ends of groups of sorted expert ids."""
    counted = counted_ids(offsets, count)
    if counted is None:
        return None
    if sorted_from(counted) is not None:
        return ids_of(rows, Element(counted, (row,)))
    here = ids_of(rows, Element(counted, (row,)))
    for node in rows.facts.graph.nodes:
        key = order_of(node)
        if key is None or op_name(key) == "topk" or (key is not node and node.args[1] != 1):
            continue
        if len(shape_of(node)) == 1 and ids_of(rows, Element(key.args[0], (row,))) == here:
            return ids_of(rows, Element(counted, (rows.number(node, (row,)),)))
    return None


def counted_ids(offsets: fx.Node, count: Expr) -> fx.Node | None:
    """The 1-D tensor of expert ids whose numbers of occurrences add up to `offsets`."""
    node: Any = _bare(offsets)
    if op_name(node) != "cumsum" or int(node.args[1]) != 0:
        return None
    node = _bare(node.args[0])
    name, args = op_name(node), list(getattr(node, "args", ()))
    source: Any = None
    if name == "histc":
        bins, low, high = (*args[1:], *(None,) * 3)[:3]
        if integer(bins) == count and low == 0 and isinstance(high, int | float) and int(high) == bins - 1:
            source = args[0]
    elif name == "bincount":
        least = args[2] if len(args) > 2 else node.kwargs.get("minlength", 0)
        source = args[0] if integer(least) == count else None
    elif name == "sum" and op_name(_bare(args[0])) == "one_hot" and list(args[1]) == [0]:
        source = _bare(args[0]).args[0]
    source = _bare(source)
    value = tensor_of(source)
    return source if value is not None and value.dim() == 1 else None


def _bare(node: Any) -> Any:
    while op_name(node) in CASTS:
        node = node.args[0]
    return node


# --------------------------------------------------------------------------------------------------------------------
# One rule per operator
# --------------------------------------------------------------------------------------------------------------------


def _matmul(node: fx.Node, left: Any = None, right: Any = None, bias: Any = None) -> Contraction | None:
    left, right = (node.args[0], node.args[1]) if left is None else (left, right)
    if tensor_of(left) is None or tensor_of(right) is None:
        return None
    nl, nr = len(shape_of(left)), len(shape_of(right))
    if nl < 2 or nr < 2:
        return None
    batch = tuple(f"n{d}" for d in range(len(shape_of(node)) - 2))
    lefts = (*batch[len(batch) - nl + 2 :], "row", "in")
    rights = (*batch[len(batch) - nr + 2 :], "in", "col")
    return Contraction(node, left, right, (*batch, "row", "col"), lefts, rights, ("in",), bias)


def _added(node: fx.Node) -> Contraction | None:
    """addmm and baddbmm."""
    if any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        return None
    return _matmul(node, node.args[1], node.args[2], node.args[0])


def _linear(node: fx.Node) -> Contraction | None:
    x, w, bias = (*node.args, None)[:3]
    if tensor_of(x) is None or tensor_of(w) is None or len(shape_of(w)) != 2:
        return None
    batch = tuple(f"n{d}" for d in range(len(shape_of(node)) - 1))
    return Contraction(node, x, w, (*batch, "col"), (*batch, "in"), ("col", "in"), ("in",), bias)


def _einsum(node: fx.Node) -> Contraction | None:
    terms = _terms(node)
    if terms is None or len(terms[0]) != 2:
        return None
    (left, right), outs = terms
    contracted = tuple(x for x in left if x in right and x not in outs)
    if any(x not in outs and x not in contracted for x in (*left, *right)):
        return None
    first, second = node.args[1]
    return Contraction(node, first, second, outs, left, right, contracted)


def _terms(node: fx.Node) -> tuple[list[tuple[str, ...]], tuple[str, ...]] | None:
    """(labels of each operand, labels of the output) of an einsum."""
    equation, operands = node.args[0], node.args[1]
    if "->" not in equation:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    lists = [tuple(_labels(t, len(shape_of(x)))) for t, x in zip(inputs.split(","), operands, strict=True)]
    outs = tuple(_labels(out, len(shape_of(node))))
    return None if any(len(set(x)) != len(x) for x in (*lists, outs)) else (lists, outs)


def _pairs(node: fx.Node, lists: list[tuple[str, ...]], outs: tuple[str, ...]) -> Iterator[Contraction]:
    """Each pair of operands of an einsum with each label that only they share as the contracted one."""
    operands = node.args[1]
    for a, c in itertools.combinations(range(len(lists)), 2):
        others = [k for k in range(len(lists)) if k not in (a, c)]
        for label in lists[a]:
            if label not in lists[c] or label in outs or any(label in lists[k] for k in others):
                continue
            summed = tuple(dict.fromkeys(x for labels in lists for x in labels if x not in outs and x != label))
            if any(x not in (*lists[a], *lists[c]) for x in summed):
                continue
            beside = tuple((operands[k], lists[k]) for k in others)
            free = tuple(x for x in (*outs, *summed) if x in (*lists[a], *lists[c]))
            yield Contraction(
                node, operands[a], operands[c], free, lists[a], lists[c], (label,), beside=beside, summed=summed
            )


def _labels(term: str, rank: int) -> list[str]:
    if "..." not in term:
        return list(term)
    before, after = term.split("...")
    hidden = rank - len(before) - len(after)
    return [*before, *(f"...{k}" for k in range(hidden)), *after]


def _groups(node: fx.Node) -> Contraction | None:
    """Rows sorted into groups, a matrix for each group."""
    given = dict(zip(("input", "mat2", "offs", "bias"), node.args, strict=False)) | dict(node.kwargs)
    x, w = node.args[0], node.args[1]
    offsets = given.get("offs")
    if not isinstance(offsets, fx.Node) or len(shape_of(x)) != 2 or len(shape_of(w)) != 3:
        return None
    if given.get("bias") is not None:
        return None
    return Contraction(node, x, w, ("row", "col"), ("row", "in"), ("expert", "in", "col"), ("in",), None, offsets)


_PRODUCTS: dict[str, Callable[[fx.Node], Contraction | None]] = {
    **dict.fromkeys(("matmul", "bmm", "mm", "__matmul__"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm"), _added),
    "linear": _linear,
    "einsum": _einsum,
    **dict.fromkeys(("_grouped_mm", "grouped_mm", "grouped_mm_fallback"), _groups),
}

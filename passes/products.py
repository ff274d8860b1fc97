"""Products: which axes of a matrix product are batch, row, column and contracted, however it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from attnc.expr import ONE, ZERO, Expr
from attnc.passes.graph import hint, op_name, shape_of, tensor_of
from attnc.passes.views import Index


@dataclass(frozen=True)
class Product:
    """out[labels] = sum_contracted left[left_labels] * right[right_labels], plus `addend` (baddbmm).

    Labels are one per dimension; batch labels occur on all three, `row` only left, `col` only right.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    out_labels: tuple[str, ...]
    left_labels: tuple[str, ...]
    right_labels: tuple[str, ...]
    contracted: str
    row: str
    col: str
    addend: fx.Node | None = None
    alpha: float = 1.0
    beta: float = 1.0

    def index(self, side: str, index: Index, inner: Expr) -> Index:
        """Index into the left or right operand of the element that belongs to out[index] and contracted position."""
        at = dict(zip(self.out_labels, index, strict=True)) | {self.contracted: inner}
        labels = self.left_labels if side == "left" else self.right_labels
        shape = shape_of(self.left if side == "left" else self.right)
        return tuple(
            ZERO if extent == ONE and label != self.contracted else at[label]
            for label, extent in zip(labels, shape, strict=True)
        )

    def swapped(self) -> Product:
        """The same product with its operands exchanged: out = (right^T left^T)^T."""
        return Product(self.node, self.right, self.left, self.out_labels, self.right_labels, self.left_labels,
                       self.contracted, self.col, self.row, self.addend, self.alpha, self.beta)


def product(node: Any) -> Product | None:
    """`node` as a product of two matrices per batch, or None."""
    rule = _PRODUCTS.get(op_name(node))
    return rule(node) if rule is not None and tensor_of(node) is not None else None


def _batched(node: fx.Node, left: Any, right: Any, **extra: Any) -> Product | None:
    if tensor_of(left) is None or tensor_of(right) is None:
        return None
    nl, nr = len(shape_of(left)), len(shape_of(right))
    if nl < 2 or nr < 2:
        return None
    rank = len(shape_of(node))
    batch = tuple(f"n{d}" for d in range(rank - 2))
    return Product(
        node, left, right, (*batch, "row", "col"), (*batch[len(batch) - nl + 2 :], "row", "in"),
        (*batch[len(batch) - nr + 2 :], "in", "col"), "in", "row", "col", **extra,
    )


def _matmul(node: fx.Node) -> Product | None:
    return _batched(node, node.args[0], node.args[1])


def _baddbmm(node: fx.Node) -> Product | None:
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    if not isinstance(beta, int | float) or not isinstance(alpha, int | float):
        return None
    addend = node.args[0] if beta != 0 else None
    return _batched(node, node.args[1], node.args[2], addend=addend, alpha=float(alpha), beta=float(beta))


def _einsum(node: fx.Node) -> Product | None:
    equation, operands = node.args[0], node.args[1]
    if len(operands) != 2 or "->" not in equation:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    terms = inputs.split(",")
    lists = [_labels(t, len(shape_of(x))) for t, x in zip(terms, operands, strict=True)]
    outs = _labels(out, len(shape_of(node)))
    left, right = lists
    if any(len(set(x)) != len(x) for x in (left, right, outs)):
        return None
    contracted = [x for x in left if x in right and x not in outs]
    extents = dict(zip(outs, (hint(s) for s in tensor_of(node).shape), strict=True))  # type: ignore[union-attr]
    if len(contracted) != 1 or any(x not in outs for x in (*left, *right) if x != contracted[0]):
        return None
    rows = [x for x in left if x not in right]
    cols = [x for x in right if x not in left]
    if not rows or not cols:
        return None
    # Of several free axes (query heads beside rows) the longest, then the last, is the row; the others are batch axes.
    row, col = (max(enumerate(free), key=lambda at: (extents[at[1]], at[0]))[1] for free in (rows, cols))
    first, second = operands
    return Product(node, first, second, tuple(outs), tuple(left), tuple(right), contracted[0], row, col)


def _labels(term: str, rank: int) -> list[str]:
    if "..." not in term:
        return list(term)
    before, after = term.split("...")
    hidden = rank - len(before) - len(after)
    return [*before, *(f"...{hidden - k}" for k in range(hidden)), *after]


_PRODUCTS = {
    "matmul": _matmul,
    "bmm": _matmul,
    "mm": _matmul,
    "__matmul__": _matmul,
    "baddbmm": _baddbmm,
    "einsum": _einsum,
}

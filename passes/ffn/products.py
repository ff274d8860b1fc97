"""Products of data with weights, however they are written: which axes are tokens, features, contracted.

    linear(x, w)   addmm(b, x, w)   x @ w   w @ x   bmm(x, w)   einsum   convolution of kernel size 1

A weight is what depends on parameters and constants only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from attnc.expr import ONE, ZERO, Expr, add, mul, var
from attnc.passes.graph import hint, op_name, shape_of, tensor_of
from attnc.passes.views import Index


class Weights(Protocol):
    """What a graph says of its values."""

    def is_fixed(self, node: Any) -> bool:
        """Whether a value depends on parameters and constants only."""

    def is_trained(self, node: Any) -> bool:
        """Whether a value is, behind views, a parameter with a gradient."""


CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")


@dataclass(frozen=True)
class Weighted:
    """out[out_labels] = sum over `contracted` of data[data_labels] * weight, plus `bias`.

    features: output axes that only the weight has. blocks: axes on which each position has weights of its own.
    groups:   parts of the contracted axis with weights of their own (grouped convolution).
    """

    node: fx.Node
    data: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    out_labels: tuple[str, ...]
    data_labels: tuple[str, ...]
    contracted: tuple[str, ...]
    features: tuple[str, ...]
    blocks: tuple[str, ...] = ()
    groups: int = 1

    @property
    def tokens(self) -> tuple[str, ...]:
        return tuple(label for label in self.out_labels if label not in self.features)

    def extent(self, label: str) -> Expr:
        """The length of an axis of the output, or of the data where it is contracted."""
        labels, node = (
            (self.data_labels, self.data) if label in self.contracted else (self.out_labels, self.node)
        )
        return shape_of(node)[labels.index(label)]

    def size(self, labels: Sequence[str]) -> int:
        """Elements along `labels`, by hint."""
        out, data = tensor_of(self.node), tensor_of(self.data)
        assert out is not None and data is not None
        known = dict(zip(self.data_labels, data.shape, strict=True))
        known |= dict(zip(self.out_labels, out.shape, strict=True))
        return math.prod(hint(known[label]) for label in labels)

    def data_index(self, index: Index, inner: dict[str, Expr] | None = None) -> Index:
        """Index into the data of the element that belongs to out[index]; contracted axes are at c0, c1, ..."""
        at = dict(zip(self.out_labels, index, strict=True))
        at |= inner or {label: var(f"c{k}") for k, label in enumerate(self.contracted)}
        return tuple(
            ZERO if extent == ONE and label not in self.contracted else at[label]
            for label, extent in zip(self.data_labels, shape_of(self.data), strict=True)
        )

    def feature(self, index: Index) -> Expr:
        """The position of out[index] among all output features."""
        at = dict(zip(self.out_labels, index, strict=True))
        flat: Expr = ZERO
        for label in self.features:
            flat = add(mul(flat, self.extent(label)), at[label])
        return flat


def weighted(node: fx.Node, known: Weights) -> Weighted | None:
    """`node` as a product of data with weights, or None."""
    rule = _PRODUCTS.get(op_name(node))
    value = tensor_of(node) if rule is not None else None
    if rule is None or value is None or not value.is_floating_point():
        return None
    return rule(node, known)


def depthwise(node: fx.Node) -> tuple[int, ...] | None:
    """The kernel of a convolution that mixes no channels and keeps every position's own output; None for others."""
    found = _convolution(node)
    if found is None:
        return None
    data, weight, given = found
    channels = hint(data.shape[1]) if data.dim() == weight.dim() else hint(data.shape[0])
    if given["groups"] != channels or hint(weight.shape[0]) != channels or hint(weight.shape[1]) != 1:
        return None
    if given.get("transposed") or any(step != 1 for step in _sequence(given["stride"])):
        return None
    return tuple(hint(s) for s in weight.shape[2:])


# --------------------------------------------------------------------------------------------------------------------
# One rule per operator
# --------------------------------------------------------------------------------------------------------------------


def _contracted(
    node: fx.Node,
    sides: tuple[tuple[fx.Node, Sequence[str]], tuple[fx.Node, Sequence[str]]],
    out: Sequence[str],
    bias: Any = None,
) -> Weighted | None:
    """The product with these labels: data first, then weight; None where an axis is summed on its own."""
    (data, inside), (weight, wide) = sides
    lengths = dict(zip(wide, shape_of(weight), strict=True))
    contracted = tuple(x for x in inside if x in wide and x not in out)
    features = tuple(x for x in out if x in wide and x not in inside)
    if not contracted or not features or any(x not in out for x in (*inside, *wide) if x not in contracted):
        return None
    blocks = tuple(x for x in out if x in wide and x in inside and lengths[x] != ONE)
    bias = bias if isinstance(bias, fx.Node) else None
    return Weighted(node, data, weight, bias, tuple(out), tuple(inside), contracted, features, blocks)


def _linear(node: fx.Node, known: Weights) -> Weighted | None:
    data, weight = node.args[:2]
    if not isinstance(weight, fx.Node) or not known.is_fixed(weight) or len(shape_of(weight)) != 2:
        return None
    rows = tuple(f"n{d}" for d in range(len(shape_of(data)) - 1))
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return _contracted(node, ((data, (*rows, "in")), (weight, ("col", "in"))), (*rows, "col"), bias)


def _matmul(node: fx.Node, known: Weights) -> Weighted | None:
    return _matrices(node, node.args[0], node.args[1], known)


def _addmm(node: fx.Node, known: Weights) -> Weighted | None:
    if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1 or not known.is_fixed(node.args[0]):
        return None
    return _matrices(node, node.args[1], node.args[2], known, node.args[0])


def _matrices(node: fx.Node, left: Any, right: Any, known: Weights, bias: Any = None) -> Weighted | None:
    nl, nr = len(shape_of(left)), len(shape_of(right))
    if nl < 2 or nr < 2:
        return None
    rank = len(shape_of(node))
    batch = tuple(f"n{d}" for d in range(rank - 2))
    out = (*batch, "row", "col")
    sides = (left, (*batch[len(batch) - nl + 2 :], "row", "in")), (right, (*batch[len(batch) - nr + 2 :], "in", "col"))
    which = _weight_of(left, right, known)
    if which is None:
        return None
    return _contracted(node, sides if which is right else sides[::-1], out, bias)


def _weight_of(left: fx.Node, right: fx.Node, known: Weights) -> fx.Node | None:
    """The operand that is the weight; of two that could be, the one with a gradient, else a matrix, the right first."""
    first, second = known.is_fixed(left), known.is_fixed(right)
    if first and second:
        if known.is_trained(left) != known.is_trained(right):
            return left if known.is_trained(left) else right
        return right if len(shape_of(right)) == 2 else left if len(shape_of(left)) == 2 else None
    return right if second else left if first else None


def _einsum(node: fx.Node, known: Weights) -> Weighted | None:
    equation, operands = node.args[0], node.args[1]
    if len(operands) != 2 or "->" not in equation:
        return None
    inputs, end = equation.replace(" ", "").split("->")
    terms = [_expanded(t, len(shape_of(x))) for t, x in zip(inputs.split(","), operands, strict=True)]
    out = _expanded(end, len(shape_of(node)))
    if any(len(set(x)) != len(x) for x in (*terms, out)):
        return None
    which = _weight_of(operands[0], operands[1], known)
    if which is None:
        return None
    sides = (operands[0], terms[0]), (operands[1], terms[1])
    return _contracted(node, sides if which is operands[1] else sides[::-1], out)


def _expanded(term: str, rank: int) -> list[str]:
    """One label for each axis; axes under the dots are counted from the right."""
    if "..." not in term:
        return list(term)
    before, after = term.split("...")
    hidden = rank - len(before) - len(after)
    return [*before, *(f".{hidden - k}" for k in range(hidden)), *after]


def _pointwise_convolution(node: fx.Node, known: Weights) -> Weighted | None:
    found = _convolution(node)
    if found is None or not known.is_fixed(node.args[1]):
        return None
    data, weight, given = found
    if any(hint(s) != 1 for s in weight.shape[2:]) or given.get("transposed"):
        return None
    padded = given["padding"] not in ("valid", "same") and any(x != 0 for x in _sequence(given["padding"]))
    if padded or any(step != 1 for step in _sequence(given["stride"])):
        return None
    rank = data.dim()
    places = tuple(f"n{d + 1}" for d in range(weight.dim() - 2))
    lead = ("n0",) if rank == weight.dim() else ()
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    bias = bias if isinstance(bias, fx.Node) else None
    groups = int(given["groups"])
    if groups == hint(data.shape[len(lead)]) and groups > 1:
        return None  # a factor of each channel
    return Weighted(node, node.args[0], node.args[1], bias, (*lead, "col", *places), (*lead, "in", *places),
                    ("in",), ("col",), (), groups)


def _convolution(node: fx.Node) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]] | None:
    """Data, weight and settings of a convolution."""
    if op_name(node) not in CONVOLUTIONS:
        return None
    data, weight = tensor_of(node.args[0]), tensor_of(node.args[1])
    if data is None or weight is None or weight.dim() < 3:
        return None
    defaults: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    names = ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    if op_name(node) == "convolution":
        names[-1:] = ["transposed", "output_padding", "groups"]
    given = defaults | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return data, weight, given


def _sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


_PRODUCTS: dict[str, Callable[[fx.Node, Weights], Weighted | None]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "__matmul__"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm"), _addmm),
    "einsum": _einsum,
    **dict.fromkeys(CONVOLUTIONS, _pointwise_convolution),
}

"""What stands around a feed-forward: its bias and factor behind the second product, and what its output is used for."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import fx

from attnc.passes.ffn.flow import CASTS, FACTORS, QUOTIENTS, VIEWS, Flows, is_dropping, is_elementwise
from attnc.passes.ffn.formula import Formula
from attnc.passes.ffn.products import Weighted
from attnc.passes.graph import hint, op_name, tensor_of

# How far around a region its surroundings are looked at: a gate behind it, a token mixer beside it.
NEAR = 12
GATES = frozenset(("sigmoid", "hardsigmoid", "special_expit", "softmax", "tanh"))
MOVES = frozenset(("permute", "transpose", "t", "mT", "movedim", "swapaxes", "swapdims"))
MATRICES = frozenset(("matmul", "bmm", "mm", "__matmul__", "einsum", "baddbmm"))


@dataclass(frozen=True)
class Tail:
    """What follows the second product and belongs to the region."""

    out: fx.Node
    nodes: tuple[fx.Node, ...] = ()
    bias: fx.Node | None = None
    scale: float = 1.0


def tail_of(second: Weighted, flows: Flows) -> Tail:
    """The bias and the constant factor behind the second product, up to the last of them."""
    node, passed, bias, factor = second.node, [], None, 1.0
    tail, in_order = Tail(node), second.features == second.out_labels[-1:]
    while len(node.users) == 1:
        (user,) = node.users
        name = op_name(user)
        other = next((x for x in user.args if x is not node), None) if len(user.args) == 2 else None
        if name == "add" and in_order and factor == 1.0 and _is_bias(other, user, second, flows) and bias is None:
            bias = other
        elif name in FACTORS | QUOTIENTS and user.args[0] is node and isinstance(other, int | float):
            factor *= other if name in FACTORS else 1.0 / other
        elif user.args[0] is not node or not _passes_all(user):
            break
        in_order = in_order and name not in MOVES
        node = user
        passed.append(node)
        if bias is not tail.bias or factor != tail.scale:
            tail = Tail(node, tuple(passed), bias, factor)
    return tail


def _passes_all(node: fx.Node) -> bool:
    """Whether `node` hands on all of its first argument, unchanged."""
    name = op_name(node)
    if name == "dropout":
        return not is_dropping(node)
    value, source = tensor_of(node), tensor_of(node.args[0])
    return (name in VIEWS or name in CASTS) and value is not None and source is not None and (
        _count(node) == _count(node.args[0])
    )


def _is_bias(node: Any, user: fx.Node, second: Weighted, flows: Flows) -> bool:
    """Whether `user` adds a parameter of one number for each output feature."""
    value = tensor_of(node)
    if value is None or user.kwargs or second.bias is not None or not flows.is_fixed(node):
        return False
    return value.dim() == 1 and hint(value.shape[0]) == second.size(second.features)


def role_of(
    formula: Formula, second: Weighted, out: fx.Node, flows: Flows, taken: Collection[fx.Node]
) -> str | None:
    """See FFNRule.role; None for what is no feed-forward: coefficients of other values (a gate on more than its own
    tokens, a router), and a layer that is followed by the product of a head or of the next layer."""
    first = formula.operands[0]
    d_model, d_ff = first.product.size(first.product.contracted), second.size(second.contracted)
    narrow = d_ff < d_model != second.size(second.features)
    use = _use(out, flows, taken, narrow)
    if use is not None:
        return None if use == "coefficients" else use
    if flows.is_fixed(first.product.data) and first.source[0].op != "placeholder":
        return "constant"
    if second.size(second.features) != d_model:
        return None if _is_layered(formula) else "head"
    if len(first.product.data_labels) == 2 and any(t.name == "batch_norm" for t in formula.terms):
        return None
    return "bottleneck" if d_ff < d_model else "block"


def _count(node: fx.Node) -> int:
    value = tensor_of(node)
    return math.prod(map(hint, value.shape)) if value is not None else 0


def _is_layered(formula: Formula) -> bool:
    """Whether a norm or a convolution makes the first product a layer of its own."""
    steps = [t.name for t in formula.terms if t.kind == "step"]
    return any(t.kind == "norm" for t in formula.terms) or any(x.endswith("norm") or "conv" in x for x in steps)


def _use(node: fx.Node, flows: Flows, taken: Collection[fx.Node], narrow: bool) -> str | None:
    """"coefficients" where the output weighs other values: it is broadcast in a product with them, or, where its hidden
    unit is narrow, enters a product of matrices; "gate" where it multiplies something as a bounded number; else None.
    """
    bounded, count = False, _count(node)
    for _ in range(NEAR):
        if len(node.users) != 1:
            return None
        (user,) = node.users
        name = op_name(user)
        beside = [x for x in user.all_input_nodes if x is not node]
        others = [x for x in beside if not flows.is_fixed(x)]
        if name in FACTORS and _count(user) > count:
            return "coefficients" if any(_count(x) == _count(user) for x in beside) else None
        if name in FACTORS and others:
            return "gate" if bounded else None
        if narrow and name in MATRICES and others and user not in flows.products and user not in taken:
            return "coefficients"
        if others or not (name in VIEWS or name in CASTS or is_elementwise(user)) or tensor_of(user) is None:
            return None
        bounded = bounded or name in GATES
        node = user
    return None


def is_parallel(source: fx.Node, own: Collection[fx.Node], taken: Collection[fx.Node]) -> bool:
    """Whether another product than `own` that reads `source` ends in a region that is taken."""
    frontier = [user for user in source.users if user not in own] if taken else []
    seen: set[fx.Node] = set()
    for _ in range(NEAR):
        if any(node in taken for node in frontier):
            return True
        seen.update(frontier)
        frontier = [user for node in frontier if not _joins(node, source) for user in node.users if user not in seen]
        if not frontier or len(seen) > NEAR * NEAR:
            return False
    return False


def _joins(node: fx.Node, source: fx.Node) -> bool:
    """Whether a residual sum stands here: what follows reads more than this input."""
    value, given = tensor_of(node), tensor_of(source)
    return op_name(node) == "add" and value is not None and given is not None and value.shape == given.shape

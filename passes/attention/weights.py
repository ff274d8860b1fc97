"""The weights of an attention on their way from the softmax to the product with the values.

Between the two may stand views, casts, dropout, and a mask that sets weights to zero. Whatever else reads the weights
is noted: they must then be there as written, so the region is seen and left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnc.expr import var
from attnc.passes.graph import NoMatch, op_name, shape_of, tensor_of
from attnc.passes.products import Product, product
from attnc.passes.views import Index, Ranges, broadcast_index, through

_CASTS = ("to", "_to_copy", "type_as", "float", "half", "bfloat16", "double")
_PIECES = {"slice", "narrow", "select"}
_SHIFTS = ("pad", "constant_pad_nd", "as_strided", "unfold")
_DROPOUTS = ("dropout", "dropout_", "native_dropout")


@dataclass(frozen=True)
class Weights:
    """The product that ends the region, the dropout probability, the nodes before it, who else reads the weights."""

    product: Product
    dropout: float
    between: list[fx.Node]
    readers: list[fx.Node]


@dataclass(frozen=True)
class Zeroing:
    """Weights set to `fill` where `mask[index]` is not `keeps`."""

    node: fx.Node
    mask: fx.Node
    fill: Any
    keeps: bool
    index: Index

    def at(self, argument: Any) -> Index:
        """Index into the mask or the fill, broadcast to the weights."""
        outer = shape_of(self.node)
        return () if tensor_of(argument) is None else broadcast_index(self.index, shape_of(argument), outer)


def follow(anchor: fx.Node) -> Weights | NoMatch:
    """Walk from the softmax to the one product with values."""
    node, dropout, between, readers = anchor, 0.0, [anchor], []
    while True:
        users = [u for u in node.users if not _is_dead(u)]
        ahead = [u for u in users if _meets_values(u, node)]
        if len(ahead) == 1:
            readers += [u for u in users if u is not ahead[0]]
            users = ahead
        if len(users) != 1:
            return NoMatch(_read_by(users), node)
        (user,) = users
        final = product(user)
        if final is not None:
            oriented = _orient(final, node)
            if oriented is None:
                return NoMatch("the weights meet the values in a product of another shape", user)
            return Weights(oriented, dropout, between, readers)
        if user.op == "output":
            return NoMatch("the weights are an output of the graph", node)
        if not _carries(user, node):
            return NoMatch(_changed_by(user), user)
        if op_name(user) in _DROPOUTS and len(user.args) > 2 and user.args[2]:
            dropout = float(user.args[1])
        node = user
        between.append(node)


def _read_by(users: list[fx.Node]) -> str:
    names = ", ".join(sorted(u.name for u in users)) or "nothing"
    said = f"the weights are read by {len(users)} nodes ({names}), one product is allowed"
    if len(users) > 1 and {op_name(u) for u in users} <= _PIECES:
        said += (
            ": as blocks of keys that were gathered for each block of rows are (BigBird); a softmax whose columns"
            " several products make, and several read, is not read"
        )
    return said


def _changed_by(user: fx.Node) -> str:
    said = f"{op_name(user) or user.op} changes the weights before they meet the values"
    if op_name(user) in _SHIFTS:
        said += ": as sliding chunks shift them from diagonals to columns (Longformer)"
    if op_name(user) == "mul" and any(op_name(u) == "sum" for u in user.users):
        said += ": a sum of a few results by their weights (Reformer's rounds of hashes) is no product that is read"
    return said


def carriers(anchor: fx.Node) -> list[list[fx.Node]] | None:
    """From the softmax to each product that reads it: the nodes on the way and the product; None: others read too."""
    paths: list[list[fx.Node]] = []
    stack: list[list[fx.Node]] = [[anchor]]
    while stack:
        path = stack.pop()
        for user in sorted((u for u in path[-1].users if not _is_dead(u)), reverse=True):
            if product(user) is not None and list(user.all_input_nodes).count(path[-1]) == 1:
                paths.append([*path[1:], user])
            elif user.op == "call_function" and _carries(user, path[-1]):
                stack.append([*path, user])
            else:
                return None
    return sorted(paths, key=lambda path: path[-1])


def pull(node: fx.Node, index: Index, anchor: fx.Node, ranges: Ranges) -> tuple[Index, list[Zeroing]] | NoMatch:
    """Index into the softmax of the weight at `index` of `node`, and the masks on the way."""
    masks: list[Zeroing] = []
    while node is not anchor:
        view = through(node, index, ranges)
        zeroed = _zeroed(node)
        if view is not None:
            node, index = view
        elif op_name(node) in (*_CASTS, *_DROPOUTS) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        elif zeroed is not None:
            masks.append(Zeroing(node, zeroed[1], node.args[2], zeroed[2], index))
            node = zeroed[0]
        else:
            return NoMatch(f"{op_name(node)} stands between the weights and the values", node)
    return index, masks


def _is_dead(node: fx.Node) -> bool:
    return not node.users and node.op != "output" and not node.is_impure()


def _carries(user: fx.Node, node: fx.Node) -> bool:
    """Whether `user` hands the weights on: a view, a cast, dropout, zeros where a mask says so."""
    zeroed = _zeroed(user)
    if zeroed is not None:
        return zeroed[0] is node and zeroed[1] is not node
    if not user.args or user.args[0] is not node:
        return False
    index = tuple(var(f"z{d}") for d in range(value.dim())) if (value := tensor_of(user)) is not None else ()
    return op_name(user) in (*_CASTS, *_DROPOUTS) or through(user, index, Ranges()) is not None


def _meets_values(user: fx.Node, node: fx.Node) -> bool:
    """Whether the weights, read by `user`, end in a product."""
    if product(user) is not None:
        return True
    return user.op == "call_function" and _carries(user, node) and any(_meets_values(u, user) for u in user.users)


def _zeroed(node: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
    """(weights, mask, whether the mask names what is kept) where `node` replaces weights by a boolean mask."""
    name, args = op_name(node), node.args
    if name not in ("masked_fill", "where") or len(args) != 3:
        return None
    weights, mask = (args[0], args[1]) if name == "masked_fill" else (args[1], args[0])
    value, result, written = tensor_of(mask), tensor_of(node), tensor_of(weights)
    if value is None or result is None or written is None or value.dtype != torch.bool:
        return None
    return (weights, mask, name == "where") if result.shape == written.shape else None


def _orient(final: Product, weights: fx.Node) -> Product | None:
    if final.left is weights and final.right is weights:
        return None
    oriented = final if final.left is weights else final.swapped()
    return None if oriented.addend is not None or oriented.alpha != 1 else oriented

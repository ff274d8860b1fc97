"""Where every element of a tensor comes from: views, copies and products of a subgraph, run on the numbers of elements.

Code cut into overlapping chunks shifts, pads, copies and gathers; what an element of the result is follows from none of
these alone, but can be counted. Each source's elements are numbered, the numbers take the way that the values would
take, and what arrives says exactly, for this size, which elements of which source lie where.

A number below zero is a constant of the graph, one from `Codes.total` on a pair of rows that were multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from attnc.passes.graph import GraphFacts, Unliftable, op_name, tensor_of
from attnc.passes.products import Product, product
from attnc.passes.views import is_view

LARGEST = 1 << 28  # elements of a tensor of numbers: 2 GiB
VALUES = 16  # different constants in one tensor
_MADE = {"zeros": 0.0, "new_zeros": 0.0, "zeros_like": 0.0, "ones": 1.0, "new_ones": 1.0, "ones_like": 1.0}
_FULL = {"full": 1, "full_like": 1, "new_full": 2}
_PICKS = ("index", "index_select", "gather", "cat", "stack", "copy_", "pad", "constant_pad_nd", "as_strided", "unfold",
          "diagonal", "roll", "lift_fresh", "split", "split_with_sizes", "chunk", "unbind", "movedim")  # fmt: skip
_SAME = ("dropout", "dropout_", "detach", "alias", "positive", "lift_fresh_copy")


def moves(node: fx.Node) -> bool:
    """Whether `node` only says where elements go."""
    name = op_name(node)
    if name in ("dropout", "dropout_"):
        return not (len(node.args) > 2 and node.args[2] and node.args[1])
    if name in ("where", "masked_fill"):
        return is_constant(node.args[name == "masked_fill"])
    if name == "embedding":
        return is_constant(node.args[1])
    return is_view(node) or name in _PICKS


def is_padded(node: fx.Node) -> bool:
    """Whether `node` is a tensor with zeros behind its end along one axis."""
    if op_name(node) not in ("pad", "constant_pad_nd"):
        return False
    sizes, mode = node.args[1], node.args[2:3] == ("constant",) or op_name(node) != "pad" or len(node.args) < 3
    fill = node.args[3:] if op_name(node) == "pad" else node.args[2:]
    ends = [x for x in sizes[1::2] if x != 0]
    return mode and fill in ((), (0,), (None,)) and len(ends) == 1 and not any(sizes[::2])


def is_constant(node: Any, known: dict[fx.Node, bool] | None = None) -> bool:
    """Whether the value of `node` is the same in every run."""
    known = {} if known is None else known
    if not isinstance(node, fx.Node):
        return True
    if node not in known:
        known[node] = _is_constant(node, known)
    return known[node]


def _is_constant(node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    if node.op == "get_attr":
        value = _attribute(node)
        return isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)
    if node.op != "call_function":
        return False
    if op_name(node) in _MADE or op_name(node) in _FULL:
        return all(not isinstance(x, fx.Node) or x is node.args[0] for x in pytree.arg_tree_leaves(*node.args))
    if not hasattr(node.target, "_schema"):
        return op_name(node) == "getitem" and is_constant(node.args[0], known)
    if node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    return all(is_constant(x, known) for x in node.all_input_nodes)


def _attribute(node: fx.Node) -> Any:
    return attrgetter(str(node.target))(node.graph.owning_module)


class Codes:
    """The numbers of one node's elements as they are when the node at position `until` reads them.

    sources: the nodes that elements come from, each with the number of its first element. padded: whether what is
    padded at the end of one axis, to whole chunks, is such a node.
    """

    def __init__(self, facts: GraphFacts, node: fx.Node, until: int, *, padded: bool = False) -> None:
        self.facts, self.until, self.padded = facts, until, padded
        self.sources: dict[fx.Node, int] = {}
        self.constants: list[float] = []
        self.total = 0
        self.nodes = self._behind(node)
        self._values: dict[fx.Node, Any] = {}
        for one in self.nodes:
            self._values[one] = self._value(one)
        self.codes = self._coded(self._values[node], node)
        self._values.clear()

    def source_of(self, code: int) -> fx.Node:
        return next(node for node, start in reversed(self.sources.items()) if start <= code)

    def constant(self, code: int) -> float:
        return self.constants[-1 - code]

    def _behind(self, node: fx.Node) -> list[fx.Node]:
        """What `node` is made of in order, its sources noted."""
        order, seen, stack = self.facts.order, {node}, [node]
        while stack:
            one = stack.pop()
            before: list[fx.Node] = []
            if is_constant(one) and not self.facts.writes.get(self.facts.root(one)):
                before = [] if op_name(one) in (*_MADE, *_FULL) else one.all_input_nodes
            elif self.padded and is_padded(one):
                self._number(one)
            elif op_name(one) in (*_MADE, *_FULL) or moves(one) or product(one) is not None:
                if op_name(one).startswith("detach") and self.facts.needs_grad(one.args[0]):
                    raise Unliftable("a gradient is cut on the way", one)
                before = [] if op_name(one) in (*_MADE, *_FULL) else one.all_input_nodes
                before = [*before, *(x for x in self.facts.writers(one) if order[x] < self.until)]
            elif tensor_of(one) is not None:
                self._number(one)
            fresh = [x for x in before if x not in seen]
            seen.update(fresh)
            stack += fresh
        return sorted(seen, key=order.__getitem__)

    def _number(self, node: fx.Node) -> None:
        value = tensor_of(node)
        assert value is not None
        if not all(isinstance(n, int) for n in value.shape):
            raise Unliftable("its sizes are known at run time only, and chunks are counted", node)
        if any(self.facts.order[node] < at for at in self.facts.writes.get(self.facts.root(node), ())):
            raise Unliftable("what chunks are cut from is changed in place", node)
        self.sources[node] = self.total
        self.total += value.numel()

    def _value(self, node: fx.Node) -> Any:
        """Numbers (int64), a constant tensor of another type or a pair ("constant", tensor)."""
        value, name = node.meta.get("val"), op_name(node)
        if isinstance(value, torch.Tensor) and value.numel() > LARGEST:
            raise Unliftable(f"{value.numel():.1e} elements are too many to be counted", node)
        if node in self.sources:
            assert isinstance(value, torch.Tensor)
            start = self.sources[node]
            held = torch.empty_strided(value.shape, value.stride(), dtype=torch.int64)
            return held.copy_(torch.arange(start, start + value.numel()).view(value.shape))
        if name in _MADE or name in _FULL:
            assert isinstance(value, torch.Tensor)
            number = _MADE[name] if name in _MADE else float(node.args[_FULL[name]])
            if self.facts.writes.get(self.facts.root(node)):
                return torch.full(value.shape, self.code(number), dtype=torch.int64)
            return _Constant(torch.full(value.shape, number, dtype=value.dtype))
        if node.op == "get_attr":
            return _Constant(_attribute(node).detach().cpu())
        given = node.all_input_nodes
        if all(isinstance(self._values[x], _Constant) or tensor_of(x) is None for x in given) and is_constant(node):
            return self._constant(node)
        return self._moved(node)

    def _constant(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda x: _plain(self._values[x]))
        kwargs = dict(kwargs) | ({"device": torch.device("cpu")} if "device" in kwargs else {})
        args = pytree.tree_map(lambda x: torch.device("cpu") if isinstance(x, torch.device) else x, args)
        made = node.target(*args, **kwargs)
        return pytree.tree_map(lambda x: _Constant(x) if isinstance(x, torch.Tensor) else x, made)

    def _moved(self, node: fx.Node) -> Any:
        name, value = op_name(node), node.meta.get("val")
        pair = product(node)
        if pair is not None:
            return self._pairs(pair)
        if isinstance(value, torch.Tensor) and isinstance(node.args[0], fx.Node):
            given = tensor_of(node.args[0])
            if given is not None and name not in ("where", "index_select") and given.dtype != value.dtype:
                raise Unliftable("numbers change their type on the way", node)
        if name in _SAME:
            return self._values[node.args[0]]
        if name in ("pad", "constant_pad_nd"):
            return self._padded(node)
        args = list(node.args)
        if name in ("where", "masked_fill"):
            mask, kept, lost = args if name == "where" else (args[1], args[2], args[0])
            return torch.where(_plain(self._values[mask]), *(self._argument(x, node) for x in (kept, lost)))
        if name in ("index", "index_select", "gather"):
            picked = fx.node.map_arg(tuple(args[1:]), lambda x: _plain(self._values[x]))
            return node.target(self._argument(args[0], node), *picked)
        if name == "embedding":
            return self._argument(args[0], node)[_plain(self._values[args[1]])]
        plain = fx.node.map_arg(tuple(args), lambda x: self._argument(x, node))
        return node.target(*plain, **node.kwargs)

    def _argument(self, x: Any, node: fx.Node) -> Any:
        if not isinstance(x, fx.Node):
            return torch.tensor(self.code(float(x))) if op_name(node) in ("where", "masked_fill") else x
        value = self._values[x]
        return value if isinstance(value, list | tuple) else self._coded(value, x)

    def _padded(self, node: fx.Node) -> torch.Tensor:
        mode, fill = (*node.args[2:], "constant", None)[:2] if op_name(node) == "pad" else ("constant", node.args[2:])
        if mode != "constant":
            raise Unliftable("padding that is not constant", node)
        fill = (fill[0] if fill else 0) if isinstance(fill, tuple) else fill
        held = self._coded(self._values[node.args[0]], node)
        return torch.constant_pad_nd(held, node.args[1], self.code(float(fill or 0)))

    def _coded(self, value: Any, node: fx.Node) -> torch.Tensor:
        """`value` as numbers: those of its constants where it is one."""
        if not isinstance(value, _Constant):
            return value
        plain = value.tensor.double()
        found, place = torch.unique(plain, return_inverse=True)
        if len(found) > VALUES:
            raise Unliftable("a table of constants takes part as numbers", node)
        return torch.tensor([self.code(float(x)) for x in found])[place]

    def code(self, number: float) -> int:
        """The number that stands for a constant."""
        if number not in self.constants:
            self.constants.append(number)
        return -1 - self.constants.index(number)

    def _pairs(self, p: Product) -> torch.Tensor:
        """Numbers of a product: of both rows, or of one where the other is a single one."""
        sides: list[torch.Tensor | None] = []
        for node, labels in ((p.left, p.left_labels), (p.right, p.right_labels)):
            value = self._values[node]
            if isinstance(value, _Constant):
                if value.tensor.shape[labels.index(p.contracted)] != 1 or not bool((value.tensor == 1).all()):
                    raise Unliftable("a product with a constant that is not one", p.node)
                sides.append(None)
                continue
            rest = [x for x in labels if x != p.contracted]
            sides.append(aligned(rows(value, labels.index(p.contracted), node), rest, p.out_labels))
        if p.addend is not None or p.alpha != 1:
            raise Unliftable("a product that is scaled or added to", p.node)
        shape = tensor_of(p.node).shape  # type: ignore[union-attr]
        left, right = sides
        if left is None or right is None:
            alone = left if right is None else right
            if alone is None:
                raise Unliftable("a product of two constants", p.node)
            return alone.expand(shape).clone()
        zero = self.code(0.0)
        for side in (left, right):
            lost = side[side < 0]
            if len(lost) and not bool((lost == zero).all()):
                raise Unliftable("a product with a constant that is not zero", p.node)
        pair = (left + 1) * self.total + right
        return torch.where((left < 0) | (right < 0), zero, pair).expand(shape).clone()


class _Constant:
    """A tensor that is the same in every run, by its values."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _plain(value: Any) -> Any:
    if isinstance(value, _Constant):
        return value.tensor
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, torch.Tensor):
        raise Unliftable("places that are found at run time", value)
    return value


def rows(codes: torch.Tensor, dim: int, node: fx.Node) -> torch.Tensor:
    """Numbers of the first elements along `dim`, whose elements must follow one another, or be one constant."""
    first = codes.select(dim, 0)
    step = (first >= 0).long().unsqueeze(dim)
    shape = [1] * codes.dim()
    shape[dim] = codes.shape[dim]
    if not torch.equal(codes, first.unsqueeze(dim) + step * torch.arange(codes.shape[dim]).view(shape)):
        raise Unliftable("the channels of a product's operand do not follow one another", node)
    return first


def aligned(t: torch.Tensor, labels: Sequence[str], out: Sequence[str]) -> torch.Tensor:
    """`t` with axes `labels` as one that broadcasts over axes `out`."""
    present = [x for x in out if x in labels]
    t = t.permute([labels.index(x) for x in present])
    for at, x in enumerate(out):
        if x not in labels:
            t = t.unsqueeze(at)
    return t

"""A graph to put in the place of a written one: nodes with metadata, and factors as tensors with the axes asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from attnc.passes.graph import Unliftable, tensor_of
from attnc.passes.recurrence.terms import Factor

aten = torch.ops.aten


class Draft:
    """A replacement in the making: its graph, whose placeholders stand for nodes of the graph that is read (leaves)."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.leaves: dict[fx.Node, fx.Node] = {}
        self._mark: fx.Node | None = None

    def leaf(self, node: fx.Node) -> fx.Node:
        """The placeholder that stands for `node`."""
        if node not in self.leaves:
            first = next(iter(self.graph.nodes), None)
            with self.graph.inserting_before(first):
                self.leaves[node] = self.graph.placeholder(node.name)
            self.leaves[node].meta["val"] = node.meta.get("val")
        return self.leaves[node]

    def origin(self, placeholder: fx.Node) -> fx.Node | None:
        """The node that a placeholder stands for."""
        return next((node for node, mine in self.leaves.items() if mine is placeholder), None)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node with its value on fake tensors."""
        node = self.graph.call_function(target, args, kwargs)
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*values[0], **values[1])
        return node

    def size(self, node: fx.Node, dim: int) -> Any:
        """The size of an axis: a number, or the node of one that is known at run time."""
        extent = tensor_of(node).shape[dim]  # type: ignore[union-attr]
        if isinstance(extent, int):
            return extent
        return self.call(aten.sym_size.int, node, dim)

    def permuted(self, node: fx.Node, order: Sequence[int]) -> fx.Node:
        order = list(order)
        return node if order == list(range(len(order))) else self.call(aten.permute.default, node, order)

    def expanded(self, node: fx.Node, sizes: Sequence[Any]) -> fx.Node:
        """`node` with its axes of one element repeated to `sizes`."""
        value = tensor_of(node)
        assert value is not None
        wanted = [-1 if have != 1 or want == 1 else want for have, want in zip(value.shape, sizes, strict=True)]
        if all(w == -1 for w in wanted):
            return node
        return self.call(aten.expand.default, node, wanted)

    def flattened(self, node: fx.Node, start: int, count: int) -> fx.Node:
        """Axes start .. start + count - 1 as one; with count 0 a new axis of one element."""
        if count == 0:
            return self.call(aten.unsqueeze.default, node, start)
        if count == 1:
            return node
        return self.call(aten.flatten.using_ints, node, start, start + count - 1)

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        value = tensor_of(node)
        return node if value is None or value.dtype == dtype else self.call(aten.to.dtype, node, dtype)

    # Factors.

    def placed(self, factor: Factor, order: Sequence[str]) -> fx.Node:
        """A factor as a tensor whose axes are `order`; axes that it does not depend on have one element."""
        node, kept, dim = factor.node, [], 0
        for at in factor.index:
            if at.is_const:
                node = self.call(aten.select.int, node, dim, int(at.value))
                continue
            if at.op == "floordiv" and at.args[0].op == "var" and at.args[1].is_const:
                node = self.call(aten.repeat_interleave.self_int, node, int(at.args[1].value), dim)
                at = at.args[0]
            if at.op != "var" or at.args[0] not in order or at.args[0] in kept:
                raise Unliftable("an operand is indexed in a way that no view gives", factor.node)
            kept.append(at.args[0])
            dim += 1
        known = [x for x in order if x in kept]
        node = self.permuted(node, [kept.index(x) for x in known])
        for position, label in enumerate(order):
            if label not in kept:
                node = self.call(aten.unsqueeze.default, node, position)
        return node

    def product(self, factors: Sequence[Factor], order: Sequence[str]) -> fx.Node | None:
        """The product of factors with the axes `order`; None where there is none."""
        result: fx.Node | None = None
        for factor in sorted(factors, key=lambda f: f.power, reverse=True):
            node = self.placed(factor, order)
            if factor.power == -1:
                result = (
                    self.call(aten.reciprocal.default, node)
                    if result is None
                    else self.call(aten.div.Tensor, result, node)
                )
                continue
            result = node if result is None else self.call(aten.mul.Tensor, result, node)
        return result


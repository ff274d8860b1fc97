"""Layers that repeat are lifted once: a region whose subgraph equals one already lifted takes over its match.

Two subgraphs are compared node by node, backwards from their outputs to the operands: same operators, constants,
shapes, strides, dtypes, gradients and readers. Equal subgraphs compute the same function of corresponding leaves, so
everything the lift proved of one holds for the other; the comparison is exact, and costs about a hundredth of a lift.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from attnc.passes.attention.extent import inside, is_computed, leaves_of
from attnc.passes.attention.lift import Match
from attnc.passes.graph import GraphFacts, integer


class Repeats:
    """The matches of one graph so far, to be found again."""

    def __init__(self, facts: GraphFacts) -> None:
        self.facts = facts
        self._known: list[tuple[Match, frozenset[fx.Node], frozenset[fx.Node]]] = []

    def add(self, match: Match) -> None:
        """Remember a match that was lifted from scratch."""
        leaves = leaves_of(match)
        nodes = inside(match, leaves)
        if not match.readers and not any(self.facts.root(n) in self.facts.writes for n in nodes):
            self._known.append((match, frozenset(leaves), frozenset(nodes)))

    def find(self, anchor: fx.Node) -> Match | None:
        """The match around `anchor`, if its subgraph equals that of a known one."""
        for match, leaves, nodes in reversed(self._known):
            out = _same_way_down(match.anchor, match.out, anchor)
            if out is None:
                continue
            image = _Comparison(self.facts, leaves, nodes).run(match.out, out)
            if image is not None and image.get(match.anchor) is anchor:
                return _moved(match, image)
        return None


def _same_way_down(known: fx.Node, end: fx.Node, node: fx.Node) -> fx.Node | None:
    """Where the only path of readers from `node` ends that is as long as the one from `known` to `end`."""
    while known is not end:
        if known.target != node.target or len(known.users) != 1 or len(node.users) != 1:
            return None
        known, node = next(iter(known.users)), next(iter(node.users))
    return node


class _Comparison:
    """Whether two subgraphs are equal, and which node stands for which."""

    def __init__(self, facts: GraphFacts, leaves: frozenset[fx.Node], nodes: frozenset[fx.Node]) -> None:
        self.facts, self.leaves, self.nodes = facts, leaves, nodes
        self.image: dict[fx.Node, fx.Node] = {}

    def run(self, known: fx.Node, node: fx.Node) -> Mapping[fx.Node, fx.Node] | None:
        stack = [(known, node)]
        while stack:
            a, b = stack.pop()
            if a in self.image:
                if self.image[a] is not b:
                    return None
                continue
            self.image[a] = b
            if a is b and a not in self.leaves:  # a mask that all layers share
                if not self._share(a):
                    return None
                continue
            if not self._alike(a, b):
                return None
            if a not in self.leaves and a in self.nodes and is_computed(a):
                pairs = _pairs((a.args, a.kwargs), (b.args, b.kwargs))
                if a.op != b.op or a.target != b.target or pairs is None:
                    return None
                stack.extend(pairs)
        return self.image if len(set(self.image.values())) == len(self.image) else None

    def _share(self, top: fx.Node) -> bool:
        """Take everything behind a shared node as its own image."""
        stack = [top]
        while stack:
            node = stack.pop()
            if self.image.setdefault(node, node) is not node:
                return False
            if node in self.nodes and node not in self.leaves:
                stack += [x for x in node.all_input_nodes if x not in self.image]
        return True

    def _alike(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether two nodes hold the same kind of value and inner ones have as many readers."""
        facts = self.facts
        if facts.root(b) in facts.writes or facts.needs_grad(a) != facts.needs_grad(b):
            return False
        if a not in self.leaves and len(a.users) != len(b.users):
            return False
        return _value(a) == _value(b)


def _value(node: fx.Node) -> Any:
    """What a lift may ask of a node's value; the node itself where it may ask what cannot be compared."""
    value = node.meta.get("val", node.meta.get("example_value"))
    if isinstance(value, torch.SymInt | int):
        return integer(value)
    if isinstance(value, list | tuple):
        return [_tensor(x) for x in value]
    return _tensor(value) if isinstance(value, torch.Tensor) else node


def _tensor(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    layout = (tuple(map(integer, value.shape)), tuple(map(integer, value.stride())))
    return *layout, value.dtype, value.device, id(getattr(value, "constant", None))


def _pairs(a: Any, b: Any) -> list[tuple[fx.Node, fx.Node]] | None:
    """Corresponding nodes of two argument structures whose other leaves are equal; None where they differ."""
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        return [(a, b)]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        found: list[tuple[fx.Node, fx.Node]] = []
        for x, y in zip(a, b, strict=True):
            pairs = _pairs(x, y)
            if pairs is None:
                return None
            found += pairs
        return found
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return _pairs(list(a.values()), list(b.values())) if list(a) == list(b) else None
    return [] if type(a) is type(b) and a == b else None


def _moved(match: Match, image: Mapping[fx.Node, fx.Node]) -> Match:
    """`match` with each node replaced by its image."""
    return replace(
        match,
        anchor=image[match.anchor],
        out=image[match.out],
        query=match.query.moved(image),
        key=match.key.moved(image),
        value=match.value.moved(image),
        captured=[image[node] for node in match.captured],
        within=tuple(image[node] for node in match.within),
        products=None,
        summed=(),
    )

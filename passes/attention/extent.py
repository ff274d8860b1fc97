"""How far a region reaches: its leaves, the nodes inside, and whether a gradient is cut on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from attnc.passes.attention.lift import Match
from attnc.passes.graph import GraphFacts, NoMatch, tensor_of


def leaves_of(match: Match) -> list[fx.Node]:
    """The nodes at which the region begins: operands and captured tensors."""
    held = match.within or (*match.key.sources, *match.value.sources)
    nodes = [*match.query.sources, *held, *match.captured]
    return list(dict.fromkeys(nodes))


def inside(match: Match, leaves: Sequence[fx.Node]) -> list[fx.Node]:
    """The region's nodes in order, from what lies behind the leaves to its output."""
    needed: set[fx.Node] = set()
    stack = [match.out]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            if node not in leaves and is_computed(node):
                stack.extend(node.all_input_nodes)
    return [n for n in match.out.graph.nodes if n in needed]


def is_computed(node: fx.Node) -> bool:
    """Whether `node` holds tensors; a number is taken as it is, whatever made it."""
    return isinstance(node.meta.get("val"), torch.Tensor | list | tuple)


def cut_gradient(facts: GraphFacts, match: Match) -> NoMatch | None:
    """The node inside the region at which a gradient stops (detach, no_grad), if any; a rewrite would not stop it."""
    leaves = leaves_of(match)
    for node in inside(match, leaves):
        if node in leaves or facts.needs_grad(node):
            continue
        value = tensor_of(node)
        if value is not None and value.is_floating_point() and any(map(facts.needs_grad, node.all_input_nodes)):
            return NoMatch("a gradient is cut inside the region", node)
    return None

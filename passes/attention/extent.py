"""How far a region reaches: its leaves, the nodes inside, and whether a gradient is cut on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from attnc.passes.attention.lift import Match
from attnc.passes.elementwise import RULES
from attnc.passes.graph import GraphFacts, NoMatch, op_name, tensor_of
from attnc.passes.views import is_view


def leaves_of(match: Match) -> list[fx.Node]:
    """The nodes at which the region begins: operands, captured tensors, and what ranks the keys of captured lists."""
    operands = _operands(match)
    return list(dict.fromkeys([*operands, *(x for node in match.captured for x in _ranking(node, operands))]))


def _operands(match: Match) -> list[fx.Node]:
    held = match.within or (*match.key.sources, *match.value.sources)
    return [*match.query.sources, *held]


def _ranking(node: fx.Node, operands: Sequence[fx.Node]) -> list[fx.Node]:
    """What the scores are made of whose `topk` is the captured `node`; `node` itself where it is no such list.

    Masks of the scores are on this side, so that a list of random scores names the keys that the model's lists name.
    """
    if (value := tensor_of(node)) is None or value.is_floating_point():
        return [node]
    begins, seen, stack, is_ranked = [], {node}, [node], False
    while stack:
        one = stack.pop()
        is_ranked = is_ranked or op_name(one) == "topk"
        passed = op_name(one) in RULES or op_name(one) in ("topk", "getitem") or is_view(one)
        if one in operands or (is_computed(one) and not passed):
            begins.append(one)
            continue
        fresh = [x for x in one.all_input_nodes if x not in seen]
        seen.update(fresh)
        stack += fresh
    return begins if is_ranked else [node]


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
    leaves = [*_operands(match), *match.captured]
    for node in inside(match, leaves):
        if node in leaves or facts.needs_grad(node):
            continue
        value = tensor_of(node)
        if value is not None and value.is_floating_point() and any(map(facts.needs_grad, node.all_input_nodes)):
            return NoMatch("a gradient is cut inside the region", node)
    return None

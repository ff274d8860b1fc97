"""What a step does, as terms: the next states and what is read of states.

Read once, at the last of equal steps, or in the body of an operator that holds the step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from attnc.expr import ONE, Expr, var
from attnc.passes.graph import Unliftable, op_name, shape_of, tensor_of
from attnc.passes.recurrence.roles import Update, update_of
from attnc.passes.recurrence.terms import Factor, Term, Terms, contraction
from attnc.passes.views import Ranges, through

# What a step computes from its tokens alone and terms look into, so that the same key is the same however it is cut.
PRODUCTS = ("mul", "neg", "to", "_to_copy", "float")


@dataclass
class Steps:
    """The steps of a loop, whether Dynamo unrolled them or an operator holds their body.

    blocks: nodes of each step, equal in form; of a body there is one block. states: place of the next state in a
    block -> the node that holds the state before the step, in the last block. first: place -> the state given at the
    start, None for zero; a node of the graph that the draft is read from. outer: nodes that the last block reads from
    outside -> those of each step. count: of the steps, a number or a node of the draft.
    """

    blocks: list[list[fx.Node]]
    states: dict[int, fx.Node]
    first: dict[int, fx.Node | None]
    outer: dict[fx.Node, list[fx.Node]]
    count: Any
    uncut: Callable[[fx.Node], bool] = lambda node: False


class Reading:
    """What the last step does, as terms."""

    def __init__(self, steps: Steps) -> None:
        self.steps, self.block = steps, steps.blocks[-1]
        self.entries = set(steps.states.values())
        self.next = {self.block[p] for p in steps.states}
        reached = set(self.entries)
        for node in self.block:
            if any(x in reached for x in node.all_input_nodes):
                reached.add(node)
        self.dependent = reached - self.entries
        self.carrying = self._behind(self.next) & self.dependent
        self.same = self._equal_nodes()
        own = [(k, n) for k, n in enumerate(self.block) if n not in self.dependent]
        self.inside = self.dependent | {n for k, n in own if self._looked_into(n, k)}

    def _behind(self, nodes: set[fx.Node]) -> set[fx.Node]:
        members = set(self.block)
        seen, stack = set(nodes), list(nodes)
        while stack:
            for x in stack.pop().all_input_nodes:
                if x in members and x not in seen:
                    seen.add(x)
                    stack.append(x)
        return seen

    def _equal_nodes(self) -> dict[fx.Node, fx.Node]:
        """Each node of the block -> the first one that computes the same."""
        known: dict[Hashable, fx.Node] = {}
        same: dict[fx.Node, fx.Node] = {}
        for node in self.block:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: same.get(n, n))
            key = (node.target, _frozen(args), _frozen(kwargs))
            same[node] = known.setdefault(key, node)
        return same

    def _is_outer_product(self, node: fx.Node) -> bool:
        """Whether a product of matrices sums over nothing."""
        found = contraction(node)
        if found is None:
            return False
        operands, labels, out = found
        sizes = [(x, s) for operand, mine in zip(operands, labels, strict=True)
                 for x, s in zip(mine, shape_of(operand), strict=True)]  # fmt: skip
        return all(x in out or s == ONE for x, s in sizes)

    def _looked_into(self, node: fx.Node, at: int) -> bool:
        value = tensor_of(node)
        if value is None or not value.is_floating_point():
            return False
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if op_name(node) in PRODUCTS:
            return True
        if self._is_outer_product(node):
            return True
        if any(_plain_arguments(block[at]) != _plain_arguments(node) for block in self.steps.blocks):
            return False
        view = through(node, tuple(var(f"z{d}") for d in range(value.dim())), Ranges())
        return view is not None and source in self.same and source is view[0]

    def terms(self, node: fx.Node, states: Sequence[fx.Node], prefix: str) -> tuple[tuple[Expr, ...], list[Term]]:
        """New indices for the axes of `node`, named with `prefix`, and its terms at them; `states` are factors."""
        inside = self.inside | {node}
        terms = Terms(inside, states, self.steps.uncut)
        index = terms.indices(node, prefix)
        if node in states:
            return index, [Term(1.0, (Factor(node, index),))]
        found = terms.of(node, index)
        return index, [self._unified(t) for t in found]

    def _unified(self, term: Term) -> Term:
        factors = tuple(Factor(self.same.get(f.node, f.node), f.index, f.power) for f in term.factors)
        return Term(term.coef, factors, term.summed)

    def updates(self) -> dict[int, Update]:
        found = {}
        for place, own in self.steps.states.items():
            node = self.block[place]
            value, before = tensor_of(node), tensor_of(own)
            if value is None or before is None or not value.is_floating_point() or value.shape != before.shape:
                raise Unliftable("what is carried is no state: it changes its shape, or is no floating tensor", node)
            index, terms = self.terms(node, list(self.entries), f"s{place}_")
            found[place] = update_of(node, index, terms, list(self.entries), own)
        return found


def _plain_arguments(node: fx.Node) -> Hashable:
    """The arguments of a node that are no nodes."""
    return _frozen(fx.node.map_arg((node.args, node.kwargs), lambda n: None))


def _frozen(tree: Any) -> Hashable:
    if isinstance(tree, list | tuple):
        return tuple(map(_frozen, tree))
    if isinstance(tree, dict):
        return tuple((k, _frozen(v)) for k, v in tree.items())
    return tree if isinstance(tree, Hashable) else repr(tree)

"""What takes the place of a written recurrence: a graph over leaves, and the nodes that its results replace."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch
from torch import fx

from attnc.op_recurrence import RECURRENCE
from attnc.passes.graph import GraphFacts, NoMatch, op_name
from attnc.passes.recurrence.emit import Draft
from attnc.rule_recurrence import RecurrenceRule, RecurrenceShape

AT = 8  # place of the spelling among the operator's arguments
REPLACED = "attnc_replaced_by"


@dataclass
class Again:
    """How to find the same region at a smaller size.

    lengths: numbers of tokens, which become small ones. fixed: other sizes, which none of them may equal.
    elements: of the square of tokens. find: the rewriting in another graph.
    """

    lengths: set[int]
    fixed: set[int]
    elements: int
    find: Callable[[GraphFacts], Rewriting | NoMatch]


@dataclass
class Rewriting:
    """A replacement for `outs`, nodes of a graph, as a graph over `leaves`, nodes of the same graph.

    steps: how many, 0 where it is no loop. sample: the same for the first steps alone, for the check of a long loop.
    again: how to find the region at a smaller size, for the check of a long product. inside: the nodes from the leaves
    to the outs in order, where they write in place.
    """

    leaves: list[fx.Node]
    outs: list[fx.Node]
    graph: fx.Graph
    rule: RecurrenceRule
    shape: RecurrenceShape
    steps: int = 0
    sample: Rewriting | None = None
    again: Again | None = None
    inside: list[fx.Node] = field(default_factory=list)
    form: str = ""

    def spell(self, form: str) -> None:
        """Run the operators that the rule is of by `form`; others, as of a normaliser, run by what suits them."""
        self.form = form
        for node in self.graph.nodes:
            if node.target is RECURRENCE and node.args[AT] == self.rule.spell():
                node.args = (*node.args[:AT], f"{form} | {self.rule.spell()}", *node.args[AT + 1 :])
        if self.sample is not None:
            self.sample.spell(form)

    def written(self) -> list[fx.Node]:
        """The nodes from the leaves to the outs, as written, in order, with whatever else they start from."""
        if self.inside:
            return self.inside
        seen: set[fx.Node] = set()
        stack = list(self.outs)
        while stack:
            node = stack.pop()
            if node in seen or node in self.leaves:
                continue
            seen.add(node)
            stack.extend(node.all_input_nodes)
        return [node for node in self.outs[0].graph.nodes if node in seen]

    def apply(self) -> None:
        """Put the replacement in the graph; the old nodes die with their last reader."""
        graph = self.outs[0].graph
        order = {node: k for k, node in enumerate(graph.nodes)}
        leaves = [_now(leaf) for leaf in self.leaves]
        env: dict[fx.Node, Any] = dict(zip(self.graph.find_nodes(op="placeholder"), leaves, strict=True))
        point = max(leaves, key=order.__getitem__).next
        while point.op == "placeholder":
            point = point.next
        kept = {k: v for k, v in self.outs[0].meta.items() if k in ("stack_trace", "nn_module_stack")}
        results: Sequence[fx.Node] = ()
        with graph.inserting_before(point):
            for node in self.graph.nodes:
                if node.op == "placeholder":
                    continue
                if node.op == "output":
                    results = [env[x] for x in node.args[0]]
                    continue
                env[node] = graph.node_copy(node, env.__getitem__)
                env[node].meta = {**node.meta, **kept}
        for out, new in zip(self.outs, results, strict=True):
            out.replace_all_uses_with(new)
            out.meta[REPLACED] = new
        for node in reversed(self.inside):  # what it writes in place is not dead by itself
            if not node.users and node.op == "call_function":
                graph.erase_node(node)

    def signature(self) -> str:
        """What is written and what takes its place, as text without names: what a verdict about them depends on."""
        text = []
        for nodes, given in ((self.written(), self.leaves), (self.graph.nodes, ())):
            at = {node: f"%{k}" for k, node in enumerate([*given, *nodes])}
            text += [f"{node.target} {_spelled(node.args, at)} {_spelled(node.kwargs, at)}" for node in nodes
                     if node.op != "placeholder"]  # fmt: skip
        text += [f"{x.meta['val'].dtype}{list(x.meta['val'].shape)}" for x in self.leaves]
        return sha256("\n".join(text).encode()).hexdigest()


def _spelled(tree: Any, at: dict[fx.Node, str]) -> str:
    return repr(fx.node.map_arg(tree, lambda n: at.get(n, n.name)))


def _now(node: fx.Node) -> fx.Node:
    """`node`, or what has taken its place."""
    while REPLACED in node.meta:
        node = node.meta[REPLACED]
    return node


def finished(
    draft: Draft,
    results: Sequence[tuple[fx.Node, fx.Node]],
    rule: RecurrenceRule,
    shape: RecurrenceShape,
    steps: int = 0,
) -> Rewriting:
    """A draft with (written node, its replacement) pairs as a rewriting; leaves that nothing reads are dropped."""
    draft.graph.output(tuple(new for _, new in results))
    draft.graph.eliminate_dead_code()
    for mine in draft.leaves.values():
        if not mine.users:
            draft.graph.erase_node(mine)
    by_place = {mine: node for node, mine in draft.leaves.items()}
    leaves = [by_place[mine] for mine in draft.graph.find_nodes(op="placeholder")]
    outs = [out for out, _ in results]
    return Rewriting(leaves, outs, draft.graph, rule, shape, steps)


def kept(inside: Collection[fx.Node], outs: Collection[fx.Node]) -> NoMatch | None:
    """Why a replacement of `outs` is work on top: what it is to spare, `inside`, has other readers."""
    for node in inside:
        for user in node.users if node not in outs else ():
            if user not in inside and not isinstance(user.meta.get("val"), int | torch.SymInt):
                what = f"{node.name} is read elsewhere too"
                return NoMatch(f"{what}, so that it stays and an operator is work on top", node)
    return None


def misplaced(facts: GraphFacts, found: Rewriting) -> NoMatch | None:
    """Why the replacement cannot stand where all its leaves are known and none of its results is read yet."""
    order = {node: k for k, node in enumerate(facts.graph.nodes)}
    last = max((order[leaf] for leaf in found.leaves), default=-1)
    written = [node for node in found.written() if node.op == "call_function"]
    own = set(written)
    ends = [order[written[0]], *(order[out] for out in found.outs), last]
    for node in facts.graph.nodes:
        if op_name(node) == "_set_grad_enabled" and min(ends) < order[node] < max(ends):
            return NoMatch("gradients are turned on or off inside of it", node)
    for out in found.outs:
        for user in out.users:
            if user not in own and order[user] < last:
                return NoMatch("its results are read before all that it reads is known", user)
    behind, stack = set(found.outs), list(found.outs)
    while stack:
        fresh = [user for user in stack.pop().users if user not in behind]
        behind.update(fresh)
        stack.extend(fresh)
    for leaf in found.leaves:
        if leaf in behind:
            return NoMatch("what it reads is computed from its own results", leaf)
        if any(order[leaf] < order[w] for w in facts.writers(leaf)):
            return NoMatch("a tensor that it reads is modified in place", leaf)
    return None

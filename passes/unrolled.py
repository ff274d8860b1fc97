"""Attentions over chunks of keys beside which the same stands over all pairs: proposed, checked, taken or dropped.

What is written over all pairs is only read by the lift and by the form that is chosen; where none is, it is dead code
and goes, and the chunks stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import fx

from attnc.passes.attention.chunks import Unrolled, in_chunks
from attnc.passes.attention.lift import Match, anchors, lift
from attnc.passes.attention.within import finished
from attnc.passes.check import Change, Trial, Verdict
from attnc.passes.graph import GraphFacts
from attnc.passes.rewrite import rewrite


def checked(found: Unrolled, spelling: str, trial: Trial) -> Verdict:
    """Run the chunks and the form in their place on the same random inputs, at their own size."""
    facts = GraphFacts(found.out.graph)
    make = partial(_again, spelling=spelling)
    change = Change(f"chunks as {spelling}", found.out, found.operands, (), (), 0.0, make)
    return trial(facts, change)


def _again(graph: fx.Graph, out: fx.Node, spelling: str) -> bool:
    """Put the form in place of the attention over chunks that ends in `out`; whether there is one."""
    for anchor in anchors(graph):
        found = in_chunks(GraphFacts(graph), anchor)
        if isinstance(found, Unrolled) and found.out is out:
            facts = GraphFacts(graph)
            match = lift(facts, found.again)
            if isinstance(match, Match):
                rewrite(facts, finished(facts, match), spelling)
                take(found)
                return True
    return False


def take(found: Unrolled) -> None:
    """Let what stands beside the chunks take their place."""
    graph = found.out.graph
    facts = GraphFacts(graph)
    found.out.replace_all_uses_with(found.result)
    kept = _needed(facts, found.nodes)
    for node in reversed(list(graph.nodes)):
        if node in found.nodes and node not in kept:
            graph.erase_node(node)


def _needed(facts: GraphFacts, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Those of `nodes` that something else still reads, with all they are made of."""
    inside = set(nodes)
    stack = [node for node in inside if any(user not in inside for user in node.users)]
    kept = set(stack)
    while stack:
        fresh = [x for x in facts.sources(stack.pop()) if x in inside and x not in kept]
        kept.update(fresh)
        stack += fresh
    return kept

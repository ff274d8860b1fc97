"""What the lifts of all kinds hand to the pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from attnc.passes.attention.chunks import Unrolled
from attnc.passes.graph import GraphFacts, NoMatch, module_path
from attnc.region import Region, Unmatched


@dataclass
class Found:
    """A region, what it computes, and its match and graph where it can be rewritten.

    nodes: everything the region computes, to its output; lifts of other kinds do not look into them.
    chunks: what is written over chunks of keys where the match stands beside it.
    """

    region: Region
    match: Any = None
    facts: GraphFacts | None = None
    nodes: frozenset[fx.Node] = frozenset()
    chunks: Unrolled | None = None


def missed(anchor: fx.Node, why: NoMatch) -> Unmatched:
    """The entry of the report for an anchor that led to no region."""
    return Unmatched(anchor.name, why.reason, why.node.name, module_path(anchor))

"""Lengths at which a choice would change: Dynamo compiles anew there, and at no other length.

A choice for a symbolic length is that for the length of the example. One guard on the length holds it on its side of
the length from which the other choice is predicted to be faster, so that a cache that grows past it has one compile
more.
"""

from __future__ import annotations

import torch
from torch._guards import TracingContext

from attnc.operands import hint
from attnc.passes.attention.lift import Match
from attnc.passes.graph import tensor_of
from attnc.passes.pipeline import Analysis


def guard_choices(analysis: Analysis) -> None:
    """Guard the lengths of regions whose choice is one of predicted times; without a compile under way none."""
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None or context.fake_mode.shape_env is None:
        return
    for found in analysis.found:
        choice = found.region.choice
        if choice is None or choice.pays_from is None or not isinstance(found.match, Match):
            continue
        length = _length(found.match)
        if isinstance(length, torch.SymInt) and length.node.shape_env is context.fake_mode.shape_env:
            bool(length < choice.pays_from)  # said to the environment of shapes, which guards what it was asked


def _length(match: Match) -> int | torch.SymInt:
    """The number of keys, or of queries where there are more."""
    found: list[int | torch.SymInt] = []
    for operand in (match.key, match.query):
        value, kinds = tensor_of(operand.source), [kind for kind, _ in operand.roles]
        if value is not None and "n" in kinds:
            found.append(value.shape[kinds.index("n")])
    return max(found, key=hint, default=1)

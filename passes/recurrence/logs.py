"""Decays as logarithms: what the written factor is the exponential of.

    exp(x) -> x        sigmoid(x) -> logsigmoid(x)        1 - sigmoid(x) -> logsigmoid(-x)        a * b -> both
    gamma ** x -> x * log(gamma) for a number gamma       a number -> its logarithm

A factor of which nothing is known may be negative, and has no logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from attnc.passes.graph import GraphFacts, op_name, shape_of, tensor_of
from attnc.passes.recurrence.emit import Draft
from attnc.passes.recurrence.terms import Factor, Term
from attnc.passes.views import Index, Ranges, broadcast_index, through

aten = torch.ops.aten
Sum = list[tuple[float, Factor | None]]  # coefficient and factor; a constant where there is none
DEEPEST = 24


def logarithm(draft: Draft, terms: Sequence[Term], facts: GraphFacts | None) -> Sum | None:
    """The logarithm of a sum of products, as a sum; None where it is not known to be positive.

    facts: of the graph that the draft is read from; its nodes behind the leaves are looked at too.
    """
    if len(terms) == 2:
        return _complement(draft, terms, facts)
    (term,) = terms
    if term.coef <= 0 or term.summed:
        return None
    found: Sum = [(math.log(term.coef), None)] if term.coef != 1.0 else []
    for factor in term.factors:
        part = _of(draft, factor.node, factor.index, facts, 0)
        if part is None:
            return None
        found += [(coef * factor.power, f) for coef, f in part]
    return found


def _complement(draft: Draft, terms: Sequence[Term], facts: GraphFacts | None) -> Sum | None:
    """1 - sigmoid(x)."""
    one, other = sorted(terms, key=lambda t: len(t.factors))
    if one.factors or one.coef != 1.0 or other.coef != -1.0 or len(other.factors) != 1 or other.factors[0].power != 1:
        return None
    return _of_complement(draft, other.factors[0].node, other.factors[0].index, facts)


def _source(draft: Draft, node: fx.Node, index: Index) -> tuple[fx.Node, Index, fx.Node, bool]:
    """The node under views, its index, the node to read operator and arguments from, and whether that is outside."""
    while True:
        outside = draft.origin(node) if node.op == "placeholder" else None
        real = outside if outside is not None else node
        view = through(real, index, Ranges())
        if view is None or op_name(real).startswith("detach"):
            return node, index, real, outside is not None
        node, index = (draft.leaf(view[0]) if outside is not None else view[0]), view[1]


def _of(draft: Draft, node: fx.Node, index: Index, facts: GraphFacts | None, depth: int) -> Sum | None:
    node, index, real, outside = _source(draft, node, index)

    def argument(position: int) -> tuple[fx.Node, Index]:
        x = real.args[position]
        assert isinstance(x, fx.Node)
        at = broadcast_index(index, shape_of(x), shape_of(real))
        return (draft.leaf(x) if outside else x), at

    if depth > DEEPEST or (outside and facts is not None and any(map(facts.writers, (real, *real.all_input_nodes)))):
        return None
    name = op_name(real)
    if name == "exp":
        return [(1.0, Factor(*argument(0)))]
    if name == "sigmoid":
        x, at = argument(0)
        return [(1.0, Factor(draft.call(aten.log_sigmoid.default, x), at))]
    if name in ("mul", "div") and len(real.args) == 2 and not real.kwargs:
        parts = [
            _of(draft, *argument(k), facts, depth + 1) if isinstance(x, fx.Node) else _number(x)
            for k, x in enumerate(real.args)
        ]
        if None in parts:
            return None
        sign = -1.0 if name == "div" else 1.0
        return [*parts[0], *((sign * c, f) for c, f in parts[1])]  # type: ignore[misc, union-attr]
    if name == "pow" and isinstance(real.args[0], int | float) and real.args[0] > 0:
        return [(math.log(real.args[0]), Factor(*argument(1)))]
    if name in ("rsub", "sub"):
        one, x = (real.args[0], 1) if name == "sub" else (real.args[1], 0)
        if one == 1 and isinstance(real.args[x], fx.Node) and real.kwargs.get("alpha", 1) == 1:
            return _of_complement(draft, *argument(x), facts)
    if name in ("to", "_to_copy", "float") and _widens(real):
        return _of(draft, *argument(0), facts, depth + 1)
    return None


def _of_complement(draft: Draft, node: fx.Node, index: Index, facts: GraphFacts | None) -> Sum | None:
    node, index, real, outside = _source(draft, node, index)
    if op_name(real) != "sigmoid":
        return None
    x = draft.leaf(real.args[0]) if outside else real.args[0]
    return [(1.0, Factor(draft.call(aten.log_sigmoid.default, draft.call(aten.neg.default, x)), index))]


def _number(value: object) -> Sum | None:
    return [(math.log(value), None)] if isinstance(value, int | float) and value > 0 else None


def _widens(node: fx.Node) -> bool:
    to, source = tensor_of(node), tensor_of(node.args[0])
    return to is not None and source is not None and torch.promote_types(to.dtype, source.dtype) == to.dtype

"""Linear attention in its parallel form: a causal product of queries and keys, weighted by a decay, times the values.

    o_i = sum_{j <= i} D_ij (q_i . k_j) v_j

No softmax stands between the two products. The element (i, j) of the weights is lifted as for attention; what is left
of it at q . k = 1 is the decay `D`, which must vanish for j > i.

Source: Sun et al. 2023, "Retentive Network", arXiv:2307.08621, equation 5; Dao and Gu 2024, "Transformers are SSMs",
arXiv:2405.21060, section 6.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import fx

from attnc.expr import ONE, SCORE, ZERO, Expr, I, J, const, var
from attnc.passes.graph import GraphFacts, Unliftable, op_name, shape_of, tensor_of
from attnc.passes.masks import Lift
from attnc.passes.products import Product, product
from attnc.passes.views import Index, Ranges, through
from attnc.predicate import rebuild

# What may stand between the product of queries and keys and the one with the values, beside views.
WEIGHTING = (
    "mul", "div", "where", "masked_fill", "masked_fill_", "tril", "triu", "to", "_to_copy", "type_as", "float", "neg",
    "add", "sub", "mul_",
)
NEAREST = 24


@dataclass(frozen=True)
class Parallel:
    """A decay-weighted product. decay: "none", "constant" (of the distance) or "head" (of run-time data)."""

    first: Product
    last: Product
    decay: str


def parallels(facts: GraphFacts, taken: Collection[fx.Node]) -> Iterator[Parallel]:
    """The decay-weighted causal products of a graph."""
    for node in facts.graph.nodes:
        if node in taken:
            continue
        final = product(node)
        if final is None:
            continue
        for oriented in (final, final.swapped()):
            found = _parallel(facts, oriented) if _behind(oriented.left, taken) is not None else None
            if found is not None:
                yield found
                break


def _behind(node: fx.Node, taken: Collection[fx.Node]) -> fx.Node | None:
    """The product of two computed tensors that the weights `node` come from, if one is near."""
    stack, seen = [node], {node}
    while stack and len(seen) < NEAREST:
        at = stack.pop()
        if at in taken:
            return None
        if at is not node and product(at) is not None:
            return at
        index = tuple(var(f"z{d}") for d in range(len(shape_of(at)))) if tensor_of(at) is not None else ()
        if at is node or op_name(at) in WEIGHTING or through(at, index, Ranges()) is not None:
            if at is node and op_name(at) not in WEIGHTING and through(at, index, Ranges()) is None:
                return at if product(at) is not None else None
            fresh = [x for x in at.all_input_nodes if x not in seen and tensor_of(x) is not None]
            seen.update(fresh)
            stack.extend(fresh)
    return None


def _parallel(facts: GraphFacts, final: Product) -> Parallel | None:
    names = tuple(var(f"y{d}") for d in range(len(final.out_labels)))
    row = names[final.out_labels.index(final.row)]
    found: list[Product] = []

    def leaf(node: fx.Node, index: Index) -> Expr | None:
        candidate = product(node)
        if candidate is None or (found and found[0].node is not node):
            return None
        at = dict(zip(candidate.out_labels, index, strict=True))
        if {at[candidate.row], at[candidate.col]} != {row, J}:
            return None
        found.append(candidate if at[candidate.col] == J else candidate.swapped())
        return SCORE

    lift = Lift(facts, final.node, leaf)
    for name, extent in zip(names, shape_of(final.node), strict=True):
        lift.ranges.declare(name.args[0], extent)
    lift.ranges.declare("j", shape_of(final.left)[final.left_labels.index(final.contracted)])
    try:
        value = lift.element(final.left, final.index("left", names, J))
    except Unliftable:
        return None
    if not found or "s" not in value.names():
        return None
    weight = rebuild(value, lambda x: const(1.0) if x == SCORE else I if x == row else None)
    rest = rebuild(value, lambda x: const(0.0) if x == SCORE else None)
    future = rebuild(weight, lambda x: ZERO if x == I else ONE if x == J else None)
    if not (rest.is_const and rest.value == 0 and future.is_const and future.value == 0):
        return None
    return Parallel(found[0], final, _decay(weight))


def _decay(weight: Expr) -> str:
    """What the weight depends on: run-time data of the two positions, their distance alone, or nothing."""
    loads = [x for x in weight.walk() if x.op == "load"]
    if any(x.names() & {"i", "j"} for x in loads):
        return "head"
    return "constant" if loads or weight.has("exp") or weight.has("pow") else "none"

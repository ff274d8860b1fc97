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
    "add", "sub", "mul_", "sum",
)
NEAREST = 24


def any_product(node: fx.Node) -> Product | None:
    """`node` as a product of two matrices per batch, also where it is written as a sum of broadcast factors."""
    return product(node) or _summed(node)


def _summed(node: fx.Node) -> Product | None:
    """`(a[..., :, None, :] * b[..., None, :, :]).sum(-1)`: the axes that only one factor has are row and column."""
    if op_name(node) != "sum" or len(node.args) < 2 or op_name(node.args[0]) != "mul":
        return None
    pair = node.args[0].args
    shapes = [shape_of(x) if tensor_of(x) is not None else () for x in pair]
    whole, dims = shape_of(node.args[0]), node.args[1]
    dims = [dims] if isinstance(dims, int) else list(dims)
    if len(dims) != 1 or len(shapes) != 2 or any(len(s) != len(whole) for s in shapes) or _keeps(node):
        return None
    inner = dims[0] % len(whole)
    rows, cols = (
        [d for d, extent in enumerate(whole) if mine[d] == extent != ONE == other[d]]
        for mine, other in (shapes, shapes[::-1])
    )
    if whole[inner] == ONE or inner in (*rows, *cols) or len(rows) != 1 or len(cols) != 1:
        return None
    names = {inner: "in", rows[0]: "row", cols[0]: "col"}
    labels = tuple(names.get(d, f"n{d}") for d in range(len(whole)))
    out = tuple(x for x in labels if x != "in")
    return Product(node, pair[0], pair[1], out, labels, labels, "in", "row", "col")


def _keeps(node: fx.Node) -> bool:
    return bool(node.kwargs.get("keepdim") or (len(node.args) > 2 and node.args[2]))


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
        final = any_product(node)
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
        if at is not node and any_product(at) is not None:
            return at
        index = tuple(var(f"z{d}") for d in range(len(shape_of(at)))) if tensor_of(at) is not None else ()
        if at is node or op_name(at) in WEIGHTING or through(at, index, Ranges()) is not None:
            if at is node and op_name(at) not in WEIGHTING and through(at, index, Ranges()) is None:
                return at if any_product(at) is not None else None
            fresh = [x for x in at.all_input_nodes if x not in seen and tensor_of(x) is not None]
            seen.update(fresh)
            stack.extend(fresh)
    return None


def _parallel(facts: GraphFacts, final: Product) -> Parallel | None:
    names = tuple(var(f"y{d}") for d in range(len(final.out_labels)))
    row = names[final.out_labels.index(final.row)]
    found: list[Product] = []

    def leaf(node: fx.Node, index: Index) -> Expr | None:
        candidate = any_product(node)
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

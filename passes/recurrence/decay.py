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
from itertools import permutations

from torch import fx

from attnc.expr import ONE, SCORE, Expr, I, J, const, mul, var
from attnc.passes.graph import GraphFacts, NoMatch, Unliftable, op_name, shape_of, tensor_of
from attnc.passes.products import Product, product
from attnc.passes.recurrence.terms import contraction
from attnc.passes.recurrence.weighted import Weighted
from attnc.passes.recurrence.weights import of_future, of_past, of_token_itself
from attnc.passes.views import Index, Ranges, through
from attnc.predicate import rebuild

# What may stand between the product of queries and keys and the one with the values, beside views.
WEIGHTING = (
    "mul", "div", "where", "masked_fill", "masked_fill_", "tril", "triu", "to", "_to_copy", "type_as", "float", "neg",
    "add", "sub", "mul_", "sum", "div_",
)
# Functions that may stand there and make of it no linear attention.
BENDS = ("square", "pow", "relu", "gelu", "silu", "sigmoid", "tanh", "abs", "softplus", "elu", "relu_", "clamp", "sqrt")
CAUSAL = ("tril", "masked_fill", "masked_fill_", "where", "mul", "mul_")
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
class Pair:
    """Where an operand is found: element `index` of a node, the row i and the column j among its indices."""

    node: fx.Node
    index: Index


@dataclass(frozen=True)
class Parallel:
    """A decay-weighted product. decay: "none", "constant" (of the distance) or "head" (of run-time data).

    node: the result; row, col: its axes over tokens and values, the latter None for a sum of the weights.
    query, key, value: the operands at (i, c), (j, c) and (j, col); value None where the weights are summed.
    weight: of a pair with score s, an expression over i, j and the other indices of the result.
    names: the indices of the result, i in the place of `row`.
    """

    node: fx.Node
    query: Pair
    key: Pair
    value: Pair | None
    row: int
    col: int | None
    weight: Expr
    decay: str
    names: Index
    lift: Weighted

    def shares(self, other: Parallel) -> bool:
        """Whether the two have their queries and keys in common, as a product and its normaliser do."""
        return self.query.node is other.query.node and self.key.node is other.key.node


@dataclass(frozen=True)
class _End:
    """What may be the last product of such a form: sums over j of the weights and the value.

    score: query and key, where the product has them itself.
    """

    node: fx.Node
    weights: tuple[Pair, ...]
    value: Pair | None
    row: int | None
    col: int | None
    names: Index
    score: tuple[Pair, Pair] | None = None


def parallels(facts: GraphFacts, taken: Collection[fx.Node]) -> Iterator[Parallel]:
    """The decay-weighted causal products of a graph."""
    for node in facts.graph.nodes:
        if node in taken:
            continue
        for end in _ends(node):
            near = end.score is not None or any(_behind(w.node, taken) is not None for w in end.weights)
            found = _parallel(facts, end) if near else None
            if found is not None:
                yield found
                break


def _ends(node: fx.Node) -> Iterator[_End]:
    value = tensor_of(node)
    if value is None or not value.is_floating_point():
        return
    names = tuple(var(f"y{d}") for d in range(value.dim()))
    final = any_product(node)
    if final is not None and final.addend is None and final.alpha == 1.0:
        for p in (final, final.swapped()):
            left, right = (Pair(n, p.index(side, names, J)) for n, side in ((p.left, "left"), (p.right, "right")))
            yield _End(node, (left,), right, p.out_labels.index(p.row), p.out_labels.index(p.col), names)
    elif op_name(node) == "einsum" and len(node.args[1]) > 2:
        yield from _of_many(node, names)
    elif op_name(node) == "sum" and len(node.args) > 1 and isinstance(node.args[0], fx.Node):
        dims = [node.args[1]] if isinstance(node.args[1], int) else list(node.args[1])
        rank = len(shape_of(node.args[0]))
        if len(dims) == 1:
            dim = int(dims[0]) % rank
            index = list(names) if _keeps(node) else [*names[:dim], J, *names[dim:]]
            index[dim] = J
            yield _End(node, (Pair(node.args[0], tuple(index)),), None, None, None, names)


def _of_many(node: fx.Node, names: Index) -> Iterator[_End]:
    """An einsum of queries, keys, values and decays at once."""
    found = contraction(node)
    if found is None:
        return
    operands, labels, out = found
    summed = sorted({x for t in labels for x in t} - set(out))
    at = dict(zip(out, names, strict=True))
    for inner, col in permutations(summed, 2) if len(summed) == 2 else ():
        here = at | {inner: var("c"), col: J}
        pairs = [Pair(x, tuple(here[y] for y in t)) for x, t in zip(operands, labels, strict=True)]
        two = [k for k, t in enumerate(labels) if inner in t]
        if len(two) != 2:
            continue
        q, k = two if col in labels[two[1]] else two[::-1]
        own = [y for t in labels for y in t if y in out and sum(y in u for u in labels) == 1]
        v = [n for n, t in enumerate(labels) if n not in two and col in t and any(y in own for y in t)]
        rows = [y for y in labels[q] if y in out and y not in labels[k]]
        if col in labels[q] or len(v) != 1 or len(rows) != 1 or rows[0] in labels[v[0]]:
            continue
        (column,) = [y for y in labels[v[0]] if y in own][:1]
        rest = tuple(p for n, p in enumerate(pairs) if n not in (q, k, v[0]))
        yield _End(
            node, rest, pairs[v[0]], out.index(rows[0]), out.index(column), names, (pairs[q], pairs[k])
        )


def _parallel(facts: GraphFacts, end: _End) -> Parallel | None:
    found: list[tuple[fx.Node, Pair, Pair, Expr]] = []
    if end.score is not None:
        assert end.row is not None
        found.append((end.node, *end.score, end.names[end.row]))

    def leaf(node: fx.Node, index: Index) -> Expr | None:
        candidate = any_product(node)
        if candidate is None or (found and found[0][0] is not node):
            return None
        at = dict(zip(candidate.out_labels, index, strict=True))
        here = (at[candidate.row], at[candidate.col])
        if J not in here or here[0] == here[1] or candidate.addend is not None or candidate.alpha != 1.0:
            return None
        row = here[here[0] == J]
        if row not in end.names or (end.row is not None and row != end.names[end.row]):
            return None
        c = candidate if here[1] == J else candidate.swapped()
        query, key = (Pair(n, c.index(side, index, var("c"))) for n, side in ((c.left, "left"), (c.right, "right")))
        found.append((node, query, key, row))
        return SCORE

    lift = Weighted(facts, end.node, leaf)
    for name, extent in zip(end.names, shape_of(end.node), strict=True):
        lift.ranges.declare(name.args[0], extent)
    source = end.weights[0]
    lift.ranges.declare("j", shape_of(source.node)[source.index.index(J)])
    try:
        value = SCORE if end.score is not None else None
        for part in end.weights:
            element = lift.element(part.node, part.index)
            value = element if value is None else mul(value, element)
    except Unliftable:
        return None
    if not found or value is None or "s" not in value.names():
        return None
    _, query, key, row = found[0]
    value = rebuild(value, lambda x: I if x == row else None)
    box = lift.ranges.box
    none = rebuild(value, lambda x: const(0.0) if x == SCORE else None)
    future, itself = of_future(value, box), of_token_itself(value, box)
    if not all(x.is_const and x.value == 0 for x in (none, future)) or (itself.is_const and itself.value == 0):
        return None
    weight = of_past(value, box)
    names = tuple(I if x == row else x for x in end.names)
    query = Pair(query.node, tuple(I if x == row else x for x in query.index))
    return Parallel(
        end.node, query, key, end.value, end.names.index(row), end.col, weight, _decay(weight), names, lift
    )


def _behind(node: fx.Node, taken: Collection[fx.Node]) -> fx.Node | None:
    """The product of two computed tensors that the weights `node` come from, if one is near."""
    stack, seen = [node], {node}
    while stack and len(seen) < NEAREST:
        at = stack.pop()
        if at in taken:
            return None
        if at is not node and any_product(at) is not None:
            return at
        index = _anywhere(at)
        if at is node or op_name(at) in WEIGHTING or through(at, index, Ranges()) is not None:
            if at is node and op_name(at) not in WEIGHTING and through(at, index, Ranges()) is None:
                return at if any_product(at) is not None else None
            fresh = [x for x in at.all_input_nodes if x not in seen and tensor_of(x) is not None]
            seen.update(fresh)
            stack.extend(fresh)
    return None


def bent(facts: GraphFacts, taken: Collection[fx.Node]) -> Iterator[NoMatch]:
    """Causal products whose weights are another function of queries times keys than a multiple: no state holds them."""
    for node in facts.graph.nodes:
        if node in taken:
            continue
        weights = [w.node for end in _ends(node) if end.value is not None for w in end.weights]
        found = next((why for w in weights if (why := _bend(w, taken)) is not None), None)
        if found is not None:
            yield found


def _bend(node: fx.Node, taken: Collection[fx.Node]) -> NoMatch | None:
    """The function between a product of queries and keys and the weights `node`, where those are causal."""
    stack: list[tuple[fx.Node, fx.Node | None, bool]] = [(node, None, False)]
    seen = {node}
    while stack and len(seen) < NEAREST:
        at, bend, causal = stack.pop()
        if at in taken:
            return None
        if any_product(at) is not None:
            if bend is None or not causal:
                continue
            what = f"{op_name(bend)} stands between the product of queries and keys and the one with the values"
            return NoMatch(f"{what}, so that no state of keys times values holds the sum", bend)
        own = op_name(at) in BENDS
        if not own and op_name(at) not in WEIGHTING and through(at, _anywhere(at), Ranges()) is None:
            continue
        causal = causal or op_name(at) in CAUSAL
        for x in at.all_input_nodes:
            value = tensor_of(x)
            if x not in seen and value is not None and value.dim() >= 2:
                seen.add(x)
                stack.append((x, at if own else bend, causal))
    return None


def _anywhere(node: fx.Node) -> Index:
    return tuple(var(f"z{d}") for d in range(len(shape_of(node)))) if tensor_of(node) is not None else ()


def _decay(weight: Expr) -> str:
    """What the weight depends on: run-time data of the two positions, their distance alone, or nothing."""
    loads = [x for x in weight.walk() if x.op == "load"]
    if any(x.names() & {"i", "j"} for x in loads):
        return "head"
    return "constant" if loads or weight.has("exp") or weight.has("pow") else "none"

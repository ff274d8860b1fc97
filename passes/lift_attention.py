"""Find softmax attention and lift it: from a softmax (or an SDPA call) to operands and an `AttentionRule`.

The anchor is a softmax. Its weights are followed to the product with the values; from an element of that product the
weights, the scores and the product of queries and keys are pulled back, index by index. What is found is therefore
what is computed: a softmax over another axis, a key that is not transposed or a mask behind the softmax do not fit.

Source: Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, section 3.2.1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from attnc.expr import FLOAT, SCORE, TRUE, ZERO, B, Expr, H, I, J, add, const, mul, scale, sub, var
from attnc.passes.graph import GraphFacts, NoMatch, Unliftable, op_name, shape_of, tensor_of
from attnc.passes.masks import Lift
from attnc.passes.operands import Operand, Roles, batch_roles, trace_operand
from attnc.passes.products import Product, product
from attnc.passes.rules import MaskedScore, split_mask
from attnc.passes.views import Index, Ranges, broadcast_index, through
from attnc.predicate import conjunction, le, rebuild, truth

ANCHORS = ("softmax", "_softmax", "_safe_softmax", "scaled_dot_product_attention")
_CASTS = ("to", "_to_copy", "type_as", "float", "half", "bfloat16", "double")


@dataclass
class Match:
    """One attention in the graph: operands, what is read at run time, and the node that the region's output replaces."""

    anchor: fx.Node
    out: fx.Node
    query: Operand
    key: Operand
    value: Operand
    masked: MaskedScore
    captured: list[fx.Node]
    batch: Expr
    q_heads: int
    lengths: tuple[Expr, Expr]
    widths: tuple[int, int]
    layout: tuple[str, ...]
    sink: Expr | None = None
    dropout: float = 0.0
    written: str = "composed"
    repeats_heads: bool = False
    inner: list[fx.Node] = field(default_factory=list)


def anchors(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if op_name(node) in ANCHORS]


def lift(facts: GraphFacts, anchor: fx.Node) -> Match | NoMatch:
    """The attention around `anchor`, or the reason and node for which there is none."""
    try:
        if op_name(anchor) == "scaled_dot_product_attention":
            return _lift_sdpa(facts, anchor)
        return _lift_softmax(facts, anchor)
    except Unliftable as exc:
        return exc.no_match


# --------------------------------------------------------------------------------------------------------------------
# Composed spellings
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class _Weights:
    """The weights on their way from the softmax to the product with the values."""

    product: Product
    dropout: float
    between: list[fx.Node]


def _lift_softmax(facts: GraphFacts, anchor: fx.Node) -> Match | NoMatch:
    weights = _follow(anchor)
    if isinstance(weights, NoMatch):
        return weights
    final = weights.product
    names = tuple(var(f"y{d}") for d in range(len(final.out_labels)))
    ranges = Ranges()
    for name, extent in zip(names, shape_of(final.node), strict=True):
        ranges.declare(name.args[0], extent)
    inner = final.index("left", names, J)
    axis = final.left_labels.index(final.contracted)
    length = shape_of(final.left)[axis]
    ranges.declare("j", length)
    at = _pull_weights(final.left, inner, anchor, ranges)
    if isinstance(at, NoMatch):
        return at
    dim = int(anchor.args[1]) % len(at)
    if "j" not in at[dim].names() or any("j" in x.names() for d, x in enumerate(at) if d != dim):
        return NoMatch("the softmax does not run over the axis that is contracted with the values", anchor)
    return _lift_scores(facts, anchor, weights, names, at, dim, ranges)


def _lift_scores(facts, anchor, weights, names, at, dim, ranges) -> Match | NoMatch:
    final = weights.product
    found: list[tuple[Product, Index]] = []

    def leaf(node: fx.Node, index: Index) -> Expr | None:
        return _product_leaf(facts, node, index, found, pulling, final.node)

    pulling = Lift(facts, final.node, leaf)
    pulling.ranges = ranges
    scores = anchor.args[0]
    assert isinstance(scores, fx.Node)
    value = pulling.element(scores, at)
    if not found:
        return NoMatch("the scores come from no product of queries and keys", scores)
    score_product, index = found[0]
    row = dict(zip(score_product.out_labels, index, strict=True))[score_product.row]
    if row == ZERO:  # a single query: its row has no coordinate of its own
        row = names[final.out_labels.index(final.row)]
    if row.op != "var" or row not in names:
        return NoMatch("the rows of the scores are not the rows of the output", score_product.node)
    sink = _sink(pulling, scores, at, dim, shape_of(final.left)[final.left_labels.index(final.contracted)])
    if isinstance(sink, NoMatch):
        return sink
    col_axis = final.out_labels.index(final.col)
    batch = [(n, e) for n, e in zip(names, shape_of(final.node), strict=True) if n not in (row, names[col_axis])]
    return _assemble(facts, anchor, weights, pulling, value, sink, found[0], row, names[col_axis], batch)


def _product_leaf(facts, node, index, found, pulling: Lift, end) -> Expr | None:
    """The raw product `s`, where `node` is a product whose columns are the softmax axis."""
    candidate = product(node)
    if candidate is None or any(not facts.unchanged(x, node, end) for x in node.all_input_nodes):
        return None
    at = dict(zip(candidate.out_labels, index, strict=True))
    if J not in (at[candidate.row], at[candidate.col]):
        return None
    if at[candidate.row] == J:
        candidate = candidate.swapped()
    others = [e for label, e in at.items() if label != candidate.col]
    if any("j" in e.names() for e in others):
        return None
    if found and (found[0][0].node is not node or found[0][1] != index):
        return None
    if not found:
        found.append((candidate, index))
    score = SCORE if candidate.alpha == 1 else scale(SCORE, candidate.alpha)
    if candidate.addend is None:
        return score
    added = pulling.element(candidate.addend, broadcast_index(index, shape_of(candidate.addend), shape_of(node)))
    return add(score, scale(added, candidate.beta))


def _assemble(facts, anchor, weights, pulling, value, sink, found, row, col, batch) -> Match | NoMatch:
    """Name the coordinates b, h, i, j and trace the operands."""
    final, (score_product, index), ranges = weights.product, found, pulling.ranges
    outer = tuple(var(f"y{d}") for d in range(len(final.out_labels)))
    q_index = score_product.index("left", index, var("e"))
    k_index = score_product.index("right", index, var("e"))
    pairs = [(n.args[0], e) for n, e in batch]
    split = batch_roles(pairs, [(score_product.left, q_index), (score_product.right, k_index)], ranges)
    if split is None:
        return NoMatch("more than one batch axis has a symbolic length", final.node)
    substitution, batch_size, q_heads = split
    substitution[row.args[0]] = I
    extents = dict(zip(final.out_labels, shape_of(final.node), strict=True))
    row_label = dict(zip((n.args[0] for n in outer), final.out_labels, strict=True))[row.args[0]]
    length_q = extents[row_label]
    names = Ranges()
    width = shape_of(score_product.left)[score_product.left_labels.index(score_product.contracted)]
    width_v = extents[final.col]
    length_k = shape_of(final.left)[final.left_labels.index(final.contracted)]
    if not width.is_const or not width_v.is_const:
        return NoMatch("a head width is symbolic", score_product.node)
    for name, extent in (("b", batch_size), ("h", const(q_heads)), ("i", length_q), ("j", length_k), ("e", width)):
        names.declare(name, extent)

    def rename(e: Expr) -> Expr:
        return rebuild(e, lambda x: substitution.get(x.args[0]) if x.op == "var" else None)

    operands = []
    sides = (
        (score_product.left, q_index, I),
        (score_product.right, k_index, J),
        (final.right, final.index("right", outer, J), J),
    )
    substitution_v = substitution | {col.args[0]: var("e")}
    for node, at, position in sides:
        renamed = tuple(
            rebuild(x, lambda y: substitution_v.get(y.args[0]) if y.op == "var" else None) for x in at
        )
        extents_of = (batch_size, length_q if position == I else length_k, width if len(operands) < 2 else width_v)
        roles = Roles(position, var("e"), q_heads, extents_of)
        operand = trace_operand(facts, node, renamed, roles, names, final.node)
        if isinstance(operand, NoMatch):
            return operand
        operands.append(operand)
    query, key, value_operand = operands
    score = rename(value)
    factor = query.factor * key.factor
    if factor != 1.0:
        score = rebuild(score, lambda x: scale(SCORE, factor) if x == SCORE else None)
    if value_operand.factor != 1.0:
        return NoMatch("the values are scaled inside the region", value_operand.source)
    masked = split_mask(score, names, (length_q, length_k), written="composed")
    if isinstance(masked, str):
        return NoMatch(masked, anchor)
    layout = tuple("e" if label == final.col else "i" if label == row_label else label for label in final.out_labels)
    return Match(
        anchor, final.node, query, key, value_operand, masked, pulling.captured, batch_size, q_heads,
        (length_q, length_k), (int(width.value), int(width_v.value)), layout,
        sink=None if sink is None else sub(rename(sink), masked.shift), dropout=weights.dropout,
        repeats_heads=_heads_of(score_product.right) > key.heads(q_heads), inner=[*weights.between, score_product.node],
    )


def _heads_of(node: fx.Node) -> int:
    """All extents of `node` before its matrix axes, batch included."""
    count = 1
    for extent in shape_of(node)[:-2]:
        count *= int(extent.value) if extent.is_const else 1
    return count


def _sink(pulling: Lift, scores: fx.Node, at: Index, dim: int, kept: Expr) -> Expr | NoMatch | None:
    """The extra logit, where the softmax has one column more than the weights that reach the values."""
    total = shape_of(scores)[dim]
    if total == kept:
        return None if at[dim] == J else NoMatch("the softmax axis is permuted before the values", scores)
    if add(total, scale(kept, -1)) != const(1):
        return NoMatch("the softmax has columns that never reach the values", scores)
    offset = add(at[dim], scale(J, -1))
    if not offset.is_const or offset.value not in (0, 1):
        return NoMatch("the softmax axis is permuted before the values", scores)
    extra = kept if offset.value == 0 else ZERO
    sink = pulling.element(scores, at[:dim] + (extra,) + at[dim + 1 :])
    if "s" in sink.names() or "j" in sink.names() or sink.kind != FLOAT:
        return NoMatch("the extra column of the softmax depends on the keys", scores)
    return sink


def _follow(anchor: fx.Node) -> _Weights | NoMatch:
    """Walk from the softmax to the product with the values; nothing else may read the weights."""
    node, dropout, between = anchor, 0.0, [anchor]
    while True:
        users = [u for u in node.users if not _is_dead(u)]
        if len(users) != 1:
            names = ", ".join(sorted(u.name for u in users)) or "nothing"
            return NoMatch(f"the weights are read by {len(users)} nodes ({names}), one product is allowed", node)
        (user,) = users
        final = product(user)
        if final is not None:
            oriented = _orient(final, node)
            if oriented is None:
                return NoMatch("the weights meet the values in a product of another shape", user)
            return _Weights(oriented, dropout, between)
        if user.op == "output":
            return NoMatch("the weights are an output of the graph", node)
        if op_name(user) in ("dropout", "dropout_", "native_dropout") and len(user.args) > 2 and user.args[2]:
            dropout = float(user.args[1])
        elif through(user, _any_index(user), Ranges()) is None and op_name(user) not in _CASTS:
            return NoMatch(f"{op_name(user) or user.op} changes the weights before they meet the values", user)
        node = user
        between.append(node)


def _is_dead(node: fx.Node) -> bool:
    return not node.users and node.op != "output" and not node.is_impure()


def _any_index(node: fx.Node) -> Index:
    value = tensor_of(node)
    return tuple(var(f"z{d}") for d in range(value.dim())) if value is not None else ()


def _orient(final: Product, weights: fx.Node) -> Product | None:
    if final.left is weights and final.right is weights:
        return None
    oriented = final if final.left is weights else final.swapped()
    return None if oriented.addend is not None or oriented.alpha != 1 else oriented


def _pull_weights(node: fx.Node, index: Index, anchor: fx.Node, ranges: Ranges) -> Index | NoMatch:
    """Index into the softmax of the weight at `index` of `node`."""
    while node is not anchor:
        view = through(node, index, ranges)
        if view is not None:
            node, index = view
        elif op_name(node) in (*_CASTS, "dropout", "dropout_") and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        else:
            return NoMatch(f"{op_name(node)} stands between the weights and the values", node)
    return index


# --------------------------------------------------------------------------------------------------------------------
# scaled_dot_product_attention
# --------------------------------------------------------------------------------------------------------------------


def _lift_sdpa(facts: GraphFacts, anchor: fx.Node) -> Match | NoMatch:
    given: dict[str, Any] = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), anchor.args,
                                     strict=False)) | dict(anchor.kwargs)
    query, key, value = given["query"], given["key"], given["value"]
    shapes = [shape_of(x) for x in (query, key, value)]
    rank = len(shapes[0])
    if rank not in (3, 4) or any(len(s) != rank for s in shapes) or not shapes[0][-3].is_const:
        return NoMatch("scaled_dot_product_attention of other than 3 or 4 axes", anchor)
    batch, heads = (shapes[0][0], shapes[0][1]) if rank == 4 else (const(1), shapes[0][0])
    if not heads.is_const or not shapes[1][-3].is_const or not shapes[0][-1].is_const:
        return NoMatch("the number of heads is symbolic", anchor)
    q_heads, k_heads = int(heads.value), int(shapes[1][-3].value)
    lengths = (shapes[0][-2], shapes[1][-2])
    ranges = Ranges()
    for name, extent in (("b", batch), ("h", heads), ("i", lengths[0]), ("j", lengths[1]), ("e", shapes[0][-1])):
        ranges.declare(name, extent)
    head = ranges.floordiv(H, const(q_heads // k_heads)) if given.get("enable_gqa") else H
    pulling = Lift(facts, anchor)
    pulling.ranges = ranges
    factor = given.get("scale")
    factor = int(shapes[0][-1].value) ** -0.5 if factor is None else factor
    score = _sdpa_score(pulling, given, factor, (lengths[0], lengths[1]), rank)
    masked = split_mask(score, ranges, lengths, written="sdpa")
    if isinstance(masked, str):
        return NoMatch(masked, anchor)
    operands = []
    for node, h, position, shape in ((query, H, I, shapes[0]), (key, head, J, shapes[1]), (value, head, J, shapes[2])):
        at = (B, h, position, var("e"))[4 - rank :]
        at = tuple(ZERO if s == const(1) and x in (B, h) else x for x, s in zip(at, shape, strict=True))
        roles = Roles(position, var("e"), q_heads, (batch, shape[-2], shape[-1]))
        operand = trace_operand(facts, node, at, roles, ranges, anchor)
        if isinstance(operand, NoMatch):
            return operand
        operands.append(operand)
    if any(o.factor != 1.0 for o in operands[2:]):
        return NoMatch("the values are scaled inside the region", anchor)
    scaled = operands[0].factor * operands[1].factor
    if scaled != 1.0:
        again = rebuild(score, lambda x: scale(SCORE, scaled) if x == SCORE else None)
        masked = split_mask(again, ranges, lengths, written="sdpa")
        assert not isinstance(masked, str)
    return Match(
        anchor, anchor, *operands, masked, pulling.captured, batch, q_heads, lengths,
        (int(shapes[0][-1].value), int(shapes[2][-1].value)), ("n0", "n1", "i", "e")[4 - rank :],
        dropout=float(given.get("dropout_p", 0.0) or 0.0), inner=[anchor],
        written="sdpa_causal" if given.get("is_causal") and given.get("attn_mask") is None else "sdpa",
        repeats_heads=operands[1].heads(q_heads) < k_heads,
    )


def _sdpa_score(pulling: Lift, given: dict[str, Any], factor: Any, lengths: tuple[Expr, Expr], rank: int) -> Expr:
    scaled = pulling.element(factor, ())
    score = mul(SCORE, scaled)
    mask = given.get("attn_mask")
    keep = TRUE
    if mask is not None:
        full = (B, H, I, J)
        shape = shape_of(mask)
        at = tuple(
            ZERO if s == const(1) and x in (B, H) or (s == const(1) and lengths[k == 3] != const(1) and k > 1) else x
            for k, (x, s) in enumerate(zip(full[4 - len(shape) :], shape, strict=True), start=4 - len(shape))
        )
        element = pulling.element(mask, at)
        if element.kind == FLOAT:
            score = add(score, element)
        else:
            keep = truth(element)
    if given.get("is_causal"):
        keep = conjunction(keep, le(J, I))
    return MaskedScore.join(score, keep)


def sizes_of(match: Match) -> list[str]:
    """Shape symbols that the lifted expressions mention."""
    found: dict[str, None] = {}
    for e in (match.masked.score, match.masked.keep, match.sink or TRUE):
        for node in e.walk():
            if node.op == "size":
                found[node.args[0]] = None
    return list(found)

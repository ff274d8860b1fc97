"""Find softmax attention and lift it: from a softmax (or an SDPA call) to operands and an `AttentionRule`.

The anchor is a softmax. Its weights are followed to the product with the values; from an element of that product the
weights, the scores and the product of queries and keys are pulled back, index by index. What is found is therefore
what is computed: a softmax over another axis, a key that is not transposed or a mask behind the softmax do not fit.

Source: Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, section 3.2.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from attnc.expr import FLOAT, ONE, SCORE, TRUE, ZERO, B, Expr, H, I, J, add, const, mul, scale, sub, var
from attnc.passes.attention.joined import join, joins, one_score, score_of, width_of
from attnc.passes.attention.operands import Operand, Roles, batch_roles, trace_operand
from attnc.passes.attention.ranked import ranked
from attnc.passes.attention.relative import by_distance
from attnc.passes.attention.rules import MaskedScore, settled, split_mask, zero_after
from attnc.passes.attention.weights import Weights, Zeroing, follow, pull
from attnc.passes.graph import GraphFacts, NoMatch, Unliftable, op_name, shape_of, tensor_of
from attnc.passes.masks import Lift
from attnc.passes.products import Product, product
from attnc.passes.views import Index, Ranges, broadcast_index
from attnc.predicate import conjunction, le, logical_not, rebuild, truth

ANCHORS = ("softmax", "_softmax", "_safe_softmax", "scaled_dot_product_attention")


@dataclass
class Match:
    """One attention in the graph: operands, what is read at run time, and the node that the output replaces."""

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
    row_factor: Expr | None = None
    gain: Expr | None = None  # a factor of the output
    readers: list[fx.Node] = field(default_factory=list)  # what else reads the weights, which must then stay
    products: tuple[Product, Product] | None = None  # of the scores and with the values, where they are written out
    summed: tuple[Product, ...] = ()  # all products that the scores are a sum of
    within: tuple[fx.Node, ...] = ()  # what the key is made of, where the value is its first channels


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


def _lift_softmax(facts: GraphFacts, anchor: fx.Node) -> Match | NoMatch:
    weights = follow(anchor)
    if isinstance(weights, NoMatch):
        return weights
    final = weights.product
    changed = next((n for n in (anchor.args[0], *weights.between) if not facts.unchanged(n, n, final.node)), None)
    if changed is not None:
        return NoMatch("the scores or weights are changed in place on their way to the values", changed)
    names = tuple(var(f"y{d}") for d in range(len(final.out_labels)))
    ranges = Ranges()
    for name, extent in zip(names, shape_of(final.node), strict=True):
        ranges.declare(name.args[0], extent)
    inner = final.index("left", names, J)
    axis = final.left_labels.index(final.contracted)
    length = shape_of(final.left)[axis]
    ranges.declare("j", length)
    pulled = pull(final.left, inner, anchor, ranges)
    if isinstance(pulled, NoMatch):
        return pulled
    at, zeroings = pulled
    dim = int(anchor.args[1]) % len(at)
    if "j" not in at[dim].names() or any("j" in x.names() for d, x in enumerate(at) if d != dim):
        return NoMatch("the softmax does not run over the axis that is contracted with the values", anchor)
    summed: list[tuple[Product, Index]] = []
    match = _lift_scores(facts, anchor, weights, names, at, dim, ranges, zeroings, summed)
    if isinstance(match, NoMatch) and len(summed) > 1:  # all products but the first as numbers added to it
        return _lift_scores(facts, anchor, weights, names, at, dim, ranges, zeroings, None)
    return match


def _lift_scores(facts, anchor, weights: Weights, names, at, dim, ranges, zeroings, summed) -> Match | NoMatch:
    """summed: where the products of a sum are noted; None: only one is allowed."""
    final = weights.product
    several = summed is not None
    found: list[tuple[Product, Index]] = summed if several else []

    def leaf(node: fx.Node, index: Index) -> Expr | None:
        return _product_leaf(facts, node, index, found, pulling, final.node, several)

    pulling = Lift(facts, final.node, leaf)
    pulling.ranges = ranges
    scores = anchor.args[0]
    assert isinstance(scores, fx.Node)
    value = pulling.settled(pulling.element(scores, at))
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
    kept = [_kept(pulling, zeroing) for zeroing in zeroings]
    return _assemble(facts, anchor, weights, pulling, value, sink, kept, found, row, names[col_axis], batch)


def _kept(pulling: Lift, zeroing: Zeroing) -> Expr:
    """Which weights a mask behind the softmax leaves."""
    if not pulling.reads(zeroing.node):
        raise Unliftable("a mask of the weights is modified in place after it was read", zeroing.node)
    fill = pulling.element(zeroing.fill, zeroing.at(zeroing.fill))
    if not fill.is_const or fill.value != 0:
        raise Unliftable("the weights are replaced by something other than zero", zeroing.node)
    inside = truth(pulling.element(zeroing.mask, zeroing.at(zeroing.mask)))
    return inside if zeroing.keeps else logical_not(inside)


def _product_leaf(facts, node, index, found, pulling: Lift, end, several: bool) -> Expr | None:
    """The raw product `s`, where the columns of product `node` are the softmax axis; a further one where allowed."""
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
    number = next((n for n, (known, where) in enumerate(found) if known.node is node and where == index), len(found))
    if number == len(found):
        if found and not (several and joins(candidate, index, *found[0])):
            return None
        found.append((candidate, index))
    score = scale(score_of(number), candidate.alpha) if candidate.alpha != 1 else score_of(number)
    if candidate.addend is None:
        return score
    added = pulling.element(candidate.addend, broadcast_index(index, shape_of(candidate.addend), shape_of(node)))
    return add(score, scale(added, candidate.beta))


def _assemble(facts, anchor, weights, pulling, value, sink, kept, found, row, col, batch) -> Match | NoMatch:
    """Name the coordinates b, h, i, j and trace the operands."""
    final, (score_product, index), ranges = weights.product, found[0], pulling.ranges
    single = one_score(value, len(found))
    if single is None:
        return NoMatch("the scores hold several products that are not simply added", score_product.node)
    value, weighs = single
    q_index = score_product.index("left", index, var("e"))
    k_index = score_product.index("right", index, var("e"))
    pairs = [(n.args[0], e) for n, e in batch]
    split = batch_roles(pairs, [(score_product.left, q_index), (score_product.right, k_index)], ranges)
    if split is None:
        return NoMatch("more than one batch axis has a symbolic length", final.node)
    substitution, batch_size, q_heads = split
    substitution |= {row.args[0]: I, col.args[0]: var("e")}
    outer = tuple(var(f"y{d}") for d in range(len(final.out_labels)))
    row_label = final.out_labels[outer.index(row)]
    extents = dict(zip(final.out_labels, shape_of(final.node), strict=True))
    widths = shape_of(score_product.left)[score_product.left_labels.index(score_product.contracted)], extents[final.col]
    lengths = extents[row_label], shape_of(final.left)[final.left_labels.index(final.contracted)]
    if not all(width.is_const for width in widths):
        return NoMatch("a head width is symbolic", score_product.node)

    def rename(e: Expr) -> Expr:
        return rebuild(e, lambda x: substitution.get(x.args[0]) if x.op == "var" else None)

    sides = (
        (score_product.left, tuple(map(rename, q_index))),
        (score_product.right, tuple(map(rename, k_index))),
        (final.right, tuple(map(rename, final.index("right", outer, J)))),
    )
    names = named(batch_size, const(q_heads), *lengths, widths[0])
    operands = _operands(facts, sides, (batch_size, q_heads, lengths, widths), names, final.node)
    if isinstance(operands, NoMatch):
        return operands
    query, key, value_operand = operands
    further = [(*part, weigh) for part, weigh in zip(found[1:], weighs[1:], strict=True)]
    rows, columns = ((batch_size, length, widths[0]) for length in lengths)
    roles = Roles(I, var("e"), q_heads, rows), Roles(J, var("e"), q_heads, columns)
    pair = join(facts, further, (query, key), rename, roles, names, final.node)
    if isinstance(pair, NoMatch):
        return pair
    query, key = pair
    score = _scaled(rename(value), query.factor * key.factor)
    masked, trains = split_mask(score, names, lengths, written="composed"), facts.needs_grad(anchor)
    if not isinstance(masked, str) and kept:
        masked = zero_after(masked, conjunction(*map(rename, kept)), names, trains=trains)
    if isinstance(masked, str):
        return NoMatch(masked, anchor)
    masked = replace(masked, score=by_distance(masked.score, masked.keep, names))
    masked = ranked(masked, pulling, names, lengths) if trains else masked
    masked = settled(masked, trains=trains, written="composed", learned=_learned(facts, pulling))
    layout = tuple("e" if label == final.col else "i" if label == row_label else label for label in final.out_labels)
    return Match(
        anchor, final.node, query, key, value_operand, masked, pulling.captured, batch_size, q_heads,
        lengths, (sum(width_of(part) for part, _ in found), int(widths[1].value)), layout,
        sink=None if sink is None else sub(rename(sink), masked.shift), dropout=weights.dropout,
        repeats_heads=_heads_of(score_product.right) > key.heads(q_heads), readers=weights.readers,
        products=(score_product, final), summed=tuple(part for part, _ in found),
    )


def _learned(facts: GraphFacts, pulling: Lift) -> Callable[[int], bool]:
    return lambda slot: facts.needs_grad(pulling.captured[slot]) or _of_parameters(pulling.captured[slot])


def _of_parameters(node: fx.Node) -> bool:
    """Whether `node` would have a gradient, were gradients taken: a learned bias is one in inference too."""
    seen, stack = {node}, [node]
    while stack:
        one = stack.pop()
        value = tensor_of(one)
        if value is None or not value.is_floating_point() or op_name(one).startswith("detach"):
            continue
        if one.op == "placeholder" and one.meta.get("requires_grad"):
            return True
        fresh = [x for x in one.all_input_nodes if x not in seen]
        seen.update(fresh)
        stack += fresh
    return False


def named(batch: Expr, heads: Expr, length_q: Expr, length_k: Expr, width: Expr) -> Ranges:
    """The ranges of b, h, i, j and e."""
    ranges = Ranges()
    for name, extent in (("b", batch), ("h", heads), ("i", length_q), ("j", length_k), ("e", width)):
        ranges.declare(name, extent)
    return ranges


def _operands(facts, sides, sizes, names: Ranges, end: fx.Node) -> list[Operand] | NoMatch:
    """Query, key and value behind their views; a constant factor is peeled off query and key only.

    sizes: batch, query heads, lengths and widths. A cache of values may have a symbol of its own for its length, which
    scaled_dot_product_attention alone demands to be that of the keys.
    """
    batch, q_heads, (length_q, length_k, *length_v), (width, width_v) = sizes
    query = Roles(I, var("e"), q_heads, (batch, length_q, width))
    key = Roles(J, var("e"), q_heads, (batch, length_k, width))
    value = Roles(J, var("e"), q_heads, (batch, (*length_v, length_k)[0], width_v), scalars=False)
    operands = []
    for (node, index), roles in zip(sides, (query, key, value), strict=True):
        operand = trace_operand(facts, node, index, roles, names, end)
        if isinstance(operand, NoMatch):
            return operand
        operands.append(operand)
    return operands


def _scaled(score: Expr, factor: float) -> Expr:
    """`score` of a product that lacks `factor`."""
    return score if factor == 1.0 else rebuild(score, lambda x: scale(SCORE, factor) if x == SCORE else None)


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
    if not heads.is_const or any(not s[-3].is_const for s in shapes) or not shapes[0][-1].is_const:
        return NoMatch("the number of heads is symbolic", anchor)
    q_heads, k_heads = int(heads.value), int(shapes[1][-3].value)
    lengths = (shapes[0][-2], shapes[1][-2])
    ranges = named(batch, heads, *lengths, shapes[0][-1])
    sides = []
    for node, position, shape in ((query, I, shapes[0]), (key, J, shapes[1]), (value, J, shapes[2])):
        # Keys and values may be repeated each by its own factor.
        head = ranges.floordiv(H, const(q_heads // int(shape[-3].value))) if given.get("enable_gqa") else H
        at = (B, head, position, var("e"))[4 - rank :]
        sides.append((node, tuple(ZERO if s == ONE and x in (B, head) else x for x, s in zip(at, shape, strict=True))))
    widths = shapes[0][-1], shapes[2][-1]
    operands = _operands(facts, sides, (batch, q_heads, (*lengths, shapes[2][-2]), widths), ranges, anchor)
    if isinstance(operands, NoMatch):
        return operands
    pulling = Lift(facts, anchor)
    pulling.ranges = ranges
    pulling.reads(anchor)
    factor = given.get("scale")
    factor = int(widths[0].value) ** -0.5 if factor is None else factor
    score = _scaled(_sdpa_score(pulling, given, factor, lengths, rank), operands[0].factor * operands[1].factor)
    masked = split_mask(score, ranges, lengths, written="sdpa")
    if isinstance(masked, str):
        return NoMatch(masked, anchor)
    masked = ranked(masked, pulling, ranges, lengths) if facts.needs_grad(anchor) else masked
    masked = settled(masked, trains=facts.needs_grad(anchor), written="sdpa", learned=_learned(facts, pulling))
    q_operand, k_operand, v_operand = operands
    return Match(
        anchor, anchor, q_operand, k_operand, v_operand, masked, pulling.captured, batch, q_heads, lengths,
        (int(widths[0].value), int(widths[1].value)), ("n0", "n1", "i", "e")[4 - rank :],
        dropout=float(given.get("dropout_p", 0.0) or 0.0),
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
            ZERO if (s == const(1) and x in (B, H)) or (s == const(1) and lengths[k == 3] != const(1) and k > 1) else x
            for k, (x, s) in enumerate(zip(full[4 - len(shape) :], shape, strict=True), start=4 - len(shape))
        )
        element = pulling.settled(pulling.element(mask, at))
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
    for e in (match.masked.score, match.masked.keep, match.sink or TRUE, match.gain or TRUE):
        for node in e.walk():
            if node.op == "size":
                found[node.args[0]] = None
    return list(found)

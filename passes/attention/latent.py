"""Latent attention by phase: with few query rows, keys and values stay latents and the up-projections move to the rows.

    k_jh = [U_h c_j, r_j], v_jh = V_h c_j             (expanded: every key, every head, every step)
    s_ijh = (U_h^T a_ih) . c_j + b_ih . r_j,  o_ih = V_h sum_j p_ijh c_j     (absorbed: one head of latents)

Both are the same sums in another order. U and V are slices of the up-projection inside the graph, so an updated weight
is never stale; which is cheaper is asked of FLOP and bytes (`seconds_of`). A decode step over a cache of latents is
absorbed, a prefill and a training step are not.

Source: DeepSeek-AI 2024, "DeepSeek-V2", arXiv:2405.04434, section 2.1 and appendix C.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attnc.expr import H, J, const, sub, terms_of, var
from attnc.passes.attention.lift import Match, lift, named
from attnc.passes.attention.operands import Operand, Roles, trace_operand
from attnc.passes.graph import GraphFacts, NoMatch, hint, op_name, shape_of, tensor_of
from attnc.passes.views import Index, Ranges, through

_E = var("e")
FEW = 4  # a region is looked at where there are this many times more keys than query rows
_EMPTY = ("new_empty", "empty", "empty_like", "new_zeros", "zeros")


@dataclass(frozen=True)
class LatentShape:
    """Sizes of one latent attention: B, H, L and S; channels per head (nope, width) and shared (rope, rank)."""

    B: int
    H: int
    L: int
    S: int
    nope: int
    rope: int
    rank: int
    width: int


def expanded_work(s: LatentShape) -> tuple[float, float]:
    """FLOP and elements moved where keys and values are made per head, written and read again."""
    per_head = s.nope + s.width
    flops = 2.0 * s.B * s.S * s.rank * s.H * per_head + 2.0 * s.B * s.H * s.L * s.S * (per_head + s.rope)
    made = s.B * s.S * s.H * (per_head + s.rope)
    return flops, s.B * s.S * (s.rank + s.rope) + 2.0 * made + s.H * per_head * s.rank


def absorbed_work(s: LatentShape) -> tuple[float, float]:
    """FLOP and elements moved where rows are taken into the latent space and back."""
    per_head = s.nope + s.width
    flops = 2.0 * s.B * s.L * s.rank * s.H * per_head + 2.0 * s.B * s.H * s.L * s.S * (2 * s.rank + s.rope)
    rows = s.B * s.H * s.L * (2 * s.rank + s.rope)
    return flops, s.B * s.S * (s.rank + s.rope) + 2.0 * rows + s.H * per_head * s.rank


def seconds_of(s: LatentShape, flops_per_s: float, elements_per_s: float) -> tuple[float, float]:
    """Time of the absorbed and of the expanded order, each as long as the slower of its products and its traffic."""
    absorbed, expanded = (max(f / flops_per_s, m / elements_per_s) for f, m in (absorbed_work(s), expanded_work(s)))
    return absorbed, expanded


@dataclass(frozen=True)
class Expansion:
    """linear(latent, weight)[..., stride * h + offset + e]: `width` channels of each head out of a latent.

    biased: whether a bias is added, which no order but the written one keeps.
    """

    latent: fx.Node
    index: Index
    weight: fx.Node
    stride: int
    offset: int
    width: int
    biased: bool


@dataclass(frozen=True)
class Latent:
    """What a match is in latents: query channels that meet the expansion or shared keys, in the key's order."""

    match: Match
    key: Expansion
    value: Expansion
    latents: Operand
    parts: tuple[tuple[int, Operand | None], ...]  # width and shared operand; None: the expansion
    shape: LatentShape


def latents(facts: GraphFacts, anchor: fx.Node, *, any_length: bool = False) -> Latent | None:
    """The latent attention around `anchor`, written expanded; None where it is none.

    any_length: whether it is looked at whatever its lengths are.
    """
    if not any_length and not has_few_rows(anchor):
        return None
    match = lift(facts, anchor)
    if isinstance(match, NoMatch) or match.readers or match.key.more or not _is_plain(match):
        return None
    value = _expansion(facts, match, match.value.source, match.value.index, match.widths[1])
    pieces = pieces_of(facts, match, match.key, match.widths[0])
    if value is None or pieces is None:
        return None
    found: list[Expansion | None] = []
    parts: list[tuple[int, Operand | None]] = []
    for node, index, width in pieces:
        shared = _shared(facts, match, node, index, width)
        found.append(None if shared is not None else _expansion(facts, match, node, index, width))
        if shared is None and found[-1] is None:
            return None
        parts.append((width, shared))
    keys = [e for e in found if e is not None]
    if len(keys) != 1 or (keys[0].latent, keys[0].index) != (value.latent, value.index):
        return None
    if not shape_of(value.latent)[-1].is_const or not all(_fits(e, match.q_heads) for e in (keys[0], value)):
        return None
    rank = int(shape_of(value.latent)[-1].value)
    held = _shared(facts, match, value.latent, value.index, rank)
    types = {tensor_of(n).dtype for n in (value.latent, value.weight, keys[0].weight, *match.query.sources)}  # type: ignore[union-attr]
    if held is None or len(types) != 1 or match.key.heads(match.q_heads) != match.q_heads:
        return None
    rope = sum(width for width, shared in parts if shared is not None)
    sizes = (size_of(match, "b"), match.q_heads, size_of(match, "n"), size_of(match, "n", match.key))
    shape = LatentShape(*sizes, keys[0].width, rope, rank, value.width)
    return Latent(match, keys[0], value, held, tuple(parts), shape)


def _fits(e: Expansion, heads: int) -> bool:
    """Whether the heads' rows of the weight lie side by side, or one stride apart from the first row on."""
    rows = int(shape_of(e.weight)[0].value)
    if e.stride == e.width:
        return 0 <= e.offset <= rows - heads * e.width
    return rows == heads * e.stride and 0 <= e.offset <= e.stride - e.width


def size_of(match: Match, role: str, operand: Operand | None = None) -> int:
    """An operand's batch ("b") or length ("n") as seen at compile time; the query's where none is given."""
    operand = operand or match.query
    kinds, value = [kind for kind, _ in operand.roles], tensor_of(operand.source)
    assert value is not None
    return hint(value.shape[kinds.index(role)]) if role in kinds else 1


def has_few_rows(anchor: fx.Node) -> bool:
    """Whether the scores have many more keys than rows, before anything is lifted."""
    if op_name(anchor) == "scaled_dot_product_attention":
        lengths = [tensor_of(x) for x in anchor.args[:2]]
        rows, keys = (hint(x.shape[-2]) if x is not None else 1 for x in lengths)
    else:
        value = tensor_of(anchor)
        rows, keys = (hint(n) for n in value.shape[-2:]) if value is not None and value.dim() > 2 else (1, 1)
    return keys >= FEW * rows


def _is_plain(match: Match) -> bool:
    """Whether scores and output lie as (B, H, L, S) and (B, H, L, Ev), so that new products can take their places."""
    if match.written.startswith("sdpa"):
        return match.layout == ("n0", "n1", "i", "e")
    if match.products is None or len(match.layout) != 4 or match.layout[2:] != ("i", "e"):
        return False
    scored, final = match.products
    wanted = (match.batch, const(match.q_heads), *match.lengths)
    plain = all(p.out_labels[-2:] == (p.row, p.col) and p.alpha == 1 and p.addend is None for p in match.products)
    return plain and shape_of(scored.node) == wanted and final.left_labels[-2:] == (final.row, final.contracted)


def _expansion(facts: GraphFacts, match: Match, node: fx.Node, index: Index, width: int) -> Expansion | None:
    """What makes `node[index]` per head out of a latent."""
    ranges = named(match.batch, const(match.q_heads), *match.lengths, const(width))
    end = match.out
    while facts.unchanged(node, node, end) and (step := through(node, index, ranges)) is not None:
        node, index = step
    if not facts.unchanged(node, node, end):
        return None
    if op_name(node) != "linear" or node.kwargs:
        return None
    source, weight = node.args[:2]
    offset, terms = terms_of(index[-1])
    coefs = dict(terms)
    rows = shape_of(weight)[0]
    if set(coefs) != {H, _E} or coefs[_E] != 1 or any(e.names() & {"h", "e"} for e in index[:-1]) or not rows.is_const:
        return None
    stride, offset = int(coefs[H]), int(offset)
    if stride <= 0 or not all(facts.unchanged(x, node, end) for x in (source, weight)):
        return None
    biased = any(x is not None for x in node.args[2:])
    return Expansion(source, (*index[:-1], _E), weight, stride, offset, width, biased)


def pieces_of(facts: GraphFacts, match: Match, operand: Operand, width: int) -> list[tuple[fx.Node, Index, int]] | None:
    """An operand's channels as (node, index, width), in order: joined by cat, or copied into fresh memory."""
    node, index, end = operand.source, operand.index, match.out
    ranges = named(match.batch, const(match.q_heads), *match.lengths, const(width))
    while True:
        joined = _joined(facts, node, index, width, end)
        if joined is not None or not facts.unchanged(node, node, end):
            return joined
        step = through(node, index, ranges)
        if step is None or _E not in step[1]:
            return [(node, index, width)]
        node, index = step


def _joined(
    facts: GraphFacts, node: fx.Node, index: Index, width: int, end: fx.Node
) -> list[tuple[fx.Node, Index, int]] | None:
    if _E not in index:
        return None
    dim = index.index(_E)
    if op_name(node) == "cat":
        axis = int(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(index)
        if axis != dim or not all(facts.unchanged(x, node, end) for x in (node, *node.args[0])):
            return None
        pieces = [(x, index, int(shape_of(x)[dim].value)) for x in node.args[0] if shape_of(x)[dim].is_const]
        return pieces if sum(p[2] for p in pieces) == width and shape_of(node)[dim] == const(width) else None
    return _copied(facts, node, index, dim, width, end) if op_name(node) in _EMPTY else None


def _copied(
    facts: GraphFacts, node: fx.Node, index: Index, dim: int, width: int, end: fx.Node
) -> list[tuple[fx.Node, Index, int]] | None:
    """What is copied into slices of fresh memory that together fill it."""
    pieces: list[tuple[fx.Node, Index, int]] = []
    found, at = {}, 0
    for writer in facts.writers(node):
        target = writer.args[0] if op_name(writer) == "copy_" and len(writer.args) == 2 else None
        if not isinstance(target, fx.Node) or target.args[:1] != (node,):
            return None
        own = tuple(var(f"z{d}") for d in range(len(index)))
        moved, kinds = through(target, own, Ranges()), [tensor_of(x) for x in (writer.args[1], node)]
        same = all(k is not None for k in kinds) and kinds[0].dtype == kinds[1].dtype  # type: ignore[union-attr]
        same = same and facts.unchanged(writer.args[1], writer, end) and facts.order[writer] < facts.order[end]
        if moved is None or not same or shape_of(writer.args[1]) != shape_of(target):
            return None
        begin = sub(moved[1][dim], own[dim])
        if not begin.is_const or any(m != o for d, (m, o) in enumerate(zip(moved[1], own, strict=True)) if d != dim):
            return None
        if any(t != s for d, (t, s) in enumerate(zip(shape_of(target), shape_of(node), strict=True)) if d != dim):
            return None
        found[int(begin.value)] = (writer.args[1], index, int(shape_of(target)[dim].value))
    for start in sorted(found):
        if start != at:
            return None
        pieces.append(found[start])
        at += found[start][2]
    return pieces if at == width and len(found) == len(facts.writers(node)) else None


def _shared(facts: GraphFacts, match: Match, node: fx.Node, index: Index, width: int) -> Operand | None:
    """`node[index]` as an operand that all heads share."""
    ranges = named(match.batch, const(match.q_heads), *match.lengths, const(width))
    roles = Roles(J, _E, match.q_heads, (match.batch, match.lengths[1], const(width)), scalars=False)
    operand = trace_operand(facts, node, index, roles, ranges, match.out)
    return None if isinstance(operand, NoMatch) or operand.heads(match.q_heads) != 1 else operand

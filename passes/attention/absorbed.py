"""Latent attention that is written absorbed: each head takes its rows into the latent space and its sums out of it.

    a_ih = rows_ih U_h,  s_ijh = a_ih . c_j + b_ih . r_j,  out_ih = (sum_j p_ijh c_j) V_h

Found from what is computed: query channels that are a product of each head with its own matrix, met by channels of one
key head that are the values too, and a product of each head with its own matrix behind. Where a matrix is not there,
because it was folded into a projection, the reason says so: a folded weight cannot be split back.

Source: DeepSeek-AI 2024, "DeepSeek-V2", arXiv:2405.04434, appendix C.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attnc.expr import ONE, ZERO, B, Expr, H, I, J, add, const, mul, var
from attnc.passes.attention.latent import LatentShape, pieces_of, size_of
from attnc.passes.attention.lift import Match, lift, named
from attnc.passes.attention.operands import Operand, Roles, trace_operand
from attnc.passes.attention.within import Place, meet, places, width_of
from attnc.passes.graph import GraphFacts, NoMatch, op_name, shape_of, tensor_of
from attnc.passes.products import Product, product
from attnc.passes.views import Index, Ranges, through
from attnc.predicate import rebuild

Axes = tuple[str, ...]  # of each dimension: b, h, i, j, e, or "bh" for both in one
_D, _E = var("d"), var("e")
LETTERS = {B: "b", H: "h", I: "i", J: "j", _E: "e"}


@dataclass(frozen=True)
class Matrix:
    """matrix[index]: one matrix per head, `index` of h, d and e."""

    node: fx.Node
    index: Index


@dataclass(frozen=True)
class Channels:
    """Some query channels and the key channels that they meet; up: the matrix that made them of `rows`, if any."""

    rows: Operand
    key: Operand
    first: int  # of the key's own channels
    width: int
    weight: float
    up: Matrix | None = None


@dataclass(frozen=True)
class Absorbed:
    """What a match is, written over its latents.

    scores: the node of all raw scores, its axes as letters; out: the product with `down`, its axes as letters.
    """

    match: Match
    channels: tuple[Channels, ...]
    scores: tuple[fx.Node, Axes] | None
    weights: Axes
    out: tuple[fx.Node, Axes]
    down: Matrix
    meeting: Place
    shape: LatentShape

    @property
    def leaves(self) -> tuple[fx.Node, ...]:
        """The nodes at which the region begins."""
        ups = [c.up.node for c in self.channels if c.up is not None]
        keys = [k.source for k in (self.match.key, *self.match.key.more)]
        held = [self.meeting.node, *self.meeting.beside, *(keys if self.match.key.more else [])]
        rows = [c.rows.source for c in self.channels]
        return tuple(dict.fromkeys([*rows, *ups, *held, self.down.node, *self.match.captured]))


def absorbed(facts: GraphFacts, anchor: fx.Node) -> Absorbed | NoMatch | None:
    """The latent attention around `anchor`, written absorbed; None where it is none, else why it must stay so."""
    match = lift(facts, anchor)
    if isinstance(match, NoMatch) or match.readers or match.dropout or match.q_heads < 2:
        return None
    queries, keys = ([operand, *operand.more] for operand in (match.query, match.key))
    if any(operand.heads(match.q_heads) != 1 for operand in keys):
        return None
    found: list[Channels] = []
    missing: NoMatch | None = None
    meeting: Place | None = None
    for query, key in zip(queries, keys, strict=True):
        first = 0
        for node, index, width in pieces_of(facts, match, query, width_of(query)) or []:
            one = _channels(facts, match, (node, index, width), key, first, query.weight)
            if isinstance(one, NoMatch):
                return None
            place = meet(facts, match, key, first) if width == match.widths[1] else None
            if one.up is None and place is not None:
                missing = _folded("the query's", width, _maker(facts, match, node, index, width)[0])
            meeting = place if one.up is not None else meeting
            found.append(one)
            first += width
    ups = [c for c in found if c.up is not None]
    if len(ups) != 1 or sum(c.width for c in found) != match.widths[0]:
        return missing
    return _whole(facts, match, tuple(found), ups[0], meeting)


def _folded(whose: str, width: int, node: fx.Node) -> NoMatch:
    return NoMatch(
        f"{whose} {width} latent channels are read off {op_name(node) or node.op}, not off a product of each head with "
        "an up-projection of its own; a folded weight cannot be split back",
        node,
    )


def _whole(
    facts: GraphFacts, match: Match, found: tuple[Channels, ...], latent: Channels, meeting: Place | None
) -> Absorbed | NoMatch:
    if latent.width != match.widths[1] or meeting is None:
        return NoMatch("keys and values are not expanded from the same latents", match.out)
    out = _up(facts, match)
    if isinstance(out, NoMatch):
        return out
    node, axes, down, width = out
    scores = _scores(facts, match)
    if isinstance(scores, NoMatch):
        return scores
    weights = () if scores is None else _axes_of_weights(match)
    if weights is None:
        return NoMatch("the weights have axes that are not batch, head, row and key", match.out)
    nope = width_of(latent.rows)
    sizes = (size_of(match, "b"), match.q_heads, size_of(match, "n"), size_of(match, "n", match.key))
    shape = LatentShape(*sizes, nope, match.widths[0] - latent.width, latent.width, width)
    types = {tensor_of(n).dtype for n in (latent.up.node, down.node, match.value.source, node)}  # type: ignore[union-attr]
    if len(types) != 1:
        return NoMatch("latents and up-projections have several types", node)
    return Absorbed(match, found, scores, weights, (node, axes), down, meeting, shape)


def _channels(
    facts: GraphFacts, match: Match, piece: tuple[fx.Node, Index, int], key: Operand, first: int, weight: float
) -> Channels | NoMatch:
    node, index, width = piece
    part = _part(facts, match, key, first, width)
    made = _product_per_head(facts, match, node, index, width)
    if made is not None:
        return Channels(made[0], part, first, width, weight, made[1])
    rows = trace_operand(facts, node, index, _rows(match, width), _ranges(match, width), match.out)
    return rows if isinstance(rows, NoMatch) else Channels(rows, part, first, width, weight)


def _rows(match: Match, width: int) -> Roles:
    return Roles(I, _E, match.q_heads, (match.batch, match.lengths[0], const(width)), scalars=False)


def _ranges(match: Match, width: int) -> Ranges:
    return named(match.batch, const(match.q_heads), *match.lengths, const(width))


def _part(facts: GraphFacts, match: Match, key: Operand, first: int, width: int) -> Operand:
    """Channels of a key as an operand of their own, where they lie in a tensor of their own; else the key."""
    shifted = tuple(add(_E, const(first)) if e == _E else e for e in key.index)
    roles = Roles(J, _E, match.q_heads, (match.batch, match.lengths[1], const(width)), scalars=False)
    for place in places(facts, key.source, shifted, _ranges(match, width), width, match.out):
        own = trace_operand(facts, place.node, place.index, roles, _ranges(match, width), match.out)
        if isinstance(own, Operand) and own.heads(match.q_heads) == 1:
            return own
    return key


def _product_per_head(
    facts: GraphFacts, match: Match, node: fx.Node, index: Index, width: int
) -> tuple[Operand, Matrix] | None:
    """rows and matrix where `node[index]` is sum_d rows[b, h, i, d] * matrix[h, d, e]."""
    node, index = _maker(facts, match, node, index, width)
    ranges, found = _ranges(match, width), product(node)
    if found is None:
        return None
    extent = shape_of(found.left)[found.left_labels.index(found.contracted)]
    if found.alpha != 1 or found.addend is not None or not extent.is_const:
        return None
    if facts.root(node) in facts.writes or not all(facts.unchanged(x, node, match.out) for x in node.all_input_nodes):
        return None
    inner = int(extent.value)
    for side, other in (("left", "right"), ("right", "left")):
        sizes = {H: match.q_heads, _D: inner, _E: width}
        matrix = _matrix(facts, getattr(found, side), found.index(side, index, _D), ranges, sizes, match.out)
        at = found.index(other, index, _D)
        if matrix is None or any("e" in e.names() for e in at):
            continue
        at = tuple(rebuild(e, lambda x: _E if x == _D else None) for e in at)
        rows = trace_operand(facts, getattr(found, other), at, _rows(match, inner), _ranges(match, inner), match.out)
        if isinstance(rows, Operand) and rows.heads(match.q_heads) == match.q_heads:
            return rows, matrix
    return None


def _maker(facts: GraphFacts, match: Match, node: fx.Node, index: Index, width: int) -> tuple[fx.Node, Index]:
    """What made `node[index]`, behind its views; coordinates of one element are 0."""
    single = {name for name, extent in ((B, match.batch), (I, match.lengths[0])) if extent == ONE}
    index = tuple(rebuild(e, lambda x: ZERO if x in single else None) for e in index)
    while product(node) is None and facts.unchanged(node, node, match.out):
        step = through(node, index, _ranges(match, width))
        if step is None:
            break
        node, index = step
    return node, index


def _matrix(
    facts: GraphFacts, node: fx.Node, index: Index, ranges: Ranges, sizes: dict[Expr, int], end: fx.Node
) -> Matrix | None:
    """`node[index]` as one matrix per head: axes h, d and e, each whole, and no other."""
    ranges.declare("d", const(sizes[_D]))
    while facts.unchanged(node, node, end):
        live = [(e, n) for e, n in zip(index, shape_of(node), strict=True) if not e.is_const]
        if {e for e, _ in live} == set(sizes) and len(live) == 3 and all(n == const(sizes[e]) for e, n in live):
            return Matrix(node, index)
        step = through(node, index, ranges)
        if step is None:
            return None
        node, index = step
    return None


def _axes(labels: tuple[str, ...], known: dict[str, str]) -> Axes | None:
    """The axes of a product as letters: batch axes are b and h, in this order, or both in one."""
    batch = [label for label in labels if label not in known]
    if len(batch) not in (1, 2):
        return None
    letters = dict(zip(batch, ("b", "h") if len(batch) == 2 else ("bh",), strict=True)) | known
    return tuple(letters[label] for label in labels)


def _axes_of_weights(match: Match) -> Axes | None:
    """The axes of what meets the values, none of them broadcast."""
    assert match.products is not None
    final = match.products[1]
    axes = _axes(final.left_labels, {final.row: "i", final.contracted: "j"})
    batch = [
        [x for x in labels if x not in (final.row, final.contracted, final.col)]
        for labels in (final.left_labels, final.out_labels)
    ]
    if axes is None or batch[0] != batch[1]:
        return None
    heads = const(match.q_heads)
    sizes = {"b": match.batch, "h": heads, "bh": mul(match.batch, heads), "i": match.lengths[0], "j": match.lengths[1]}
    return axes if tuple(sizes[letters] for letters in axes) == shape_of(final.left) else None


def _scores(facts: GraphFacts, match: Match) -> tuple[fx.Node, Axes] | NoMatch | None:
    """The node of all raw scores and its axes; None for a call of scaled_dot_product_attention."""
    if match.written.startswith("sdpa"):
        plain = match.layout == ("n0", "n1", "i", "e")
        return None if plain else NoMatch("scaled_dot_product_attention of other than 4 axes", match.anchor)
    nodes = [part.node for part in match.summed]
    node = nodes[0]
    if len(nodes) > 1:
        readers = {user for n in nodes for user in n.users}
        node = next(iter(readers))
        added = len(readers) == 1 and op_name(node) == "add" and set(node.args) == set(nodes) and not node.kwargs
        if len(nodes) != 2 or not added or shape_of(node) != shape_of(nodes[0]):
            return NoMatch("the scores are not plainly the sum of two products", nodes[0])
    axes = _axes(match.summed[0].out_labels, {match.summed[0].row: "i", match.summed[0].col: "j"})
    pairs = zip((match.query, *match.query.more), (match.key, *match.key.more), match.summed, strict=True)
    if axes is None or not all(_lies_so(facts, match, q, k, part, axes) for q, k, part in pairs):
        return NoMatch("the scores have axes that are not batch, head, row and key", node)
    return node, axes


def _lies_so(facts: GraphFacts, match: Match, query: Operand, key: Operand, part: Product, axes: Axes) -> bool:
    """Whether element (b, h, i, j) of a product, its axes as said, is the product of query and key at these."""
    if part.alpha != 1 or part.addend is not None:
        return False
    alone = match.batch == ONE
    names = {"b": ZERO if alone else B, "h": H, "i": I, "j": J}
    names["bh"] = H if alone else add(mul(B, const(match.q_heads)), H)
    index = tuple(names[letters] for letters in axes)
    for side, at, length, operand in (("left", I, 0, query), ("right", J, 1, key)):
        width = width_of(operand)
        roles = Roles(at, _E, match.q_heads, (match.batch, match.lengths[length], const(width)))
        own = trace_operand(
            facts, getattr(part, side), part.index(side, index, _E), roles, _ranges(match, width), match.out
        )
        if not isinstance(own, Operand) or (own.source, own.index) != (operand.source, operand.index):
            return False
    return True


def _up(facts: GraphFacts, match: Match) -> tuple[fx.Node, Axes, Matrix, int] | NoMatch:
    """The product that takes the summed latents of each head out: its node, its axes, its matrix, its width."""
    node = match.out
    while True:
        users = [u for u in node.users if u.users or u.op == "output" or u.is_impure()]
        if len(users) != 1:
            return NoMatch(f"the summed latents are read by {len(users)} nodes, one up-projection is allowed", node)
        (user,) = users
        if product(user) is not None and user.all_input_nodes.count(node) == 1:
            break
        own = tuple(var(f"z{d}") for d in range(len(shape_of(user)) if tensor_of(user) is not None else 0))
        if user.args[:1] != (node,) or not own or through(user, own, Ranges()) is None:
            return _folded("its sum's", match.widths[1], user)
        node = user
    return _placed(facts, match, product(user)) or _folded("its sum's", match.widths[1], user)  # type: ignore[arg-type]


def _placed(facts: GraphFacts, match: Match, up: Product) -> tuple[fx.Node, Axes, Matrix, int] | None:
    """The axes of `up` in b, h, i and e, and its matrix; None where it is no product of each head with its own."""
    outer = tuple(var(f"y{d}") for d in range(len(up.out_labels)))
    ranges = Ranges()
    for name, extent in zip(outer, shape_of(up.node), strict=True):
        ranges.declare(name.args[0], extent)
    ranges.declare("d", const(match.widths[1]))
    side = next((s for s in ("left", "right") if _pulled(match, up, s, outer, ranges) is not None), None)
    if side is None or up.alpha != 1 or up.addend is not None:
        return None
    at = _pulled(match, up, side, outer, ranges)
    assert at is not None
    digits = _digits(match, at, outer, ranges)
    free = up.row if side == "right" else up.col
    wide = outer[up.out_labels.index(free)]
    width = shape_of(up.node)[up.out_labels.index(free)]
    if digits is None or wide in digits or not width.is_const:
        return None
    axes, place = [], {wide: _E}
    for name in outer:
        axes.append("e" if name == wide else "".join(LETTERS[c] for c, _ in digits.get(name, [])))
        value: Expr = ZERO
        for coordinate, extent in digits.get(name, []):
            value = add(mul(value, extent), coordinate)
        place.setdefault(name, value)
    index = tuple(place[name] for name in outer)
    names = _ranges(match, int(width.value))
    names.declare("d", const(match.widths[1]))
    again = _pulled(match, up, side, index, names)
    named_so = None if again is None else _coordinates(match, again, names)
    wanted = ((B, match.batch), (H, const(match.q_heads)), (I, match.lengths[0]))
    if named_so is None or any(n != ONE and e != c for e, (c, n) in zip(named_so, wanted, strict=True)):
        return None
    other = "left" if side == "right" else "right"
    sizes = {H: match.q_heads, _D: match.widths[1], _E: int(width.value)}
    matrix = _matrix(facts, getattr(up, other), up.index(other, index, _D), names, sizes, up.node)
    return None if matrix is None else (up.node, tuple(axes), matrix, int(width.value))


def _pulled(match: Match, up: Product, side: str, index: Index, ranges: Ranges) -> Index | None:
    """The index into the summed latents that belongs to out[index] of `up`."""
    node, at = getattr(up, side), up.index(side, index, _D)
    while node is not match.out:
        step = through(node, at, ranges)
        if step is None:
            return None
        node, at = step
    return at if at[match.layout.index("e")] == _D else None


def _coordinates(match: Match, at: Index, ranges: Ranges) -> Index | None:
    """b, h and i of an index into the summed latents."""
    batch = [e for e, label in zip(at, match.layout, strict=True) if label not in ("i", "e")]
    if len(batch) == 1:
        heads = const(match.q_heads)
        batch = [ranges.floordiv(batch[0], heads), ranges.mod(batch[0], heads)]
    i = at[match.layout.index("i")]
    return (*batch, i) if len(batch) == 2 else None


def _digits(match: Match, at: Index, outer: Index, ranges: Ranges) -> dict[Expr, list[tuple[Expr, Expr]]] | None:
    """For each outer coordinate, the coordinates b, h, i it is made of, slowest first, with their extents."""
    found = _coordinates(match, at, ranges)
    if found is None:
        return None
    extents = {B: match.batch, H: const(match.q_heads), I: match.lengths[0]}
    digits: dict[Expr, list[tuple[int, Expr, Expr]]] = {}
    for coordinate, e in zip((B, H, I), found, strict=True):
        if extents[coordinate] == ONE:
            continue
        whole = e if e.op == "var" else e.args[0] if e.op in ("floordiv", "mod") else None
        if whole not in outer:
            return None
        digits.setdefault(whole, []).append((1 if e.op == "mod" else 0, coordinate, extents[coordinate]))
    if any(len({rank for rank, *_ in parts}) != len(parts) for parts in digits.values()):
        return None
    return {name: [(c, n) for _, c, n in sorted(parts, key=lambda p: p[0])] for name, parts in digits.items()}

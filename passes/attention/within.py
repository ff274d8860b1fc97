"""Values that are channels of the key: the same memory feeds both products, so a kernel may read it once.

    k_j = [c_j, r_j], v_j = c_j

It is proven by walking both operands back through views and joins (cat) until they meet in one node at one index with
nothing written in between. Absorbed latent attention is so, and caches that hold latent and rotary key side by side.

Source: DeepSeek-AI 2024, "DeepSeek-V2", arXiv:2405.04434, section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from attnc.expr import add, const, sub, var
from attnc.passes.attention.factors import settle
from attnc.passes.attention.lift import Match, named
from attnc.passes.attention.operands import Operand
from attnc.passes.attention.stored import as_stored
from attnc.passes.graph import GraphFacts, op_name, shape_of
from attnc.passes.views import Index, Ranges, through

_E = var("e")


@dataclass(frozen=True)
class Place:
    """An element of an operand as an element of a node further back; beside: what was joined with it on the way."""

    node: fx.Node
    index: Index
    beside: tuple[fx.Node, ...] = ()


def places(facts: GraphFacts, node: fx.Node, index: Index, ranges: Ranges, width: int, end: fx.Node) -> list[Place]:
    """Every node that holds the element `index` of `node` for all e < width, nearest first, unchanged until `end`."""
    found = [Place(node, index)]
    while facts.unchanged(found[-1].node, found[-1].node, end):
        at = found[-1]
        step = _piece(at, width) if op_name(at.node) == "cat" else None
        if step is None:
            moved = through(at.node, at.index, ranges)
            step = None if moved is None else Place(*moved, at.beside)
        if step is None or not isinstance(step.node, fx.Node) or not facts.unchanged(step.node, at.node, end):
            break
        found.append(step)
    return found


def _piece(at: Place, width: int) -> Place | None:
    """The joined tensor that holds channels e < width of `at`."""
    joined = list(at.node.args[0])
    dim = int(at.node.args[1] if len(at.node.args) > 1 else at.node.kwargs.get("dim", 0)) % len(at.index)
    first = sub(at.index[dim], _E)
    if not first.is_const or any(not shape_of(x)[dim].is_const for x in joined):
        return None
    low, begin = 0, int(first.value)
    for piece in joined:
        high = low + int(shape_of(piece)[dim].value)
        if low <= begin and begin + width <= high:
            index = (*at.index[:dim], add(_E, const(begin - low)), *at.index[dim + 1 :])
            return Place(piece, index, (*at.beside, *(x for x in joined if x is not piece)))
        low = high
    return None


def meet(facts: GraphFacts, match: Match, key: Operand, first: int = 0) -> Place | None:
    """Where channels [first, first + Ev) of `key` and the value are the same elements; None: not proven."""
    width = match.widths[1]
    ranges = named(match.batch, const(match.q_heads), *match.lengths, const(width))
    shifted = tuple(add(_E, const(first)) if e == _E else e for e in key.index)
    ways = [
        places(facts, node, index, ranges, width, match.out)
        for node, index in ((key.source, shifted), (match.value.source, match.value.index))
    ]
    known = {(place.node, place.index) for place in ways[1]}
    return next((place for place in ways[0] if (place.node, place.index) in known), None)


def width_of(operand: Operand) -> int:
    """The number of an operand's own channels."""
    kinds = [kind for kind, _ in operand.roles]
    return int(shape_of(operand.source)[kinds.index("e")].value)


def finished(facts: GraphFacts, match: Match) -> Match:
    """A lifted match as it is described and rewritten: operands as stored, row factors out, shared memory noted."""
    return share(facts, settle(as_stored(facts, match)))


def share(facts: GraphFacts, match: Match) -> Match:
    """`match` with the nodes noted that key and value are both made of, where the value is the key's first channels.

    Of several products that are added up, the one over the values' channels becomes the first.
    """
    if facts.needs_grad(match.out) or match.value.factor != 1.0:
        return match
    queries, keys = ([operand, *operand.more] for operand in (match.query, match.key))
    for at, key in enumerate(keys):
        place = meet(facts, match, key) if width_of(key) >= match.widths[1] else None
        if place is None:
            continue
        others = [operand.source for n, operand in enumerate(keys) if n != at]
        within = tuple(dict.fromkeys([place.node, *place.beside, *others]))
        return replace(match, query=_first(queries, at), key=_first(keys, at), within=within)
    return match


def _first(operands: list[Operand], at: int) -> Operand:
    rest = tuple(replace(operand, more=()) for n, operand in enumerate(operands) if n != at)
    return replace(operands[at], factor=operands[0].factor, more=rest)

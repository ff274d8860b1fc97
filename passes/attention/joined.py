"""Scores that are a sum of products, read as one product over more channels.

    a_i . c_j + b_i . r_j  =  [a_i, b_i] . [c_j, r_j]

Absorbed latent attention and split rotary parts are written so; as one product no sum of scores lies in memory.

Source: DeepSeek-AI 2024, "DeepSeek-V2", arXiv:2405.04434, section 2.1 (latent and rotary parts of the scores).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import fx

from attnc.expr import FLOAT, SCORE, Expr, combination, const, var
from attnc.passes.attention.operands import Operand, Roles, trace_operand
from attnc.passes.graph import GraphFacts, NoMatch, shape_of, tensor_of
from attnc.passes.products import Product
from attnc.passes.views import Index, Ranges
from attnc.predicate import rebuild

_WHOLE = var("joined", FLOAT)


def score_of(number: int) -> Expr:
    """The raw product `number` of a sum of products."""
    return SCORE if number == 0 else var(f"s{number}", FLOAT)


def width_of(product: Product) -> int:
    """The number of channels that a product contracts; 0 where it is symbolic."""
    width = shape_of(product.left)[product.left_labels.index(product.contracted)]
    return int(width.value) if width.is_const else 0


def joins(candidate: Product, index: Index, known: Product, where: Index) -> bool:
    """Whether two products give a row and a column of the scores the same places, and have one dtype.

    A product over as many channels as there are keys is left a number per pair: its operands hold no less.
    """
    at, there = (dict(zip(p.out_labels, i, strict=True)) for p, i in ((candidate, index), (known, where)))
    one, other = tensor_of(candidate.node), tensor_of(known.node)
    same = one is not None and other is not None and one.dtype == other.dtype
    keys = shape_of(candidate.node)[candidate.out_labels.index(candidate.col)]
    narrow = width_of(candidate) > 0 and not (keys.is_const and width_of(candidate) >= keys.value)
    return same and narrow and at[candidate.row] == there[known.row] and at[candidate.col] == there[known.col]


def one_score(value: Expr, count: int) -> tuple[Expr, list[float]] | None:
    """`value` with its sum of `count` products as one `s`, and what each weighs beside the first; None: no such sum."""
    extra = [score_of(n) for n in range(1, count)]
    ratios: list[list[float]] = []

    def leaf(x: Expr) -> Expr | None:
        terms = dict(x.args[1]) if x.op == "lin" else {}
        if SCORE not in terms or any(atom not in terms for atom in extra):
            return None
        first = terms.pop(SCORE)
        ratios.append([float(terms.pop(atom)) / float(first) for atom in extra])
        return combination(x.args[0], {**terms, _WHOLE: first}, FLOAT)

    if not extra:
        return value, [1.0]
    found = rebuild(value, leaf)
    if not ratios or any(r != ratios[0] for r in ratios) or found.names() & {"s", *(e.args[0] for e in extra)}:
        return None
    return rebuild(found, lambda x: SCORE if x == _WHOLE else None), [1.0, *ratios[0]]


def join(
    facts: GraphFacts,
    further: Sequence[tuple[Product, Index, float]],
    pair: tuple[Operand, Operand],
    rename: Callable[[Expr], Expr],
    both: tuple[Roles, Roles],
    names: Ranges,
    end: fx.Node,
) -> tuple[Operand, Operand] | NoMatch:
    """Query and key with the channels of further products behind their own; each product with its weight."""
    query, key = pair
    queries, keys = [], []
    for product, index, weight in further:
        width = const(width_of(product))
        ranges = Ranges()
        ranges.box = dict(names.box)
        ranges.declare("e", width)
        traced = []
        for side, node, roles in (("left", product.left, both[0]), ("right", product.right, both[1])):
            at = tuple(map(rename, product.index(side, index, roles.width)))
            own = replace(roles, extents=(*roles.extents[:2], width))
            operand = trace_operand(facts, node, at, own, ranges, end)
            if isinstance(operand, NoMatch):
                return operand
            traced.append(operand)
        ratio = weight * traced[0].factor * traced[1].factor / (query.factor * key.factor)
        queries.append(replace(traced[0], factor=1.0, weight=ratio))
        keys.append(replace(traced[1], factor=1.0))
    return replace(query, more=tuple(queries)), replace(key, more=tuple(keys))

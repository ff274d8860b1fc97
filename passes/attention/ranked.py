"""Lists that leave no row without a key: the highest score of a row is one that its mask keeps.

    keep = j in topk(where(m_ij, x, low)) and m_ij,   m keeps a key in every row   ->   keep does

Lists are made of scores that the attention's own mask was put on before; its keys rank above those that the mask sets
as low as it can, so the first on a list is kept. A mask of padded keys may empty a row, and then nothing is said.

Source: Shi et al. 2025, "Trainable Dynamic Mask Sparse Attention", arXiv:2508.02124, section 3 (Doge).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from attnc.expr import Expr, J
from attnc.passes.attention.rules import MaskedScore, decide, each_row_keeps, strip
from attnc.passes.graph import op_name
from attnc.passes.masks import Lift
from attnc.passes.views import Ranges
from attnc.predicate import conjunction


def ranked(masked: MaskedScore, pulling: Lift, ranges: Ranges, lengths: tuple[Expr, Expr]) -> MaskedScore:
    """`masked`, known to leave no row without a key where its lists say so; pulling: what lifted it."""
    parts = masked.keep.args if masked.keep.op == "and" else ()
    for part in parts:
        if masked.empty != "never" and part.op == "among" and part.args[0] == J:
            rest = conjunction(*(other for other in parts if other is not part))
            if not rest.has("load") and _ranks(part.args[1], pulling, rest, ranges, lengths):
                return replace(masked, empty="never")
    return masked


def _ranks(numbers: Expr, pulling: Lift, kept: Expr, ranges: Ranges, lengths: tuple[Expr, Expr]) -> bool:
    """Whether a list names the highest of scores that the mask `kept`, with a key in every row, was put on."""
    slot, *at = numbers.args[:-1]
    top = _top(pulling.captured[slot])
    if top is None:
        return False
    own = Lift(pulling.facts, pulling.end)
    own.ranges = ranges
    found = strip(own.element(top.args[0], (*at, J)))
    return bool(found.fills) and decide(found.keep, ranges) == kept and each_row_keeps(kept, ranges, lengths)


def _top(node: fx.Node) -> fx.Node | None:
    """The `topk` along the last axis, of the largest, whose positions `node` is."""
    top = node.args[0] if op_name(node) == "getitem" and node.args[1] == 1 else None
    if not isinstance(top, fx.Node) or op_name(top) != "topk" or top.kwargs:
        return None
    given: list[Any] = list(top.args[2:4])
    dim, largest = given + [-1, True][len(given) :]
    rank = top.args[0].meta["val"].dim()
    return top if largest and int(dim) % rank == rank - 1 else None

"""Relative positions out of flat offsets: a bias shifted into place by pad and reshape reads a table at i - j.

    f[(33 i + j + 33) // 34, (33 i + j + 33) % 34 - 1] with j <= i  =  f[i, j - i + 32]

The offset is written in the row and the distance, whose range the mask bounds; quotients then come out whole.

Source: Dai et al. 2019, "Transformer-XL", arXiv:1901.02860, appendix B (the shift).
"""

from __future__ import annotations

from attnc import predicate
from attnc.expr import Expr, I, J, mul, sub, var
from attnc.passes.attention.rules import decide
from attnc.passes.views import Ranges

_D = var("d")


def by_distance(score: Expr, keep: Expr, ranges: Ranges) -> Expr:
    """`score`, where `keep` holds, with quotients and remainders of i and j in terms of i - j where that is simpler."""
    if not _quotients(score) or not {"i", "j"} <= ranges.box.keys():
        return score
    (_, last_row), (_, last_col) = ranges.box["i"], ranges.box["j"]
    least, most = predicate.distances(keep)
    within = Ranges()
    first = -last_col if least is None else max(least, -last_col)
    within.box = {**ranges.box, "d": (first, last_row if most is None else min(most, last_row))}
    moved = decide(_divided(score, within), within)
    back = predicate.rebuild(moved, lambda x: sub(I, J) if x == _D else None)
    return back if _quotients(back) < _quotients(score) else score


def _quotients(e: Expr) -> int:
    """How many quotients and remainders mix row and column."""
    return sum(x.op in ("floordiv", "mod") and {"i", "j"} <= x.names() for x in e.walk())


def _divided(e: Expr, ranges: Ranges) -> Expr:
    """`e` with `i - d` for `j`, remainders as quotients, and quotients made as far as the ranges decide them."""

    def leaf(x: Expr) -> Expr | None:
        if x == J:
            return sub(I, _D)
        if x.op not in ("floordiv", "mod"):
            return None
        total, divisor = (_divided(arg, ranges) for arg in x.args)
        quotient = ranges.floordiv(total, divisor)
        return quotient if x.op == "floordiv" else sub(total, mul(divisor, quotient))

    return predicate.rebuild(e, leaf)

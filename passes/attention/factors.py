"""Factors of a score that are one number per row move to the query: `s * t[h]` is `(q * t[h]) . k`.

A learned temperature per head or a scale that arrives as a tensor then costs L * E products instead of L * S, and the
score is linear in `s` again, as every fast form wants it.
"""

from __future__ import annotations

from dataclasses import replace

from attnc.expr import SCORE, Expr, load, mul
from attnc.passes.attention.lift import Match
from attnc.predicate import rebuild


def settle(match: Match) -> Match:
    """`match` with its row factor taken out of the score, and only the captured tensors that are still read."""
    score, factor = _split(match.masked.score)
    expressions = [score, match.masked.keep, match.sink, factor, match.gain]
    used = sorted({x.args[0] for e in expressions if e is not None for x in e.walk() if x.op == "load"})
    if factor is None and len(used) == len(match.captured):
        return match
    slots = {old: new for new, old in enumerate(used)}

    def renumber(e: Expr) -> Expr:
        def leaf(x: Expr) -> Expr | None:
            if x.op != "load":
                return None
            return load(slots[x.args[0]], tuple(renumber(a) for a in x.args[1:]), x.kind)

        return rebuild(e, leaf)

    return replace(
        match,
        masked=replace(match.masked, score=renumber(score), keep=renumber(match.masked.keep)),
        sink=None if match.sink is None else renumber(match.sink),
        row_factor=None if factor is None else renumber(factor),
        gain=None if match.gain is None else renumber(match.gain),
        captured=[match.captured[slot] for slot in used],
    )


def _split(score: Expr) -> tuple[Expr, Expr | None]:
    """(score without the factor, factor) where `s` occurs once, multiplied by what does not depend on the key."""
    products = {x for x in score.walk() if x.op == "mul" and SCORE in x.args}
    if len(products) != 1 or score.op not in ("lin", "mul"):
        return score, None
    (found,) = products
    terms = dict(score.args[1]) if score.op == "lin" else {score: 1}
    others = [x for x in found.args if x != SCORE]
    bare = any(SCORE in x.children() for x in score.walk() if x is not found)
    squared = len(others) != len(found.args) - 1
    if found not in terms or squared or bare or not all(_is_row(x) for x in others):
        return score, None
    factor = others[0]
    for other in others[1:]:
        factor = mul(factor, other)
    return rebuild(score, lambda x: SCORE if x == found else None), factor


def _is_row(e: Expr) -> bool:
    return not e.names() & {"s", "j"}

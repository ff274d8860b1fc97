"""Ranges of keys that a block of query rows can keep, and of rows that a block of keys can reach, as Triton text.

A comparison `c * x <= r(y)` bounds `x` by its value at the ends of the block of `y`: at the end where it is widest, for
what some row keeps; at the other, for what all rows keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnc.codegen.triton_text import Slot, Writer
from attnc.expr import INT, ONE, ZERO, Expr, add, const, floordiv, maximum, minimum, neg, scale, sub, terms_of, var

LENGTH = {"j": "S", "i": "L"}
OTHER = {"j": "i", "i": "j"}
Ends = tuple[Expr | None, Expr | None]


@dataclass(frozen=True)
class Span:
    """What is kept by some pair and by all pairs of a block; (first, end), end excluded, None: no bound.

    full: None where nothing is known to be kept by all.
    """

    some: Ends = (None, None)
    full: Ends | None = None


def range_body(keep: Expr, captured: Sequence[Slot], x: str) -> str:
    """The body of hole `visit` (x = "j") or `visit_rows` (x = "i")."""
    span, length = _span(keep, x), var(LENGTH[x])
    full = span.full or (ZERO, ZERO)
    bounds = [rest if end is None else end for end, rest in zip((*span.some, *full), (ZERO, length) * 2, strict=True)]
    writer = Writer(captured, bounds)
    names = ("low", "high", "full_low", "full_high")
    for name, e in zip(names, bounds, strict=True):
        writer.assign(name, _narrow(e, writer.as_kind(e, INT), LENGTH[x]))
    return writer.body(f"return {', '.join(names)}")


def _narrow(e: Expr, text: str, length: str) -> str:
    """Ranges have 32 bits; captured integers may have more, and are cut to the length before."""
    text = text[1:-1] if text.startswith("(") and text.endswith(")") else text
    if e.has("load"):
        text = f"tl.minimum(tl.maximum({text}, 0), {length})"
    return f"tl.cast({text}, tl.int32)" if e.has("load") or e.has("size") or e.names() & {"b", "h"} else text


def _span(keep: Expr, x: str) -> Span:
    if keep.is_const:
        return Span(full=(None, None)) if keep.value else Span(some=(ZERO, ZERO), full=None)
    if keep.op == "and":
        return _meet([_span(part, x) for part in keep.args])
    if keep.op == "or":
        return _join([_span(part, x) for part in keep.args])
    if keep.op == "le":
        return _bound(keep.args[0], x)
    if keep.op == "eq":
        return _meet([_bound(keep.args[0], x), _bound(neg(keep.args[0]), x)])
    return Span()


def _bound(e: Expr, x: str) -> Span:
    """Where `e <= 0` holds: one term in x, the others known at the ends of the block."""
    constant, terms = terms_of(e)
    own = [(atom, coef) for atom, coef in terms if x in atom.names()]
    rest = [(_at_ends(atom, OTHER[x]), coef) for atom, coef in terms if x not in atom.names()]
    step = _steps(own[0][0], x) if len(own) == 1 else None
    ends = [pair for pair, _ in rest if pair is not None]
    if step is None or len(ends) < len(rest):
        return Span()
    # coef * atom <= right, the right side at its greatest and at its least over the block
    greatest, least = const(-constant), const(-constant)
    for pair, (_, c) in zip(ends, rest, strict=True):
        greatest = add(greatest, scale(pair[0 if c > 0 else 1], -c))
        least = add(least, scale(pair[1 if c > 0 else 0], -c))
    coef = int(own[0][1])
    some, full = (_solved(right, coef, step) for right in (greatest, least))
    return Span(some, full)


def _solved(right: Expr, coef: int, step: int) -> Ends:
    """x with `coef * (x // step) <= right`."""
    quotient = floordiv(right, const(abs(coef)))
    if coef > 0:
        return None, scale(add(quotient, ONE), step)
    return scale(neg(quotient), step), None


def _steps(atom: Expr, x: str) -> int | None:
    """c where `atom` is `x // c`, 1 where it is `x`."""
    if atom == var(x):
        return 1
    if atom.op == "floordiv" and atom.args[0] == var(x) and atom.args[1].is_const and atom.args[1].value > 0:
        return int(atom.args[1].value)
    return None


def _at_ends(atom: Expr, y: str) -> tuple[Expr, Expr] | None:
    """A term without x at the least and at the greatest position of the block."""
    if atom.names() <= {"b", "h"}:
        return atom, atom
    step = _steps(atom, y)
    if step is None:
        return None
    low, high = var(f"{y}_low"), sub(var(f"{y}_high"), ONE)
    return floordiv(low, const(step)), floordiv(high, const(step))


def _extreme(rule, values: Sequence[Expr | None]) -> Expr | None:
    found: Expr | None = None
    for value in values:
        if value is not None:
            found = value if found is None else rule(found, value)
    return found


def _tightest(ends: Sequence[Ends]) -> Ends:
    return _extreme(maximum, [low for low, _ in ends]), _extreme(minimum, [high for _, high in ends])


def _meet(spans: Sequence[Span]) -> Span:
    fulls = [span.full for span in spans if span.full is not None]
    return Span(_tightest([span.some for span in spans]), _tightest(fulls) if len(fulls) == len(spans) else None)


def _join(spans: Sequence[Span]) -> Span:
    lows, highs = ([span.some[side] for span in spans] for side in (0, 1))
    some = (
        None if None in lows else _extreme(minimum, lows),
        None if None in highs else _extreme(maximum, highs),
    )
    fulls = [span.full for span in spans if span.full is not None]
    if len({low for low, _ in fulls}) == 1:  # ranges that start together: the longest one
        ends = [high for _, high in fulls]
        return Span(some, (fulls[0][0], None if None in ends else _extreme(maximum, ends)))
    return Span(some, fulls[0] if fulls else None)

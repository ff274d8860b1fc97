"""Derivatives of index expressions, again index expressions.

    derivative(20 * tanh(0.1 * s), s) = 2 - 2 * tanh(0.1 * s) ** 2

Piecewise constant parts (comparisons, floor division, trunc, integers) have derivative 0; at a tie `min` and `max`
share it equally and `abs` has 0, as in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attnc.codegen.triton_text import Slot
from attnc.expr import FLOAT, Expr, add, const, div, floordiv, mul, neg, scale, sub
from attnc.predicate import lt, where

NOTHING = const(0.0)


def derivative(e: Expr, wrt: Expr) -> Expr:
    """d e / d wrt, where `wrt` is `s` or one lookup."""
    memo: dict[Expr, Expr] = {}

    def go(x: Expr) -> Expr:
        if x not in memo:
            if x == wrt:
                memo[x] = const(1.0)
            else:
                memo[x] = _RULES[x.op](x, go) if x.kind == FLOAT and x.op in _RULES else NOTHING
        return memo[x]

    return go(e)


def lookup_slopes(e: Expr, captured: Sequence[Slot]) -> tuple[tuple[Expr, Expr], ...]:
    """(lookup, d e / d lookup) of every float lookup whose captured tensor needs a gradient, where it is not 0."""
    loads = [x for x in e.walk() if x.op == "load" and x.kind == FLOAT and captured[x.args[0]].needs_grad]
    found = [(x, derivative(e, x)) for x in sorted(loads, key=lambda x: (x.args[0], x.key))]
    return tuple((x, slope) for x, slope in found if slope != NOTHING)


Rule = Callable[[Expr, Callable[[Expr], Expr]], Expr]


def _product(x: Expr, go) -> Expr:
    parts = []
    for at in range(len(x.args)):
        slope = go(x.args[at])
        if slope != NOTHING:
            for other in x.args[:at] + x.args[at + 1 :]:
                slope = mul(slope, other)
            parts.append(slope)
    return add(*parts) if parts else NOTHING


def _outer(slope: Callable[[Expr], Expr]) -> Rule:
    """The chain rule for a function of one argument; `slope` is its derivative, given the node itself."""

    def rule(x: Expr, go) -> Expr:
        inner = go(x.args[0])
        return NOTHING if inner == NOTHING else mul(slope(x), inner)

    return rule


def _extreme(x: Expr, go) -> Expr:
    (a, c), (slope_a, slope_c) = x.args, (go(arg) for arg in x.args)
    if (slope_a, slope_c) == (NOTHING, NOTHING):
        return NOTHING
    first, second = (lt(c, a), lt(a, c)) if x.op == "max" else (lt(a, c), lt(c, a))
    return where(first, slope_a, where(second, slope_c, scale(add(slope_a, slope_c), 0.5)))


def _remainder(x: Expr, go) -> Expr:
    a, c = x.args
    turns = go(c)
    return go(a) if turns == NOTHING else sub(go(a), mul(floordiv(a, c), turns))


def _sum(x: Expr, go) -> Expr:
    parts = [scale(go(atom), coef) for atom, coef in x.args[1] if go(atom) != NOTHING]
    return add(*parts) if parts else NOTHING


_RULES: dict[str, Rule] = {
    "lin": _sum,
    "mul": _product,
    "where": lambda x, go: where(x.args[0], go(x.args[1]), go(x.args[2])),
    "min": _extreme,
    "max": _extreme,
    "mod": _remainder,
    "recip": _outer(lambda x: neg(mul(x, x))),
    "exp": _outer(lambda x: x),
    "tanh": _outer(lambda x: sub(const(1.0), mul(x, x))),
    "sigmoid": _outer(lambda x: sub(x, mul(x, x))),
    "log": _outer(lambda x: div(const(1.0), x.args[0])),
    "sqrt": _outer(lambda x: div(const(0.5), x)),
    "abs": _outer(
        lambda x: where(lt(const(0.0), x.args[0]), const(1.0), where(lt(x.args[0], const(0.0)), const(-1.0), NOTHING))
    ),
}

"""The weight of a pair of tokens in a causal product without softmax, taken apart: scales, one-sided factors, decay.

    weight(i, j) = number * f(i) * w(j) * exp(c(i) - c(j)) * exp(r (i - j))     j <= i;     0 for j > i

Source: Sun et al. 2023, arXiv:2307.08621, equation 5; Dao and Gu 2024, arXiv:2405.21060, section 6 (segment sums).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from attnc.expr import FLOAT, ONE, SCORE, Expr, I, J, add, sub, terms_of, var
from attnc.intervals import bounds
from attnc.passes.graph import Unliftable
from attnc.predicate import as_int, rebuild

D = var("d")
FAR = 1 << 40


@dataclass
class Weight:
    """number, loads as (load, power), exponents of one side, and the decay.

    sums: (coefficient, load at i): exp of coefficient times (its value at i less that at j). rates: (coefficient, load
    or None): exp of that times i - j.
    """

    number: float = 1.0
    loads: list[tuple[Expr, int]] = field(default_factory=list)
    exponents: list[tuple[float, Expr]] = field(default_factory=list)
    sums: list[tuple[float, Expr]] = field(default_factory=list)
    rates: list[tuple[float, Expr | None]] = field(default_factory=list)
    scores: int = 0


def of_future(value: Expr, box: Mapping[str, tuple[int, int]]) -> Expr:
    """`value` for j > i."""
    return _decided(rebuild(value, lambda x: add(I, ONE, D) if x == J else None), box)


def of_past(value: Expr, box: Mapping[str, tuple[int, int]]) -> Expr:
    """`value` for j <= i, its choices made."""
    found = _decided(rebuild(value, lambda x: add(J, D) if x == I else None), box)
    return rebuild(found, lambda x: sub(I, J) if x == D else None)


def of_token_itself(value: Expr, box: Mapping[str, tuple[int, int]]) -> Expr:
    return _decided(rebuild(value, lambda x: J if x == I else None), box)


def _decided(value: Expr, box: Mapping[str, tuple[int, int]]) -> Expr:
    """`value` with the choices that hold for all d >= 0 made."""
    ranges = {**box, "i": (0, FAR), "j": (0, FAR), "d": (0, FAR)}

    def leaf(x: Expr) -> Expr | None:
        if x.op == "max" and x.args[1].is_const:
            inner = rebuild(x.args[0], leaf)
            low = bounds(inner, ranges)
            return inner if low is not None and low[0] >= x.args[1].value else None
        if x.op != "where":
            return None
        known = bounds(rebuild(x.args[0], leaf), ranges)
        if known is None or (known[0] and not known[1]):  # may, but need not
            return None
        return rebuild(x.args[1] if known[1] else x.args[2], leaf)

    return rebuild(value, leaf)


def parsed(value: Expr, node: fx.Node) -> Weight:
    """The weight of an expression for j <= i. Raises: Unliftable where it is no product of this kind."""
    weight = Weight()
    _factors(weight, value, 1, node)
    if weight.scores != 1:
        raise Unliftable("the weights are not proportional to the product of queries and keys", node)
    return weight


def _factors(weight: Weight, e: Expr, power: int, node: fx.Node) -> None:
    if e.is_const:
        weight.number *= float(e.value) ** power
    elif e == SCORE:
        weight.scores += power
    elif e.op == "load" and e.kind == FLOAT:
        weight.loads.append((e, power))
    elif e.op == "mul":
        for part in e.args:
            _factors(weight, part, power, node)
    elif e.op == "recip":
        _factors(weight, e.args[0], -power, node)
    elif e.op == "exp":
        _exponent(weight, e.args[0], power, node)
    elif e.op == "lin" and e.args[0] == 0 and len(e.args[1]) == 1:
        ((atom, coef),) = e.args[1]
        weight.number *= float(coef) ** power
        _factors(weight, atom, power, node)
    else:
        raise Unliftable("the weights are no product of decays: a sum, a choice or a function of them remains", node)


def _exponent(weight: Weight, e: Expr, power: int, node: fx.Node) -> None:
    constant, terms = terms_of(e)
    weight.number *= math.exp(float(constant) * power)
    sides: dict[Expr, dict[bool, float]] = {}
    rates: dict[Expr | None, list[float]] = {}
    for atom, coef in terms:
        scaled = float(coef) * power
        where = atom.names() & {"i", "j"}
        if atom.op == "load" and len(where) < 2:
            if not where:
                weight.exponents.append((scaled, atom))
                continue
            at_i = rebuild(atom, lambda x: I if x == J else None)
            both = sides.setdefault(at_i, {})
            both["i" in where] = both.get("i" in where, 0.0) + scaled
            continue
        rate, place = _rate(atom)
        if place is None:
            raise Unliftable("the decay of a pair is data of the pair, no sum from one token to the other", node)
        known = rates.setdefault(rate, [0.0, 0.0, 0.0])
        for k, part in enumerate(place):
            known[k] += scaled * part
    for rate, (of_i, of_j, rest) in rates.items():
        if of_i != -of_j or rest:
            raise Unliftable("the decay depends on more than the distance of the tokens", node)
        weight.rates.append((of_i, rate))
    for at_i, both in sides.items():
        if both.get(True, 0.0) == -both.get(False, 0.0) != 0.0:
            weight.sums.append((both[True], at_i))
            continue
        for is_i, coef in both.items():
            weight.exponents.append((coef, at_i if is_i else rebuild(at_i, lambda x: J if x == I else None)))


def _rate(atom: Expr) -> tuple[Expr | None, tuple[float, float, float] | None]:
    """(load, its logarithm or None, factors of i, of j and of 1) of `load * (i - j)`, `load * i` or `i - j`."""
    parts = list(atom.args) if atom.op == "mul" else [atom]
    loads = [p for p in parts if p.op == "load" or (p.op == "log" and p.args[0].op == "load")]
    places = [p for p in parts if p not in loads]
    if len(places) != 1 or len(loads) > 1 or any(x.names() & {"i", "j"} for x in loads):
        return None, None
    constant, terms = terms_of(as_int(places[0]))
    known = dict(terms)
    if not set(known) <= {I, J}:
        return None, None
    return (loads[0] if loads else None), (float(known.get(I, 0)), float(known.get(J, 0)), float(constant))

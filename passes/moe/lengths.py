"""Quotients and remainders of positions by lengths that are symbols: rows of experts times tokens come apart again."""

from __future__ import annotations

from collections import Counter

from attnc.expr import ONE, ZERO, Expr, add, const, mul, scale, terms_of, var
from attnc.passes.views import Ranges


class Lengths(Ranges):
    """Ranges of coordinates; a coordinate is less than its extent even where that is a symbol."""

    def __init__(self) -> None:
        super().__init__()
        self.extents: dict[str, Expr] = {}

    def declare(self, name: str, extent: Expr) -> None:
        super().declare(name, extent)
        self.extents[name] = extent

    def floordiv(self, e: Expr, divisor: Expr) -> Expr:
        whole, rest = self._parts(e, divisor)
        return whole if self._is_less(rest, divisor) else add(whole, super().floordiv(rest, divisor))

    def mod(self, e: Expr, divisor: Expr) -> Expr:
        _, rest = self._parts(e, divisor)
        return rest if self._is_less(rest, divisor) else super().mod(rest, divisor)

    def _parts(self, e: Expr, divisor: Expr) -> tuple[Expr, Expr]:
        """(quotient of the terms that are multiples of a symbolic divisor, the other terms)."""
        if divisor.is_const:
            return ZERO, e
        constant, terms = terms_of(e)
        whole, rest = [ZERO], [const(constant)]
        for atom, coef in terms:
            found = _quotient(scale(atom, coef), divisor)
            (rest if found is None else whole).append(scale(atom, coef) if found is None else found)
        return add(*whole), add(*rest)

    def _is_less(self, e: Expr, bound: Expr) -> bool:
        """Whether `e` is a position, in row-major order, in axes of which `bound` is the number of elements."""
        if bound.is_const:
            return False
        constant, terms = terms_of(e)
        left = dict(terms)
        inner = ONE
        while left and constant == 0:
            steps = ((atom, self._coordinate(scale(atom, coef), inner)) for atom, coef in left.items())
            atom, coordinate = next((step for step in steps if step[1] is not None), (None, None))
            if atom is None or coordinate is None:
                return False
            del left[atom]
            inner = mul(inner, self.extents[coordinate])
        return constant == 0 and inner == bound

    def _coordinate(self, term: Expr, inner: Expr) -> str | None:
        """The declared coordinate in `coordinate * inner`."""
        known = (name for name in term.names() if name in self.extents)
        return next((name for name in known if mul(var(name), inner) == term), None)


def _quotient(e: Expr, divisor: Expr) -> Expr | None:
    """`e / divisor` where that is exact, both being products."""
    (number, factors), (by, own) = _factored(e), _factored(divisor)
    if by == 0 or number % by or any(factors[x] < count for x, count in own.items()):
        return None
    left = factors - own
    product = ONE
    for x in left.elements():
        product = mul(product, x)
    return scale(product, number // by)


def _factored(e: Expr) -> tuple[int, Counter[Expr]]:
    constant, terms = terms_of(e)
    if constant == 0 and len(terms) == 1:
        ((atom, coef),) = terms
        return int(coef), Counter(atom.args if atom.op == "mul" else (atom,))
    return (int(constant), Counter()) if not terms else (1, Counter((e,)))

"""Comparison, logic and choice over index expressions, in one normal form.

Integer comparisons become `combination <= 0` or `combination == 0` with common factors divided out; conjunctions and
disjunctions are flat, sorted and free of superfluous bounds. Negation is pushed down to the comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from attnc.expr import (
    BOOL,
    FALSE,
    FLOAT,
    INT,
    ONE,
    TRUE,
    UNARY,
    ZERO,
    Expr,
    I,
    J,
    add,
    among,
    choice,
    combination,
    const,
    div,
    floordiv,
    load,
    maximum,
    minimum,
    mod,
    mul,
    neg,
    num,
    scale,
    sub,
    terms_of,
    to_float,
    unary,
)


def as_int(e: Expr) -> Expr:
    """A float expression that is exactly an integer one, as that integer one; else `e` itself."""
    if e.kind != FLOAT:
        return num(e)
    if e.is_const:
        return const(int(e.value)) if math.isfinite(e.value) and e.value == int(e.value) else e
    if e.op == "float":
        return e.args[0]
    if e.op == "lin":
        constant, terms = e.args
        parts = [(as_int(atom), coef) for atom, coef in terms]
        if constant == int(constant) and all(p.kind == INT and c == int(c) for p, c in parts):
            return add(const(int(constant)), *(scale(p, int(c)) for p, c in parts))
    return e


def _gcd_floor(e: Expr) -> Expr:
    """Divide an integer `e <= 0` by the common factor of its coefficients."""
    if e.op != "lin" or e.kind != INT:
        return e
    constant, terms = e.args
    common = math.gcd(*(coef for _, coef in terms))
    if common <= 1:
        return e
    return combination(-((-constant) // common), {atom: coef // common for atom, coef in terms}, INT)


def _over_choices(rule: Callable[[Expr, Expr], Expr], a: Expr, c: Expr) -> Expr | None:
    """Compare under a choice of constants: `where(p, 1, 0) == 1` is `p`."""
    for side, other, swap in ((a, c, False), (c, a, True)):
        if other.is_const and _is_table(side):
            yes, no = (rule(other, x) if swap else rule(x, other) for x in side.args[1:])
            return where(side.args[0], yes, no)
    return None


def _is_table(e: Expr) -> bool:
    return e.op == "where" and all(x.is_const or _is_table(x) for x in e.args[1:])


def _bound_of_abs(e: Expr) -> Expr | None:
    """`|x| + c <= 0` as bounds of x, and `c - |x| <= 0` as a choice of two."""
    constant, terms = terms_of(e)
    if len(terms) != 1 or terms[0][0].op != "abs" or terms[0][0].kind != INT:
        return None
    x, coef = terms[0][0].args[0], terms[0][1]
    below, above = (add(const(constant), scale(x, coef)), add(const(constant), scale(x, -coef)))
    join = conjunction if coef > 0 else disjunction
    return join(le(below, ZERO), le(above, ZERO))


def le(a: Expr, c: Expr) -> Expr:
    a, c = as_int(a), as_int(c)
    chosen = _over_choices(le, a, c)
    if chosen is not None:
        return chosen
    if FLOAT in (a.kind, c.kind):
        if a.is_const and c.is_const:
            return const(a.value <= c.value)
        # Kept as two sides: moving terms across a float comparison can change it at a tie.
        return Expr("le2", (a, c), BOOL)
    e = _gcd_floor(sub(a, c))
    if e.is_const:
        return const(e.value <= 0)
    split = _bound_of_abs(e)
    return split if split is not None else Expr("le", (e,), BOOL)


def lt(a: Expr, c: Expr) -> Expr:
    a, c = as_int(a), as_int(c)
    if FLOAT in (a.kind, c.kind):
        return const(a.value < c.value) if a.is_const and c.is_const else logical_not(le(c, a))
    return le(a, sub(c, ONE)) if c.is_const else le(add(a, ONE), c)  # a choice stays one side


def eq(a: Expr, c: Expr) -> Expr:
    if a.kind == BOOL and c.kind == BOOL:
        if c.is_const:
            a, c = c, a
        if a.is_const:
            return c if a.value else logical_not(c)
        return logical_not(xor(a, c))
    a, c = as_int(a), as_int(c)
    chosen = _over_choices(eq, a, c)
    if chosen is not None:
        return chosen
    if FLOAT in (a.kind, c.kind):
        if a.is_const and c.is_const:
            return const(a.value == c.value)
        return Expr("eq2", tuple(sorted((a, c), key=lambda f: f.key)), BOOL)
    e = sub(a, c)
    if e.is_const:
        return const(e.value == 0)
    if e.op == "lin":
        constant, terms = e.args
        if constant % math.gcd(*(coef for _, coef in terms)):
            return FALSE
        if terms[0][1] < 0:
            e = neg(e)
    return Expr("eq", (e,), BOOL)


def ne(a: Expr, c: Expr) -> Expr:
    return logical_not(eq(a, c))


def truth(e: Expr) -> Expr:
    """`e != 0`, as a cast to bool has it."""
    return e if e.kind == BOOL else ne(e, const(0.0) if e.kind == FLOAT else ZERO)


def logical_not(e: Expr) -> Expr:
    if e.is_const:
        return const(not e.value)
    if e.op == "not":
        return e.args[0]
    if e.op == "le":  # not (x <= 0)  is  1 - x <= 0
        return Expr("le", (_gcd_floor(sub(ONE, e.args[0])),), BOOL)
    if e.op in ("and", "or"):
        parts = [logical_not(x) for x in e.args]
        return disjunction(*parts) if e.op == "and" else conjunction(*parts)
    return Expr("not", (e,), BOOL)


def _join(op: str, parts: tuple[Expr, ...], absorbing: Expr, neutral: Expr) -> Expr:
    flat: dict[Expr, None] = {}
    for part in parts:
        for p in part.args if part.op == op else (part,):
            p = truth(p)
            if p == absorbing:
                return absorbing
            if p != neutral:
                flat[p] = None
    kept = [p for p in flat if not any(_implied(op, p, q) or _absorbed(op, p, q) for q in flat if q != p)]
    if any(logical_not(p) in flat for p in kept):
        return absorbing
    if not kept:
        return neutral
    return kept[0] if len(kept) == 1 else Expr(op, tuple(sorted(kept, key=lambda f: f.key)), BOOL)


def _implied(op: str, p: Expr, q: Expr) -> bool:
    """Whether bound `p` is superfluous beside `q`: same terms, looser (in an and) or tighter (in an or) constant."""
    if p.op != "le" or q.op != "le":
        return False
    (cp, tp), (cq, tq) = terms_of(p.args[0]), terms_of(q.args[0])
    return tp == tq and (cp < cq if op == "and" else cp > cq)


def _absorbed(op: str, p: Expr, q: Expr) -> bool:
    """`p` is superfluous beside `q` as in `(p and q) or q`."""
    inner = "and" if op == "or" else "or"
    return p.op == inner and set(q.args if q.op == inner else (q,)) <= set(p.args)


def conjunction(*parts: Expr) -> Expr:
    return _join("and", parts, FALSE, TRUE)


def disjunction(*parts: Expr) -> Expr:
    return _join("or", parts, TRUE, FALSE)


def xor(a: Expr, c: Expr) -> Expr:
    return disjunction(conjunction(a, logical_not(c)), conjunction(logical_not(a), c))


def where(p: Expr, yes: Expr, no: Expr) -> Expr:
    p = truth(p)
    if p.is_const:
        return yes if p.value else no
    if FLOAT in (yes.kind, no.kind) and yes.kind != no.kind:
        yes, no = to_float(num(yes)), to_float(num(no))
    yes = yes.args[1] if yes.op == "where" and yes.args[0] == p else yes
    no = no.args[2] if no.op == "where" and no.args[0] == p else no
    if yes == no:
        return yes
    if yes.kind == BOOL and no.kind == BOOL:
        return disjunction(conjunction(p, yes), conjunction(logical_not(p), no))
    yes, no = num(yes), num(no)
    if p.op == "not":
        p, yes, no = p.args[0], no, yes
    return choice(p, yes, no)


def rebuild(e: Expr, leaf: Callable[[Expr], Expr | None]) -> Expr:
    """Copy `e` through the simplifying constructors, replacing nodes for which `leaf` returns an expression."""
    memo: dict[Expr, Expr] = {}

    def go(x: Expr) -> Expr:
        if x not in memo:
            found = leaf(x)
            memo[x] = found if found is not None else _remake(x, go)
        return memo[x]

    return go(e)


MAKE: dict[str, Callable[..., Expr]] = {
    "floordiv": floordiv,
    "mod": mod,
    "min": minimum,
    "max": maximum,
    "le2": le,
    "eq2": eq,
    "le": lambda x: le(x, ZERO),
    "eq": lambda x: eq(x, ZERO),
    "not": logical_not,
    "and": conjunction,
    "or": disjunction,
    "where": where,
    "among": among,
    "float": to_float,
    "recip": lambda x: div(const(1.0), x),
    **{op: (lambda x, op=op: unary(op, x)) for op in UNARY},
}


def _remake(x: Expr, go: Callable[[Expr], Expr]) -> Expr:
    if x.op in ("const", "var", "size"):
        return x
    if x.op == "load":
        return load(x.args[0], tuple(go(a) for a in x.args[1:]), x.kind)
    if x.op == "lin":
        return add(const(x.args[0]), *(scale(go(atom), coef) for atom, coef in x.args[1]))
    if x.op == "mul":
        product = go(x.args[0])
        for factor in x.args[1:]:
            product = mul(product, go(factor))
        return product
    return MAKE[x.op](*(go(a) for a in x.args))


def distances(keep: Expr) -> tuple[int | None, int | None]:
    """Bounds of i - j over all pairs that `keep` may keep, for any lengths and tables; None where there is none."""
    if keep.op == "and":
        parts = [distances(part) for part in keep.args]
        least, most = ([x for x in side if x is not None] for side in zip(*parts, strict=True))
        return max(least, default=None), min(most, default=None)
    if keep.op == "or":
        parts = [distances(part) for part in keep.args]
        least, most = (list(side) for side in zip(*parts, strict=True))
        return (None if None in least else min(least)), (None if None in most else max(most))
    if keep.op not in ("le", "eq"):
        return None, None
    constant, terms = terms_of(keep.args[0])
    if keep.op == "eq" and constant == 0:
        width = _same_block(terms)
        return (None, None) if width is None else (1 - width, width - 1)
    coefs = dict(terms)
    if set(coefs) != {I, J} or coefs[I] != -coefs[J]:
        return None, None
    # coef * (i - j) + constant <= 0, or == 0
    coef = coefs[I]
    edge = int(-constant // coef if coef > 0 else -(constant // coef))
    if keep.op == "eq":
        return edge, edge
    return (None, edge) if coef > 0 else (edge, None)


def _same_block(terms: tuple[tuple[Expr, Any], ...]) -> int | None:
    """c, where `terms` are i // c - j // c."""
    if len(terms) != 2 or terms[0][1] != -terms[1][1]:
        return None
    (one, _), (two, _) = terms
    if one.op != "floordiv" or two.op != "floordiv" or one.args[1] != two.args[1] or not one.args[1].is_const:
        return None
    return int(one.args[1].value) if {one.args[0], two.args[0]} == {I, J} else None

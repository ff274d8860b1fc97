"""Index expressions: what one element of a score or mask tensor is, as a function of its position.

An `Expr` is an immutable tree over the coordinates of an attention score, `b` (batch), `h` (query head), `i` (query
row), `j` (key column), the raw product `s = q_i . k_j`, sizes `n0, n1, ...` (integers known at run time only), lookups
`t0[...]` into captured tensors and lists of numbers in them (`j in t0[b, i, :8]`). One rule is written once and read
many ways (reference mask, block classification, FlexAttention `mask_mod`, text), see `attnc.predicate` (comparison and
logic), `attnc.reading` (tensors), `attnc.intervals` (bounds).

Construction simplifies: sums are kept as one linear combination, comparisons as `combination <= 0`, so that
`j <= i`, `i >= j` and `i - j > -1` are the same object. Integer identities are exact; float ones hold up to rounding.

sympy is not used here on purpose: one relational there costs tens of microseconds and the masks of a model hold
thousands; sizes still come from sympy symbols, named by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b

Scalar = bool | int | float

BOOL, INT, FLOAT = "bool", "int", "float"

# op -> kind of its value; None: the kind of its arguments decides.
UNARY: dict[str, Callable[[float], float]] = {
    "exp": math.exp,
    "tanh": math.tanh,
    "sqrt": math.sqrt,
    "log": math.log,
    "sigmoid": lambda x: 1.0 / (1.0 + math.exp(-x)),
    "abs": abs,
    "trunc": math.trunc,
}


@dataclass(frozen=True, slots=True, eq=True)
class Expr:
    """One node: `op`, its arguments and the kind of its value (bool, int or float)."""

    op: str
    args: tuple = ()
    kind: str = INT
    key: int = field(default=0, compare=False, repr=False)

    def __post_init__(self) -> None:
        # A digest rather than hash(): the order of terms, and so every spelling, is the same in each process.
        text = f"{self.op}{self.kind}{_digestible(self.args)}"
        object.__setattr__(self, "key", int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big"))

    def __hash__(self) -> int:
        return self.key

    @property
    def is_const(self) -> bool:
        return self.op == "const"

    @property
    def value(self) -> Scalar:
        assert self.op == "const", self
        return self.args[0]

    def children(self) -> Iterator[Expr]:
        """Sub-expressions, whatever the node's layout."""
        if self.op == "lin":
            for atom, _ in self.args[1]:
                yield atom
            return
        for arg in self.args:
            if isinstance(arg, Expr):
                yield arg

    def walk(self) -> Iterator[Expr]:
        """This node and every node below it, each object once."""
        seen: set[Expr] = set()
        stack = [self]
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                yield node
                stack.extend(node.children())

    def names(self) -> frozenset[str]:
        """The coordinates this expression depends on."""
        return _names(self)

    def has(self, op: str) -> bool:
        return any(node.op == op for node in self.walk())


def _digestible(args: tuple) -> str:
    return ",".join(
        str(a.key) if isinstance(a, Expr) else f"({_digestible(a)})" if isinstance(a, tuple) else repr(a)
        for a in args
    )


@lru_cache(maxsize=65536)
def _names(e: Expr) -> frozenset[str]:
    if e.op == "var":
        return frozenset((e.args[0],))
    return frozenset().union(*(_names(c) for c in e.children()))


def const(value: Scalar) -> Expr:
    kind = BOOL if isinstance(value, bool) else INT if isinstance(value, int) else FLOAT
    return Expr("const", (value,), kind)


def var(name: str, kind: str = INT) -> Expr:
    return Expr("var", (name,), kind)


B, H, I, J = var("b"), var("h"), var("i"), var("j")
SCORE = var("s", FLOAT)
TRUE, FALSE = const(True), const(False)
ZERO, ONE = const(0), const(1)


def size(name: str) -> Expr:
    """An integer that is known at run time only; `name` is a shape symbol or, in a spelling, `n0`, `n1`, ..."""
    return Expr("size", (name,), INT)


def load(slot: int, index: tuple[Expr, ...], kind: str) -> Expr:
    """Element `index` of captured tensor number `slot`."""
    return Expr("load", (slot, *index), kind)


def listing(slot: int, index: tuple[Expr, ...], count: int) -> Expr:
    """The numbers `t[*index, 0]` .. `t[*index, count - 1]` of captured tensor `slot`: only `among` reads them."""
    return load(slot, (*index, const(count)), INT)


def among(x: Expr, numbers: Expr) -> Expr:
    """Whether `x` is one of `numbers`, which are a `listing`: a key that is on its row's list."""
    return Expr("among", (x, numbers), BOOL)


def choice(p: Expr, yes: Expr, no: Expr) -> Expr:
    """`yes` where `p` holds, else `no`; `p` is no constant and the two have one kind (else use `predicate.where`)."""
    return yes if yes == no else Expr("where", (p, yes, no), yes.kind)


def is_pick(e: Expr) -> bool:
    """Whether `e` chooses between two constants."""
    return e.op == "where" and e.args[1].is_const and e.args[2].is_const


# --------------------------------------------------------------------------------------------------------------------
# Arithmetic
# --------------------------------------------------------------------------------------------------------------------


def terms_of(e: Expr) -> tuple[Scalar, tuple[tuple[Expr, Scalar], ...]]:
    """Constant and (atom, coefficient) pairs of a sum."""
    if e.op == "const":
        return (int(e.value) if e.kind == BOOL else e.value), ()
    if e.op == "lin":
        return e.args
    return 0, ((e, 1),)


def combination(constant: Scalar, terms: dict[Expr, Scalar], kind: str) -> Expr:
    """The sum `constant + sum(coef * atom)` in normal form."""
    live = [(atom, coef) for atom, coef in terms.items() if coef != 0]
    if kind == FLOAT and len(live) == 1:
        # A constant choice absorbs what is added to it and what multiplies it: (1 - mask) * min is one choice.
        atom, coef = live[0]
        if is_pick(atom) and (coef != 1 or constant != 0):
            yes, no = (_scaled(arg.value, coef, constant) for arg in atom.args[1:])
            return choice(atom.args[0], const(yes), const(no))
    if not live:
        return const(float(constant) if kind == FLOAT else constant)
    if constant == 0 and len(live) == 1 and live[0][1] == 1 and (live[0][0].kind == kind):
        return live[0][0]
    live.sort(key=lambda term: term[0].key)
    return Expr("lin", (constant, tuple(live)), kind)


def _scaled(value: Scalar, coef: Scalar, constant: Scalar) -> float:
    scaled = float(value) * coef if value != 0 else 0.0
    return scaled + constant


def add(*parts: Expr) -> Expr:
    kind = FLOAT if any(p.kind == FLOAT for p in parts) else INT
    constant: Scalar = 0
    terms: dict[Expr, Scalar] = {}
    for part in parts:
        c, ts = terms_of(num(part) if part.kind == BOOL else part)
        constant += c
        for atom, coef in ts:
            terms[atom] = terms.get(atom, 0) + coef
    return combination(constant, terms, kind)


def scale(e: Expr, factor: Scalar) -> Expr:
    if e.kind == BOOL:
        e = num(e)
    kind = FLOAT if FLOAT in (e.kind, const(factor).kind) else INT
    if factor == 0 and kind == INT:
        return ZERO
    c, ts = terms_of(e)
    constant = c * factor if c != 0 else (0.0 if kind == FLOAT else 0)
    terms: dict[Expr, Scalar] = {}
    parts: list[Expr] = []
    for atom, coef in ts:
        if kind == FLOAT and is_pick(atom):
            yes, no = (_scaled(arg.value, coef * factor, 0.0) for arg in atom.args[1:])
            parts.append(choice(atom.args[0], const(yes), const(no)))
        else:
            terms[atom] = coef * factor
    scaled = combination(constant, terms, kind)
    return add(scaled, *parts) if parts else scaled


def neg(e: Expr) -> Expr:
    return scale(e, -1)


def sub(a: Expr, c: Expr) -> Expr:
    return add(a, neg(c))


def mul(a: Expr, c: Expr) -> Expr:
    a, c = (num(x) if x.kind == BOOL else x for x in (a, c))
    if a.is_const:
        a, c = c, a
    if c.is_const:
        return scale(a, c.value)
    kind = FLOAT if FLOAT in (a.kind, c.kind) else INT
    for pick, other in ((a, c), (c, a)):
        # x * where(p, 1, 0): a 0/1 factor is a choice (scores are finite, so x * 0 is 0).
        if is_pick(pick):
            return choice(pick.args[0], mul(other, pick.args[1]), mul(other, pick.args[2]))
    for total, factor in ((a, c), (c, a)):
        if total.op == "lin" and (len(total.args[1]) > 1 or total.args[0] != 0):
            constant, terms = total.args
            return add(scale(factor, constant), *(mul(scale(atom, coef), factor) for atom, coef in terms))
    coef: Scalar = 1
    factors: list[Expr] = []
    for part in (a, c):
        if part.op == "lin":  # one term, no constant
            ((atom, k),) = part.args[1]
            coef *= k
            part = atom
        factors += part.args if part.op == "mul" else (part,)
    product = Expr("mul", tuple(sorted(factors, key=lambda f: f.key)), kind)
    return scale(product, coef) if coef != 1 else product


def div(a: Expr, c: Expr) -> Expr:
    """True division."""
    if c.is_const and c.value != 0:
        return scale(a, 1.0 / c.value)
    if a.is_const and c.is_const:
        return const(math.nan if a.value == 0 else math.copysign(math.inf, float(a.value)))
    if c.op == "lin" and len(c.args[1]) == 1 and c.args[0] == 0:
        ((atom, coef),) = c.args[1]
        return scale(div(a, atom), 1.0 / coef)
    return mul(a, Expr("recip", (c,), FLOAT))


def floordiv(a: Expr, c: Expr) -> Expr:
    if a.is_const and c.is_const and c.value != 0 and FLOAT not in (a.kind, c.kind):
        return const(a.value // c.value)
    if c.is_const and c.value == 1:
        return a
    if c.is_const and a.kind == INT and c.kind == INT and c.value > 0:
        constant, terms = terms_of(a)
        whole = {atom: coef // c.value for atom, coef in terms if coef % c.value == 0}
        rest = {atom: coef for atom, coef in terms if coef % c.value}
        if whole:
            inner = combination(constant % c.value, rest, INT)
            return add(combination(constant // c.value, whole, INT), floordiv(inner, c))
        if a.op == "floordiv" and a.args[1].is_const:
            return floordiv(a.args[0], const(a.args[1].value * c.value))
    return Expr("floordiv", (a, c), a.kind)


def mod(a: Expr, c: Expr) -> Expr:
    """Remainder with the divisor's sign, as Python and torch.remainder have it."""
    if a.is_const and c.is_const and c.value != 0 and FLOAT not in (a.kind, c.kind):
        return const(a.value % c.value)
    if c.is_const and c.value == 1 and a.kind == INT:
        return ZERO
    if c.is_const and a.kind == INT and c.kind == INT and c.value > 0:
        constant, terms = terms_of(a)
        rest = {atom: coef % c.value for atom, coef in terms if coef % c.value}
        if len(rest) < len(terms) or constant != constant % c.value or dict(terms) != rest:
            return mod(combination(constant % c.value, rest, INT), c)
    return Expr("mod", (a, c), a.kind)


def minimum(a: Expr, c: Expr) -> Expr:
    if a.is_const and c.is_const:
        return const(min(a.value, c.value))
    return a if a == c else Expr("min", (a, c), FLOAT if FLOAT in (a.kind, c.kind) else INT)


def maximum(a: Expr, c: Expr) -> Expr:
    if a.is_const and c.is_const:
        return const(max(a.value, c.value))
    return a if a == c else Expr("max", (a, c), FLOAT if FLOAT in (a.kind, c.kind) else INT)


def unary(op: str, a: Expr) -> Expr:
    a = num(a) if a.kind == BOOL else a
    kind = INT if op == "trunc" or (op == "abs" and a.kind == INT) else FLOAT
    if is_pick(a):
        return choice(a.args[0], unary(op, a.args[1]), unary(op, a.args[2]))
    if op == "log" and a.is_const and a.value == 0:
        return const(float("-inf"))
    if op == "trunc" and a.kind == INT:
        return a
    if a.is_const and a.value == a.value:  # not NaN; exp(-inf) is 0
        try:
            value = UNARY[op](a.value)
        except (ValueError, OverflowError):
            return Expr(op, (a,), kind)
        return const(value if kind == INT else float(value))
    return Expr(op, (a,), kind)


def to_float(e: Expr) -> Expr:
    if e.kind == FLOAT:
        return e
    if e.kind == BOOL:
        return const(float(e.value)) if e.is_const else choice(e, const(1.0), const(0.0))
    return const(float(e.value)) if e.is_const else Expr("float", (e,), FLOAT)


def num(e: Expr) -> Expr:
    """A bool as 0 or 1."""
    if e.kind != BOOL:
        return e
    return const(int(e.value)) if e.is_const else choice(e, ONE, ZERO)

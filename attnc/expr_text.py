"""Index expressions as one line of text, and back.

The text is Python's expression grammar: `i - j <= 511 and t0[b, j] != 0`, `50.0 * tanh(0.0025 * s)`.
`parse(spell(e)) == e` for every expression; numbers are written in full (`repr`), so nothing is lost.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable

from attnc import predicate
from attnc.errors import UsageError
from attnc.expr import (
    BOOL,
    FLOAT,
    INT,
    UNARY,
    Expr,
    add,
    among,
    const,
    div,
    floordiv,
    listing,
    load,
    maximum,
    minimum,
    mod,
    mul,
    neg,
    scale,
    size,
    sub,
    to_float,
    unary,
    var,
)

COORDINATES = {"b": INT, "h": INT, "i": INT, "j": INT, "s": FLOAT}
_SLOT_KIND = {"t": INT, "f": FLOAT, "p": BOOL}
_KIND_SLOT = {kind: letter for letter, kind in _SLOT_KIND.items()}


def spell(e: Expr) -> str:
    """`e` as text; lookups are `t0[...]` (integers), `f0[...]` (floats), `p0[...]` (booleans) by captured slot."""
    return _SPELL[e.op](e) if e.op in _SPELL else _call(e)


def _atom(e: Expr) -> str:
    text = spell(e)
    return text if re.fullmatch(r"[\w.]+(\[[^\[\]]*\])?|\w+\([^()]*\)", text) else f"({text})"


def _number(value: bool | int | float) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "inf", -math.inf: "-inf"}.get(value, "nan")
    return repr(value)


def _sum(e: Expr) -> str:
    constant, terms = e.args
    parts = [_term(atom, coef) for atom, coef in sorted(terms, key=lambda term: term[1] < 0)]
    if constant != 0:
        parts.append(_number(constant))
    return " + ".join(parts).replace("+ -", "- ")


def _term(atom: Expr, coef: float) -> str:
    if abs(coef) == 1:
        return _atom(atom) if coef == 1 else f"-{_atom(atom)}"
    return f"{_number(coef)} * {_atom(atom)}"


def _call(e: Expr) -> str:
    return f"{e.op}({', '.join(spell(a) for a in e.args)})"


def _bound(e: Expr) -> str:
    inner = e.args[0]
    if inner.op == "lin":
        constant, terms = inner.args
        left = add(*(scale(atom, coef) for atom, coef in terms))
        return f"{spell(left)} {'<=' if e.op == 'le' else '=='} {-constant}"
    return f"{spell(inner)} {'<=' if e.op == 'le' else '=='} 0"


def _listed(e: Expr) -> str:
    x, numbers = e.args
    slot, *index, count = numbers.args
    return f"{_atom(x)} in t{slot}[{', '.join([*map(spell, index), f':{count.value}'])}]"


_SPELL = {
    "const": lambda e: _number(e.value),
    "var": lambda e: e.args[0],
    "size": lambda e: e.args[0],
    "load": lambda e: f"{_KIND_SLOT[e.kind]}{e.args[0]}[{', '.join(spell(a) for a in e.args[1:]) or '()'}]",
    "lin": _sum,
    "mul": lambda e: " * ".join(_atom(a) for a in e.args),
    "floordiv": lambda e: f"{_atom(e.args[0])} // {_atom(e.args[1])}",
    "mod": lambda e: f"{_atom(e.args[0])} % {_atom(e.args[1])}",
    "le": _bound,
    "eq": _bound,
    "le2": lambda e: f"{_atom(e.args[0])} <= {_atom(e.args[1])}",
    "eq2": lambda e: f"{_atom(e.args[0])} == {_atom(e.args[1])}",
    "among": _listed,
    "not": lambda e: f"not ({spell(e.args[0])})",
    "and": lambda e: " and ".join(f"({spell(a)})" if a.op == "or" else spell(a) for a in e.args),
    "or": lambda e: " or ".join(f"({spell(a)})" for a in e.args),
}

_BINARY: dict[type[ast.operator], Callable[[Expr, Expr], Expr]] = {
    ast.Add: add,
    ast.Sub: sub,
    ast.Mult: mul,
    ast.Div: div,
    ast.FloorDiv: floordiv,
    ast.Mod: mod,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Expr, Expr], Expr]] = {
    ast.LtE: predicate.le,
    ast.Lt: predicate.lt,
    ast.GtE: lambda a, c: predicate.le(c, a),
    ast.Gt: lambda a, c: predicate.lt(c, a),
    ast.Eq: predicate.eq,
    ast.NotEq: predicate.ne,
}
_CALLS: dict[str, Callable[..., Expr]] = {
    "where": predicate.where,
    "min": minimum,
    "max": maximum,
    "float": to_float,
    "recip": lambda x: div(const(1.0), x),
    **{op: (lambda x, op=op: unary(op, x)) for op in UNARY},
}


def parse(text: str) -> Expr:
    """The expression that `text` spells.

    Raises: UsageError if `text` is not in the grammar.
    """
    try:
        return _parse(ast.parse(text, mode="eval").body)
    except UsageError:
        raise
    # What a text can make Python's own parser or the algebra raise; NUL is a ValueError, depth the last two.
    except (SyntaxError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError, MemoryError) as exc:
        raise UsageError(
            f"parse the index expression {text!r:.200}: {str(exc) or type(exc).__name__:.200} is not in the grammar of "
            f"coordinates "
            f"({', '.join(COORDINATES)}), sizes n0.., lookups t0[..], arithmetic, comparisons, and/or/not, where(). "
            "Check the text against attnc.expr_text."
        ) from exc


def _parse(node: ast.expr) -> Expr:
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        return const(node.value)
    if isinstance(node, ast.Name):
        return _name(node.id)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        index = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        slot = node.value.id
        return load(int(slot[1:]), tuple(_parse(x) for x in index), _SLOT_KIND[slot[0]])
    if isinstance(node, ast.BinOp):
        return _BINARY[type(node.op)](_parse(node.left), _parse(node.right))
    if isinstance(node, ast.UnaryOp):
        inner = _parse(node.operand)
        return predicate.logical_not(inner) if isinstance(node.op, ast.Not) else neg(inner)
    if isinstance(node, ast.BoolOp):
        join = predicate.conjunction if isinstance(node.op, ast.And) else predicate.disjunction
        return join(*(_parse(x) for x in node.values))
    if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In):
        return among(_parse(node.left), _listing(node.comparators[0]))
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return _COMPARE[type(node.ops[0])](_parse(node.left), _parse(node.comparators[0]))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _CALLS[node.func.id](*(_parse(x) for x in node.args))
    raise KeyError(ast.dump(node))


def _listing(node: ast.expr) -> Expr:
    """`t0[b, i, :8]`"""
    if not isinstance(node, ast.Subscript) or not isinstance(node.value, ast.Name) or node.value.id[0] != "t":
        raise KeyError(ast.dump(node))
    *index, numbers = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    count = numbers.upper if isinstance(numbers, ast.Slice) and not (numbers.lower or numbers.step) else None
    if not isinstance(count, ast.Constant) or not isinstance(count.value, int):
        raise KeyError(ast.dump(node))
    return listing(int(node.value.id[1:]), tuple(map(_parse, index)), count.value)


def _name(name: str) -> Expr:
    if name in COORDINATES:
        return var(name, COORDINATES[name])
    if name in ("inf", "nan"):
        return const(float(name))
    if re.fullmatch(r"n\d+", name):
        return size(name)
    raise KeyError(name)

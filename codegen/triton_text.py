"""Index expressions as Triton source: the bodies of a skeleton's holes.

    text_of(parse("i - j <= 511 and t0[b, i] == t0[b, j]"), slots) ->
        t0_b_i = tl.load(t0 + b * t0_s0 + tl.minimum(i, t0_d1 - 1) * t0_s1)
        t0_b_j = tl.load(t0 + b * t0_s0 + tl.minimum(j, t0_d1 - 1) * t0_s1)
        return ((i - j) <= 511) & (t0_b_i == t0_b_j)

A body reads the hole's parameters (`s`, `b`, `h`, `i`, `j`, `m_ok`) and, by these names, what stands for `captured`:
`t0` the pointer of captured tensor 0, `t0_s1` its stride and `t0_d1` its length along dimension 1, in elements, `n0`
the first size; `g0` the float32 gradient buffer of captured tensor 0, contiguous, of its shape. Integers have 32 bits,
or 64 where values may need them, and divide as Python's do; floats have 32.

A lookup by both `i` and `j` alone is masked by `m_ok`; any other index is held inside the table, as `attnc.reading`
holds it, so that rows and keys beyond the lengths read nothing foreign.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from attnc.errors import LoweringError
from attnc.expr import BOOL, FLOAT, INT, Expr, terms_of

CAPTURED_NAME = re.compile(r"\b(?:t\d+(?:_[sd]\d+)?|n\d+)\b")
# Positions, sizes and captured integers of 32 bits are taken to stay below this; products beyond 31 bits take 64.
LARGEST_INDEX = 1 << 24
_FLOAT32_MAX, _FLOAT32_TINY = (2.0 - 2.0**-23) * 2.0**127, 2.0**-126


@dataclass(frozen=True)
class Slot:
    """What a kernel must know of one captured tensor.

    needs_grad: whether its gradient is accumulated. wide: whether offsets into it may need 64 bits.
    """

    dtype: torch.dtype
    rank: int
    needs_grad: bool = False
    wide: bool = False


def slot_of(tensor: torch.Tensor, *, needs_grad: bool | None = None, wide: bool = False) -> Slot:
    """The slot of `tensor`; gradients as `requires_grad` says unless given."""
    learns = tensor.requires_grad if needs_grad is None else needs_grad
    return Slot(tensor.dtype, tensor.dim(), learns and tensor.dtype.is_floating_point, wide)


def text_of(e: Expr, captured: Sequence[Slot]) -> str:
    """The body of a function that returns `e`: assignments, shared parts named once, then `return`.

    Raises: LoweringError for a lookup that `captured` does not describe.
    """
    writer = Writer(captured, [e])
    return writer.body(f"return {writer.value(e)}")


def captured_names(texts: Iterable[str]) -> tuple[str, ...]:
    """The names in `texts` that stand for captured tensors and sizes, tensors first, each with strides and lengths."""
    found = {name for text in texts for name in CAPTURED_NAME.findall(text)}
    return tuple(sorted(found, key=_place))


def gradient_names(texts: Iterable[str]) -> tuple[str, ...]:
    """The names in `texts` of gradient buffers."""
    found = {name for text in texts for name in re.findall(r"\bg\d+\b", text)}
    return tuple(sorted(found, key=lambda name: int(name[1:])))


def _place(name: str) -> tuple:
    base, _, part = name.partition("_")
    return base[0] == "n", int(base[1:]), part[:1] == "d", part


@dataclass
class Writer:
    """Writes expressions as Triton text into one function body.

    roots: every expression that the body will hold, so that shared parts are known before the first is written.
    """

    slots: Sequence[Slot]
    roots: Iterable[Expr] = ()
    lines: list[str] = field(default_factory=list)
    known: dict[Expr, str] = field(default_factory=dict)
    uses: Counter = field(init=False)

    def __post_init__(self) -> None:
        self.roots = tuple(self.roots)
        nodes = {node for root in self.roots for node in root.walk()}
        self.uses = Counter(child for node in nodes for child in node.children())
        self.uses.update(self.roots)

    def value(self, e: Expr) -> str:
        """`e` as text that can stand in any expression."""
        if e in self.known:
            return self.known[e]
        text = _TEXT[e.op](self, e)
        if e.op == "load":
            text = self.assign(_load_name(e) or self.fresh(), text)
        elif e.op not in ("const", "var", "size") and self.uses[e] > 1:
            text = self.assign(self.fresh(), text)
        elif not re.fullmatch(r"-?[\w.]+|[\w.]+\([^()]*\)", text):
            text = f"({text})"
        self.known[e] = text
        return text

    def assign(self, name: str, text: str) -> str:
        self.lines.append(f"{name} = {text}")
        return name

    def fresh(self) -> str:
        return f"x{sum(line.startswith('x') for line in self.lines)}"

    def body(self, last: str) -> str:
        """The lines so far, then `last`."""
        return "\n".join([*self.lines, unwrapped(last)])

    def as_kind(self, e: Expr, kind: str) -> str:
        """`e` as a number of `kind`, integers as floats where a float is asked for."""
        if e.is_const:
            return _number(float(e.value) if kind == FLOAT else e.value)
        text = self.value(e)
        return f"tl.cast({unwrapped(text)}, tl.float32)" if kind == FLOAT and e.kind != FLOAT else text

    def slot(self, e: Expr) -> Slot:
        number = e.args[0]
        if number >= len(self.slots) or self.slots[number].rank != len(e.args) - 1:
            found = f"of rank {self.slots[number].rank}" if number < len(self.slots) else "absent"
            raise LoweringError(
                f"write the lookup t{number} with {len(e.args) - 1} indices as Triton text: captured tensor {number} "
                f"is {found}. Give one slot per captured tensor of the rule."
            )
        return self.slots[number]


def unwrapped(text: str) -> str:
    """Without the one pair of parentheses around everything."""
    lead, inner = ("return ", text[7:]) if text.startswith("return ") else ("", text)
    depth = 0
    for at, letter in enumerate(inner):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and at < len(inner) - 1:
            return text
    return lead + inner[1:-1] if inner.startswith("(") else text


def _number(value: bool | int | float) -> str:
    if not isinstance(value, float):
        return repr(value)
    if abs(value) < _FLOAT32_TINY:
        return "0.0"
    if math.isnan(value) or abs(value) > _FLOAT32_MAX:
        return f'float("{math.copysign(math.inf, value) if value == value else math.nan}")'
    return repr(value)


def _load_name(e: Expr) -> str | None:
    """`t0_b_j` for t0[b, j]: plain lookups are named after what they read."""
    parts = [x.args[0] if x.op == "var" else str(x.value) if x.is_const and x.value >= 0 else None for x in e.args[1:]]
    return None if None in parts else "_".join([f"t{e.args[0]}", *parts, *([] if parts else ["value"])])  # type: ignore[list-item]


def _load(w: Writer, e: Expr) -> str:
    slot, table = w.slot(e), f"t{e.args[0]}"
    pointer = " + ".join([table, *offsets(w, e)])
    text = f"tl.load({pointer}, mask=m_ok, other=0)" if reads_pairs(e) else f"tl.load({pointer})"
    if e.kind == FLOAT and slot.dtype != torch.float32:
        return f"{text}.to(tl.float32)"
    if e.kind == INT and slot.dtype not in (torch.int32, torch.int64):
        return f"{text}.to(tl.int32)"
    return f"{text} != 0" if e.kind == BOOL and slot.dtype != torch.bool else text


def reads_pairs(e: Expr) -> bool:
    """Whether a lookup is by `i` and `j` themselves, so that `m_ok` masks exactly what lies outside."""
    plain = [x for x in e.args[1:] if x.op == "var"]
    return len(plain) + sum(x.is_const for x in e.args[1:]) == len(e.args) - 1 and {"i", "j"} <= {
        x.args[0] for x in plain
    }


def offsets(w: Writer, e: Expr) -> list[str]:
    """One summand per dimension of a lookup: index times stride."""
    slot, table, pairs = w.slot(e), f"t{e.args[0]}", reads_pairs(e)
    parts = []
    for d, x in enumerate(e.args[1:]):
        if x.is_const and x.value == 0:
            continue
        at = held(w, x, f"{table}_d{d}", pairs)
        parts.append(f"{f'tl.cast({at}, tl.int64)' if slot.wide else at} * {table}_s{d}")
    return parts


def held(w: Writer, x: Expr, length: str, pairs: bool = False) -> str:
    """An index as text, held inside its dimension unless it is in range by itself."""
    if x.is_const and x.value < 0:  # from the end, as torch has it
        return f"({length} - {-x.value})"
    text = w.value(x)
    if x.is_const or pairs or (x.op == "var" and x.args[0] in ("b", "h")):
        return text
    inner = unwrapped(text)
    return f"tl.minimum({inner if x.op == 'var' else f'tl.maximum({inner}, 0)'}, {length} - 1)"


# --------------------------------------------------------------------------------------------------------------------
# One row per operation
# --------------------------------------------------------------------------------------------------------------------


def _largest(w: Writer, e: Expr) -> int:
    """An upper bound of |e|, as far as 32 bits are concerned."""
    if e.is_const:
        return abs(int(e.value))
    if e.op == "lin":
        return abs(int(e.args[0])) + sum(abs(int(coef)) * _largest(w, atom) for atom, coef in e.args[1])
    if e.op == "mul":
        return math.prod(_largest(w, factor) for factor in e.args)
    if e.op == "mod" and e.args[1].is_const:
        return abs(int(e.args[1].value))
    if e.op == "floordiv" and e.args[1].is_const:
        return _largest(w, e.args[0]) // max(1, abs(int(e.args[1].value)))
    if e.op == "where":
        return max(_largest(w, e.args[1]), _largest(w, e.args[2]))
    return LARGEST_INDEX


def _factor(w: Writer, e: Expr, kind: str, wide: bool) -> str:
    text, is_wide = w.as_kind(e, kind), e.is_const or (e.op == "mul" and _largest(w, e) >= 1 << 31)
    return f"tl.cast({unwrapped(text)}, tl.int64)" if wide and not is_wide else text


def _linear(w: Writer, constant, terms, kind: str) -> str:
    """A sum as text, what is added before what is taken away; apart, what has no score in it.

    `s + (big * mask - big)`, as it is written: added to `big * mask` first, the score would be rounded away.
    """
    scored = [term for term in terms if kind == FLOAT and "s" in term[0].names()]
    rest = [term for term in terms if term not in scored]
    if scored and len(rest) + (constant != 0) > 1:
        return f"{_linear(w, 0.0, scored, kind)} + ({_linear(w, constant, rest, kind)})"
    wide = kind == INT and sum(abs(int(c)) * _largest(w, a) for a, c in terms) + abs(int(constant)) >= 1 << 31
    parts = []
    for atom, coef in sorted(terms, key=lambda term: term[1] < 0):
        text, size = _factor(w, atom, kind, wide), abs(coef)
        sign = "-" if coef < 0 else "+"
        parts.append(
            f"{sign} {text}" if size == 1 else f"{sign} {_number(float(size) if kind == FLOAT else size)} * {text}"
        )
    if constant != 0 and not (kind == FLOAT and constant != constant):
        number = _number(abs(float(constant)) if kind == FLOAT else abs(constant))
        parts.append(f"{'-' if constant < 0 else '+'} {number}")
    elif constant != constant:
        parts.append(f"+ {_number(math.nan)}")
    text = " ".join(parts)
    return text[2:] if text.startswith("+ ") else f"-{text[2:]}"


def _sum(w: Writer, e: Expr) -> str:
    constant, terms = e.args
    return _linear(w, constant, terms, e.kind)


def _product(w: Writer, e: Expr) -> str:
    wide = e.kind == INT and math.prod(_largest(w, f) for f in e.args) >= 1 << 31
    return " * ".join(_factor(w, factor, e.kind, wide) for factor in e.args)


# tanh(x) = x + x^3 P(x^2) for |x| < 0.625 (Cephes, tanhf.c), where 1 - 2 / (1 + exp(2x)) would cancel.
TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)


def _tanh(w: Writer, e: Expr) -> str:
    """tanh, which the interpreter lacks: exact at both ends, since exp2 overflows to inf and 2 / inf is 0."""
    x = w.assign(w.fresh(), unwrapped(w.as_kind(e.args[0], FLOAT)))
    square = w.assign(w.fresh(), f"{x} * {x}")
    series = _number(TANH[0])
    for coefficient in TANH[1:]:
        sign = "-" if coefficient < 0 else "+"
        series = w.assign(w.fresh(), f"{series} * {square} {sign} {_number(abs(coefficient))}")
    far = w.assign(w.fresh(), f"1.0 - 2.0 / (1.0 + tl.exp2({x} * {_number(2.0 / math.log(2.0))}))")
    return f"tl.where(tl.abs({x}) < 0.625, {x} + {x} * {square} * {series}, {far})"


def _bound(symbol: str) -> Callable[[Writer, Expr], str]:
    def write(w: Writer, e: Expr) -> str:
        constant, terms = terms_of(e.args[0])
        if w.uses[e.args[0]] > 1 or e.args[0].op != "lin":
            return f"{w.value(e.args[0])} {symbol} 0"
        left = sorted(terms, key=lambda term: term[1] < 0)
        if len(left) == 2 and [c for _, c in left] == [1, -1] and constant == 0:
            return f"{w.value(left[0][0])} {symbol} {w.value(left[1][0])}"
        text = _linear(w, 0, terms, INT)
        return f"{f'({unwrapped(text)})' if ' ' in text else text} {symbol} {-constant}"

    return write


def _compare(symbol: str) -> Callable[[Writer, Expr], str]:
    def write(w: Writer, e: Expr) -> str:
        kind = FLOAT if FLOAT in (e.args[0].kind, e.args[1].kind) else INT
        return f"{w.as_kind(e.args[0], kind)} {symbol} {w.as_kind(e.args[1], kind)}"

    return write


def _extreme(name: str) -> Callable[[Writer, Expr], str]:
    def write(w: Writer, e: Expr) -> str:
        a, c = (unwrapped(w.as_kind(x, e.kind)) for x in e.args)
        # As torch's, of which a NaN is one argument's result; integers have none.
        nan = ", propagate_nan=tl.PropagateNan.ALL" if e.kind == FLOAT else ""
        return f"tl.{name}({a}, {c}{nan})"

    return write


def _function(pattern: str) -> Callable[[Writer, Expr], str]:
    def write(w: Writer, e: Expr) -> str:
        kind = e.kind if e.op == "abs" else FLOAT
        return pattern.format(unwrapped(w.as_kind(e.args[0], kind)))

    return write


def _never_negative(e: Expr) -> bool:
    if e.op == "var":
        return e.args[0] in "bhij"
    if e.op == "lin":
        return e.args[0] >= 0 and all(coef >= 0 and _never_negative(atom) for atom, coef in e.args[1])
    if e.op in ("mul", "min", "max", "floordiv"):
        return all(_never_negative(x) for x in e.args)
    return (e.is_const and e.value >= 0) or e.op == "abs" or (e.op == "mod" and _never_negative(e.args[1]))


def _division(power_of_two: str, plain: str, float_text: str) -> Callable[[Writer, Expr], str]:
    """Division that rounds down: Triton's own rounds to zero."""

    def write(w: Writer, e: Expr) -> str:
        a, c = (w.as_kind(x, e.kind) for x in e.args)
        if e.kind == FLOAT:
            return float_text.format(a=a, c=c)
        if e.args[1].is_const and e.args[1].value > 0:
            size = int(e.args[1].value)
            if size & (size - 1) == 0:
                return power_of_two.format(a=a, shift=size.bit_length() - 1, low=size - 1)
            if _never_negative(e.args[0]):
                return f"{a} {plain} {c}"
        a = a if a.isidentifier() else w.assign(w.fresh(), unwrapped(a))
        quotient = w.assign(w.fresh(), f"{a} // {c}")
        rest = w.assign(w.fresh(), f"{a} - {quotient} * {c}")
        positive = e.args[1].is_const and e.args[1].value > 0
        wrong = f"{rest} < 0" if positive else f"({rest} != 0) & (({rest} < 0) != ({c} < 0))"
        change = (quotient, f"{quotient} - 1") if plain == "//" else (rest, f"{rest} + {c}")
        return f"tl.where({wrong}, {change[1]}, {change[0]})"

    return write


def _where(w: Writer, e: Expr) -> str:
    p, yes, no = e.args
    texts = (w.value(p), w.as_kind(yes, e.kind), w.as_kind(no, e.kind))
    return f"tl.where({', '.join(unwrapped(text) for text in texts)})"


_TEXT: dict[str, Callable[[Writer, Expr], str]] = {
    "const": lambda w, e: _number(e.value),
    "var": lambda w, e: e.args[0],
    "size": lambda w, e: e.args[0],
    "load": _load,
    "lin": _sum,
    "mul": _product,
    "recip": lambda w, e: f"1.0 / {w.as_kind(e.args[0], FLOAT)}",
    "float": lambda w, e: w.as_kind(e.args[0], FLOAT),
    "floordiv": _division("{a} >> {shift}", "//", "tl.floor(tl.div_rn({a}, {c}))"),
    "mod": _division("{a} & {low}", "%", "{a} - {c} * tl.floor(tl.div_rn({a}, {c}))"),
    "min": _extreme("minimum"),
    "max": _extreme("maximum"),
    "le": _bound("<="),
    "eq": _bound("=="),
    "le2": _compare("<="),
    "eq2": _compare("=="),
    "not": lambda w, e: f"{w.value(e.args[0])} == 0",
    "and": lambda w, e: " & ".join(w.value(x) for x in e.args),
    "or": lambda w, e: " | ".join(w.value(x) for x in e.args),
    "where": _where,
    "exp": _function("tl.exp({})"),
    "log": _function("tl.log({})"),
    "sqrt": _function("tl.sqrt({})"),
    "sigmoid": _function("tl.sigmoid({})"),
    "abs": _function("tl.abs({})"),
    "trunc": _function("tl.cast({}, tl.int32)"),
    "tanh": _tanh,
}

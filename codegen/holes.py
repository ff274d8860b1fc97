"""The holes of attention skeletons, and what a rule puts into them.

Every hole is a `@triton.jit` function with exactly these parameters; the skeleton's own version is dense attention.

    keep(b, h, i, j, m_ok, captured)             whether a pair is kept, before `m_ok` is applied
    score(s, b, h, i, j, m_ok, captured)         natural-log logit of the raw product `s`, float32, of the shape of `s`
    score_slope(s, b, h, i, j, m_ok, captured)   d score / d s
    add_grads(d_score, s, b, h, i, j, m_ok, captured, captured_grads)
                                                 adds d loss / d captured by atomics
    add_grads_of_rows(...)                       the same where h goes along i
    sink(b, h, i, captured)                      the logit of a row's sink; -inf: none
    gain(b, h, i, captured)                      a factor of a row's output
    visit(b, h, i_low, i_high, L, S, captured) -> low, high, full_low, full_high
                                                 keys that some row in i_low .. i_high - 1 may keep, low .. high - 1,
                                                 and keys that all these rows keep, full_low .. full_high - 1
    visit_rows(b, h, j_low, j_high, L, S, captured) -> low, high, full_low, full_high
                                                 the same for the rows that may keep keys j_low .. j_high - 1

Coordinates broadcast against each other: `i` may be a column and `j` a row, or the reverse; `b` and `h` are scalars, or
go along `i` where query heads are packed. `visit` takes scalars, `add_grads` scalars b, h, a column i and a row j. Ends
of ranges may lie outside 0 .. S (0 .. L): the skeleton cuts them; a range with low >= high is empty.

Ranges come from comparisons linear in `i` and `j`, also in block numbers (`i // 64`), with sizes and lookups by b and
h: windows, causal masks with a cache, chunks, lengths of sequences. What is not of that kind is visited in full and
masked, so that ranges are always safe.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from attnc.codegen.derivative import derivative, lookup_slopes
from attnc.codegen.ranges import range_body
from attnc.codegen.triton_text import Slot, Writer, held, text_of, unwrapped
from attnc.errors import LoweringError
from attnc.expr import FLOAT, SCORE, Expr, const, terms_of, to_float
from attnc.rule_attention import AttentionRule

PARAMETERS = {
    "keep": ("b", "h", "i", "j", "m_ok", "captured"),
    "score": ("s", "b", "h", "i", "j", "m_ok", "captured"),
    "score_slope": ("s", "b", "h", "i", "j", "m_ok", "captured"),
    "add_grads": ("d_score", "s", "b", "h", "i", "j", "m_ok", "captured", "captured_grads"),
    "add_grads_of_rows": ("d_score", "s", "b", "h", "i", "j", "m_ok", "captured", "captured_grads"),
    "sink": ("b", "h", "i", "captured"),
    "gain": ("b", "h", "i", "captured"),
    "visit": ("b", "h", "i_low", "i_high", "L", "S", "captured"),
    "visit_rows": ("b", "h", "j_low", "j_high", "L", "S", "captured"),
}


def holes_of(
    rule: AttentionRule, captured: Sequence[Slot], wanted: Collection[str] = tuple(PARAMETERS)
) -> dict[str, str]:
    """The body of each `wanted` hole for `rule`, in the order of PARAMETERS.

    captured: one slot per captured tensor of the rule.
    Raises: LoweringError for what kernels do not compute: a factor of the rows, dropout, sinks by key.
    """
    _check(rule)
    sink = const(float("-inf")) if rule.sink is None else rule.sink
    gain = const(1.0) if rule.gain is None else rule.gain
    bodies = {
        "keep": lambda: _keep(rule.keep, captured),
        "score": lambda: _score(rule.score, captured),
        "score_slope": lambda: text_of(derivative(rule.score, SCORE), captured),
        "add_grads": lambda: _add_grads(rule.score, captured, frozenset("i")),
        "add_grads_of_rows": lambda: _add_grads(rule.score, captured, frozenset("hi")),
        "sink": lambda: text_of(to_float(sink), captured),
        "gain": lambda: text_of(to_float(gain), captured),
        "visit": lambda: range_body(rule.keep, captured, "j"),
        "visit_rows": lambda: range_body(rule.keep, captured, "i"),
    }
    return {name: write() for name, write in bodies.items() if name in wanted}


def plain_scale(rule: AttentionRule) -> float:
    """c where the score is `c * s` and nothing else, so that kernels may leave the factor to the end; else 0."""
    constant, terms = terms_of(rule.score)
    return float(terms[0][1]) if constant == 0 and [atom for atom, _ in terms] == [SCORE] else 0.0


def _check(rule: AttentionRule) -> None:
    found = None
    if rule.row is not None:
        found = "a factor of the query rows, allowed is none. Multiply the query first (forms.masked.scaled_rows)"
    elif rule.dropout:
        found = f"dropout={rule.dropout}, allowed is 0. Leave the region as written"
    elif rule.sink is not None and {"j", "s"} & rule.sink.names():
        found = "a sink that depends on the key, allowed are b, h and i. Use another form"
    if found:
        raise LoweringError(f"write {rule.spell()!r} as Triton holes: found {found}.")


LEAST = "-2.3e38"  # a score below it is -inf in units of log 2 of float32


def _keep(keep: Expr, captured: Sequence[Slot]) -> str:
    if keep.is_const:
        return "return m_ok" if keep.value else "return m_ok & (j < 0)"
    writer = Writer(captured, [keep])
    return writer.body(f"return {writer.value(keep)}")


def _score(score: Expr, captured: Sequence[Slot]) -> str:
    writer = Writer(captured, [score])
    text = writer.as_kind(score, FLOAT)
    if score.has("load"):  # a mask of the run: finfo.min in units of log 2 would be -inf, and its row without keys
        x = writer.assign("x", unwrapped(text))
        text = f"tl.where(({x} < {LEAST}) & ({x} > float('-inf')), {LEAST}, {x})"
    return writer.body(f"return {text}" if "s" in score.names() else f"return {text} + tl.zeros_like(s)")


def _add_grads(score: Expr, captured: Sequence[Slot], rows: frozenset[str]) -> str:
    """rows: the coordinates that are columns."""
    slopes = lookup_slopes(score, captured)
    if not slopes:
        return "return"
    writer = Writer(captured, [slope for _, slope in slopes] + [x for load, _ in slopes for x in load.args[1:]])
    for number, (load, slope) in enumerate(slopes):
        text = "d_score" if slope == const(1.0) else f"d_score * {writer.as_kind(slope, FLOAT)}"
        # A slope may be anything where nothing flows: where no pair is, or is kept.
        d = writer.assign(f"d{number}", f"tl.where(m_ok & (d_score != 0.0), {text}, 0.0)")
        used = frozenset().union(*(x.names() for x in load.args[1:]))
        if not used & (rows | {"j"}):
            d = f"tl.sum({d})"
        elif not used & rows:
            d = f"tl.sum({d}, axis=0)[None, :]"
        elif "j" not in used:
            d = f"tl.sum({d}, axis=1)[:, None]"
        writer.lines.append(f'tl.atomic_add({_gradient_pointer(writer, load)}, {d}, sem="relaxed")')
    return writer.body("return").removesuffix("\nreturn")


def _gradient_pointer(w: Writer, load: Expr) -> str:
    """Where the gradient of a lookup goes: the buffer is contiguous, so strides are products of lengths."""
    table, slot = f"t{load.args[0]}", w.slot(load)
    text = ""
    for d, x in enumerate(load.args[1:]):
        at = held(w, x, f"{table}_d{d}")
        at = f"tl.cast({at}, tl.int64)" if slot.wide else at
        if text:
            text = f"({text})" if " " in text else text
            text = f"{text} * {table}_d{d}" + (f" + {at}" if at != "0" else "")
        else:
            text = at
    return f"g{load.args[0]} + {text}" if text else f"g{load.args[0]}"

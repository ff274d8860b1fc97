"""From a lifted score to score, mask and empty rows: what is masked, with what, whether a row can lose all keys.

A mask is a choice whose losing side is so low that its weight is 0 (-inf, finfo.min, -1e9). It may be added, chosen by
`where`, filled in, or multiplied; it is taken out of sums and clamps and becomes the predicate `keep`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from attnc import predicate
from attnc.expr import FALSE, FLOAT, TRUE, ZERO, Expr, I, J, add, const, scale, sub, terms_of
from attnc.passes.views import Ranges
from attnc.rule_attention import MASKING, lone_run_mask, lowered, run_masks

# A score this low has weight exp(score - max) = 0 beside any key that is kept, unless all kept scores of the row lie
# below -9900 themselves: GPT-2's and BERT's -1e4, finfo(float16).min and below.
LOWEST = -MASKING
# Adding this to a score leaves nothing of the score in float32: a row without keys is then uniform.
SWALLOWS = -1e30
# Gradients of a masked pair end where the mask was chosen (where, masked_fill), and reach the score where it was added;
# of parts of the score, or of a clamp at a tie: "partly".
REACHES = ("chosen", "added", "partly")


@dataclass(frozen=True)
class MaskedScore:
    """Score and mask of an attention.

    fill is "none", "-inf" or "finite", empty one of region.EMPTY_ROWS; shift was taken off the scores of each row, and
    goes off a sink. reach: how far gradients of masked pairs come, one of REACHES.
    """

    score: Expr
    keep: Expr
    fill: str
    empty: str
    shift: Expr = ZERO
    reach: str = "chosen"

    @staticmethod
    def join(score: Expr, keep: Expr) -> Expr:
        """`score` where `keep` holds, else -inf: a boolean mask as scaled_dot_product_attention reads it."""
        return predicate.where(keep, score, const(float("-inf")))


@dataclass
class _Stripped:
    score: Expr
    keep: Expr
    fills: tuple[float, ...]
    uniform: bool = True  # whether all masked scores of a row are equal
    reach: str = "chosen"


def split_mask(score: Expr, ranges: Ranges, lengths: tuple[Expr, Expr], *, written: str) -> MaskedScore | str:
    """`score` with its mask taken out, or the sentence that says why it cannot be."""
    stripped = strip(score)
    if "s" not in stripped.score.names():
        return "the scores do not depend on the product of queries and keys"
    keep = decide(stripped.keep, ranges)
    if len(stripped.fills) > 1 and _empty(keep, stripped, ranges, lengths, written) == "unknown":
        alone = strip(score, float("-inf"))
        if each_row_keeps(decide(alone.keep, ranges), ranges, lengths):
            stripped, keep = replace(alone, score=_swallowing(alone.score)), decide(alone.keep, ranges)
    stripped.score = assume(stripped.score, stripped.keep)
    shift = row_shift(stripped.score)
    if "s" in keep.names():
        return "the mask depends on the scores themselves"
    if keep == FALSE:
        return "the mask keeps no pair"
    fill = "none" if keep == TRUE else "-inf" if float("-inf") in stripped.fills else "finite"
    empty = _empty(keep, stripped, ranges, lengths, written)
    return MaskedScore(sub(stripped.score, shift), keep, fill, empty, shift, stripped.reach)


def settled(masked: MaskedScore, *, trains: bool, written: str, learned: Callable[[int], bool]) -> MaskedScore:
    """`masked` with what a row without keys gives once numbers of the run and gradients are looked at.

    A number that a run gives each key may be a mask too, of -inf even: beside a finite mask it decides over which keys
    a lost row is uniform. In training torch's CPU kernel rebuilds the weights as exp(score - lse), which is 1 and not
    1/S where the score swallowed log S (`benchmarks/sdpa_fault.py`): what was composed stays composed, SDPA stays as it
    is.

    learned: whether a captured tensor, by its slot, has a gradient; such a bias does not come near a mask.
    """
    if run_masks(masked.score, learned):
        alone = masked.keep == TRUE and masked.reach != "partly" and lone_run_mask(masked.score, learned) is not None
        # Where it is alone, `without_lost_rows` finds the lost rows when they are there.
        if masked.fill == "finite" or (trains and written == "composed" and not alone):
            return replace(masked, empty="unknown")
    if written == "composed" and masked.empty == "never" and lowered(masked.score, learned):
        return replace(masked, empty="nan")  # a softmax by hand over nothing but -inf
    if not trains or masked.empty != "mean" or masked.reach == "chosen":
        return masked
    return replace(masked, empty="mean_added" if (masked.reach, written) == ("added", "composed") else "unknown")


def zero_after(masked: MaskedScore, kept: Expr, ranges: Ranges, *, trains: bool) -> MaskedScore | str:
    """`masked` where weights outside of `kept` are set to zero behind the softmax, or why that is another function.

    Where a row keeps a key the softmax gives zero outside of `keep` already; a row without keys becomes zero.
    """
    kept = decide(kept, ranges)
    if kept != masked.keep and predicate.conjunction(masked.keep, predicate.logical_not(kept)) != FALSE:
        return "weights that the scores' mask keeps are set to zero behind the softmax"
    if masked.empty == "never":
        return masked
    if kept != masked.keep:
        return "the masks before and behind the softmax differ, and a row may lose all its keys"
    if trains and masked.empty == "nan" and masked.reach != "chosen":
        return "a row may lose all its keys, whose weights are zero but whose gradient is NaN"
    return replace(masked, empty="zero")


def assume(score: Expr, keep: Expr) -> Expr:
    """`score` where `keep` holds: choices by its conjuncts are made."""
    known = set(keep.args if keep.op == "and" else (keep,)) | {keep}

    def leaf(x: Expr) -> Expr | None:
        if x.op == "where" and (x.args[0] in known or predicate.logical_not(x.args[0]) in known):
            return assume(x.args[1] if x.args[0] in known else x.args[2], keep)
        return None

    return score if keep == TRUE else predicate.rebuild(score, leaf)


def row_shift(score: Expr) -> Expr:
    """The terms of `score` that are one number per row: softmax does not see them (a subtracted maximum).

    Not the large ones: `(1 - t[j]) * -1e38` without its constant, or a padded row that is lowered as a whole, would be
    the same in real numbers only.
    """
    if score.op != "lin":
        return const(0.0)
    constant, terms = score.args
    rows = [
        scale(atom, coef)
        for atom, coef in terms
        if not atom.names() & {"s", "j"}
        and not _is_large(atom, coef)
        and not (coef > 0 and run_masks(atom))
    ]
    return add(const(float(constant) if abs(constant) < -LOWEST else 0.0), *rows)


def _is_large(atom: Expr, coef: float) -> bool:
    return abs(coef) >= -LOWEST or any(x.is_const and abs(x.value) >= -LOWEST for x in atom.walk())


def _is_low(e: Expr, lowest: float) -> bool:
    return e.is_const and e.kind == FLOAT and e.value <= lowest


def _swallowing(score: Expr) -> Expr:
    """`score` with the lowest numbers raised to one that leaves as little of a score and stays finite when scaled."""

    def leaf(x: Expr) -> Expr | None:
        return const(SWALLOWS) if _is_low(x, SWALLOWS) and x.value > float("-inf") else None

    return predicate.rebuild(score, leaf)


def strip(e: Expr, lowest: float = LOWEST) -> _Stripped:
    """`e` and what is masked in it: with `lowest` and what is lower still."""
    if e.op == "where":
        p, yes, no = e.args
        for wanted, low, kept in ((p, no, yes), (predicate.logical_not(p), yes, no)):
            if _is_low(low, lowest):
                inner = strip(kept, lowest)
                again = inner.fills == (low.value,) and inner.uniform and inner.reach == "chosen"
                fills = inner.fills if again else (low.value, *inner.fills)
                keep = predicate.conjunction(wanted, inner.keep)
                reach = inner.reach if inner.fills else "chosen"
                return _Stripped(inner.score, keep, fills, again or not inner.fills, reach)
    if e.op == "lin" and e.kind == FLOAT:
        return _strip_sum(e, lowest)
    if e.op == "max" and any(_is_low(a, lowest) for a in e.args):
        inner = strip(e.args[1] if _is_low(e.args[0], lowest) else e.args[0], lowest)
        return replace(inner, reach="partly") if inner.reach == "added" or not inner.fills else inner
    return _Stripped(e, TRUE, ())


def _strip_sum(e: Expr, lowest: float) -> _Stripped:
    constant, terms = e.args
    parts, keep = [const(float(constant))], TRUE
    fills: tuple[float, ...] = ()
    masks: list[_Stripped] = []
    others = False  # whether something without a mask is added
    for atom, coef in terms:
        inner = strip(atom, lowest) if coef > 0 else _Stripped(atom, TRUE, ())
        scaled = tuple(fill * coef for fill in inner.fills)
        if any(fill > LOWEST for fill in scaled):
            inner, scaled = _Stripped(atom, TRUE, ()), ()
        masks += [inner] if scaled else []
        others = others or not scaled
        parts.append(scale(inner.score, coef))
        keep = predicate.conjunction(keep, inner.keep)
        fills += scaled
    alone = len(terms) == 1 and constant == 0
    return _Stripped(add(*parts), keep, fills, alone or all(fill <= SWALLOWS for fill in fills), _reach(masks, others))


def _reach(masks: list[_Stripped], others: bool) -> str:
    """How far gradients of masked pairs come in a sum of `masks` and, if so, of `others`."""
    pure = all(mask.score.is_const for mask in masks)  # nothing but the mask: where(keep, 0, low)
    if pure and others:
        return "added"
    return masks[0].reach if len(masks) == 1 and not others else "partly" if masks else "chosen"


def decide(p: Expr, ranges: Ranges) -> Expr:
    """`p` without the comparisons that the ranges of the coordinates decide (a window longer than the sequence)."""

    def leaf(x: Expr) -> Expr | None:
        if x.op not in ("le", "eq", "le2", "eq2"):
            return None
        known = ranges.of(x)
        if known is None or known == (True, False):
            return None
        return TRUE if known[1] is True else FALSE if known[0] is False else None

    return predicate.rebuild(p, leaf)


def _empty(keep: Expr, stripped: _Stripped, ranges: Ranges, lengths: tuple[Expr, Expr], written: str) -> str:
    if keep == TRUE or each_row_keeps(keep, ranges, lengths):
        return "never"
    fills = stripped.fills
    finite = [f for f in fills if f != float("-inf")]
    if len(finite) == len(fills) == 1 and stripped.uniform:
        return "mean"
    if not finite:
        return "zero" if written == "sdpa" else "nan"
    # Two finite fills add up to -inf where both apply: some keys of an empty row weigh more than others.
    return "unknown"


def at_key(e: Expr, key: Expr) -> Expr:
    """`e` with `j` replaced by `key`."""
    return predicate.rebuild(e, lambda x: key if x == J else None)


def each_row_keeps(keep: Expr, ranges: Ranges, lengths: tuple[Expr, Expr]) -> bool:
    """Whether some key is kept in every row: proven by naming one (the diagonal, its end, the first or last key)."""
    rows, cols = lengths
    candidates = [ZERO, sub(cols, const(1))]
    if rows == cols or (rows.is_const and cols.is_const and rows.value <= cols.value):
        candidates.insert(0, I)
    candidates.append(add(I, sub(cols, rows)))
    return any(decide(at_key(keep, key), ranges) == TRUE for key in candidates)


# --------------------------------------------------------------------------------------------------------------------
# Labels
# --------------------------------------------------------------------------------------------------------------------


def label(keep: Expr, score: Expr) -> str:
    """What a mask means, in one word: none, causal, window, chunked, prefix, document, padding, chosen (keys on
    lists of the run), predicate or tensor."""
    if keep == TRUE:
        return _label_of_bias(score)
    parts = keep.args if keep.op == "and" else (keep,)
    kinds = {_part(p) for p in parts}
    for kind in ("tensor", "chosen"):
        if kind in kinds:
            return kind
    for kind in ("document", "predicate", "padding", "prefix", "chunked", "window"):
        if kind in kinds:
            return kind
    return "causal"


def _label_of_bias(score: Expr) -> str:
    """A mask that stayed a number from run-time data: a lookup times what only a mask would be multiplied by."""
    for node in score.walk():
        if node.op == "lin" and any(abs(coef) >= -LOWEST for _, coef in node.args[1]):
            loads = [x for x in node.walk() if x.op == "load"]
            if loads:
                return "tensor" if any({I, J} <= set(x.args[1:]) for x in loads) else "padding"
    return "none"


def _part(p: Expr) -> str:
    if p.op == "among" and "j" in p.args[0].names():
        return "chosen"
    loads = [x for x in p.walk() if x.op == "load"]
    if any({I, J} <= set(x.args[1:]) for x in loads):
        return "tensor"
    if p.op == "le":
        constant, terms = terms_of(p.args[0])
        coefs = {atom: coef for atom, coef in terms if atom in (I, J)}
        if not loads and all(atom in (I, J) or atom.op == "size" for atom, _ in terms):
            if coefs == {J: 1, I: -1}:
                return "causal" if constant <= 0 or any(a.op == "size" for a, _ in terms) else "window"
            if coefs == {I: 1, J: -1}:
                return "window"
        if loads and "i" not in p.names():
            return "padding"
    if p.op == "eq":
        a = p.args[0]
        if len(loads) == 2 and loads[0].args[0] == loads[1].args[0]:
            return "document"
        if not loads and a.op == "lin" and all(x.op == "floordiv" for x, _ in a.args[1]):
            return "chunked"
    inner = p.args[0] if p.op == "not" else p
    if loads and "i" not in inner.names():
        return "padding"
    if p.op == "or" and not loads and len(p.args) == 2:
        sides = {_part(q) if "i" in q.names() else "columns" for q in p.args}
        return "prefix" if sides == {"causal", "columns"} else "predicate"
    return "predicate"



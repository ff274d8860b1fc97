"""Softmax attention as facts.

`AttentionRule` is what happens between the raw product `s = q_i . k_j` and the weighted sum of values:

    o_i = sum_j p_ij v_j,   p_ij = exp(score_ij) / (exp(sink_i) + sum_{j kept} exp(score_ij))

with `score` and `keep` index expressions (see `attnc.expr`). A rule is free of shapes; run-time data are slots of
captured tensors (`t0[b, j]`) and sizes (`n0`).

Source: Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, section 3.2.1.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from attnc.errors import UsageError
from attnc.expr import BOOL, FLOAT, SCORE, TRUE, Expr, I, J, terms_of
from attnc.expr_text import parse, spell
from attnc.rule import Rule, Shape

# What a row that keeps no key gives: proven not to occur, 0 (SDPA), NaN (-inf by hand), the mean of all values
# (finfo.min chosen), the same with gradients of the scores (finfo.min added), or something that no form reproduces.
EMPTY_ROWS = ("never", "zero", "nan", "mean", "mean_added", "unknown")
# What a mask adds to a score, or multiplies by, is at least this large (GPT-2's and BERT's 1e4).
MASKING = 1e4


def run_masks(score: Expr, learned: Callable[[int], bool] = lambda slot: False) -> list[Expr]:
    """Parts of `score` that may be masks of the run.

    Such a part is a float of each key or row, or a lookup times what only a mask is multiplied by. learned: whether a
    captured tensor, by its slot, has a gradient; a bias that learns does not come near a mask.
    """
    stack, numbers = [score], []
    while stack:
        x = stack.pop()
        numbers.append(x)
        stack += [y for y in x.children() if y.kind != BOOL]  # what a choice goes by is no number of the score
    return [x for x in dict.fromkeys(numbers) if _may_mask(x, learned)]


def lone_run_mask(score: Expr, learned: Callable[[int], bool]) -> Expr | None:
    """The load that may mask keys, if it is added as it is and nothing else in `score` may be a mask."""
    masks, parts = run_masks(score, learned), linear_score(score)
    if len(masks) != 1 or parts is None or masks[0].op != "load" or masks[0].args[-1] != J:
        return None
    return masks[0] if dict(terms_of(parts[1])[1]).get(masks[0]) == 1 else None


def lowered(score: Expr, learned: Callable[[int], bool] = lambda slot: False) -> Expr | None:
    """What is added to the score and may be a mask of the run, or None: where it is -inf, so is the score.

    As one sum: two of the lowest finite numbers are -inf.
    """
    terms = terms_of(score)[1]
    alone = [(pair, Expr("lin", (0, (pair,)), FLOAT)) for pair in terms if "s" not in pair[0].names()]
    masks = tuple(pair for pair, term in alone if run_masks(term, learned))
    return Expr("lin", (0, masks), FLOAT) if masks else None


def _may_mask(e: Expr, learned: Callable[[int], bool]) -> bool:
    if e.op == "load" and e.kind == FLOAT:
        return bool({I, J} & set(e.args[1:])) and not learned(e.args[0])
    return e.op == "lin" and any(abs(coef) >= MASKING and atom.has("load") for atom, coef in e.args[1])


RULE_PARTS = {"score", "keep", "empty", "sink", "dropout", "row", "gain"}


@dataclass(frozen=True)
class AttentionRule(Rule):
    """Scores, mask and normaliser of a softmax attention.

    score:   float expression of `s`, coordinates and lookups; the scale is part of it.
    keep:    boolean expression; a pair that is not kept has weight 0.
    empty:   what a row without any kept key gives, one of EMPTY_ROWS.
    sink:    a further logit (b, h, i) in the normaliser without a value; None: no sink.
    dropout: probability with which weights are dropped, 0 outside training.
    row:     a factor (b, h, i) of the query, None: 1. The product of the scores is then `row * q_i . k_j`.
    gain:    a factor (b, h) of the output that heads which share a key head have in common, None: 1.
    """

    kind: ClassVar[str] = "attention"

    score: Expr = SCORE
    keep: Expr = TRUE
    empty: str = "never"
    sink: Expr | None = None
    dropout: float = 0.0
    row: Expr | None = None
    gain: Expr | None = None

    @property
    def scale(self) -> float | None:
        """The constant factor of `s`, where the score is `factor * s` plus terms without `s`; else None."""
        parts = linear_score(self.score)
        return None if parts is None else parts[0]

    @property
    def bias(self) -> Expr | None:
        """What is added to `factor * s`; None where the score is not linear in `s` or nothing is added."""
        parts = linear_score(self.score)
        return None if parts is None or (parts[1].is_const and parts[1].value == 0) else parts[1]

    @property
    def softcap(self) -> float | None:
        """`c` where the score is `c * tanh(x / c)`, with or without a bias inside; else None."""
        score = self.score
        if (
            score.op == "lin"
            and score.args[0] == 0
            and len(score.args[1]) == 1
            and score.args[1][0][0].op == "tanh"
        ):
            return float(score.args[1][0][1])
        return None

    @property
    def core(self) -> AttentionRule:
        """The rule as kernels know it: the factor of queries is multiplied in before them."""
        return self if self.row is None else replace(self, row=None)

    def spell(self) -> str:
        """One line; `AttentionRule.parse` reads it back."""
        parts = [f"score={spell(self.score)}"]
        if self.keep != TRUE:
            parts.append(f"keep={spell(self.keep)}")
        if self.keep != TRUE or self.empty != "never":
            parts.append(f"empty={self.empty}")
        if self.sink is not None:
            parts.append(f"sink={spell(self.sink)}")
        if self.dropout:
            parts.append(f"dropout={self.dropout!r}")
        if self.row is not None:
            parts.append(f"row={spell(self.row)}")
        if self.gain is not None:
            parts.append(f"gain={spell(self.gain)}")
        return "; ".join(parts)

    @classmethod
    def parse(cls, text: str) -> AttentionRule:
        """The rule that `text` spells. Raises: UsageError if it is not one."""
        parts = [part.partition("=") for part in text.split("; ") if part]
        given = {name: value for name, _, value in parts}
        unknown = {name for name, equals, _ in parts if not equals} | set(given) - RULE_PARTS
        dropout = given.get("dropout", "0.0")
        if (
            unknown
            or len(given) < len(parts)
            or given.get("empty", "never") not in EMPTY_ROWS
            or re.fullmatch(r"0|1|[01]?\.\d+|\d(\.\d+)?e-\d+", dropout) is None
            or not 0 <= float(dropout) < 1
        ):
            raise UsageError(
                f"parse the attention rule {text!r:.200}: found {sorted(unknown) or dict(given)!r:.200}, allowed are "
                f"score, keep, empty ({', '.join(EMPTY_ROWS)}), sink, dropout (0 to 1), row and gain, each once. Spell "
                "rules with AttentionRule.spell()."
            )
        return cls(
            score=parse(given["score"]) if "score" in given else SCORE,
            keep=parse(given["keep"]) if "keep" in given else TRUE,
            empty=given.get("empty", "never"),
            sink=parse(given["sink"]) if "sink" in given else None,
            dropout=float(dropout),
            row=parse(given["row"]) if "row" in given else None,
            gain=parse(given["gain"]) if "gain" in given else None,
        )

    def facts(self) -> dict[str, object]:
        """The facts by name; expressions as text."""
        return {
            "keep": spell(self.keep),
            "score": spell(self.score),
            "scale": self.scale,
            "softcap": self.softcap,
            "bias": self.bias is not None,
            "sink": self.sink is not None,
            "row": self.row is not None,
            "gain": self.gain is not None,
            "dropout": self.dropout,
            "empty": self.empty,
        }

    def flops(self, shape: AttentionShape) -> int:
        """FLOP of the two products over all pairs, forward, as if no pair were skipped."""
        return 2 * shape.B * shape.Hq * shape.L * shape.S * (shape.E + shape.Ev)

    def elements(self, shape: AttentionShape) -> int:
        """Elements of query, key, value and output, each once."""
        return shape.B * (shape.Hq * shape.L + shape.H * shape.S) * (shape.E + shape.Ev)

    def summary(self, shape: AttentionShape) -> list[str]:
        """Lengths, heads and widths, and what changes the scores."""
        parts = [
            f"{shape.text('L')} x {shape.text('S')}",
            f"heads {shape.Hq}" if shape.Hq == shape.H else f"heads {shape.Hq}/{shape.H}",
            f"E {shape.E}" if shape.Ev == shape.E else f"E {shape.E}/{shape.Ev}",
            f"B {shape.text('B')}",
        ]
        parts += [f"softcap {self.softcap}"] if self.softcap is not None else []
        parts += [name for name in ("bias", "sink") if getattr(self, name) is not None]
        return parts + ([f"dropout {self.dropout}"] if self.dropout else [])


@dataclass(frozen=True)
class AttentionShape(Shape):
    """Sizes of one attention."""

    B: int
    Hq: int
    H: int
    L: int
    S: int
    E: int
    Ev: int

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.Hq // self.H

    @property
    def is_square(self) -> bool:
        """Whether there are as many queries as keys, at every length where lengths are symbolic."""
        return self.text("L") == self.text("S")

    @property
    def has_lengths(self) -> bool:
        """Whether the numbers of queries and keys are known at compile time."""
        return not {"L", "S"} & set(self.symbols)


def linear_score(score: Expr) -> tuple[float, Expr] | None:
    """Split `factor * s + rest`; None where `s` appears in any other way."""
    constant, terms = terms_of(score)
    factor, rest = 0.0, []
    for atom, coef in terms:
        if atom == SCORE:
            factor = float(coef)
        elif "s" in atom.names():
            return None
        else:
            rest.append((atom, coef))
    if not rest:
        return factor, Expr("const", (float(constant),), FLOAT)
    if len(rest) == 1 and rest[0][1] == 1 and constant == 0:
        return factor, rest[0][0]
    return factor, Expr("lin", (constant, tuple(rest)), FLOAT)

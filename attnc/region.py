"""Regions: recognised subgraphs, as facts without the graph they came from.

`AttentionRule` is what happens between the raw product `s = q_i . k_j` and the weighted sum of values:

    o_i = sum_j p_ij v_j,   p_ij = exp(score_ij) / (exp(sink_i) + sum_{j kept} exp(score_ij))

with `score` and `keep` index expressions (see `attnc.expr`). A rule is free of shapes; run-time data are slots of
captured tensors (`t0[b, j]`) and sizes (`n0`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attnc.errors import UsageError
from attnc.expr import FLOAT, SCORE, TRUE, Expr
from attnc.expr_text import parse, spell

KINDS = ("attention", "ffn", "moe", "recurrence")

# What a row that keeps no key gives: proven not to occur, 0 (SDPA), NaN (-inf by hand), the mean of all values
# (finfo.min), or something that no form reproduces.
EMPTY_ROWS = ("never", "zero", "nan", "mean", "unknown")


@dataclass(frozen=True)
class AttentionRule:
    """Scores, mask and normaliser of a softmax attention.

    score:   float expression of `s`, coordinates and lookups; the scale is part of it.
    keep:    boolean expression; a pair that is not kept has weight 0.
    empty:   what a row without any kept key gives, one of EMPTY_ROWS.
    sink:    a further logit (b, h, i) in the normaliser without a value; None: no sink.
    dropout: probability with which weights are dropped, 0 outside training.
    row:     a factor (b, h, i) of the query, None: 1. The product of the scores is then `row * q_i . k_j`.
    """

    score: Expr = SCORE
    keep: Expr = TRUE
    empty: str = "never"
    sink: Expr | None = None
    dropout: float = 0.0
    row: Expr | None = None

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

    def spell(self) -> str:
        """One line; `AttentionRule.parse` reads it back."""
        parts = [f"score={spell(self.score)}"]
        if self.keep != TRUE:
            parts += [f"keep={spell(self.keep)}", f"empty={self.empty}"]
        if self.sink is not None:
            parts.append(f"sink={spell(self.sink)}")
        if self.dropout:
            parts.append(f"dropout={self.dropout!r}")
        if self.row is not None:
            parts.append(f"row={spell(self.row)}")
        return "; ".join(parts)

    @classmethod
    def parse(cls, text: str) -> AttentionRule:
        """The rule that `text` spells. Raises: UsageError if it is not one."""
        given = dict(part.split("=", 1) for part in text.split("; ") if part)
        unknown = set(given) - {"score", "keep", "empty", "sink", "dropout", "row"}
        if unknown or given.get("empty", "never") not in EMPTY_ROWS:
            raise UsageError(
                f"parse the attention rule {text!r}: found {sorted(unknown) or given['empty']}, allowed are score, "
                f"keep, empty ({', '.join(EMPTY_ROWS)}), sink, dropout and row. Spell rules with AttentionRule.spell()."
            )
        return cls(
            score=parse(given["score"]) if "score" in given else SCORE,
            keep=parse(given["keep"]) if "keep" in given else TRUE,
            empty=given.get("empty", "never"),
            sink=parse(given["sink"]) if "sink" in given else None,
            dropout=float(given.get("dropout", 0.0)),
            row=parse(given["row"]) if "row" in given else None,
        )


def linear_score(score: Expr) -> tuple[float, Expr] | None:
    """Split `factor * s + rest`; None where `s` appears in any other way."""
    from_terms = score.args if score.op == "lin" else (0, ((score, 1),))
    constant, terms = from_terms
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


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention; a symbolic length carries its hint here and its name in `symbols`."""

    B: int
    Hq: int
    H: int
    L: int
    S: int
    E: int
    Ev: int
    symbols: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.Hq // self.H

    @property
    def is_static(self) -> bool:
        return not self.symbols


@dataclass(frozen=True)
class Choice:
    """The form picked for a region, its predicted time, and why.

    form: a spelling; "as written" where nothing replaces the region.
    reason: one sentence. refused: form name -> sentence.
    """

    form: str
    reason: str
    predicted_s: float | None = None
    written_s: float | None = None
    refused: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        return self.form.split("{", 1)[0]

    @property
    def rewrites(self) -> bool:
        return self.form != AS_WRITTEN


AS_WRITTEN = "as written"


@dataclass(frozen=True)
class Region:
    """One recognised subgraph.

    path:     module path, as `model.layers.3.self_attn`; "" where unknown.
    written:  how the region is written: "sdpa" (a mask in memory or none), "sdpa_causal" (`is_causal=True`),
              "flex_attention" or "composed".
    fill:     what masked scores are set to, "-inf", "finite" (finfo.min and the like) or "none".
    captured: (dtype, shape) of each captured tensor, as text.
    mask:     a label of what the mask means: none, causal, window, ..., see `passes.masks.label`.
    sizes:    the sizes n0, n1, ... of the rule, as seen at compile time.
    repeats_heads: whether key and value heads are written out once per query head.
    training: whether gradients flow through it.
    """

    kind: str
    path: str
    node: str
    rule: AttentionRule
    shape: Shape
    dtype: str
    device: str
    mask: str = "none"
    written: str = "composed"
    fill: str = "none"
    captured: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    repeats_heads: bool = False
    training: bool = False
    choice: Choice | None = None

    @property
    def facts(self) -> dict[str, object]:
        """The facts of the region by name, as `explain` prints and exports them."""
        rule, shape = self.rule, self.shape
        capped = rule.softcap
        return {
            "B": shape.B,
            "Hq": shape.Hq,
            "H": shape.H,
            "L": shape.L,
            "S": shape.S,
            "E": shape.E,
            "Ev": shape.Ev,
            "group": shape.group,
            "symbols": dict(shape.symbols),
            "dtype": self.dtype,
            "mask": self.mask,
            "keep": spell(rule.keep),
            "score": spell(rule.score),
            "scale": rule.scale,
            "softcap": capped,
            "bias": rule.bias is not None,
            "sink": rule.sink is not None,
            "row": rule.row is not None,
            "dropout": rule.dropout,
            "empty": rule.empty,
            "fill": self.fill,
            "written": self.written,
            "training": self.training,
        }

    @property
    def flops(self) -> int:
        """FLOP of the two products over all pairs, forward, as if no pair were skipped."""
        s = self.shape
        return 2 * s.B * s.Hq * s.L * s.S * (s.E + s.Ev)

    @property
    def bytes(self) -> int:
        """Bytes of query, key, value and output, each once."""
        s = self.shape
        elements = s.B * (s.Hq * s.L * (s.E + s.Ev) + s.H * s.S * (s.E + s.Ev))
        return elements * ITEM_BYTES.get(self.dtype, 4)

    @property
    def refusals(self) -> list[str]:
        return [] if self.choice is None else [f"{name}: {why}" for name, why in self.choice.refused.items()]


ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

"""Regions: recognised subgraphs, as facts without the graph they came from; and the choice made for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from attnc.rule import Rule, Shape
from attnc.rule_attention import AttentionRule, AttentionShape
from attnc.rule_ffn import FFNRule, FFNShape
from attnc.rule_moe import MoERule, MoEShape
from attnc.rule_recurrence import RecurrenceRule, RecurrenceShape

AS_WRITTEN = "as written"
FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, **dict.fromkeys(FLOAT8, 1)}


def form_name(spelling: str) -> str:
    """The form of a spelling, without its knobs."""
    return spelling.split("{", 1)[0]


@dataclass(frozen=True)
class Choice:
    """The form picked for a region, its predicted time, its error, and why.

    form: a spelling; "as written" where nothing replaces the region.
    reason: one sentence. refused: form name -> sentence.
    offers: spelling of each form that applies, with its best knobs -> predicted seconds, fastest first.
    error: of an approximation, the Frobenius norm of what the region's output is off by over that of the output,
           measured in float64 on the user's data, the worst of the batches; row_error: that of the worst single row.
    low_s, high_s: the interval of predicted_s; both or none.
    mass, kept: of an approximation that drops pairs, the share of the exact probabilities that it keeps, and of pairs.
    pays_from: the length from which an approximation is predicted to be faster than what is written; where nothing is
    rewritten, that from which something would be.
    """

    form: str
    reason: str
    predicted_s: float | None = None
    written_s: float | None = None
    refused: Mapping[str, str] = field(default_factory=dict, hash=False)
    offers: Mapping[str, float] = field(default_factory=dict, hash=False)
    error: float | None = None
    low_s: float | None = None
    high_s: float | None = None
    row_error: float | None = None
    mass: float | None = None
    kept: float | None = None
    pays_from: int | None = None

    @property
    def name(self) -> str:
        return form_name(self.form)

    @property
    def rewrites(self) -> bool:
        return self.form != AS_WRITTEN


@dataclass(frozen=True)
class Region:
    """One recognised subgraph.

    path:     module path, as `model.layers.3.mlp`; "" where unknown.
    node:     name of the node that it was found by.
    written:  how the region is written, in the words of its kind.
    training: whether gradients flow through it.
    """

    path: str
    node: str
    rule: Rule
    shape: Shape
    dtype: str
    device: str
    written: str = "composed"
    training: bool = False
    choice: Choice | None = None

    @property
    def kind(self) -> str:
        return self.rule.kind

    @property
    def facts(self) -> dict[str, object]:
        """The facts of the region by name, as `explain` prints and exports them."""
        return {
            **self.shape.sizes(),
            "symbols": dict(self.shape.symbols),
            "dtype": self.dtype,
            **self.rule.facts(),
            "written": self.written,
            "training": self.training,
        }

    @property
    def title(self) -> str:
        """What it is, in a word or two."""
        return self.kind

    @property
    def key(self) -> str:
        """What tuning results are kept under: equal for regions that compute the same at the same sizes and types."""
        sizes = " ".join(f"{name}={value}" for name, value in self.shape.sizes().items())
        mode = "training" if self.training else "inference"
        text = " | ".join([self.rule.spell(), sizes, self.dtype, mode, *self.data])
        return f"{self.kind}-{sha256(text.encode()).hexdigest()[:16]}"

    @property
    def data(self) -> tuple[str, ...]:
        """What the rule reads at run time, as text: types and shapes of tensors, and sizes."""
        return ()

    @property
    def flops(self) -> int:
        return self.rule.flops(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of inputs, weights and outputs, each once."""
        return self.rule.elements(self.shape) * ITEM_BYTES.get(self.dtype, 4)


@dataclass(frozen=True)
class AttentionRegion(Region):
    """A softmax attention.

    written:  "sdpa" (a mask in memory or none), "sdpa_causal" (`is_causal=True`), "flex_attention" or "composed".
    fill:     what masked scores are set to, "-inf", "finite" (finfo.min and the like) or "none".
    captured: (dtype, shape) of each captured tensor, as text.
    mask:     a label of what the mask means: none, causal, window, ..., see `passes.masks.label`.
    sizes:    the sizes n0, n1, ... of the rule, as seen at compile time.
    repeats_heads: whether key and value heads are written out once per query head.
    value_in_key: whether the graph proves that the value is the key's first Ev channels.
    stored: types of query, key and value in memory, where some have 8 bits and the graph widens them; dtype is what it
    widens them to, and () means all three.
    weights: names and shapes of the weights that the options supply for it.
    tiles_kept: share of tiles of 64 x 64 pairs that the mask does not empty on the inputs at hand, where it is one.
    crosses: whether the rows are of another sequence than the keys.
    columns: keys that a row is written over where these are cut out of all, in chunks; 0: all.
    """

    rule: AttentionRule
    shape: AttentionShape
    mask: str = "none"
    fill: str = "none"
    captured: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    repeats_heads: bool = False
    value_in_key: bool = False
    stored: tuple[str, ...] = ()
    weights: tuple[tuple[str, tuple[int, ...]], ...] = ()
    tiles_kept: float | None = None
    crosses: bool = False
    columns: int = 0

    @property
    def facts(self) -> dict[str, Any]:
        own = {"group": self.shape.group, "mask": self.mask, "fill": self.fill, "captured": list(self.captured)}
        held = {"repeats_heads": self.repeats_heads, "value_in_key": self.value_in_key, "stored": list(self.stored)}
        held |= {"tiles_kept": self.tiles_kept, "crosses": self.crosses, "columns": self.columns}
        return {**super().facts, **own, "sizes": list(self.sizes), **held}

    @property
    def data(self) -> tuple[str, ...]:
        within = ["value in key"] if self.value_in_key else []
        return (*self.captured, *map(str, self.sizes), *within, *self.stored)

    @property
    def bytes(self) -> int:
        """Bytes of inputs, as they are stored, and output, each once."""
        s = self.shape
        query, key, value = (ITEM_BYTES.get(name, 4) for name in self.types)
        rows = s.Hq * s.L * (s.E * query + s.Ev * ITEM_BYTES.get(self.dtype, 4))
        return s.B * (rows + s.H * s.S * (s.E * key + s.Ev * value))

    @property
    def types(self) -> tuple[str, ...]:
        """Types of query, key and value in memory."""
        return self.stored or (self.dtype,) * 3

    @property
    def widened(self) -> int:
        """Elements of query, key and value that are stored in 8 bits."""
        s = self.shape
        counts = s.Hq * s.L * s.E, s.H * s.S * s.E, s.H * s.S * s.Ev
        return s.B * sum(n for n, name in zip(counts, self.types, strict=True) if name in FLOAT8)

    @property
    def title(self) -> str:
        return f"{'full' if self.mask == 'none' else self.mask} attention"


@dataclass(frozen=True)
class Unmatched:
    """Something that looked like a region and is none.

    anchor: name of the node that looked like a region's core.
    reason: one sentence. node: name of the node at which the match ended. path: module path, "" where unknown.
    """

    anchor: str
    reason: str
    node: str
    path: str


KINDS: dict[str, tuple[type[Rule], type[Shape], type[Region]]] = {
    "attention": (AttentionRule, AttentionShape, AttentionRegion),
    "recurrence": (RecurrenceRule, RecurrenceShape, Region),
    "moe": (MoERule, MoEShape, Region),
    "ffn": (FFNRule, FFNShape, Region),
}

"""Counts of a whole language model from its config dict, without weights: parameters, cache, FLOP.

    card = model_card(json.load(open("config.json")))
    card.parameters()                 total, and active under three named conventions
    card.cache_bytes(32768)           keys, values and states of one sequence
    card.decode_flops(32768)          FLOP of the token at that position

The counts are sums over layers (`layers.py`, `mixers.py`); sums over a length are sympy expressions of `length`,
lambdified once per phase and convention.

Source: conventions as in the published cost tables of Step-3, arXiv:2507.19427, and DeepSeekMoE, arXiv:2401.06066.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy

from attnc.cost_models.config_keys import KEYS, MOST_LAYERS, Facts
from attnc.cost_models.config_layers import BUILDERS, embedding
from attnc.cost_models.families import ALIASES, FAMILIES, LIKE_LLAMA, Family
from attnc.cost_models.layers import LENGTH, USUAL, Conventions, Embedding, Experts, Layer, Norms
from attnc.errors import UsageError, did_you_mean

PHASES = ("prefill", "decode", "train")
ROLES = ("mixer", "ffn", "router")
TRAIN_PASSES = 3  # forward, and a backward of twice its products
# Keys of a config that change what a reader may expect of the counts.
SAID = {
    "num_nextn_predict_layers": "layers that predict further tokens (MTP) are not counted",
    "quantization_config": "the config names a quantisation of its weights; bytes here follow the type asked for",
}


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters. The three `active` ones are what sources mean by activated parameters per token.

    active: no embeddings. active_head: plus the output head. active_both: plus input embedding and head.
    """

    total: int
    active: float
    active_head: float
    active_both: float


@dataclass(frozen=True)
class Flops:
    """FLOP by column: attention and states, the mixers' projections, feed-forward, router, output head."""

    mixing: float
    projections: float
    ffn: float
    router: float
    head: float

    @property
    def total(self) -> float:
        return self.mixing + self.projections + self.ffn + self.router + self.head


@dataclass(frozen=True)
class ModelCard:
    """A model as layers with their counts; `notes` say what was assumed while reading the config."""

    name: str
    layers: tuple[tuple[Layer, int], ...]
    embedding: Embedding
    notes: tuple[str, ...] = ()

    # Parameters.

    def parameters(self, chosen: float | None = None) -> Parameters:
        """Totals and actives; `chosen` routed experts per token instead of the mean (zero experts do nothing)."""
        inner = sum(count * layer.total for layer, count in self.layers)
        active = sum(count * layer.active(chosen) for layer, count in self.layers)
        head = sum(p.parameters for p in self.embedding.products)
        both = self.embedding.total
        return Parameters(inner + both, active, active + head, active + both)

    @property
    def active_range(self) -> tuple[float, float]:
        """Fewest and most active parameters with the head; they differ where a router has zero experts."""
        moe = [layer for layer, _ in self.layers if isinstance(layer, Experts)]
        if not moe:
            active = self.parameters().active_head
            return active, active
        fewest = min(max(0, m.top_k - m.zero_experts) for m in moe)
        most = max(min(m.top_k, m.experts) for m in moe)
        return self.parameters(fewest).active_head, self.parameters(most).active_head

    def weight_bytes(self, item: float = 2) -> float:
        return self.parameters().total * item

    def touched_weights(self, tokens: float) -> float:
        """Parameters read by a step over `tokens` tokens: all that is dense, and the experts that balanced tokens meet.

        The input embedding is a lookup of a row per token.
        """
        met = sum(p.parameters for p in self.embedding.products)
        for layer, count in self.layers:
            if isinstance(layer, Experts):
                missed = (1 - layer.chosen / layer.experts) ** tokens
                met += count * layer.active(0) + count * layer.experts * (1 - missed) * layer.expert.total
            else:
                met += count * layer.total
        return met

    # What a sequence leaves behind.

    def kv_bytes(self, context: float, item: float = 2) -> float:
        """Bytes of keys and values (or latents) of one sequence of `context` tokens, windows at most full."""
        return sum(
            count * layer.kv_elements * item * min(context, layer.reach.limit or context)
            for layer, count in self.layers
        )

    def kv_bytes_per_token(self, item: float = 2) -> float:
        """Bytes by which the cache grows with every token once the windows are full."""
        return sum(c * layer.kv_elements * item for layer, c in self.layers if layer.reach.limit is None)

    def state_bytes(self, item: float = 4) -> float:
        """Bytes of the recurrences' states of one sequence."""
        return sum(count * layer.state_elements * item for layer, count in self.layers)

    def conv_bytes(self, item: float = 2) -> float:
        """Bytes of the last inputs that short convolutions keep, of one sequence."""
        return sum(count * layer.conv_elements * item for layer, count in self.layers)

    def cache_bytes(self, context: float, item: float = 2, state_item: float = 4) -> float:
        """All that one sequence of `context` tokens keeps."""
        return self.kv_bytes(context, item) + self.state_bytes(state_item) + self.conv_bytes(item)

    def decode_traffic(self, context: float, item: float = 2, state_item: float = 4) -> float:
        """Bytes of cache that one decoded token moves: keys and values read, states read and written."""
        return self.kv_bytes(context, item) + 2 * self.state_bytes(state_item) + 2 * self.conv_bytes(item)

    # FLOP.

    def flops(self, phase: str, length: float, how: Conventions = USUAL) -> Flops:
        """FLOP of one sequence by column.

        phase: "prefill" of `length` tokens, "decode" of the one token at position `length`, "train" on `length` tokens.
        Raises: UsageError for an unknown phase.
        """
        tokens = 1.0 if phase == "decode" else float(length)
        passes = TRAIN_PASSES if phase == "train" else 1
        mixing = self._compiled(phase, how)(length)
        mixer, ffn, router = (passes * tokens * 2 * self._weights[role] for role in ROLES)
        heads = 1.0 if phase == "prefill" and how.head == "last" else tokens
        head = passes * heads * 2 * self._weights["head"]
        return Flops(mixing, mixer, ffn, router, head)

    @cached_property
    def _weights(self) -> dict[str, float]:
        """Weights in products that one token meets, by role."""
        met = {role: sum(count * layer.active_weights(role) for layer, count in self.layers) for role in ROLES}
        return {**met, "head": self.embedding.active_weights("head")}

    @cached_property
    def _lambdified(self) -> dict[tuple[str, Conventions], Callable[[float], float]]:
        return {}

    def _compiled(self, phase: str, how: Conventions) -> Callable[[float], float]:
        """FLOP between tokens as a function of the length, lambdified on first use."""
        made = self._lambdified.get((phase, how))
        if made is None:
            summed = phase == "generation"
            expression = self.generation_expression(how) if summed else self.mixing_expression(phase, how)
            made = self._lambdified[phase, how] = sympy.lambdify(LENGTH, expression, modules="math")
        return made

    def mixing_expression(self, phase: str, how: Conventions = USUAL) -> sympy.Expr:
        """FLOP between tokens as an expression of `length`, as in `flops`."""
        if phase not in PHASES:
            near = did_you_mean(phase, PHASES) or " Name one of them."
            raise UsageError(f"phase {phase!r}: allowed are {', '.join(PHASES)}.{near}")
        total = sympy.Integer(0)
        for layer, count in self.layers:
            for mixing in layer.mixing(phase, how):
                if phase == "decode":
                    total += count * (mixing.pair * mixing.reach.keys() + mixing.token)
                else:
                    passes = TRAIN_PASSES if phase == "train" else 1
                    total += passes * count * (mixing.pair * mixing.reach.pairs(how.causal) + mixing.token * LENGTH)
        return total

    def decode_flops(self, context: float, how: Conventions = USUAL) -> float:
        """FLOP of the one token at position `context`."""
        return self.flops("decode", context, how).total

    def prefill_flops(self, length: float, how: Conventions = USUAL) -> float:
        """FLOP of a prompt of `length` tokens."""
        return self.flops("prefill", length, how).total

    def training_flops(self, length: float, how: Conventions = USUAL) -> float:
        """FLOP of forward and backward over one sequence of `length` tokens, without recomputation."""
        return self.flops("train", length, how).total

    def generation_flops(self, length: float, how: Conventions = USUAL) -> float:
        """FLOP of decoding positions 1 to `length` one by one, as an integral over the position."""
        return 2 * sum(self._weights.values()) * length + self._compiled("generation", how)(length)

    def generation_expression(self, how: Conventions) -> sympy.Expr:
        """FLOP between tokens summed over positions 1 to `length`: half the square, whatever `how.causal` says."""
        total = sympy.Integer(0)
        for layer, count in self.layers:
            for mixing in layer.mixing("decode", how):
                total += count * (mixing.pair * mixing.reach.pairs("half") + mixing.token * LENGTH)
        return total

    def __iter__(self) -> Iterator[tuple[Layer, int]]:
        return iter(self.layers)


# Reading a config.


def model_card(config: Mapping[str, Any], name: str | None = None) -> ModelCard:
    """The card of the model that a transformers config.json describes.

    Raises: UsageError for a config that is no dict, lacks facts (all named) or lists layers nobody knows.
    """
    if not isinstance(config, Mapping):
        raise UsageError(f"config: found {type(config).__name__}, allowed is the dict of a config.json.")
    notes: list[str] = []
    config = _text_part(config, notes)
    kind = _model_type(config)
    family = _family(kind, config, notes)
    notes += [said for key, said in SAID.items() if config.get(key)]
    facts = Facts(config, family.defaults, family.fixed)
    plan = family.plan(facts)
    if len(plan) > MOST_LAYERS:
        raise UsageError(f"config: found {len(plan)} layers, allowed are {MOST_LAYERS}. Correct it.")
    words = Counter(word for block in plan for word in block)
    layers = [(BUILDERS[word](facts), count) for word, count in words.items()]
    norms = Norms(facts.need("d_model"), family.norms * len(plan) + family.final_norms, family.norm_bias)
    ends = embedding(facts)
    if facts.missing:
        missing = list(dict.fromkeys(facts.missing))
        raise UsageError(
            f"config of model_type {kind!r}: found no {', '.join(missing)}. Add "
            f"{'it' if len(missing) == 1 else 'them'}, under these names or those of a known family."
        )
    return ModelCard(name or kind, (*layers, (norms, 1)), ends, tuple(notes))


def _text_part(config: Mapping[str, Any], notes: list[str]) -> Mapping[str, Any]:
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return config
    notes.append("only the language model of text_config is counted, not encoders of images or sound")
    outer = {k: v for k, v in config.items() if k in ("model_type", "tie_word_embeddings") and v is not None}
    return {**outer, **text}


def _model_type(config: Mapping[str, Any]) -> str:
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise UsageError(f"config model_type={kind!r:.60}: found {type(kind).__name__}, allowed is a name.")
    return kind or "unnamed"


def _family(kind: str, config: Mapping[str, Any], notes: list[str]) -> Family:
    lowered = kind.lower()
    known = ALIASES.get(lowered, lowered)
    if known in FAMILIES:
        return FAMILIES[known]
    standard = ("layers", "d_model", "heads", "d_ff", "vocab")
    missing = [KEYS[word][-1 if word == "d_ff" else 0] for word in standard if not any(k in config for k in KEYS[word])]
    if missing:
        raise UsageError(
            f"config of model_type {kind!r}: no known family, and it lacks {', '.join(missing)} to be read as a "
            f"llama.{did_you_mean(lowered, FAMILIES)} Known are {', '.join(sorted(FAMILIES))}."
        )
    notes.append(f"model_type {kind!r} is not known: read as a llama with grouped heads and gated feed-forward")
    return LIKE_LLAMA

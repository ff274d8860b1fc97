"""The forms attnc knows: one line each, in the order they are offered."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TypeVar

from attnc.errors import UsageError, did_you_mean
from attnc.forms.axial import Axial
from attnc.forms.base import AttentionForm, Form
from attnc.forms.bigbird import BigBird
from attnc.forms.block_local import BlockLocal
from attnc.forms.block_mixture import BlockMixture
from attnc.forms.block_scores import BlockScores
from attnc.forms.block_sparse import BlockSparse
from attnc.forms.cache_eviction import CacheEviction
from attnc.forms.chunked import Chunked
from attnc.forms.compressed_selection import CompressedSelection
from attnc.forms.dense import Dense
from attnc.forms.dilated_segments import DilatedSegments
from attnc.forms.flash import Flash
from attnc.forms.flash_decode import FlashDecode
from attnc.forms.gated_blocks import GatedBlocks
from attnc.forms.generated import BAR, IN
from attnc.forms.gist_blocks import GistBlocks
from attnc.forms.hash_buckets import HashBuckets
from attnc.forms.hash_halves import HashHalves
from attnc.forms.head_blocks import HeadBlocks
from attnc.forms.head_groups import HeadGroups
from attnc.forms.head_policies import HeadPolicies
from attnc.forms.hierarchical import Hierarchical
from attnc.forms.kept_tiles import KeptTiles
from attnc.forms.key_importance import KeyImportance
from attnc.forms.linear import LinearAttention
from attnc.forms.listed import Listed
from attnc.forms.longformer import Longformer
from attnc.forms.low_rank import LowRank
from attnc.forms.memory_blocks import MemoryBlocks
from attnc.forms.neighborhood import Neighborhood
from attnc.forms.page_bounds import PageBounds
from attnc.forms.pooled_window import PooledWindow
from attnc.forms.rectified import Rectified
from attnc.forms.recurrent import RecurrentForm
from attnc.forms.scan import Scan
from attnc.forms.sinks_window import SinksWindow
from attnc.forms.sliding_window import SlidingWindow
from attnc.forms.spans import Spans
from attnc.forms.spans_search import SpansSearch
from attnc.forms.step import Step
from attnc.forms.strided import Strided
from attnc.forms.token_groups import TokenGroups
from attnc.forms.token_top_k import TokenTopK
from attnc.forms.vertical_slash import VerticalSlash
from attnc.forms.z_order import ZOrder
from attnc.region import form_name
from attnc.rule_attention import AttentionRule
from attnc.rule_recurrence import RecurrenceRule

Made = TypeVar("Made", bound=AttentionForm)

FORMS: tuple[type[Form], ...] = (
    Dense,
    BlockSparse,
    Flash,
    FlashDecode,
    Listed,
    KeptTiles,
    LowRank,
    Hierarchical,
    LinearAttention,
    SlidingWindow,
    SinksWindow,
    Strided,
    BigBird,
    Longformer,
    DilatedSegments,
    Axial,
    BlockLocal,
    Neighborhood,
    Spans,
    BlockMixture,
    GistBlocks,
    HeadBlocks,
    BlockScores,
    GatedBlocks,
    Rectified,
    PooledWindow,
    PageBounds,
    MemoryBlocks,
    CompressedSelection,
    VerticalSlash,
    TokenTopK,
    CacheEviction,
    HeadGroups,
    HeadPolicies,
    KeyImportance,
    HashBuckets,
    HashHalves,
    TokenGroups,
    SpansSearch,
    ZOrder,
    Chunked,
    Scan,
    Step,
)


def form_named(name: str) -> type[Form]:
    """The form called `name`. Raises: UsageError, naming the nearest known one."""
    known = {form.name: form for form in FORMS}
    if name not in known:
        raise UsageError(
            f"form {name!r:.80}: no such form; known are {', '.join(known)}."
            + (did_you_mean(name, known) or " See `attnc forms`.")
        )
    return known[name]


def parse_form(spelling: str) -> Form:
    """The form that `spelling` names, as in `block_sparse{provider=flex,block_m=128}`.

    Raises: UsageError for an unknown form or knob, or a text that is no spelling.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(?:\{([^{}]*)\})?\s*", spelling)
    if match is None:
        raise UsageError(
            f"parse the form {spelling!r:.200}: found no `name{{knob=value,...}}`. Write a form as in "
            "'block_sparse{provider=flex,block_m=128}'."
        )
    return form_named(match[1]).parse(match[2] or "")


HeadGroups.read = staticmethod(parse_form)  # runs of heads take any form of attention


@lru_cache(maxsize=256)
def settings_allowed(name: str, allow: tuple[str, ...]) -> tuple[Form, ...] | None:
    """The settings of the form `name` that `allow` names with their knobs; () where it names the form itself: any.

    None where it names neither.
    """
    if name in allow:
        return ()
    found = tuple(parse_form(spelling) for spelling in allow if form_name(spelling) == name)
    return found or None


def is_allowed(form: Form, allow: tuple[str, ...]) -> bool:
    """Whether `allow` names the form, or one with its semantic knobs."""
    settings = settings_allowed(form.name, allow)
    return settings is not None and (not settings or any(_means(form, other) for other in settings))


def _means(form: Form, other: Form) -> bool:
    return all(getattr(form, n) == getattr(other, n) for n, k in form.knobs().items() if k.role == "semantic")


def spell_attention(form: Form | str, rule: AttentionRule) -> str:
    """The spelling of an attention operator for a form and a rule, `FORM{knobs} | RULE`; `parse_attention` reads it."""
    return f"{form if isinstance(form, str) else form.spell()}{BAR}{rule.spell()}"


@lru_cache(maxsize=1024)
def parse_attention(spelling: str) -> tuple[AttentionForm, AttentionRule]:
    """The form and rule of an operator's spelling. Raises: UsageError if it is not one."""
    form, bar, rule = spelling.rpartition(BAR)
    if not bar:
        raise UsageError(
            f"parse the operator spelling {spelling!r:.200}: found no ' | ', allowed is 'FORM{{knobs}} | RULE'. "
            "Build it with attnc.forms.spell_attention."
        )
    made = parse_form(form.partition(IN)[0])
    if not isinstance(made, AttentionForm):
        raise UsageError(
            f"parse the operator spelling {spelling!r:.200}: found {made.name}, a form of a {made.kind}, allowed is "
            f"one of attention. Known are {', '.join(f.name for f in FORMS if f.kind == 'attention')}."
        )
    return made, AttentionRule.parse(rule)


def parse_generated(spelling: str, kind: type[Made], allowed: str = "") -> tuple[Made, AttentionRule]:
    """The same for an operator of one sort of forms, in words `allowed`. Raises: UsageError if the form is another."""
    form, rule = parse_attention(spelling)
    if not isinstance(form, kind):
        raise UsageError(
            f"parse the operator spelling {spelling!r:.200}: found the form {form.name}, allowed is "
            f"{allowed or kind.name}. Use attnc::attention for any form."
        )
    return form, rule


@lru_cache(maxsize=1024)
def parse_recurrence(spelling: str) -> tuple[RecurrentForm | None, RecurrenceRule]:
    """Form and rule of an operator's spelling, `RULE` or `FORM{knobs} | RULE`. Raises: UsageError if it is neither."""
    form, bar, rule = spelling.rpartition(BAR)
    if not bar:
        return None, RecurrenceRule.parse(spelling)
    made = parse_form(form.partition(IN)[0])
    if not isinstance(made, RecurrentForm):
        raise UsageError(
            f"parse the operator spelling {spelling!r:.200}: found {made.name}, a form of {made.kind}, allowed is one "
            f"of a recurrence. Known are {', '.join(f.name for f in FORMS if f.kind == 'recurrence')}."
        )
    return made, RecurrenceRule.parse(rule)

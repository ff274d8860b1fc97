"""One linear recurrence by the names of its axes, as the operator takes it: what to write, what to read, what decays.

    S_t[batch, key, value] = decay S_{t-1} + coef * keys * values * beta
    out[t, batch, value]   = scale * outputs * sum_key query S_t

Every operand is a product of factors, tensors of the draft with named axes; an axis that an operand lacks is the same
for all of it, and is not repeated in memory where the operator maps heads itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import fx

from attnc.op_recurrence import RECURRENCE
from attnc.passes.graph import GraphFacts, Unliftable, hint, tensor_of
from attnc.passes.recurrence.emit import Draft
from attnc.passes.recurrence.logs import logarithm
from attnc.passes.recurrence.terms import Factor, Term
from attnc.rule_recurrence import RecurrenceRule, RecurrenceShape

aten = torch.ops.aten
TIME = "t"


@dataclass
class Mixer:
    """A recurrence with named axes.

    batch: the axes that are neither key nor value: the first is the batch, the others are heads. key, value: None where
    the state has no such axis. decay: a sum of products; none for 1. low_rank: a and b of b (a^T S).
    dtype: of the state as written. length: of time, a number or a node.
    """

    batch: list[str]
    key: str | None
    value: str | None
    dtype: torch.dtype
    length: Any = None
    decay: list[Term] = field(default_factory=list)
    query: list[Factor] = field(default_factory=list)
    scale: float = 1.0
    outputs: list[Factor] = field(default_factory=list)
    keys: list[Factor] = field(default_factory=list)
    values: list[Factor] = field(default_factory=list)
    beta: list[Factor] = field(default_factory=list)
    coef: float = 1.0
    delta: bool = False
    low_rank: tuple[list[Factor], list[Factor], float] | None = None
    initial: Factor | None = None
    before: bool = False
    log_decay: list[tuple[float, Factor | None]] | None = None  # a decay that is known by its logarithm

    def factors(self) -> list[Factor]:
        found = [*self.query, *self.outputs, *self.keys, *self.values, *self.beta]
        found += [f for term in self.decay for f in term.factors]
        found += [f for _, f in self.log_decay or () if f is not None]
        found += [*self.low_rank[0], *self.low_rank[1]] if self.low_rank else []
        return found + ([self.initial] if self.initial is not None else [])


@dataclass
class Emitted:
    """Nodes of the draft: the outputs with axes `labels`, the last state with axes `state_labels`; rule and sizes."""

    out: fx.Node
    labels: list[str]
    state: fx.Node
    state_labels: list[str]
    rule: RecurrenceRule
    shape: RecurrenceShape


class _Emission:
    def __init__(self, draft: Draft, mixer: Mixer, facts: GraphFacts | None) -> None:
        self.draft, self.m, self.facts = draft, mixer, facts
        self.heads = mixer.batch[1:]
        self.first = mixer.batch[:1]
        self.sizes: dict[str, Any] = {}
        for factor in mixer.factors():
            for dim, at in enumerate(factor.index):
                if at.op == "var":
                    self.sizes.setdefault(at.args[0], draft.size(factor.node, dim))
                elif at.op == "floordiv" and at.args[0].op == "var":
                    extent = draft.size(factor.node, dim)
                    if isinstance(extent, int):
                        self.sizes.setdefault(at.args[0].args[0], extent * int(at.args[1].value))
        if mixer.length is not None:
            self.sizes[TIME] = mixer.length
        missing = [x for x in (*mixer.batch, TIME, mixer.key, mixer.value) if x is not None and x not in self.sizes]
        if missing:
            raise Unliftable("an axis of the state is in none of its operands", mixer.factors()[0].node)

    def filled(self, factors: Sequence[Factor], heads: Sequence[str], *last: str | None) -> fx.Node:
        """The product of factors as (B, H, *last), every axis at its full size; ones where there is no factor."""
        order = [*self.first, *heads, *(x for x in last if x is not None)]
        sizes = [self.sizes[x] for x in order]
        node = self.draft.product(factors, order)
        if node is None:
            some = self.m.factors()[0].node
            node = self.draft.call(aten.new_ones.default, some, sizes, dtype=self.m.dtype)
        node = self.draft.expanded(node, sizes)
        return self.in_order(node, len(heads))

    def in_order(self, node: fx.Node, heads: int) -> fx.Node:
        """Axes (batch?, heads..., rest) as (B, H, rest)."""
        if not self.first:
            node = self.draft.call(aten.unsqueeze.default, node, 0)
        return self.draft.flattened(node, 1, heads)

    def keyed(self, factors: Sequence[Factor]) -> fx.Node:
        return self.filled(factors, self.key_heads, TIME, self.m.key)

    @property
    def key_heads(self) -> list[str]:
        """The leading head axes that queries and keys have: the operator maps the others."""
        used = {x for f in (*self.m.query, *self.m.keys, *self._low_rank()) for x in f.labels}
        most = max((k + 1 for k, x in enumerate(self.heads) if x in used), default=0)
        return self.heads[:most]

    def _low_rank(self) -> list[Factor]:
        return [*self.m.low_rank[0], *self.m.low_rank[1]] if self.m.low_rank else []

    # The decay.

    def decay(self) -> tuple[fx.Node | None, str, bool]:
        """The operand, its kind and whether it holds factors rather than logarithms."""
        m = self.m
        if m.log_decay is None and len(m.decay) == 1 and not m.decay[0].factors and m.decay[0].coef == 1.0:
            return None, "none", False
        logs = m.log_decay if m.log_decay is not None else logarithm(self.draft, m.decay, self.facts)
        parts = [f for _, f in logs if f is not None] if logs is not None else [f for t in m.decay for f in t.factors]
        labels = {x for f in parts for x in f.labels}
        kind = "channel" if m.key is not None and m.key in labels else "token"
        if not labels & {TIME, m.key, *self.first}:
            kind = "head"
        channel = [m.key] if kind == "channel" and m.key is not None else []
        order: list[str] = self.heads if kind == "head" else [*m.batch, TIME, *channel]
        known = {*order}
        if not labels <= known:
            raise Unliftable("the decay varies over the values", parts[0].node)
        node = self.summed(m.decay, order) if logs is None else self._sum_of(logs, order)
        node = self.draft.expanded(node, [self.sizes[x] for x in order])
        if kind == "head":
            return self.draft.flattened(node, 0, len(self.heads)), kind, logs is None
        return self.in_order(node, len(self.heads)), kind, logs is None

    def _sum_of(self, logs: Sequence[tuple[float, Factor | None]], order: Sequence[str]) -> fx.Node:
        node: fx.Node | None = None
        constant = 0.0
        for coef, factor in logs:
            if factor is None:
                constant += coef
                continue
            part = self.draft.placed(factor, order)
            part = part if coef == 1.0 else self.draft.call(aten.mul.Tensor, part, coef)
            node = part if node is None else self.draft.call(aten.add.Tensor, node, part)
        if node is None:
            some = self.m.factors()[0].node
            sizes = [self.sizes[x] for x in order]
            return self.draft.call(aten.new_full.default, some, sizes, constant, dtype=self.m.dtype)
        return self.draft.call(aten.add.Tensor, node, constant) if constant else node

    def summed(self, terms: Sequence[Term], order: Sequence[str]) -> fx.Node:
        """A sum of products as a tensor with axes `order`."""
        total: fx.Node | None = None
        for term in terms:
            node = self.draft.product(term.factors, order)
            if node is None:
                some = self.m.factors()[0].node
                node = self.draft.call(aten.new_full.default, some, [1] * len(order), term.coef, dtype=self.m.dtype)
            elif term.coef != 1.0:
                node = self.draft.call(aten.mul.Tensor, node, term.coef)
            total = node if total is None else self.draft.call(aten.add.Tensor, total, node)
        assert total is not None
        return total

    # The state.

    def initial(self) -> fx.Node | None:
        m = self.m
        if m.initial is None:
            return None
        order = [*m.batch, *(x for x in (m.key, m.value) if x is not None)]
        node = self.draft.expanded(self.draft.placed(m.initial, order), [self.sizes[x] for x in order])
        node = self.in_order(node, len(self.heads))
        if m.key is None:
            node = self.draft.call(aten.unsqueeze.default, node, 2)
        if m.value is None:
            node = self.draft.call(aten.unsqueeze.default, node, 3)
        return node

    def named(self, node: fx.Node, *last: tuple[int, str | None]) -> fx.Node:
        """A result (B, H, ...) with its heads apart and without the axes that have no name (positions, labels)."""
        for position, label in sorted(last, reverse=True):
            if label is None:
                node = self.draft.call(aten.select.int, node, position, 0)
        if not self.heads:
            node = self.draft.call(aten.select.int, node, 1, 0)
        elif len(self.heads) > 1:
            node = self.draft.call(aten.unflatten.int, node, 1, [self.sizes[x] for x in self.heads])
        return node if self.first else self.draft.call(aten.select.int, node, 0, 0)


def emit(draft: Draft, mixer: Mixer, facts: GraphFacts | None = None) -> Emitted:
    """Put the operator in the draft.

    Raises: Unliftable where an operand cannot be laid out as the operator takes it.
    """
    e = _Emission(draft, mixer, facts)
    decay, kind, factors = e.decay()
    if factors and (mixer.delta or mixer.low_rank is not None):
        raise Unliftable(
            "its decay is not known to be positive; written as exp or sigmoid of something it would be",
            mixer.decay[0].factors[0].node,
        )
    keyless = mixer.key is None
    query, key = (None, None) if keyless else (e.keyed(mixer.query), e.keyed(mixer.keys))
    value = e.filled(mixer.values, e.heads, TIME, mixer.value)
    if mixer.value is None:
        value = draft.call(aten.unsqueeze.default, value, 3)
    if mixer.coef != 1.0 and not mixer.delta:
        value = draft.call(aten.mul.Tensor, value, mixer.coef)
    beta = e.filled(mixer.beta, e.heads, TIME) if mixer.beta or (mixer.delta and mixer.coef != 1.0) else None
    if beta is not None and mixer.coef != 1.0 and mixer.delta:
        beta = draft.call(aten.mul.Tensor, beta, mixer.coef)
    query, key, value = _of_one_type(draft, query, key, value)
    more: tuple[Any, ...] = ()
    if mixer.low_rank is not None:
        a, b, coef = mixer.low_rank
        right = e.keyed(b)
        more = (e.keyed(a), right if coef == 1.0 else draft.call(aten.mul.Tensor, right, coef))
    wide = tensor_of(value).dtype  # type: ignore[union-attr]
    rule = RecurrenceRule(
        decay=kind, factors=factors, delta=mixer.delta, low_rank=mixer.low_rank is not None,
        gate="write" if beta is not None else "none", read="before" if mixer.before else "after", scale=mixer.scale,
        state="float64" if mixer.dtype == torch.float64 else "float32",
        out="value" if torch.promote_types(wide, mixer.dtype) == wide else "state",
    )  # fmt: skip
    initial = e.initial()
    node = draft.call(RECURRENCE, query, key, value, decay, None, beta, None, initial, rule.spell(), *more)
    out = e.named(draft.call(getitem, node, 0), (3, mixer.value))
    state = e.named(draft.call(getitem, node, 1), (2, mixer.key), (3, mixer.value))
    last = [x for x in (mixer.value,) if x is not None]
    labels = [*mixer.batch, TIME, *last]
    if mixer.outputs:
        factor = draft.product(mixer.outputs, labels)
        assert factor is not None
        out = draft.call(aten.mul.Tensor, out, factor)
    rest = [x for x in (mixer.key, mixer.value) if x is not None]
    return Emitted(out, labels, state, [*mixer.batch, *rest], rule, _shape(query, value))


def _of_one_type(draft: Draft, *nodes: fx.Node | None) -> list[Any]:
    dtypes = [tensor_of(n).dtype for n in nodes if n is not None]  # type: ignore[union-attr]
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return [None if n is None else draft.cast(n, widest) for n in nodes]


def _shape(query: fx.Node | None, value: fx.Node) -> RecurrenceShape:
    wide = tensor_of(value)
    assert wide is not None
    sizes = dict(zip("BHLV", wide.shape, strict=True)) | {"K": 1, "Hk": 0}
    key = tensor_of(query)
    if key is not None:
        sizes |= {"K": key.shape[-1], "Hk": key.shape[1]}
    symbols = {name: str(x) for name, x in sizes.items() if not isinstance(x, int)}
    return RecurrenceShape(**{name: hint(x) for name, x in sizes.items()}, symbols=symbols)


def arranged(draft: Draft, node: fx.Node, labels: Sequence[str], wanted: Sequence[str | None]) -> fx.Node:
    """`node` with axes `labels` as one with axes `wanted`; None stands for an axis of one element."""
    known = [x for x in wanted if x is not None]
    node = draft.permuted(node, [list(labels).index(x) for x in known])
    for position, label in enumerate(wanted):
        if label is None:
            node = draft.call(aten.unsqueeze.default, node, position)
    return node

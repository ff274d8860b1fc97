"""Which factor of a step is query, key, value, decay or gate, and which axis of the state is key, value or head.

    S'[s] = sum of  factors * S[s]                        the decay
                    factors * S[s with one axis summed]   the delta rule, or a low-rank vector pair
                    factors                               what is written: keys * values * beta

The key axis is the one that reads sum over. Of the others, the value axis is the last that no decay and no key varies
over; the rest are batch and heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from attnc.expr import ZERO, Expr, var
from attnc.passes.graph import Unliftable
from attnc.passes.recurrence.mixer import Mixer
from attnc.passes.recurrence.terms import Factor, Term
from attnc.passes.views import Index


@dataclass
class Update:
    """The next state as terms, its axes named by `index`; split by what becomes of the state before.

    corrected: the term that sums over an axis of the state, with the name of that axis and of the sum.
    """

    node: fx.Node
    index: Index
    decay: list[Term]
    written: list[Term]
    corrected: tuple[Term, str, str] | None


def update_of(node: fx.Node, index: Index, terms: Sequence[Term], states: Sequence[fx.Node], own: fx.Node) -> Update:
    """Sort the terms of a state's update.

    states: what holds states before the step; own: this one's.
    Raises: Unliftable where the step is no decay, delta rule or low-rank change with something written.
    """
    found = Update(node, index, [], [], None)
    for term in terms:
        held = term.of(states)
        if not held:
            found.written.append(term)
            continue
        if len(held) > 1 or held[0].power != 1:
            raise Unliftable("the step is not linear in what it carries: it multiplies or divides by it", node)
        (state,) = held
        rest = Term(term.coef, term.without(state), term.summed)
        if state.node is not own:
            raise Unliftable("the state also takes from another state", node)
        if state.index == index and not term.summed:
            found.decay.append(rest)
            continue
        moved = [d for d, (a, b) in enumerate(zip(state.index, index, strict=True)) if a != b]
        if len(moved) != 1 or found.corrected is not None or index[moved[0]] == ZERO:
            raise Unliftable("the step mixes its state in another way than a decay and a delta rule do", node)
        inner = state.index[moved[0]]
        if inner.op != "var" or term.summed != {inner.args[0]}:
            raise Unliftable("the step mixes its state in another way than a decay and a delta rule do", node)
        found.corrected = rest, index[moved[0]].args[0], inner.args[0]
    if not found.written:
        raise Unliftable("nothing is added to what the step carries", node)
    if len(found.written) > 1:
        raise Unliftable(f"{len(found.written)} products are added to the state in one step, expected one", node)
    if found.written[0].summed:
        raise Unliftable("a step writes more than one token", node)
    return found


@dataclass
class Read:
    """A term of what is read of a state: query factors, the state's index and the name that is summed over, if any."""

    term: Term
    state: Factor
    inner: str | None


def read_of(term: Term, states: Sequence[fx.Node], node: fx.Node) -> Read:
    """A term with one state as a read of it. Raises: Unliftable where it is no plain one."""
    (state, *more) = term.of(states)
    if more or state.power != 1:
        raise Unliftable("what is read is not linear in the state", node)
    inner = [e.args[0] for e in state.index if e.op == "var" and e.args[0] in term.summed]
    if len(inner) > 1 or set(inner) != term.summed:
        raise Unliftable("what is read sums over more than one axis of the state", node)
    return Read(Term(term.coef, term.without(state)), state, inner[0] if inner else None)


def mixer_of(update: Update, read: Read | None, dtype: torch.dtype) -> tuple[Mixer, dict[Expr, Expr]]:
    """The recurrence of an update and a read, with new names for the read's indices.

    Raises: Unliftable where the axes of the two do not fit each other.
    """
    axes = [e for e in update.index if e != ZERO]
    renames: dict[Expr, Expr] = {}
    if read is not None:
        for mine, own in zip(read.state.index, update.index, strict=True):
            if own == ZERO:
                continue
            if mine.op != "var" or mine in renames:
                raise Unliftable("a read takes one row or the diagonal of the state", read.state.node)
            renames[mine] = own
    key = renames[var(read.inner)].args[0] if read is not None and read.inner is not None else None
    if update.corrected is not None:
        if key is not None and key != update.corrected[1]:
            raise Unliftable("the delta rule and the reads sum over different axes of the state", update.node)
        key = update.corrected[1]
    names = [e.args[0] for e in axes]
    queries = [f.renamed(renames) for f in read.term.factors] if read is not None else []
    value = _value_axis(names, key, update, queries)
    batch = [x for x in names if x not in (key, value)]
    extra = sorted({x for f in queries for x in f.labels} - {*names, "t"})
    mixer = Mixer([*batch, *extra], key, value, dtype, decay=_or_one(update))
    mixer.coef = update.written[0].coef
    for factor in update.written[0].factors:
        side = mixer.keys if key in factor.labels else mixer.values if value in factor.labels else mixer.beta
        side.append(factor)
    if key is None:
        mixer.values, mixer.keys, mixer.beta = [*mixer.values, *mixer.keys, *mixer.beta], [], []
    for factor in queries:
        (mixer.outputs if value in factor.labels or key is None else mixer.query).append(factor)
    mixer.scale = read.term.coef if read is not None and key is not None else 1.0
    if read is not None and key is None and read.term.coef != 1.0:
        raise Unliftable("a state that is read whole is scaled", update.node)
    if update.corrected is not None:
        _correct(mixer, update, *update.corrected)
    return mixer, renames


def _or_one(update: Update) -> list[Term]:
    if update.decay:
        return update.decay
    raise Unliftable("the step forgets its state: nothing of it is kept", update.node)


def _value_axis(names: Sequence[str], key: str | None, update: Update, queries: Sequence[Factor]) -> str | None:
    """The last axis that may hold values: no decay, no query or key factor varies over it."""
    pairs = [f.labels for f in (*update.written[0].factors, *queries)]
    decays = [f.labels for term in update.decay for f in term.factors]
    changed = [f.labels for f in update.corrected[0].factors] if update.corrected is not None else []
    for name in reversed(names[1:]):
        if name == key or any(name in labels for labels in (*decays, *changed)):
            continue
        if not any(name in labels and key in labels for labels in pairs):
            return name
    return None


def _correct(mixer: Mixer, update: Update, term: Term, key: str, inner: str) -> None:
    """The delta rule where the correction is the written key times the decayed state's prediction, else low rank."""
    names = {var(inner): var(key)}
    right = [f.renamed(names) for f in term.factors if inner in f.labels]
    left = [f for f in term.factors if inner not in f.labels]
    (decay, *more) = update.decay
    if not more and term.coef == -mixer.coef * decay.coef:
        rest = _less(right + left, [*decay.factors, *mixer.keys, *mixer.keys, *mixer.beta])
        if rest == []:
            mixer.delta = True
            return
    if any(mixer.value in f.labels for f in term.factors):
        raise Unliftable("the correction of the state varies over the values", update.node)
    mixer.low_rank = right, left, term.coef


def _less(factors: Sequence[Factor], wanted: Sequence[Factor]) -> list[Factor] | None:
    """`factors` without `wanted`; None where one of them is not there."""
    left = list(factors)
    for factor in wanted:
        if factor not in left:
            return None
        left.remove(factor)
    return left

"""The parallel form of linear attention as one operator: no matrix of pairs of tokens is left.

    o_i = sum_{j <= i} f(i) w(j) exp(c(i) - c(j)) (q_i . k_j) v_j      ->      S_t = exp(g_t) S_{t-1} + w_t k_t v_t^T

with g_t = c(t) - c(t - 1), which is what `c` is the cumulative sum of, where it is one.

Source: Dao and Gu 2024, arXiv:2405.21060, section 3 (state space duality).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from attnc.expr import ZERO, Expr, I, J, const, var
from attnc.expr_text import spell
from attnc.passes.graph import GraphFacts, NoMatch, Unliftable, hint, op_name, shape_of, tensor_of
from attnc.passes.recurrence.decay import Pair, Parallel, parallels
from attnc.passes.recurrence.emit import Draft
from attnc.passes.recurrence.mixer import TIME, Emitted, Mixer, arranged, emit
from attnc.passes.recurrence.rewriting import Again, Rewriting, finished, kept, misplaced
from attnc.passes.recurrence.terms import Factor, Term, whole_axes
from attnc.passes.recurrence.weighted import TOTALS
from attnc.passes.recurrence.weights import Weight, parsed
from attnc.predicate import rebuild

aten = torch.ops.aten
T = var(TIME)
CHANNEL = "c"


def quadratic(facts: GraphFacts, products: Sequence[Parallel]) -> Rewriting | NoMatch:
    """The replacement of the causal products of one mixer; why there is none."""
    draft = Draft()
    try:
        made = []
        for p in products:
            made.append((p.node, *_drawn(facts, draft, p)))
            draft.leaves[p.node] = made[-1][1]  # a product that divides by another reads what takes its place
    except Unliftable as exc:
        return exc.no_match
    except (RuntimeError, TypeError, ValueError, IndexError) as exc:
        reason = f"it cannot be drawn up as a recurrence: {type(exc).__name__}: {str(exc).partition(chr(10))[0]}"
        return NoMatch(reason, products[-1].node)
    main = max((e for _, _, e in made), key=lambda e: (e.shape.V, e.shape.K))
    found = finished(draft, [(node, new) for node, new, _ in made], main.rule, main.shape)
    found.again = _again(products, found)
    for wrong in (misplaced(facts, found), kept(_weights(products, found), found.outs)):
        if wrong is not None:
            return wrong
    return found


def _weights(products: Sequence[Parallel], found: Rewriting) -> list[fx.Node]:
    """What is computed from both queries and keys on the way to the results."""
    sides: list[set[fx.Node]] = []
    for side in ({p.query.node for p in products}, {p.key.node for p in products}):
        for node in found.written():
            if side.intersection(node.all_input_nodes):
                side.add(node)
        sides.append(side)
    return [node for node in found.written() if all(node in side for side in sides)]


def _again(products: Sequence[Parallel], found: Rewriting) -> Again:
    tokens = {hint(shape_at(p.value or p.key)) for p in products}
    sizes = {hint(s) for leaf in found.leaves if (t := tensor_of(leaf)) is not None for s in t.shape}
    shape = found.shape
    elements = shape.B * shape.H * max(tokens) ** 2
    at = [p.node for p in products]

    def find(facts: GraphFacts) -> Rewriting | NoMatch:
        same = [p for p in parallels(facts, ()) if op_name(p.node) in {op_name(n) for n in at}]
        if len(same) != len(products):
            return NoMatch(f"{len(same)} causal products are found there, {len(products)} expected", at[0])
        return quadratic(facts, same)

    return Again(tokens, sizes - tokens | {shape.K, shape.V, shape.H, shape.Hk}, elements, find)


def shape_at(pair: Pair) -> object:
    """The number of tokens j of an operand."""
    value = tensor_of(pair.node)
    assert value is not None
    return value.shape[pair.index.index(J)]


def _drawn(facts: GraphFacts, draft: Draft, p: Parallel) -> tuple[fx.Node, Emitted]:
    """The operator for one product, laid out as its result."""
    weight = parsed(p.weight, p.node)
    value = tensor_of(p.node)
    assert value is not None
    column = None if p.col is None else p.names[p.col].args[0]
    shape = shape_of(p.node)
    sizes = extents_of(p)
    if sizes["i"] != sizes["j"]:
        counts = f"{spell(sizes['i'])} tokens read {spell(sizes['j'])}"
        raise Unliftable(f"{counts}, a recurrence reads as many as it writes", p.node)
    batch = [
        e.args[0] for d, e in enumerate(p.names)
        if d not in (p.row, p.col) and e.op == "var" and shape[d] != const(1)
    ]  # fmt: skip
    mixer = Mixer(batch, CHANNEL, column, _wide(value.dtype), decay=[Term(1.0)])
    mixer.scale = weight.number
    mixer.query = [_factor(draft, p, p.query)]
    mixer.keys = [_factor(draft, p, p.key)]
    mixer.values = [_factor(draft, p, p.value)] if p.value is not None else []
    _sides(draft, p, weight, mixer)
    _decays(draft, p, weight, mixer)
    made = emit(draft, mixer, facts)
    wanted = [TIME if d == p.row else e.args[0] if e.args[0] in made.labels else None for d, e in enumerate(p.names)]
    out = arranged(draft, made.out, made.labels, wanted)
    return draft.cast(out, value.dtype), made


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def extents_of(p: Parallel) -> dict[str, Expr]:
    """How many elements each index of the product runs over."""
    sizes = {e.args[0]: s for e, s in zip(p.names, shape_of(p.node), strict=True)}
    held = p.value or p.key
    return sizes | {"j": shape_of(held.node)[held.index.index(J)]}


def _factor(draft: Draft, p: Parallel, pair: Pair, power: int = 1) -> Factor:
    """An operand with the tokens as time, whichever side of the pair it stands on."""
    value = tensor_of(pair.node)
    assert value is not None
    at = tuple(
        ZERO if extent == 1 else _timed(e) for e, extent in zip(pair.index, value.shape, strict=True)
    )
    read = tuple(ZERO if extent == 1 else e for e, extent in zip(pair.index, value.shape, strict=True))
    whole_axes(pair.node, read, extents_of(p))
    return Factor(draft.leaf(pair.node), at, power)


def _timed(e: Expr) -> Expr:
    return rebuild(e, lambda x: T if x in (I, J) else None)


def _load(draft: Draft, p: Parallel, load: Expr, power: int = 1) -> Factor:
    slot, *index = load.args
    if slot < TOTALS:
        return _factor(draft, p, Pair(p.lift.captured[slot], tuple(index)), power)
    node, dim = p.lift.totals[slot - TOTALS]
    total = draft.call(aten.cumsum.default, draft.leaf(node), dim)
    return Factor(total, tuple(map(_timed, index)), power)


def _sides(draft: Draft, p: Parallel, weight: Weight, mixer: Mixer) -> None:
    """What depends on one token of a pair alone: a factor of the results or of what is written."""
    for load, power in weight.loads:
        names = load.names()
        if {"i", "j"} <= names:
            raise Unliftable("the decay of a pair is data of the pair", p.node)
        (mixer.outputs if "i" in names else mixer.beta if "j" in names else mixer.outputs).append(
            _load(draft, p, load, power)
        )
    for coef, load in weight.exponents:
        factor = _load(draft, p, load)
        node = factor.node if coef == 1.0 else draft.call(aten.mul.Tensor, factor.node, coef)
        side = mixer.outputs if "i" in load.names() else mixer.beta
        side.append(Factor(draft.call(aten.exp.default, node), factor.index))


def _decays(draft: Draft, p: Parallel, weight: Weight, mixer: Mixer) -> None:
    logs: list[tuple[float, Factor | None]] = []
    for coef, load in weight.sums:
        logs.append((coef, _steps(draft, p, load)))
    for coef, rate in weight.rates:
        if rate is not None and rate.op == "log":
            if coef != 1.0 or weight.sums or len(weight.rates) > 1:
                raise Unliftable("a power of a decay beside another decay", p.node)
            mixer.decay = [Term(1.0, (_load(draft, p, rate.args[0]),))]
            return
        logs.append((coef, None if rate is None else _load(draft, p, rate)))
    if logs:
        mixer.log_decay = logs


def _steps(draft: Draft, p: Parallel, load: Expr) -> Factor:
    """What is summed up to `load`: its change from token to token, at the first token any number."""
    slot, *index = load.args
    timed = tuple(map(_timed, index))
    if slot >= TOTALS:
        return Factor(draft.leaf(p.lift.totals[slot - TOTALS][0]), timed)
    node = p.lift.captured[slot]
    whole_axes(node, tuple(index), extents_of(p))
    axes = [d for d, e in enumerate(timed) if e == T]
    if len(axes) != 1:
        raise Unliftable("a decay whose token is not one of its indices", node)
    (dim,) = axes
    total = draft.leaf(node)
    first = draft.call(aten.slice.Tensor, total, dim, 0, 1)
    return Factor(draft.call(aten.diff.default, total, 1, dim, first), timed)


"""Linear attention by cumulative sums as one operator: no state of every token is held in memory.

    o_t = sum_c q_t[c] * cumsum(k[c] v)_t      ->      S_t = S_{t-1} + k_t v_t^T,  o_t = q_t^T S_t

Source: Katharopoulos et al. 2020, "Transformers are RNNs", arXiv:2006.16236, section 3.3.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import fx

from attnc.expr import ONE, ZERO, Expr, var
from attnc.passes.graph import GraphFacts, NoMatch, Unliftable, op_name, shape_of, tensor_of
from attnc.passes.recurrence.emit import Draft
from attnc.passes.recurrence.mixer import TIME, Emitted, arranged, emit
from attnc.passes.recurrence.rewriting import Rewriting, finished, kept, misplaced
from attnc.passes.recurrence.roles import Read, Update, mixer_of, read_of
from attnc.passes.recurrence.terms import Factor, PartOfAxis, Term, Terms
from attnc.passes.views import Ranges, through

aten = torch.ops.aten
T = var(TIME)
LINEAR = ("mul", "neg", "to", "_to_copy", "float", "sum", "matmul", "bmm", "mm", "einsum")
WRITING = ("mul", "neg", "to", "_to_copy", "float", "matmul", "bmm", "einsum", "outer")
NEAREST = 24


def cumulatives(
    facts: GraphFacts, taken: Collection[fx.Node]
) -> Iterator[tuple[fx.Node, fx.Node, Rewriting | NoMatch]]:
    """(cumulative sum, what is read of it, what may take the place of that) for each that sums keys times values.

    A sum of keys alone, as normalisers read it, is no larger than the keys and stays.
    """
    for total in facts.graph.nodes:
        if op_name(total) != "cumsum" or total in taken or not isinstance(total.args[0], fx.Node):
            continue
        value = tensor_of(total)
        if value is None or not value.is_floating_point() or value.dim() < 3:
            continue
        attempts = [(read, _attempt(facts, total, read)) for read in _reads(total)]
        drawn = [read for read, found in attempts if isinstance(found, Rewriting)]
        left = kept({total}.union(*(_between(total, read) for read in drawn)), drawn)
        for read, found in attempts:
            if found is not None:
                yield total, read, left if left is not None and isinstance(found, Rewriting) else found


def _reads(total: fx.Node) -> list[fx.Node]:
    """The first nodes behind `total` that sum over something."""
    found, stack, seen = [], [total], {total}
    while stack and len(seen) < NEAREST:
        for user in stack.pop().users:
            if user in seen or tensor_of(user) is None:
                continue
            seen.add(user)
            if op_name(user) in ("sum", "matmul", "bmm", "einsum"):
                found.append(user)
            elif op_name(user) in LINEAR or _is_view(user):
                stack.append(user)
    return found


def _is_view(node: fx.Node) -> bool:
    value = tensor_of(node)
    index = tuple(var(f"z{d}") for d in range(value.dim())) if value is not None else ()
    return value is not None and through(node, index, Ranges()) is not None


def _attempt(facts: GraphFacts, total: fx.Node, node: fx.Node) -> Rewriting | NoMatch | None:
    """None where it is no mixer at all: no key axis is summed over."""
    try:
        return _cumulative(facts, total, node)
    except PartOfAxis as exc:
        return exc.no_match
    except Unliftable:
        return None
    except (RuntimeError, TypeError, ValueError, IndexError) as exc:
        reason = f"it cannot be drawn up as a recurrence: {type(exc).__name__}: {str(exc).partition(chr(10))[0]}"
        return NoMatch(reason, node)


def _between(total: fx.Node, node: fx.Node) -> set[fx.Node]:
    found, stack = {node}, [node]
    while stack:
        for x in stack.pop().all_input_nodes:
            if x is not total and x not in found and (op_name(x) in LINEAR or _is_view(x)) and _reaches(total, x):
                found.add(x)
                stack.append(x)
    return found


def _reaches(total: fx.Node, node: fx.Node) -> bool:
    stack, seen = [node], {node}
    while stack and len(seen) < NEAREST:
        at = stack.pop()
        if at is total:
            return True
        if op_name(at) in LINEAR or at is node or _is_view(at):
            fresh = [x for x in at.all_input_nodes if x not in seen]
            seen.update(fresh)
            stack.extend(fresh)
    return False


def _written(total: fx.Node) -> set[fx.Node]:
    """What the summed products are made of, as far as terms look into it."""
    source = total.args[0]
    found: set[fx.Node] = set()
    stack = [source]
    while stack and len(found) < NEAREST:
        at = stack.pop()
        if isinstance(at, fx.Node) and at not in found and (op_name(at) in WRITING or _is_view(at)):
            found.add(at)
            stack.extend(at.all_input_nodes)
    return found


def _cumulative(facts: GraphFacts, total: fx.Node, node: fx.Node) -> Rewriting | NoMatch | None:
    def uncut(n: fx.Node) -> bool:
        return not facts.needs_grad(n.args[0])

    dim = int(total.args[1]) % len(shape_of(total))
    terms = Terms(_between(total, node), [total], uncut)
    index = terms.indices(node, "r")
    found = terms.of(node, index)
    held = [t for t in found if t.of([total])]
    if len(held) != 1 or len(found) != 1 or not held[0].summed:
        return None
    read = read_of(held[0], [total], node)
    time = read.state.index[dim]
    if time.op != "var" or time.args[0] in held[0].summed or read.inner is None:
        return None
    read, index = _at_time(read, time, dim), tuple(T if e == time else e for e in index)
    made_of = Terms(_written(total), (), uncut)
    full = [ZERO if s == ONE else var(f"s{d}") for d, s in enumerate(shape_of(total))]
    full[dim] = T
    for e, s in zip(full, shape_of(total), strict=True):
        if e.op == "var":
            made_of.extents[e.args[0]] = s
            made_of.ranges.declare(e.args[0], s)
    source = total.args[0]
    assert isinstance(source, fx.Node)
    written = [Term(1.0, (Factor(source, tuple(full)),))]
    if source in made_of.inside:
        written = made_of.of(source, tuple(full))
    if len(written) != 1 or written[0].summed:
        return None
    update = Update(total, tuple(e for d, e in enumerate(full) if d != dim), [Term(1.0)], written, None)
    draft = Draft()
    made, renames = _emitted(facts, draft, update, read, total)
    wanted = [None if e == ZERO else renames.get(e, e).args[0] for e in index]
    value = tensor_of(node)
    assert value is not None
    out = draft.cast(arranged(draft, made.out, made.labels, wanted), value.dtype)
    rewriting = finished(draft, [(node, out)], made.rule, made.shape)
    wrong = misplaced(facts, rewriting)
    return rewriting if wrong is None else wrong


def _at_time(read: Read, time: Expr, dim: int) -> Read:
    """The read with its token called time, and the state's index without it."""
    names = {time: T}
    factors = tuple(f.renamed(names) for f in read.term.factors)
    state = Factor(read.state.node, tuple(e for d, e in enumerate(read.state.index) if d != dim))
    return Read(Term(read.term.coef, factors), state, read.inner)


def _emitted(
    facts: GraphFacts, draft: Draft, update: Update, read: Read, total: fx.Node
) -> tuple[Emitted, dict[Expr, Expr]]:
    value = tensor_of(total)
    assert value is not None
    mixer, renames = mixer_of(update, read, value.dtype)
    if mixer.value is None:
        raise Unliftable("no values are summed", total)

    def placed(factors: Sequence[Factor]) -> list[Factor]:
        return [Factor(draft.leaf(f.node), f.index, f.power) for f in factors]

    mixer.query, mixer.outputs, mixer.keys = placed(mixer.query), placed(mixer.outputs), placed(mixer.keys)
    mixer.values, mixer.beta = placed(mixer.values), placed(mixer.beta)
    return emit(draft, mixer, facts), renames

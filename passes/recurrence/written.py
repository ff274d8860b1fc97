"""Recurrences that no hook has made one operator: loops over tokens or chunks, and causal products without softmax.

A chunked mixer has both, and a delta rule beside them a triangular solve; what ends in the same product with weights
and reads from one another is one mixer.

Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule", arXiv:2406.06484, section 3.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from attnc.expr import var
from attnc.op_recurrence import RECURRENCE
from attnc.passes.found import Found, missed
from attnc.passes.graph import GraphFacts, NoMatch, hint, module_path, op_name, tensor_of
from attnc.passes.recurrence.asking import whole
from attnc.passes.recurrence.chunks import Chunks, chunked
from attnc.passes.recurrence.cumulative import cumulatives
from attnc.passes.recurrence.decay import Parallel, bent, parallels
from attnc.passes.recurrence.loops import Loop, loops
from attnc.passes.recurrence.quadratic import quadratic
from attnc.passes.recurrence.reroll import reroll
from attnc.passes.recurrence.rewriting import Rewriting
from attnc.passes.recurrence.scans import scans
from attnc.passes.recurrence.step import Step, entry, step_facts
from attnc.region import AS_WRITTEN, Choice, Region, Unmatched
from attnc.rule_recurrence import RecurrenceRule, RecurrenceShape

# Products with weights end a mixer; a loop with one inside is a layer or a cell with a full matrix.
WEIGHTED = ("linear", "addmm", "conv1d", "conv2d", "embedding", "grouped_mm_fallback", "_grouped_mm")
SOLVES = ("linalg_solve_triangular", "triangular_solve", "linalg_inv", "linalg_inv_ex")
ZEROS = ("zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full")
INITIAL = 7  # place of the initial state among the operator's arguments
FEWEST = 4  # steps over single tokens; fewer are chance
DECAYS = {"none": "none", "constant": "head", "head": "token", "key": "channel", "value": "channel", "state": "state"}
AS_ONE = "chunked"  # until a form is chosen, any one says that the operator takes the place of what is written
PLACES = {"products": "a matrix of all pairs of tokens", "sums": "the states of all tokens", "scan": "a scan",
          "chunks": "chunks and what they carry on"}
WHY = "written out in the graph: "
MIXED = "its loops and products are parts of one algorithm, which no rewrite takes together"


@dataclass
class Mixer:
    """Loops and products of one linear mixer, and the products with weights that it ends in."""

    ends: set[fx.Node]
    parts: set[fx.Node] = field(default_factory=set)
    behind: set[fx.Node] = field(default_factory=set)  # what its parts are made of
    rolled: list[tuple[Loop, Step]] = field(default_factory=list)
    products: list[Parallel] = field(default_factory=list)
    solves: bool = False  # a triangular system on the way into its products, by an operator or by substitution

    @property
    def main(self) -> Parallel:
        """The product with values; sums of weights normalise it."""
        return next((p for p in reversed(self.products) if p.value is not None), self.products[-1])


def rolled(facts: GraphFacts, taken: Collection[fx.Node]) -> Iterator[Found | Unmatched]:
    """The recurrences of a graph that are written out, each with what may take its place.

    A loop that is no recurrence but makes the values of one solves the triangular system of its delta rule.
    """
    mixers: list[Mixer] = []
    refused: list[tuple[Loop, NoMatch]] = []
    whole, why_not = _of_chunks(facts, taken)
    yield from whole
    taken = {*taken, *(node for found in whole for node in found.nodes)}
    for loop in loops(facts.graph, taken):
        step = _step(loop, mixers)
        if isinstance(step, Step):
            _enter(mixers, _ends(loop.nodes), loop.nodes).rolled.append((loop, step))
        elif step is not None and loop.steps >= FEWEST:
            refused.append((loop, step))
    for found in parallels(facts, taken):
        around = next((m for m in mixers if any(found.node in loop.nodes for loop, _ in m.rolled)), None)
        around = around or next((m for m in mixers if any(found.shares(p) for p in m.products)), None)
        (around or _enter(mixers, _ends([found.node]), [found.node])).products.append(found)
    behind = {id(mixer): _behind(facts, mixer) for mixer in mixers}
    for mixer in mixers:
        mixer.solves |= any(behind[id(mixer)].intersection(loop.nodes) for loop, _ in refused)
        mixer.solves |= any(op_name(node) in SOLVES for node in behind[id(mixer)])
        yield _found(facts, mixer, why_not)
    for loop, why in refused:
        if not any(nodes.intersection(loop.nodes) for nodes in behind.values()):
            yield missed(why.node, why)
    inside = {node for mixer in mixers for loop, _ in mixer.rolled for node in loop.nodes}
    for why in bent(facts, {*taken, *inside}):
        yield missed(why.node, why)
    for total, read, match in cumulatives(facts, {*taken, *inside}):
        yield _one(facts, read, match, "sums", frozenset([total, read]))
    for node, match in scans(facts, taken):
        yield _one(facts, node, match, "scan", frozenset([node, *node.users]))


def _one(
    facts: GraphFacts, node: fx.Node, match: Rewriting | NoMatch, written: str, nodes: frozenset[fx.Node]
) -> Found | Unmatched:
    """A recurrence that one node is."""
    if isinstance(match, NoMatch):
        return missed(node, match)
    out = tensor_of(match.outs[0])
    assert out is not None
    region = Region(
        module_path(node), node.name, match.rule, match.shape, str(out.dtype).removeprefix("torch."), out.device.type,
        written=written, training=facts.needs_grad(match.outs[0]), choice=_chosen(match, written),
    )  # fmt: skip
    return Found(region, match, facts, nodes)


def _step(loop: Loop, mixers: Sequence[Mixer]) -> Step | NoMatch | None:
    """The state of a loop; why there is none; None where the loop is no candidate at all."""
    nodes = set(loop.nodes)
    known = {node for mixer in mixers for inner, _ in mixer.rolled for node in inner.nodes}
    if any(op_name(n) in WEIGHTED for n in loop.blocks[-1]) or nodes & known:
        return None
    reasons = []
    for place in loop.carried:
        step = step_facts(loop, place)
        if isinstance(step, Step) and (step.chunk > 1 or loop.steps >= FEWEST):
            return step
        if isinstance(step, Step):
            continue
        reasons.append(step)
    telling = [r for r in reasons if any(word in r.reason for word in ("affine", "mixes", "mixed"))]
    return telling[0] if telling else None


def _ends(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The first products with weights that `nodes` flow into."""
    seen, stack, ends = set(nodes), list(nodes), set()
    while stack:
        for user in stack.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if op_name(user) in WEIGHTED:
                ends.add(user)
            elif user.op != "output":
                stack.append(user)
    return ends


def _enter(mixers: list[Mixer], ends: set[fx.Node], nodes: Sequence[fx.Node]) -> Mixer:
    """The mixer that ends like this and has what these nodes read, or reads them; made if there is none."""
    behind = _sources(nodes)
    for mixer in mixers:
        if mixer.ends & ends and (behind & mixer.parts or mixer.behind.intersection(nodes)):
            break
    else:
        mixer = Mixer(ends)
        mixers.append(mixer)
    mixer.ends |= ends
    mixer.parts |= set(nodes)
    mixer.behind |= behind
    return mixer


def _sources(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """What `nodes` are made of, back to products with weights."""
    seen, stack = set(nodes), list(nodes)
    while stack:
        fresh = [x for x in stack.pop().all_input_nodes if x not in seen and op_name(x) not in WEIGHTED]
        seen.update(fresh)
        stack.extend(fresh)
    return seen


def _of_chunks(facts: GraphFacts, taken: Collection[fx.Node]) -> tuple[list[Found], list[tuple[Chunks, NoMatch]]]:
    """The mixers that are written in chunks and are proved to be one operator; the others, with the reason."""
    found: list[Found] = []
    left: list[tuple[Chunks, NoMatch]] = []
    for chunks in chunked(facts, taken):
        match = whole(facts, chunks)
        if isinstance(match, NoMatch):
            left.append((chunks, match))
            continue
        one = _one(facts, chunks.out, match, "chunks", frozenset(chunks.inside))
        assert isinstance(one, Found)
        assert isinstance(one.region.rule, RecurrenceRule)
        given = any(n.target is RECURRENCE and n.args[INITIAL] is not None for n in match.graph.nodes)
        rule = replace(one.region.rule, chunk=chunks.size, state_in=given, state_out=len(match.outs) > 1)
        found.append(replace(one, region=replace(one.region, rule=rule)))
    return found, left


def _found(facts: GraphFacts, mixer: Mixer, why_not: Sequence[tuple[Chunks, NoMatch]]) -> Found:
    rule, shape = _of_products(mixer.main) if mixer.products else (RecurrenceRule(), None)
    anchor = mixer.main.node if mixer.products else None
    nodes = {found.node for found in mixer.products}
    for loop, step in mixer.rolled[-1:]:
        rule, shape, anchor = _of_loop(loop, step, rule)
    for loop, _ in mixer.rolled:
        nodes |= set(loop.nodes)
    assert anchor is not None and shape is not None
    rule = replace(rule, delta=rule.delta or mixer.solves)
    match, written = _rewriting(facts, mixer, why_not), "loop" if mixer.rolled else "products"
    choice = Choice(AS_WRITTEN, WHY + match.reason) if isinstance(match, NoMatch) else _chosen(match, written)
    if isinstance(match, Rewriting):
        rule, shape = replace(match.rule, state_in=rule.state_in, state_out=rule.state_out), match.shape
        nodes |= set(match.outs)
    value = tensor_of(anchor)
    assert value is not None
    region = Region(
        module_path(anchor), anchor.name, rule, shape, str(value.dtype).removeprefix("torch."), value.device.type,
        written=written, training=facts.needs_grad(anchor), choice=choice,
    )  # fmt: skip
    taken = isinstance(match, Rewriting)
    return Found(region, match if taken else None, facts if taken else None, nodes=frozenset(nodes))


def _rewriting(facts: GraphFacts, mixer: Mixer, why_not: Sequence[tuple[Chunks, NoMatch]]) -> Rewriting | NoMatch:
    """What may take the place of a mixer; why nothing may."""
    if mixer.rolled and not mixer.products and not mixer.solves and len(mixer.rolled) == 1:
        return reroll(facts, mixer.rolled[0][0])
    if mixer.products and not mixer.rolled and not mixer.solves:
        return quadratic(facts, mixer.products)
    for chunks, why in why_not:
        if mixer.parts.intersection(chunks.inside):
            return NoMatch(f"{MIXED}: {why.reason}", why.node)
    return NoMatch(MIXED, mixer.main.node if mixer.products else mixer.rolled[0][0].blocks[-1][0])


def _chosen(found: Rewriting, written: str) -> Choice:
    what = f"{found.steps} steps" if found.steps else PLACES[written]
    return Choice(AS_ONE, f"one operator in chunks in place of {what}")


def _of_loop(loop: Loop, step: Step, rule: RecurrenceRule) -> tuple[RecurrenceRule, RecurrenceShape, fx.Node]:
    """Facts of a loop; `rule`: of the products of the same mixer, whose decay within chunks may say more."""
    state = loop.blocks[-1][step.place]
    first = entry(loop, 0, step.place)
    inside = set(loop.nodes)
    collected = any(user not in inside for block in loop.blocks[:-1] for user in block[step.place].users)
    used = not collected and any(user not in inside for user in state.users)
    shape, decay = _sizes(step, max(_length(loop), loop.steps * step.chunk))
    if decay == "none" and rule.decay != "none":
        decay = rule.decay
    given = op_name(first) not in ZEROS
    found = RecurrenceRule(
        decay=decay, delta=step.delta, chunk=step.chunk, state_in=given, state_out=used,
        state="float64" if "64" in str(state.meta["val"].dtype) else "float32",
    )
    return found, shape, state


def _sizes(step: Step, length: int) -> tuple[RecurrenceShape, str]:
    """Sizes of the state, and the decay in the rule's words; a state of fewer axes has one value or one key a head."""
    decay = DECAYS[step.decay]
    *outer, last = step.shape
    if len(outer) >= 3:
        heads, K = outer[-2:]
        return RecurrenceShape(_count(outer[:-2]), heads, length, K, last, heads), decay
    batch, heads = outer[0], outer[-1]
    if len(outer) == 2:
        by_axis = {"key": "token", "head": "token", "value": "channel"}
        return RecurrenceShape(batch, heads, length, last, 1, heads), by_axis.get(step.decay, decay)
    return RecurrenceShape(batch, last, length, 1, 1), "token" if decay in ("channel", "state") else decay


def _count(sizes: Sequence[int]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count


def _length(loop: Loop) -> int:
    """Tokens that the loop walks over: the longest axis along which its steps select or slice."""
    lengths = [0]
    for node in loop.blocks[-1]:
        if op_name(node) in ("select", "slice") and len(node.args) > 1:
            value = tensor_of(node.args[0])
            at = loop.blocks[-1].index(node)
            moves = loop.blocks[0][at].args[1:] != node.args[1:]
            if value is not None and moves and isinstance(node.args[1], int):
                lengths.append(hint(value.shape[node.args[1]]))
    return max(lengths)


def _of_products(found: Parallel) -> tuple[RecurrenceRule, RecurrenceShape]:
    first, last = tensor_of(found.query.node), tensor_of(found.node)
    assert first is not None and last is not None
    sizes = [hint(s) for s in last.shape]
    batch = [d for d in range(len(sizes)) if d not in (found.row, found.col)]
    chunks = sizes[batch.pop(batch.index(found.row - 1))] if len(batch) > 2 and found.row - 1 in batch else 1
    heads = sizes[batch[1]] if len(batch) > 1 else 1
    width = hint(first.shape[found.query.index.index(var("c"))]) if var("c") in found.query.index else 1
    rows = sizes[found.row]
    values = sizes[found.col] if found.col is not None else 1
    rule = RecurrenceRule(decay=DECAYS[found.decay], chunk=rows)
    return rule, RecurrenceShape(sizes[batch[0]] if batch else 1, heads, rows * chunks, width, values, heads)


def _behind(facts: GraphFacts, mixer: Mixer) -> set[fx.Node]:
    """What the values of a mixer are made of, back to products with weights, through writes into parts of a tensor."""
    seen: set[fx.Node] = set()
    stack = [found.value.node for found in mixer.products if found.value is not None]
    stack += [n for loop, _ in mixer.rolled for n in loop.blocks[0]]
    while stack:
        node = stack.pop()
        if node not in seen and op_name(node) not in WEIGHTED:
            seen.add(node)
            stack.extend(facts.sources(node))
    return seen

"""Recurrences that no hook has made one operator: loops over tokens or chunks, and causal products without softmax.

A chunked mixer has both, and a delta rule beside them a triangular solve; what ends in the same product with weights
is one mixer.

Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule", arXiv:2406.06484, section 3.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from attnc.passes.found import Found, missed
from attnc.passes.graph import GraphFacts, NoMatch, hint, module_path, op_name, tensor_of
from attnc.passes.recurrence.decay import Parallel, parallels
from attnc.passes.recurrence.loops import Loop, loops
from attnc.passes.recurrence.step import Step, entry, step_facts
from attnc.region import AS_WRITTEN, Choice, Region, Unmatched
from attnc.rule_recurrence import RecurrenceRule, RecurrenceShape

# Products with weights end a mixer; a loop with one inside is a layer or a cell with a full matrix.
WEIGHTED = ("linear", "addmm", "conv1d", "conv2d", "embedding", "grouped_mm_fallback", "_grouped_mm")
SOLVES = ("linalg_solve_triangular", "triangular_solve", "linalg_inv", "linalg_inv_ex")
ZEROS = ("zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full")
FEWEST = 4  # steps over single tokens; fewer are chance
DECAYS = {"none": "none", "constant": "head", "head": "token", "key": "channel", "value": "channel", "state": "state"}
WHY = "written out in the graph, and attnc has no form for that; a hook for its function makes it one node"


@dataclass
class Mixer:
    """Loops and products of one linear mixer, and the products with weights that it ends in."""

    ends: set[fx.Node]
    rolled: list[tuple[Loop, Step]] = field(default_factory=list)
    products: list[Parallel] = field(default_factory=list)
    solves: bool = False  # a triangular system on the way into its products, by an operator or by substitution


def rolled(facts: GraphFacts, taken: Collection[fx.Node]) -> Iterator[Found | Unmatched]:
    """The recurrences of a graph that are written out.

    A loop that is no recurrence but makes the values of one solves the triangular system of its delta rule.
    """
    mixers: list[Mixer] = []
    refused: list[tuple[Loop, NoMatch]] = []
    for loop in loops(facts.graph, taken):
        step = _step(loop, mixers)
        if isinstance(step, Step):
            _enter(mixers, _ends(loop.nodes)).rolled.append((loop, step))
        elif step is not None and loop.steps >= FEWEST:
            refused.append((loop, step))
    for found in parallels(facts, taken):
        _enter(mixers, _ends([found.last.node])).products.append(found)
    behind = {id(mixer): _behind(facts, mixer) for mixer in mixers}
    for mixer in mixers:
        mixer.solves |= any(behind[id(mixer)].intersection(loop.nodes) for loop, _ in refused)
        mixer.solves |= any(op_name(node) in SOLVES for node in behind[id(mixer)])
        yield _found(facts, mixer)
    for loop, why in refused:
        if not any(nodes.intersection(loop.nodes) for nodes in behind.values()):
            yield missed(why.node, why)


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


def _enter(mixers: list[Mixer], ends: set[fx.Node]) -> Mixer:
    """The mixer that ends like this, made if there is none."""
    for mixer in mixers:
        if mixer.ends & ends:
            mixer.ends |= ends
            return mixer
    mixers.append(Mixer(ends))
    return mixers[-1]


def _found(facts: GraphFacts, mixer: Mixer) -> Found:
    rule, shape = _of_products(mixer.products[-1]) if mixer.products else (RecurrenceRule(), None)
    anchor = mixer.products[-1].last.node if mixer.products else None
    nodes = {n for found in mixer.products for n in (found.first.node, found.last.node)}
    for loop, step in mixer.rolled[-1:]:
        rule, shape, anchor = _of_loop(loop, step, rule)
    for loop, _ in mixer.rolled:
        nodes |= set(loop.nodes)
    assert anchor is not None and shape is not None
    rule = replace(rule, delta=rule.delta or mixer.solves)
    value = tensor_of(anchor)
    assert value is not None
    region = Region(
        module_path(anchor), anchor.name, rule, shape, str(value.dtype).removeprefix("torch."), value.device.type,
        written="loop" if mixer.rolled else "products", training=facts.needs_grad(anchor),
        choice=Choice(AS_WRITTEN, WHY),
    )
    return Found(region, nodes=frozenset(nodes))


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
    first, last = tensor_of(found.first.left), tensor_of(found.last.node)
    assert first is not None and last is not None
    labels = found.last.out_labels
    extents = dict(zip(labels, map(hint, last.shape), strict=True))
    batch = [label for label in labels if label not in (found.last.row, found.last.col)]
    before = labels[labels.index(found.last.row) - 1]
    chunks = extents[batch.pop(batch.index(before))] if len(batch) > 2 and before in batch else 1
    heads = extents[batch[1]] if len(batch) > 1 else 1
    width = hint(first.shape[found.first.left_labels.index(found.first.contracted)])
    rows = extents[found.last.row]
    rule = RecurrenceRule(decay=DECAYS[found.decay], chunk=rows)
    return rule, RecurrenceShape(
        extents[batch[0]] if batch else 1, heads, rows * chunks, width, extents[found.last.col], heads
    )


def _behind(facts: GraphFacts, mixer: Mixer) -> set[fx.Node]:
    """What the values of a mixer are made of, back to products with weights, through writes into parts of a tensor."""
    seen: set[fx.Node] = set()
    stack = [found.last.right for found in mixer.products]
    stack += [n for loop, _ in mixer.rolled for n in loop.blocks[0]]
    while stack:
        node = stack.pop()
        if node not in seen and op_name(node) not in WEIGHTED:
            seen.add(node)
            stack.extend(facts.sources(node))
    return seen

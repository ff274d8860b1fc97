"""Mixers written in chunks, by their borders: where tokens are cut into chunks, and where the chunks are joined again.

    (B, T, H, K) -> (B, T / C, C, H, K)  ...  (B, T / C, C, H, V) -> (B, T, H, V)

What lies between may be written in any way: segment sums and einsums, a loop over chunks, a triangular system that is
solved row by row. What it computes is asked of it, in `passes.recurrence.asking`.

Source: Dao and Gu 2024, "Transformers are SSMs", arXiv:2405.21060, section 6; Yang et al. 2024, "Gated Delta Networks",
arXiv:2412.06464, section 3.3.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from attnc.passes.graph import GraphFacts, hint, op_name, tensor_of

RESHAPES = ("view", "reshape", "_unsafe_view", "flatten", "unflatten")
SLICES = ("slice", "narrow")
PARTS = ("select", "slice", "narrow", "squeeze", "getitem")
PIECES = ("split", "split_with_sizes", "chunk")
WEIGHTED = ("linear", "addmm", "conv1d", "conv2d", "convolution", "embedding")
CONTRACTIONS = ("matmul", "bmm", "einsum", "mm", "sum", "__matmul__", "baddbmm")
ONE_SIDED = ("tril", "triu", "tril_", "triu_", "masked_fill", "masked_fill_", "where", "cumsum")
MADE = ("mul", "unsqueeze")


@dataclass
class Chunks:
    """What lies between the borders.

    out: the chunks to be joined, or joined by `cat`. time: its axes of tokens, (chunk, place) or one.
    length, size: tokens, and tokens of a chunk. leaves: what is read from outside -> its axis of tokens or None.
    inside: the nodes between, in order; cuts: those of them that cut. finals: others of them that are read outside.
    """

    out: fx.Node
    time: tuple[int, ...]
    length: int
    size: int
    leaves: dict[fx.Node, int | None] = field(default_factory=dict)
    inside: list[fx.Node] = field(default_factory=list)
    cuts: set[fx.Node] = field(default_factory=set)
    finals: list[fx.Node] = field(default_factory=list)


def chunked(facts: GraphFacts, taken: Collection[fx.Node]) -> Iterator[Chunks]:
    """The parts of a graph between such borders that sum over earlier tokens, outer ones first."""
    constant = _constants(facts)
    known: set[fx.Node] = set(taken)
    for joined in reversed(list(_joins(facts.graph))):
        if joined.out in known:
            continue
        found = _between(facts, joined, constant)
        if found is None or known.intersection(found.inside):
            continue
        names = [op_name(n) for n in found.inside]
        timed = [x for x, dim in found.leaves.items() if dim is not None]
        if len(timed) < 2 or any(n in WEIGHTED for n in names) or not any(n in ONE_SIDED for n in names):
            continue
        if sum(n in CONTRACTIONS for n in names) < 2:
            continue
        known.update(found.inside)
        yield found


def _constants(facts: GraphFacts) -> set[fx.Node]:
    """What is computed from no input."""
    found: set[fx.Node] = set()
    for node in facts.graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and all(x in found for x in node.all_input_nodes)):
            found.add(node)
    return found


def sizes(node: fx.Node) -> list[int]:
    value = tensor_of(node)
    assert value is not None
    return [hint(s) for s in value.shape]


def groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Axes of a shape and the axes of another one that hold the same elements, in order; axes of one element apart."""
    found, a, b = [], 0, 0
    while a < len(before) or b < len(after):
        left, right = [a] if a < len(before) else [], [b] if b < len(after) else []
        m, n = (before[a] if left else 1), (after[b] if right else 1)
        a, b = a + len(left), b + len(right)
        while m != n:
            if m < n and a < len(before):
                m, left, a = m * before[a], [*left, a], a + 1
            elif n < m and b < len(after):
                n, right, b = n * after[b], [*right, b], b + 1
            else:
                return []
        found.append((left, right))
    return found


def _joins(graph: fx.Graph) -> Iterator[Chunks]:
    """Where chunks may be joined: an axis made of two others, or pieces of one length side by side."""
    for node in graph.nodes:
        value = tensor_of(node)
        if value is None or not value.is_floating_point():
            continue
        if op_name(node) in RESHAPES:
            source = sizes(node.args[0])
            for left, right in groups(source, sizes(node)):
                count = [d for d in left if source[d] > 1]
                if len(count) == 2 and len(right) == 1 and count[1] == count[0] + 1:
                    c, place = count
                    yield Chunks(node.args[0], (c, place), source[c] * source[place], source[place])
        if op_name(node) == "cat" and len(node.args[0]) > 1:
            dim = int(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % value.dim()
            shapes = [sizes(x) for x in node.args[0]]
            if any(len(shape) != value.dim() for shape in shapes):
                continue  # a cache that is still empty is joined as a tensor of no elements and one axis
            widths = [shape[dim] for shape in shapes]
            if len(set(widths[:-1])) == 1 and widths[0] > 1 and widths[-1] <= widths[0]:
                yield Chunks(node, (dim,), sum(widths), widths[0])


def _cut(node: fx.Node, joined: Chunks) -> tuple[fx.Node, int] | None:
    """The tensor and the axis that `node` cuts into chunks."""
    if not node.args or not isinstance(node.args[0], fx.Node) or tensor_of(node) is None:
        return None
    source, name, length, size = node.args[0], op_name(node), joined.length, joined.size
    if name == "getitem" and op_name(source) in PIECES:
        pieces, source = source, source.args[0]
        dim = int(pieces.args[2] if len(pieces.args) > 2 else pieces.kwargs.get("dim", 0))
    elif name in SLICES and len(node.args) > 1:
        dim = int(node.args[1])
    elif name in RESHAPES and tensor_of(source) is not None:
        before, after = sizes(source), sizes(node)
        for left, right in groups(before, after):
            parts = [after[d] for d in right if after[d] > 1]
            if len(left) == 1 and before[left[0]] == length and parts == [length // size, size]:
                return source, left[0]
        return None
    else:
        return None
    if tensor_of(source) is None:
        return None
    whole, part = sizes(source), sizes(node)
    dim %= len(whole)
    return (source, dim) if whole[dim] == length and part[dim] in (size, length % size) else None


def _between(facts: GraphFacts, joined: Chunks, constant: set[fx.Node]) -> Chunks | None:
    """The nodes behind a join as far as the cuts; None where there are none."""
    cuts = {n: cut for n in facts.graph.nodes if n.op == "call_function" and (cut := _cut(n, joined)) is not None}
    if len({source for source, _ in cuts.values()}) < 2:
        return None
    chunked = set(cuts)
    for node in facts.graph.nodes:
        if node not in chunked and node.op == "call_function" and any(x in chunked for x in node.all_input_nodes):
            chunked.add(node)
    last = facts.order[joined.out]
    leaves: dict[fx.Node, int | None] = {}
    inside: set[fx.Node] = set()
    stack = [joined.out]
    while stack:
        node = stack.pop()
        if node in inside or node in leaves:
            continue
        if node in cuts:
            inside.add(node)
            if op_name(node) == "getitem":
                inside.add(node.args[0])
            leaves[cuts[node][0]] = cuts[node][1]
        elif tensor_of(node) is None and isinstance(node.meta.get("val"), int | torch.SymInt):
            inside.add(node)
        elif node in chunked or node in constant:
            inside.add(node)
            stack += [x for x in facts.sources(node) if facts.order[x] <= last]
        else:
            leaves[node] = None
    if inside & set(leaves):
        return None
    found = Chunks(joined.out, joined.time, joined.length, joined.size, leaves, [], set(cuts) & inside)
    _expand(found, inside)
    _follow(facts, found, inside, constant)
    found.inside = sorted(inside, key=facts.order.__getitem__)
    return found


def _follow(facts: GraphFacts, found: Chunks, inside: set[fx.Node], constant: set[fx.Node]) -> None:
    """Take in what comes after the results' last reader inside, to the last state."""

    def finals() -> list[fx.Node]:
        return [n for n in inside if n is not found.out and _leaves(n, inside, constant, found.cuts)]

    found.finals = finals()
    given = {*found.leaves, *constant}
    made: dict[fx.Node, set[fx.Node]] = {}  # what is computed from the inside alone -> that, with all on the way to it
    for node in facts.graph.nodes:
        if not found.finals:
            return
        (only, *more) = found.finals
        views = all(op_name(user) in PARTS for user in only.users if user not in inside)
        if not more and not views:
            return
        inputs = node.all_input_nodes
        if node in inside or node.op != "call_function" or found.out in inputs:
            continue
        if all(x in inside or x in given or x in made for x in inputs):
            made[node] = {node}.union(*(made[x] for x in inputs if x in made))
            if any(x in found.finals for x in inputs):
                inside |= made[node]
                found.finals = finals()


def _leaves(node: fx.Node, inside: set[fx.Node], constant: set[fx.Node], cuts: set[fx.Node]) -> bool:
    """Whether what is computed inside is read elsewhere."""
    if tensor_of(node) is None or node in constant or node in cuts:
        return False
    return any(user not in inside for user in node.users)


def _expand(found: Chunks, inside: set[fx.Node]) -> None:
    """Take in products of a leaf with a gate, so that the gate is a leaf of its own: `beta * key` beside `key`."""
    leaves = found.leaves
    done = False
    while not done:
        done = True
        for leaf, dim in list(leaves.items()):
            factors = [x for x in leaf.args if isinstance(x, fx.Node)] if op_name(leaf) == "mul" else []
            if dim is None or len(factors) != 2:
                continue
            bare = [_bare(x, dim, leaf) for x in factors]
            if any(x is None for x in bare) or not any(x is not None and x[0] in leaves for x in bare):
                continue
            del leaves[leaf]
            inside.add(leaf)
            for part in bare:
                assert part is not None
                source, axis, views = part
                inside.update(views)
                leaves.setdefault(source, axis)
            done = False


def _bare(node: fx.Node, dim: int, product: fx.Node) -> tuple[fx.Node, int | None, list[fx.Node]] | None:
    """A factor without its unsqueezes, its axis of tokens if it has one, and those views; None if it is no tensor."""
    value, whole = tensor_of(node), tensor_of(product)
    if value is None or whole is None:
        return None
    axis: int | None = dim - (whole.dim() - value.dim())
    assert axis is not None
    if axis < 0 or (hint(value.shape[axis]) == 1 != hint(whole.shape[dim])):
        axis = None
    views = []
    while op_name(node) == "unsqueeze" and tensor_of(node.args[0]) is not None:
        views.append(node)
        at = int(node.args[1]) % len(sizes(node))
        if axis == at:
            return None
        axis = axis if axis is None or axis < at else axis - 1
        node = node.args[0]
    return node, axis, views

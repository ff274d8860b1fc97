"""Find mixtures of experts: feed-forwards whose weights are picked by a router, however tokens are sent to them.

The anchor is a pair of products with experts' weights. From there the graph is followed to the first nodes that hold
the sum of the weighted outputs, shared experts included; that sum is taken apart element by element (`combine`),
and every term must meet the same token, the same slot and the same expert in its data, its weights and its output.
The router behind the weights is then told by its values (`router`).

Source: Shazeer et al. 2017, arXiv:1701.06538, section 2.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator

from torch import fx

from attnc.expr import ONE, Expr, var
from attnc.passes.found import Found, missed
from attnc.passes.graph import GraphFacts, NoMatch, Unliftable, module_path, op_name, shape_of, tensor_of
from attnc.passes.moe.block import Block, block_of, down_projection
from attnc.passes.moe.combine import Sums
from attnc.passes.moe.data import data_of, origin
from attnc.passes.moe.describe import described, nodes_of
from attnc.passes.moe.leaving import leaving
from attnc.passes.moe.products import Contraction, Weighted, contraction, contractions, holds_many, weighted
from attnc.passes.moe.router import Routers
from attnc.passes.moe.rows import Element, Rows
from attnc.passes.moe.summand import Unit
from attnc.region import AS_WRITTEN, Choice, Region, Unmatched

STEPS = 16  # nodes in a row, beyond the last product, that may be no sum of experts' outputs
CHOICE = Choice(AS_WRITTEN, "no form of attnc replaces experts yet, so the block runs as written")


def moes(facts: GraphFacts, taken: Collection[fx.Node]) -> Iterator[Found | Unmatched]:
    """The mixtures of experts of a graph, and what looked like one."""
    sums, routers = Sums(Rows(facts)), Routers()
    done: set[fx.Node] = set()
    for node in facts.graph.nodes:
        if node in done or node in taken:
            continue
        unit = _second(sums, node)
        if unit is None:
            continue
        try:
            found = _block(facts, sums, unit)
            entry = found if isinstance(found, NoMatch) else _entry(facts, routers, found)
        except Unliftable as exc:
            entry = exc.no_match
        if isinstance(entry, Found):
            done |= entry.nodes
            yield entry
        elif _of_experts(unit.second.expert):
            done |= {node, *(first.node for first in unit.hidden.firsts)}
            yield missed(node, entry)
    yield from map(missed_pair, _alone(sums, done, taken))
    yield from leaving(facts, done)


def _alone(sums: Sums, done: Collection[fx.Node], taken: Collection[fx.Node]) -> Iterator[fx.Node]:
    """Products of rows with weights gathered or grouped by expert ids that belong to no block."""
    for node in sums.rows.facts.graph.nodes:
        dot = contraction(node) if node not in done and node not in taken else None
        if dot is None or len(dot.contracted) != 1 or not any(map(holds_many, node.all_input_nodes)):
            continue
        for label in dot.out_labels:
            if (label in dot.left_labels) == (label in dot.right_labels) or dot.extent(label) == ONE:
                continue
            found = _weighted(sums, dot, label)
            if found is not None and isinstance(found.expert, Element) and found.expert.node.op != "placeholder":
                yield node
                break


def missed_pair(node: fx.Node) -> Unmatched:
    """The entry for a product that should have another behind an activation."""
    return missed(node, NoMatch("one product with weights picked by ids, two around an activation are an expert", node))


def _second(sums: Sums, node: fx.Node) -> Unit | None:
    """The feed-forward whose second product is `node`: one of stacked experts, or one that is weighted by rows."""
    ways = contractions(node)
    if not ways or not (_is_weighed(node) or any(map(holds_many, node.all_input_nodes))):
        return None
    for dot in ways:
        for label in dot.out_labels:
            own = (label in dot.left_labels) != (label in dot.right_labels)
            if own and dot.extent(label) != ONE:
                unit = _unit(sums, dot, label)
                if unit is not None:
                    return unit
    return None


def _unit(sums: Sums, dot: Contraction, channel: str) -> Unit | None:
    """The feed-forward of experts whose second product is `dot`, `channel` being the axis of its outputs."""
    index = _index(sums, dot, channel)
    second = _weighted(sums, dot, channel)
    if second is None or not (_of_experts(second.expert) or _is_weighed(dot.node)):
        return None
    try:
        unit = sums.unit(dot, index)
        alike = unit is not None and {_of_experts(x.expert) for x in unit.hidden.firsts} == {_of_experts(second.expert)}
        return unit if alike and not _of_blocks(sums, unit) else None
    except Unliftable:
        return None


def _of_blocks(sums: Sums, unit: Unit | None) -> bool:
    """Whether the axis that picks weights picks data too: heads or blocks of features, no experts."""
    if unit is None or not isinstance(unit.second.expert, Expr):
        return False
    x = data_of(sums.rows, unit).x
    return any(unit.second.expert.names() & e.names() for e in x.index)


def _weighted(sums: Sums, dot: Contraction, channel: str) -> Weighted | None:
    """The product at an element in general, `channel` being the axis of its outputs."""
    try:
        return weighted(sums.rows, dot, _index(sums, dot, channel), sums.col, "p")
    except Unliftable:
        return None


def _index(sums: Sums, dot: Contraction, channel: str) -> tuple[Expr, ...]:
    return tuple(sums.col if x == channel else _row(sums, x, dot.extent(x)) for x in dot.out_labels)


def _is_weighed(node: fx.Node) -> bool:
    """Whether what `node` computes is multiplied by numbers of its rows, or stacked: an expert in a loop."""
    for _ in range(6):
        users = [u for u in node.users if u.users]
        if len(users) != 1:
            return False
        (user,) = users
        if op_name(user) in ("stack", "cat"):
            return True
        if op_name(user) in ("mul", "mul_"):
            others = [x for x in user.all_input_nodes if x is not node and tensor_of(x) is not None]
            return any(shape_of(x) == () or shape_of(x)[-1] == ONE for x in others)
        node = user
    return False


def _row(sums: Sums, label: str, extent: Expr) -> Expr:
    sums.rows.ranges.declare(f"r_{label}", extent)
    return var(f"r_{label}")


def _of_experts(expert: Element | Expr | None) -> bool:
    return isinstance(expert, Element) or (isinstance(expert, Expr) and bool(expert.names()))


def _block(facts: GraphFacts, sums: Sums, unit: Unit) -> Block | NoMatch:
    """The largest block whose sum holds the feed-forward."""
    x = origin(data_of(sums.rows, unit).x.node)
    below = down_projection(x)
    sums.begin({x}, facts.order[x if below is None else below[1]])
    best: Block | None = None
    failed = 0
    why = NoMatch("no later node is the sum of the experts' outputs", unit.second.node)
    for node in _ahead(facts, unit.second.node):
        value = tensor_of(node)
        if value is None or value.dim() < 2 or not shape_of(node)[-1].is_const or _only_shows(node):
            continue
        try:
            block = block_of(sums, node)
        except Unliftable as exc:
            failed += 1
            if best is not None or failed > STEPS:
                break
            why = exc.no_match
            continue
        failed = 0
        if block is None or all(unit.second.node is not expert.second.node for expert in block.experts):
            if best is not None:
                break
        else:
            best = block
    return why if best is None else best


def _only_shows(node: fx.Node) -> bool:
    """Whether `node` is a view or a cast of the sum before it."""
    return origin(node) is not node


def _ahead(facts: GraphFacts, start: fx.Node) -> Iterator[fx.Node]:
    """Nodes that everything computed from `start` passes, in order."""
    nodes = list(facts.graph.nodes)[facts.order[start] :]
    reached: set[fx.Node] = set()
    horizon = facts.order[start]
    for node in nodes:
        if node is not start and not any(x in reached for x in node.all_input_nodes):
            continue
        if node.op == "output":
            return
        if horizon <= facts.order[node]:
            yield node
        reached.add(node)
        horizon = max([horizon, *(facts.order[u] for u in node.users)])


def _path(anchor: fx.Node, logits: fx.Node | None) -> str:
    """The module that holds experts and router."""
    paths = [module_path(n).split(".") for n in (anchor, logits or anchor)]
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*paths, strict=False))
    return ".".join(name for name, _ in shared)


def _entry(facts: GraphFacts, routers: Routers, block: Block) -> Found | NoMatch:
    anchor = block.experts[0].second.node
    router = routers.of(block.wanted, block.tokens, block.count)
    if isinstance(router, str):
        return NoMatch(router, anchor)
    found = described(block, router)
    if isinstance(found, NoMatch):
        return found
    match, rule, shape = found
    out = tensor_of(anchor)
    assert out is not None
    region = Region(
        path=_path(anchor, router.logits),
        node=anchor.name,
        rule=rule,
        shape=shape,
        dtype=str(out.dtype).removeprefix("torch."),
        device=out.device.type,
        written=block.dispatch,
        training=facts.needs_grad(block.out),
        choice=CHOICE,
    )
    return Found(region, match, facts, nodes_of(block, router, facts.order))

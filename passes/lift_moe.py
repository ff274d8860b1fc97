"""Find mixtures of experts: feed-forwards whose weights are picked by a router, however tokens are sent to them.

The anchor is a pair of products with experts' weights. From there the graph is followed to the first nodes that hold
the sum of the weighted outputs, shared experts included; that sum is taken apart element by element (`moe_combine`),
and every term must meet the same token, the same slot and the same expert in its data, its weights and its output.
The router behind the weights is then told by its values (`moe_router`).

Source: Shazeer et al. 2017, arXiv:1701.06538, section 2.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator

from torch import fx

from attnc.expr import ONE, Expr, var
from attnc.passes.found import Found, missed
from attnc.passes.graph import GraphFacts, NoMatch, Unliftable, module_path, op_name, shape_of, tensor_of
from attnc.passes.moe_block import Block, block_of, data_of, down_projection, origin
from attnc.passes.moe_combine import Sums
from attnc.passes.moe_describe import described, nodes_of
from attnc.passes.moe_products import Contraction, contractions, weighted
from attnc.passes.moe_router import router_of
from attnc.passes.moe_rows import Element, Rows
from attnc.passes.moe_summand import Unit
from attnc.region import AS_WRITTEN, Choice, Region, Unmatched

STEPS = 48  # nodes that are looked at beyond the last product for the sum of the experts' outputs
CHOICE = Choice(AS_WRITTEN, "no form of attnc replaces experts yet, so the block runs as written")


def moes(facts: GraphFacts, taken: Collection[fx.Node]) -> Iterator[Found | Unmatched]:
    """The mixtures of experts of a graph, and what looked like one."""
    sums = Sums(Rows(facts))
    done: set[fx.Node] = set()
    for node in facts.graph.nodes:
        if node in done or node in taken:
            continue
        unit = _second(sums, node)
        if unit is None:
            continue
        found = _block(facts, sums, unit)
        entry = found if isinstance(found, NoMatch) else _entry(facts, found)
        if isinstance(entry, Found):
            done |= entry.nodes
            yield entry
        elif _of_experts(unit.second.expert):
            done.add(node)
            yield missed(node, entry)


def _second(sums: Sums, node: fx.Node) -> Unit | None:
    """The feed-forward whose second product is `node`: one of stacked experts, or one that is weighted by rows."""
    for dot in contractions(node):
        for label in dot.out_labels:
            own = (label in dot.left_labels) != (label in dot.right_labels)
            if own and dot.extent(label) != ONE:
                unit = _unit(sums, dot, label)
                if unit is not None:
                    return unit
    return None


def _unit(sums: Sums, dot: Contraction, channel: str) -> Unit | None:
    """The feed-forward of experts whose second product is `dot`, `channel` being the axis of its outputs."""
    index = tuple(sums.col if x == channel else _row(sums, x, dot.extent(x)) for x in dot.out_labels)
    try:
        second = weighted(sums.rows, dot, index, sums.col, "p")
        if second is None or not (_of_experts(second.expert) or _is_weighed(dot.node)):
            return None
        unit = sums.unit(dot, index)
    except Unliftable:
        return None
    alike = unit is not None and {_of_experts(x.expert) for x in unit.hidden.firsts} == {_of_experts(second.expert)}
    return unit if alike else None


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
    x = origin(data_of(sums.rows, unit)[0].node)
    below = down_projection(x)
    sums.begin({x}, facts.order[x if below is None else below[1]])
    best: Block | None = None
    why = NoMatch("no later node is the sum of the experts' outputs", unit.second.node)
    for node in _ahead(facts, unit.second.node):
        value = tensor_of(node)
        if value is None or value.dim() < 2 or not shape_of(node)[-1].is_const:
            continue
        try:
            block = block_of(sums, node)
        except Unliftable as exc:
            if best is not None:
                break
            why = exc.no_match
            continue
        best = block or best
        if best is not None and block is None:
            break
    return why if best is None else best


def _ahead(facts: GraphFacts, start: fx.Node) -> Iterator[fx.Node]:
    """Nodes that everything computed from `start` passes, in order."""
    nodes = list(facts.graph.nodes)[facts.order[start] :]
    reached: set[fx.Node] = set()
    horizon, steps = facts.order[start], 0
    for node in nodes:
        if node is not start and not any(x in reached for x in node.all_input_nodes):
            continue
        if node.op == "output":
            return
        if horizon <= facts.order[node]:
            yield node
            steps += 1
        if steps > STEPS:
            return
        reached.add(node)
        horizon = max([horizon, *(facts.order[u] for u in node.users)])


def _path(anchor: fx.Node, logits: fx.Node) -> str:
    """The module that holds experts and router."""
    paths = [module_path(n).split(".") for n in (anchor, logits)]
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*paths, strict=False))
    return ".".join(name for name, _ in shared)


def _entry(facts: GraphFacts, block: Block) -> Found | NoMatch:
    anchor = block.experts[0].second.node
    router = router_of(block.wanted, block.tokens, block.count)
    if isinstance(router, str):
        return NoMatch(router, anchor)
    found = described(block, router)
    if isinstance(found, NoMatch):
        return found
    match, rule, shape = found
    out = tensor_of(block.out)
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

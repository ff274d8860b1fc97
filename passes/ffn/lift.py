"""Feed-forwards by meaning: two products with weights over one token each, and a nonlinear function between them.

The anchor is the second product. Its data are read backwards, index by index, through element-wise operators, views,
dropout, casts, norms over the hidden axis and depthwise convolutions over the tokens, to one or two products with
weights that read the same input. What lies between is named by its values (`unit`), so that a spelling needs no
row of its own. Linear in the size of the graph; equal formulas are named once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attnc.expr import ONE, Expr, add, scale
from attnc.passes.ffn.around import NEAR, is_parallel, role_of, tail_of
from attnc.passes.ffn.flow import Flow, Flows
from attnc.passes.ffn.formula import Formula, Operand, layout_of
from attnc.passes.ffn.products import Weighted
from attnc.passes.ffn.terms import Reader
from attnc.passes.ffn.unit import Unit, norm_of, unit_of
from attnc.passes.found import Found, missed
from attnc.passes.graph import GraphFacts, NoMatch, Unliftable, hint, module_path, op_name, tensor_of
from attnc.region import AS_WRITTEN, Choice, Region, Unmatched
from attnc.rule_ffn import FFNRule, FFNShape

# Operators whose results keep the features of a token on the last axis.
FEATURES_LAST = frozenset(("layer_norm", "rms_norm", "native_layer_norm", "linear", "embedding"))


@dataclass(frozen=True)
class Projection:
    """Features `offset, offset + step, ...` of a product with weights; step 0: of another layout.

    bias: the product's own, or a parameter added to its result.
    """

    node: fx.Node
    data: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    offset: int = 0
    step: int = 1


@dataclass(frozen=True)
class FFNMatch:
    """A feed-forward in its graph.

    input: what the first products read, behind views. up, gate: the value and its gate, None where it is not gated.
    down: the second product. hidden: its data. inner: the nodes between the products, in order. out: the output, with
    its bias and constant factor.
    """

    input: fx.Node
    up: Projection
    gate: Projection | None
    down: Projection
    hidden: fx.Node
    inner: tuple[fx.Node, ...]
    out: fx.Node


def ffns(facts: GraphFacts, taken: Collection[fx.Node]) -> Iterator[Found | Unmatched]:
    """The feed-forwards of a graph, outside the nodes that other regions have taken."""
    flows = Flows(facts, taken)
    units: dict[Any, tuple[Unit, str | None]] = {}
    used: set[fx.Node] = set()
    seconds: set[fx.Node] = set()
    for node, product in flows.products.items():
        flow = flows.of[product.data]
        if flow.kind == "broken" and flow.why is not None:
            if not _is_excused(facts, flow, taken):
                yield missed(node, flow.why)
        elif flow.kind == "hidden" and flow.bent and (flow.sources <= seconds or not used & flow.sources):
            found = _lift(facts, flows, product, flow, units, taken)
            if isinstance(found, NoMatch):
                yield missed(node, found)
            elif found is not None and (flow.sources <= seconds or not used & found.nodes):
                found = _chained(found, used) if flow.sources <= seconds else found
                used |= found.nodes
                seconds.add(node)
                yield found


def _chained(found: Found, used: set[fx.Node]) -> Found:
    """A feed-forward whose first product is the second one of another: that product is the other's."""
    region = replace(found.region, rule=replace(found.region.rule, chained=True))  # type: ignore[call-arg]
    return replace(found, region=region, nodes=found.nodes - used)


def _is_excused(facts: GraphFacts, flow: Flow, taken: Collection[fx.Node]) -> bool:
    """Whether what stands in the way comes from another region: a gate on the output of an attention, for one."""
    seen: set[fx.Node] = set()
    frontier = [flow.culprit] if flow.culprit is not None else []
    for _ in range(NEAR):
        if any(node in taken for node in frontier):
            return True
        seen.update(frontier)
        frontier = [x for node in frontier for x in facts.sources(node) if x not in seen]
    return False


def _lift(
    facts: GraphFacts, flows: Flows, second: Weighted, flow: Flow, units: dict[Any, Any], taken: Collection[fx.Node]
) -> Found | NoMatch | None:
    """The region whose second product is `second`; None where it is no feed-forward at all."""
    reader = Reader(facts, flows, second, flow.sources)
    try:
        formula = reader.run()
        why = _mismatch(reader, formula)
    except Unliftable as exc:
        return exc.no_match
    if why is not None:
        return why
    if formula.key not in units:
        units[formula.key] = unit_of(formula), norm_of(formula)
    unit, norm = units[formula.key]
    if unit.linear:
        return None
    tail = tail_of(second, flows)
    role = role_of(formula, second, tail.out, flows, taken)
    if role is None:
        return None
    why = _read_elsewhere(formula, second, flows)
    return why if why is not None else _found(facts, flows, second, formula, (unit, norm), tail, role, taken)


def _mismatch(reader: Reader, formula: Formula) -> NoMatch | None:
    """Why the operands are not projections of one token each, if they are not."""
    second, operands = reader.second, formula.operands
    here = second.size(second.tokens)
    axes = {name for name, extent in reader.tokens.items() if extent != ONE}
    for operand in operands:
        node = operand.product.node
        if operand.product.size(operand.product.tokens) != here:
            return NoMatch("the two products run over different numbers of tokens", node)
        if {name for x in operand.tokens for name in x.names()} != axes:
            return NoMatch("a token of the second product is not one token of the first", node)
    if len({_place(operand, formula.shifted) for operand in operands}) > 1:
        names = ", ".join(sorted(operand.product.data.name for operand in operands))
        return NoMatch(f"the products before the activation read different inputs ({names})", second.node)
    if len(operands) > 2:
        why = f"the hidden unit is a function of {len(operands)} projections, one or two are allowed"
        return NoMatch(why, second.node)
    return None


def _read_elsewhere(formula: Formula, second: Weighted, flows: Flows) -> NoMatch | None:
    """Why the hidden unit is not this region's own: something that is no product reads it too."""
    inside = {*formula.nodes, second.node}
    for node in formula.bent:
        for user in node.users:
            if user not in inside and user not in flows.products and tensor_of(user) is not None:
                return NoMatch(f"the hidden unit is also read by {user.name}", node)
    return None


def _place(operand: Operand, shifted: bool) -> tuple[fx.Node, tuple[Expr, ...]]:
    """What an operand reads; behind a convolution, but for a constant distance."""
    node, index = operand.source
    return node, tuple(_without_constant(x) for x in index) if shifted else index


def _without_constant(e: Expr) -> Expr:
    return add(e, scale(ONE, -e.args[0])) if e.op == "lin" else e


# The region.


def _found(facts, flows, second, formula, named, tail, role, taken) -> Found:
    unit, norm = named
    ups = [_projection(operand) for operand in formula.operands]
    gate = unit.gate
    if gate is None and len(ups) == 2:
        gate = 1
    up = ups[0] if gate is None else ups[1 - gate]
    down = Projection(second.node, second.data, second.weight, tail.bias or second.bias)
    first = formula.operands[0]
    match = FFNMatch(first.source[0], up, None if gate is None else ups[gate], down, second.data,
                     tuple(sorted(formula.nodes, key=facts.order.__getitem__)), tail.out)
    parallel = is_parallel(match.input, {p.node for p in ups}, taken)
    layout = _layout(formula)
    order = sorted(range(len(ups)), key=lambda k: (facts.order[ups[k].node], ups[k].offset))
    rule = FFNRule(
        unit.activation, gate is not None, layout, gate is not None and order[0] == gate,
        unit.up, unit.shift, unit.factor, unit.scale, tail.scale, unit.up_limits, unit.gate_limits, unit.clip,
        any(p.bias is not None for p in ups), down.bias is not None, _inner(formula, unit, norm), formula.dropout,
        _axis(first), role, parallel, _rank(formula), False, first.product.size(first.product.blocks),
        max(first.product.groups, second.groups), unit.text,
    )
    value = tensor_of(second.node)
    assert value is not None
    region = Region(
        _common_path([p.node for p in ups] + [second.node]), second.node.name, rule, _shape(first.product, second),
        str(value.dtype).removeprefix("torch."), value.device.type, _written(ups, down), facts.needs_grad(tail.out),
        Choice(AS_WRITTEN, "no form rewrites a feed-forward yet"),
    )
    nodes = {*match.inner, *(p.node for p in ups), second.node, *tail.nodes}
    return Found(region, match, facts, frozenset(nodes))


def _projection(operand: Operand) -> Projection:
    product = operand.product
    step, offset = layout_of(operand.feature) or (0, 0)
    return Projection(product.node, product.data, product.weight, operand.bias or product.bias, offset, step)


def _rank(formula: Formula) -> int:
    firsts = {first.node: first for operand in formula.operands for first, _ in operand.updates}
    return sum(first.size(first.features) for first in firsts.values())


def _layout(formula: Formula) -> str:
    """Where value and gate are among the products' features, see FFNRule.layout."""
    if len(formula.operands) == 1:
        return "one"
    one, two = formula.operands
    if one.product.node is not two.product.node:
        return "separate"
    places = [layout_of(x.feature) for x in (one, two)]
    if places[0] is None or places[1] is None:
        return "blocked"
    return "halves" if places[0][0] == places[1][0] == 1 else "interleaved"


def _inner(formula: Formula, unit: Unit, norm: str | None) -> tuple[str, ...]:
    """What stands between the products besides the activation, in order around it."""
    steps = [(t.name, t.bent) for t in formula.terms if t.kind == "step"]
    if norm is not None:
        steps.append((norm, next(t.bent for t in formula.terms if t.kind == "norm")))
    elif unit.learned:
        steps.append(("learned scale and shift" if unit.offset else "learned scale", True))
    before = [name for name, bent in steps if not bent]
    after = [name for name, bent in steps if bent]
    return (*before, "act", *after) if steps else ()


def _axis(operand: Operand) -> str:
    """Whether the products run over features, or over tokens: another axis of a tensor that keeps features last."""
    node, index = operand.source
    contracted = [d for d, x in enumerate(index) if any(name.startswith("c") for name in x.names())]
    if op_name(node) in FEATURES_LAST and contracted and len(index) - 1 not in contracted:
        return "tokens"
    return "features"


def _shape(first: Weighted, second: Weighted) -> FFNShape:
    out = tensor_of(second.node)
    assert out is not None
    at = [second.out_labels.index(label) for label in second.tokens]
    symbolic: list[Any] = [out.shape[d] for d in at if isinstance(out.shape[d], torch.SymInt)]
    constant = math.prod(hint(out.shape[d]) for d in at if not isinstance(out.shape[d], torch.SymInt))
    symbols = {}
    if symbolic:
        factors = [str(constant)] if constant != 1 else []
        symbols["tokens"] = "*".join([*factors, *(str(s.node.expr) for s in symbolic)])
    return FFNShape(second.size(second.tokens), first.size(first.contracted), second.size(second.contracted),
                    second.size(second.features), symbols=symbols)


def _written(ups: list[Projection], down: Projection) -> str:
    names = [op_name(p.node) for p in (*ups, down)]
    return "+".join(dict.fromkeys(names))


def _common_path(nodes: list[fx.Node]) -> str:
    """The module that holds all of `nodes`."""
    paths = [module_path(node).split(".") for node in nodes]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)

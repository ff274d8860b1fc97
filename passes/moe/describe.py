"""The rule and the shape of a block: its terms, its router and its hidden units in the words of `MoERule`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from attnc.passes.ffn.unit import Unit as Function
from attnc.passes.ffn.unit import unit_of
from attnc.passes.graph import NoMatch, hint, op_name, tensor_of
from attnc.passes.moe.block import Block
from attnc.passes.moe.data import origin
from attnc.passes.moe.hidden import layout
from attnc.passes.moe.products import contraction
from attnc.passes.moe.router import Router
from attnc.passes.moe.summand import Summand, Unit
from attnc.rule_moe import MoERule, MoEShape


@dataclass
class MoEMatch:
    """One block in the graph: what a rewrite or an export reads, and the node that the output replaces.

    input, router_input: nodes that the experts and the router read, behind views.
    weights: for each routed feed-forward, the nodes of its first weights (value and gate, or both in one), then the
             second's; one entry where all experts share stacked weights.
    biases:  nodes of the experts' biases. shared: weights of each shared expert; shared_gates: what they are scaled by.
    """

    out: fx.Node
    input: fx.Node
    router: Router
    block: Block
    weights: list[list[fx.Node]] = field(default_factory=list)
    shared: list[list[fx.Node]] = field(default_factory=list)
    shared_gates: list[fx.Node] = field(default_factory=list)

    @property
    def router_input(self) -> fx.Node | None:
        return None if self.router.data is None else origin(self.router.data)


def described(block: Block, router: Router) -> tuple[MoEMatch, MoERule, MoEShape] | NoMatch:
    """The match, the facts and the sizes of a block."""
    expert = block.experts[0]
    function = unit_of(expert.hidden.formula)
    if function.linear:
        return NoMatch("no activation stands between the products of the experts", expert.second.node)
    weights = [_weights(u) for u in block.experts]
    match = MoEMatch(block.out, block.x, router, block, weights, [_weights(s.unit) for s in block.shared if s.unit])
    match.shared_gates = [f.node for s in block.shared for f in s.factors]
    facts = {**router.facts, **_experts(expert, function), **_shared(block), **_zero(block, router)}
    facts["scale"] = round(float(facts.get("scale", 1.0)) * block.scale, 6)
    facts |= {"weight_at": block.weight_at, "jitter": _jitter(block.x), "post_norm": bool(block.routed[0].norm)}
    facts["expert_bias"] = bool(expert.hidden.biased) or block.routed[0].biased or expert.second.bias is not None
    width, latent = int(expert.second.width.value), 0
    d_model = expert.second.columns
    if block.latent:
        facts["latent"], latent = True, d_model
        d_model = hint(tensor_of(block.out).shape[-1])  # type: ignore[union-attr]
    data = tensor_of(router.data)
    d_routed = d_model if data is None else hint(data.shape[-1])
    shape = MoEShape(
        tokens=block.tokens,
        d_model=d_model,
        d_ff=width,
        num_experts=block.count,
        top_k=router.top_k,
        shared_d_ff=sum(int(s.unit.second.width.value) for s in block.shared if s.unit is not None),
        d_latent=latent,
        d_routed=0 if d_routed == d_model else d_routed,
        symbols=_symbols(block.out),
    )
    return match, MoERule(**facts), shape


def _weights(unit: Unit) -> list[fx.Node]:
    firsts = list(dict.fromkeys(first.weight.node for first in unit.hidden.firsts))
    return [*firsts, unit.second.weight.node]


def _experts(unit: Unit, function: Function) -> dict[str, Any]:
    where = layout(unit.hidden, unit.second.inner, int(unit.second.width.value))
    return {
        "activation": function.activation if function.activation != "custom" else function.text,
        "gated": function.gate is not None or len(unit.hidden.firsts) > 1,
        "fused": where in ("halves", "interleaved", "other"),
        "interleaved": where == "interleaved",
        "details": details(function),
    }


def details(function: Function) -> tuple[str, ...]:
    """What a hidden unit does beside its activation, as text."""
    found = []
    for name, (low, high) in (("up", function.up_limits), ("gate", function.gate_limits), ("act", function.clip)):
        if low is not None:
            found.append(f"{name}>={low:g}")
        if high is not None:
            found.append(f"{name}<={high:g}")
    if function.up != "identity":
        found.append(f"{function.up}(up)")
    if function.shift:
        found.append(f"up+{function.shift:g}")
    if function.factor != 1.0:
        found.append(f"gate*{function.factor:g}")
    return tuple(found) + ((f"*{function.scale:g}",) if function.scale != 1.0 else ())


def _shared(block: Block) -> dict[str, Any]:
    if not block.shared:
        return {}
    first = block.shared[0].unit
    assert first is not None
    function = unit_of(first.hidden.formula)
    gates = {_gate(s) for s in block.shared}
    return {
        "shared": len(block.shared),
        "shared_gate": gates.pop() if len(gates) == 1 else "other",
        "shared_activation": function.activation,
        "shared_gated": function.gate is not None,
    }


def _gate(term: Summand) -> str:
    """The function of the gate of a shared expert: by operator, where it is one."""
    unit = term.unit
    assert unit is not None
    factors = (*term.factors, *unit.hidden.factors)
    if not factors:
        return ""
    node = origin(factors[0].node)
    return op_name(node) if op_name(node) == "sigmoid" else "router" if contraction(node) is None else "linear"


def _zero(block: Block, router: Router) -> dict[str, Any]:
    """Router classes without weights; those that normalise with shared experts are theirs."""
    beyond = router.classes - block.count
    known = router.facts["choice"] not in ("other", "given") and router.facts.get("normalise") != "chosen and shared"
    if beyond <= 0 or not known:
        return {}
    return {"zero_experts": beyond, "zero": "identity" if block.identity else "none"}


def _jitter(x: fx.Node) -> float:
    """Half the range of uniform noise that multiplies the input."""
    if op_name(x) not in ("mul", "mul_"):
        return 0.0
    for factor in x.all_input_nodes:
        if op_name(factor) in ("uniform", "uniform_") and len(factor.args) == 3:
            low, high = factor.args[1:]
            return round((float(high) - float(low)) / 2, 6)
    return 0.0


def _symbols(out: fx.Node) -> dict[str, str]:
    value = tensor_of(out)
    assert value is not None
    count: Any = 1
    for s in value.shape[:-1]:
        count = count * s
    return {"tokens": str(count.node.expr)} if isinstance(count, torch.SymInt) else {}


def nodes_of(block: Block, router: Router, order: dict[fx.Node, int]) -> frozenset[fx.Node]:
    """Everything the block computes from its input, and the router from its own."""
    boundary = {block.x}
    floor = order[block.x]
    routed = None if router.data is None else origin(router.data)
    if routed is not None and order[routed] < floor:
        boundary.add(routed)
        floor = order[routed]
    found: set[fx.Node] = set()
    stack = [block.out]
    while stack:
        node = stack.pop()
        if node in found or node in boundary or node.op != "call_function" or order[node] < floor:
            continue
        found.add(node)
        stack += node.all_input_nodes
    return frozenset(found)

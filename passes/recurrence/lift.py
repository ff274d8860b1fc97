"""Recurrences as regions: the operator that hooks put in their place, and short causal convolutions that mix tokens.

    y = c * conv(b * x)          a gated short convolution: depthwise, causal, between two gates of one projection

A depthwise convolution in front of a recurrence is a fact of that recurrence. Recurrences that stand in the graph as
loops or products are `passes.recurrence.written`.

Source: `attnc.rule_recurrence` for the recurrences; Liquid AI 2024, "Liquid foundation models" (LFM2), whose layers mix
tokens by gated short convolutions; Fu et al. 2022, "Hungry hungry hippos", arXiv:2212.14052, section 3.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from attnc.forms import parse_recurrence
from attnc.op_recurrence import RECURRENCE
from attnc.passes.found import Found, missed
from attnc.passes.graph import GraphFacts, NoMatch, hint, module_path, op_name, tensor_of
from attnc.region import AS_WRITTEN, Choice, Region, Unmatched
from attnc.rule import Shape
from attnc.rule_recurrence import RecurrenceRule, RecurrenceShape

OPERANDS = ("query", "key", "value", "decay", "rates", "beta", "bonus", "initial_state")
# fmt: off
VIEWS = (
    "view", "reshape", "_unsafe_view", "transpose", "permute", "squeeze", "unsqueeze", "expand", "contiguous", "clone",
    "slice", "to", "_to_copy", "type_as", "float", "split", "chunk", "split_with_sizes", "getitem", "flatten", "mT",
    "movedim", "alias", "repeat_interleave", "detach",
)
# fmt: on
# What may stand between the short convolution of a mixer and its recurrence.
POINTWISE = ("silu", "gelu", "relu", "sigmoid", "mul", "add", "neg", "softplus", "cat", "silu_", "mul_")
FURTHEST = 48  # nodes looked at behind an operand

AS_CONVOLUTION = "a convolution as written; no form replaces one"


def recurrences(facts: GraphFacts, taken: Collection[fx.Node]) -> Iterator[Found | Unmatched]:
    """The recurrence operators of a graph, then the short convolutions that are mixers themselves."""
    in_front: set[fx.Node] = set()
    for node in facts.graph.nodes:
        if node.target is RECURRENCE and node not in taken:
            convolution = next((c for x in node.args[:3] if (c := _convolution_behind(x)) is not None), None)
            in_front |= {convolution.node} if convolution is not None else set()
            yield _operator(facts, node, convolution)
    for node in facts.graph.nodes:
        if node in taken or node in in_front:
            continue
        found = _gated(node)
        if isinstance(found, NoMatch):
            yield missed(node, found)
        elif found is not None:
            yield _convolution(facts, found)


# The operator.


@dataclass(frozen=True)
class Operator:
    """A recurrence that is one node already: a choice changes how it is spelled, and nothing else."""

    node: fx.Node

    def spell(self, form: str) -> None:
        """Run the node by `form`."""
        at = len(OPERANDS)
        rule = parse_recurrence(str(self.node.args[at]))[1]
        self.node.args = (*self.node.args[:at], f"{form} | {rule.spell()}", *self.node.args[at + 1 :])


def _operator(facts: GraphFacts, node: fx.Node, convolution: Depthwise | None) -> Found:
    given = dict(zip(OPERANDS, node.args, strict=False))
    results = [user for user in node.users if op_name(user) == "getitem"]
    rule = replace(
        parse_recurrence(str(node.args[len(OPERANDS)]))[1],
        state_in=given["initial_state"] is not None,
        state_out=any(user.args[1] == 1 and user.users for user in results),
        conv=convolution.taps if convolution is not None else 0,
    )
    key, value = tensor_of(given["key"]), tensor_of(given["value"])
    assert value is not None
    B, H, L, V = value.shape
    sizes = {"B": B, "H": H, "L": L, "V": V, "K": 1, "Hk": 0}
    if key is not None:
        sizes |= {"K": key.shape[-1], "Hk": key.shape[1]}
    inputs = [x for x in given.values() if isinstance(x, fx.Node)]
    region = Region(
        module_path(node),
        node.name,
        rule,
        _shape(sizes),
        str(value.dtype).removeprefix("torch."),
        value.device.type,
        written="operator",
        training=any(map(facts.needs_grad, inputs)),
    )
    return Found(region, Operator(node), facts, frozenset([node, *results]))


def _shape(sizes: dict[str, Any]) -> Shape:
    symbols = {name: str(x) for name, x in sizes.items() if not isinstance(x, int)}
    return RecurrenceShape(**{name: hint(x) for name, x in sizes.items()}, symbols=symbols)


# Depthwise convolutions.


@dataclass(frozen=True)
class Depthwise:
    """A depthwise convolution over tokens.

    padding: zeros put before and after the tokens, together with those of a padding in front of it. state: whether
    earlier tokens are joined in front.
    """

    node: fx.Node
    source: fx.Node
    taps: int
    padding: tuple[int, int]
    state: bool


def _depthwise(node: Any) -> Depthwise | None:
    """The convolution that `node` is, if it takes channels one by one and every token."""
    if op_name(node) not in ("conv1d", "convolution") or not isinstance(node.args[0], fx.Node):
        return None
    schema = [a.name for a in node.target._schema.arguments]
    given = {**dict(zip(schema, node.args, strict=False)), **node.kwargs}
    weight = tensor_of(given["weight"])
    if weight is None or weight.dim() != 3 or weight.shape[1] != 1 or given.get("groups", 1) != weight.shape[0]:
        return None
    one = ([1], 1)
    if given.get("stride", 1) not in one or given.get("dilation", 1) not in one or given.get("transposed", False):
        return None
    padding = given.get("padding", 0)
    if isinstance(padding, str):
        return None
    both = padding[0] if isinstance(padding, (list, tuple)) else padding
    before, after, state, source = both, both, False, node.args[0]
    while op_name(source) in ("constant_pad_nd", "pad", "cat", "to", "_to_copy"):
        if op_name(source) == "cat":
            state, source = True, source.args[0][-1]
            continue
        if op_name(source) in ("constant_pad_nd", "pad"):
            before, after = before + source.args[1][0], after + source.args[1][1]
        source = source.args[0]
    return Depthwise(node, source, int(weight.shape[2]), (before, after), state)


def _convolution_behind(operand: Any) -> Depthwise | None:
    """The nearest depthwise convolution of at most 8 taps that an operand comes from, through elementwise operators."""
    queue = [operand] if isinstance(operand, fx.Node) else []
    seen = set(queue)
    for node in queue:
        if len(seen) > FURTHEST:
            return None
        found = _depthwise(node)
        if found is not None and found.taps <= 8:
            return found
        if op_name(node) in VIEWS + POINTWISE:
            queue += [x for x in node.all_input_nodes if x not in seen]
            seen |= set(node.all_input_nodes)
    return None


# Gated short convolutions.


@dataclass(frozen=True)
class Gated:
    """y = gate * conv(gate * x)."""

    convolution: Depthwise
    out: fx.Node
    between: tuple[fx.Node, ...]


def _gated(node: fx.Node) -> Gated | NoMatch | None:
    """The gated convolution around a depthwise one; None where it stands between no gates of one projection."""
    convolution = _depthwise(node)
    if convolution is None:
        return None
    entrance = _product(convolution.source)
    between, last = [], node
    while len(last.users) == 1 and op_name(next(iter(last.users))) in VIEWS:
        last = next(iter(last.users))
        between.append(last)
    gates = [user for user in last.users if op_name(user) == "mul"]
    if entrance is None or len(gates) != 1 or len(last.users) != 1:
        return None
    outer = next((x for x in gates[0].args[:2] if x is not last), None)
    origins = {_origin(x) for x in (*entrance, outer)}
    if len(origins) != 1 or None in origins:
        return None
    why = _not_causal(convolution, between)
    return Gated(convolution, gates[0], tuple(between)) if why is None else why


def _product(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """The factors of a product of two tensors, under views."""
    while op_name(node) in VIEWS:
        node = node.args[0]
    if op_name(node) != "mul" or not all(isinstance(x, fx.Node) for x in node.args[:2]):
        return None
    return node.args[0], node.args[1]


def _origin(node: Any) -> fx.Node | None:
    """What a part of something comes from."""
    while op_name(node) in VIEWS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node if op_name(node) in ("linear", "addmm", "mm", "matmul", "conv1d") else None


def _not_causal(convolution: Depthwise, between: list[fx.Node]) -> NoMatch | None:
    """Why the result for a token depends on later ones; None if it does not."""
    before, after = convolution.padding
    reach = convolution.taps - 1
    value, source = tensor_of(convolution.node), tensor_of(convolution.source)
    assert value is not None and source is not None
    kept = next((n for n in between if op_name(n) == "slice"), None)
    start = kept.args[2] if kept is not None and len(kept.args) > 2 else 0
    tail = isinstance(start, int) and start < 0  # the last tokens, behind a state in front
    if (before == reach or convolution.state) and (after == 0 or (kept is not None and (start in (0, None) or tail))):
        return None
    reason = (
        f"a depthwise convolution of {convolution.taps} taps between gates reaches tokens behind its own: padding "
        f"{before} before and {after} after, of which {'a part is cut' if kept is not None else 'nothing is cut'}; "
        f"causal is {reach} before and none after"
    )
    return NoMatch(reason, convolution.node)


def _convolution(facts: GraphFacts, gated: Gated) -> Found:
    convolution = gated.convolution
    value = tensor_of(convolution.source)
    assert value is not None
    B, H, L = value.shape
    rule = RecurrenceRule(memory="taps", gate="write", conv=convolution.taps, state_in=convolution.state)
    region = Region(
        module_path(convolution.node),
        convolution.node.name,
        rule,
        _shape({"B": B, "H": H, "L": L, "K": 1, "V": 1}),
        str(value.dtype).removeprefix("torch."),
        value.device.type,
        written="convolution",
        training=facts.needs_grad(convolution.node),
        choice=Choice(AS_WRITTEN, AS_CONVOLUTION),
    )
    return Found(region, nodes=frozenset([convolution.node, *gated.between, gated.out]))

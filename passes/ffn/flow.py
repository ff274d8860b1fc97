"""What each value of a graph is a function of, as far as feed-forwards care: one pass over the nodes, in order.

    fixed    parameters, constants, lengths
    hidden   an element-wise function of products with weights of one input; `bent`: a nonlinear one
    row      one number for each token, reduced from hidden units (the mean of a norm written by hand)
    broken   a nonlinear function of a product with weights that also depends on something else, and on what
    other    anything else

A candidate for a feed-forward is a product with weights whose data are hidden and bent; `lift` then checks axes.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from attnc.passes.ffn.products import CONVOLUTIONS, Weighted, depthwise, weighted
from attnc.passes.graph import GraphFacts, NoMatch, hint, op_name, tensor_of

# More products than this feed no hidden unit of a feed-forward, and sets of them would make the pass quadratic.
MOST_SOURCES = 6

CASTS = frozenset(("to", "_to_copy", "type_as", "float", "half", "bfloat16", "double"))
DROPOUTS = frozenset(("dropout", "dropout_", "native_dropout", "feature_dropout", "alpha_dropout"))
VIEWS = frozenset(
    (
        "contiguous", "clone", "alias", "positive", "detach", "lift_fresh", "lift_fresh_copy", "view", "reshape",
        "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten", "permute", "transpose", "swapaxes", "swapdims",
        "t", "mT", "numpy_T", "matrix_H", "mH", "adjoint", "unsqueeze", "squeeze", "expand", "expand_as", "slice",
        "narrow", "select", "getitem", "split", "split_with_sizes", "chunk", "tensor_split", "unbind", "movedim",
    )
)
REDUCTIONS = frozenset(
    ("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm")
)
NORMS = frozenset(("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm", "batch_norm"))
PADS = frozenset(("pad", "constant_pad_nd"))
LIKE = frozenset(("full_like", "zeros_like", "ones_like", "new_full", "new_zeros", "new_ones"))
# Element-wise operators that carry no such tag.
UNTAGGED = frozenset(
    (
        "hardswish", "prelu", "multiply", "subtract", "divide", "true_divide", "rsub", "masked_fill", "log_sigmoid",
        "special_expit", "where",
    )
)
# Operators whose first argument is data, and those whose further arguments are parameters.
DATA_FIRST = frozenset(
    ("linear", "conv1d", "conv2d", "conv3d", "convolution", "layer_norm", "rms_norm", "native_layer_norm", "softmax")
)
LOOKUPS = frozenset(("embedding", "index_select", "gather", "index", "take", "one_hot"))
SUMS = frozenset(("add", "sub", "rsub", "subtract", "neg"))
FACTORS = frozenset(("mul", "multiply"))
QUOTIENTS = frozenset(("div", "divide", "true_divide"))
MASKS = frozenset(("where", "masked_fill"))


@dataclass(frozen=True, slots=True)
class Flow:
    """What a value is a function of. origin: where the products' common input comes from, behind views."""

    kind: str
    sources: frozenset[fx.Node] = frozenset()
    origin: fx.Node | None = None
    bent: bool = False
    why: NoMatch | None = None
    culprit: fx.Node | None = None


FIXED, OTHER = Flow("fixed"), Flow("other")


def is_elementwise(node: fx.Node) -> bool:
    """Whether each element of `node` is a function of the same element of each of its inputs."""
    if not isinstance(node.target, OpOverload):
        return False
    name = op_name(node)
    return name in UNTAGGED or torch.Tag.pointwise in node.target.tags


def is_dropping(node: fx.Node) -> bool:
    """Whether `node` is a dropout that drops something."""
    return op_name(node) in DROPOUTS and len(node.args) > 2 and bool(node.args[2]) and node.args[1] != 0


class Flows:
    """The flow of each node of a graph, and its products with weights, in order."""

    def __init__(self, facts: GraphFacts, taken: Collection[fx.Node]) -> None:
        self.of: dict[fx.Node, Flow] = {}
        self.products: dict[fx.Node, Weighted] = {}
        self._origin: dict[fx.Node, fx.Node] = {}
        self._inputs = _data_inputs(facts.graph)
        for node in facts.graph.nodes:
            flow = self._flow(node, taken)
            # A tensor that is filled in place is not what made it.
            self.of[node] = OTHER if flow.kind == "fixed" and facts.root(node) in facts.writes else flow

    def is_fixed(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and self.of.get(node, OTHER).kind == "fixed"

    def is_trained(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and bool(self.origin(node).meta.get("requires_grad"))

    def origin(self, node: fx.Node) -> fx.Node:
        """The node behind views, casts and dropout."""
        if node not in self._origin:
            through = op_name(node) in VIEWS | CASTS | DROPOUTS
            source = node.args[0] if through and node.args else None
            self._origin[node] = self.origin(source) if isinstance(source, fx.Node) else node
        return self._origin[node]

    def _flow(self, node: fx.Node, taken: Collection[fx.Node]) -> Flow:
        if node.op in ("placeholder", "get_attr"):
            return OTHER if node in self._inputs else FIXED
        if node.op != "call_function" or node in taken or op_name(node) in LOOKUPS:
            return OTHER
        found = weighted(node, self)
        if found is not None:
            self.products[node] = found
            origin = self.origin(found.data)
            if origin in self.products:  # of a product of products, as in a low-rank update, the first one's input
                origin = self.of[origin].origin
            return Flow("hidden", frozenset((node,)), origin)
        inputs = {x: self.of[x] for x in node.all_input_nodes}
        if all(flow.kind == "fixed" for flow in inputs.values()):
            return FIXED if node.meta.get("val") is not None else OTHER
        name = op_name(node)
        first = inputs.get(node.args[0], OTHER) if node.args and isinstance(node.args[0], fx.Node) else OTHER
        if name in LIKE:
            return FIXED
        if name in VIEWS or name in CASTS or name in DROPOUTS:
            return first
        if first.kind == "hidden" and (name in NORMS or name in PADS or depthwise(node) is not None):
            return first
        if first.kind == "hidden" and name == "glu":
            return Flow("hidden", first.sources, first.origin, True)
        if name in REDUCTIONS and not is_elementwise(node):
            return Flow("row", first.sources, first.origin) if first.kind in ("hidden", "row") else OTHER
        if is_elementwise(node):
            return _combined(node, inputs)
        return self._lost(node, inputs)

    def _lost(self, node: fx.Node, inputs: dict[fx.Node, Flow]) -> Flow:
        """Behind an operator that is not element-wise; worth a word where it alone stands in the way."""
        live = [flow for flow in inputs.values() if flow.kind != "fixed"]
        if op_name(node) in CONVOLUTIONS:  # a layer of a convolutional network
            return OTHER
        if len(live) == 1 and live[0].kind == "hidden" and live[0].bent and tensor_of(node) is not None:
            why = NoMatch(f"{op_name(node)} stands between the activation and the second product", node)
            return Flow("broken", live[0].sources, live[0].origin, True, why)
        return live[0] if len(live) == 1 and live[0].kind == "broken" and op_name(node) in NORMS else OTHER


def _data_inputs(graph: fx.Graph) -> set[fx.Node]:
    """The inputs of the graph that hold data: integers, and what the data of an operator are made of, element by
    element. Parameters are inputs too, and a graph does not say which is which."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            value = tensor_of(node)
            if value is not None and not value.is_floating_point() and value.dim() > 0:
                found.add(node)
        stack = [node.args[0]] if op_name(node) in DATA_FIRST else []
        while stack:
            at = stack.pop()
            value = tensor_of(at)
            if value is None or at in seen:
                continue
            seen.add(at)
            if at.op == "placeholder" and value.dim() > 1:
                found.add(at)
            elif at.op == "call_function" and (op_name(at) in VIEWS or op_name(at) in CASTS or is_elementwise(at)):
                count = _count(value)
                stack += [x for x in at.all_input_nodes if (v := tensor_of(x)) is not None and _count(v) == count]
    return found


def _count(value: torch.Tensor) -> int:
    return math.prod(map(hint, value.shape))


def _combined(node: fx.Node, inputs: dict[fx.Node, Flow]) -> Flow:
    """The flow of an element-wise operator that depends on more than constants."""
    name = op_name(node)
    flows = {x: flow for x, flow in inputs.items() if flow.kind != "fixed"}
    hidden = [flow for flow in flows.values() if flow.kind == "hidden"]
    broken = [flow for flow in flows.values() if flow.kind == "broken"]
    culprit = next((x for x, flow in flows.items() if flow.kind == "other"), None)
    if culprit is not None:
        active = [flow for flow in hidden if flow.bent]
        if not active or name not in FACTORS | MASKS:
            return OTHER
        how = "multiplied" if name in FACTORS else "masked"
        why = NoMatch(f"the hidden unit is {how} by {culprit.name}, which is no function of the same input", node)
        return Flow("broken", active[0].sources, active[0].origin, True, why, culprit)
    if broken:
        return broken[0]
    if not hidden:
        return next(iter(flows.values()))
    sources = frozenset().union(*(flow.sources for flow in hidden))
    if len(sources) > MOST_SOURCES:
        return OTHER
    bent = any(flow.bent for flow in hidden) or _bends(node, flows)
    if len({flow.origin for flow in hidden}) > 1:
        if not any(flow.bent for flow in hidden) or name not in FACTORS:
            return OTHER
        names = " and ".join(sorted(flow.origin.name for flow in hidden if flow.origin is not None))
        why = NoMatch(f"the products before the activation read different inputs, {names}", node)
        return Flow("broken", sources, hidden[0].origin, True, why)
    return Flow("hidden", sources, hidden[0].origin, bent)


def _bends(node: fx.Node, flows: dict[fx.Node, Flow]) -> bool:
    """Whether an element-wise operator is nonlinear in its hidden operands."""
    name, args = op_name(node), node.args
    hidden = [x for x, flow in flows.items() if flow.kind == "hidden"]
    if name in SUMS:
        return False
    if name in FACTORS:
        return len(hidden) > 1 or (len(args) > 1 and args[0] is args[1])
    if name in QUOTIENTS:
        return len(args) > 1 and args[1] in hidden
    if name in MASKS:
        return args[0 if name == "where" else 1] in hidden
    return True

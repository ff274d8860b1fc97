"""Small local rewrites before recognition: values instead of in-place updates, one spelling of softmax.

    x.div_(c)                              -> x.div(c), where nothing else sees x's memory
    exp(x - max(x)) / sum(exp(x - max(x))) -> softmax(x)      also without the max
    exp(x - logsumexp(x))                  -> softmax(x)

Both keep the graph's meaning by themselves; recognition then has fewer spellings to know.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from attnc.passes.graph import GraphFacts, op_name, tensor_of

aten = torch.ops.aten


def normalize(gm: fx.GraphModule) -> fx.GraphModule:
    """Apply the rewrites to `gm` in place and return it."""
    _functionalize(gm.graph)
    for node in list(gm.graph.nodes):
        softmax = _hand_written(node)
        if softmax is not None:
            _replace_by_softmax(gm.graph, node, *softmax)
    gm.graph.eliminate_dead_code()
    return gm


# --------------------------------------------------------------------------------------------------------------------
# In-place updates
# --------------------------------------------------------------------------------------------------------------------


def _functionalize(graph: fx.Graph) -> None:
    facts = GraphFacts(graph)
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        members.setdefault(facts.root(node), []).append(node)
    for node in list(graph.nodes):
        value = _functional(node)
        if value is None:
            continue
        target = node.args[0]
        family = members[facts.root(target)]
        if _is_private(facts, node, target, family):
            _make_functional(graph, facts, node, target, value)


def _functional(node: fx.Node) -> OpOverload | None:
    """The functional twin of an in-place operator on its first argument."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return None
    schema = node.target._schema
    name = schema.name.split("::")[-1]
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if not name.endswith("_") or name.endswith("__") or not schema.name.startswith("aten::"):
        return None
    if len(written) != 1 or written[0] is not schema.arguments[0] and written[0].name != schema.arguments[0].name:
        return None
    packet = getattr(aten, name[:-1], None)
    overload = schema.overload_name or "default"
    return getattr(packet, overload, None) if packet is not None and isinstance(node.args[0], fx.Node) else None


def _is_private(facts: GraphFacts, node: fx.Node, target: fx.Node, family: list[fx.Node]) -> bool:
    """Whether only `target` itself names the memory that `node` writes: its creator, earlier updates, no live views."""
    root = facts.root(target)
    if root.op != "call_function" or op_name(root) in ("getitem", "detach"):
        return False
    value, made = tensor_of(target), tensor_of(root)
    if value is None or made is None or value.shape != made.shape or value.stride() != made.stride():
        return False
    at = facts.order[node]
    chain = {root}
    for member in family:
        if member in chain or member is node:
            continue
        updates = _functional(member) is not None and member.args[0] in chain
        if updates and facts.order[member] < at:
            chain.add(member)
        elif any(facts.order[user] > at for user in member.users) and facts.order[member] < at:
            return False  # a view made before is read afterwards and must see the update
    return target in chain


def _make_functional(graph: fx.Graph, facts: GraphFacts, node: fx.Node, target: fx.Node, op: OpOverload) -> None:
    before, after = tensor_of(target), tensor_of(node)
    assert before is not None and after is not None
    at = facts.order[node]
    node.target = op
    result = node
    node.meta["val"] = op(*_values(node.args), **_values(node.kwargs))
    if node.meta["val"].dtype != before.dtype:  # an update keeps its dtype, an operator promotes
        with graph.inserting_after(node):
            result = graph.call_function(aten.to.dtype, (node, before.dtype))
        result.meta.update(node.meta)
        result.meta["val"] = after
        facts.order[result] = at
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
    root = facts.root(target)
    for name in (target, root):
        name.replace_all_uses_with(
            result, delete_user_cb=lambda user: user not in (node, result) and facts.order.get(user, at + 1) > at
        )


def _values(args: Any) -> Any:
    return fx.node.map_arg(args, lambda n: n.meta["val"])


# --------------------------------------------------------------------------------------------------------------------
# Softmax by hand
# --------------------------------------------------------------------------------------------------------------------


def _hand_written(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(x, dim) where `node` is softmax(x, dim) written with exp."""
    name = op_name(node)
    if name == "div":
        return _quotient(node)
    if name == "exp" and op_name(node.args[0]) == "sub" and len(node.args[0].args) == 2:
        x, norm = node.args[0].args
        if op_name(norm) == "logsumexp" and norm.args[0] is x and node.args[0].kwargs.get("alpha", 1) == 1:
            return _reduced(norm, x)
    return None


def _quotient(node: fx.Node) -> tuple[fx.Node, int] | None:
    if len(node.args) != 2 or node.kwargs:
        return None
    numerator, total = node.args
    if op_name(numerator) != "exp" or op_name(total) != "sum" or total.args[0] is not numerator:
        return None
    value, summed = tensor_of(numerator), tensor_of(total)
    if value is None or summed is None or value.dtype != summed.dtype:
        return None
    x = numerator.args[0]
    found = _reduced(total, numerator)
    if found is None or not isinstance(x, fx.Node):
        return None
    dim = found[1]
    if op_name(x) == "sub" and len(x.args) == 2 and x.kwargs.get("alpha", 1) == 1:
        inner, peak = x.args
        if isinstance(inner, fx.Node) and _is_row_constant(peak, inner, dim):
            return inner, dim
    return x, dim


def _reduced(node: fx.Node, source: fx.Node) -> tuple[fx.Node, int] | None:
    """(source, dim) of a reduction over one axis that keeps it, so that it broadcasts back over the same axis."""
    value = tensor_of(source)
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    dims = [dims] if isinstance(dims, int) else dims
    if value is None or not isinstance(dims, (list, tuple)) or len(dims) != 1 or not keep:
        return None
    return source, int(dims[0]) % value.dim()


def _is_row_constant(peak: Any, inner: fx.Node, dim: int) -> bool:
    """Whether `peak` has extent 1 along `dim`, so that subtracting it does not change the softmax over `dim`."""
    if op_name(peak) == "detach":
        peak = peak.args[0]
    value, full = tensor_of(peak), tensor_of(inner)
    if value is None or full is None or value.dim() != full.dim():
        return False
    source = peak.args[0] if op_name(peak) == "getitem" and peak.args[1] == 0 else peak
    is_peak = op_name(source) in ("max", "amax") and source.args and source.args[0] is inner
    return is_peak and value.shape[dim] == 1


def _replace_by_softmax(graph: fx.Graph, node: fx.Node, x: fx.Node, dim: int) -> None:
    value = tensor_of(x)
    if value is None or value.dim() == 0:
        return
    with graph.inserting_before(node):
        softmax = graph.call_function(aten.softmax.int, (x, dim))
    softmax.meta.update(node.meta)
    node.replace_all_uses_with(softmax)

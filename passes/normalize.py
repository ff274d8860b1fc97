"""Small local rewrites before recognition: values instead of in-place updates, one spelling of softmax.

    x.div_(c)                              -> x.div(c), where nothing else sees x's memory
    exp(x - max(x)) / sum(exp(x - max(x))) -> softmax(x)      also without the max
    exp(x - logsumexp(x)), exp(log_softmax(x)) -> softmax(x)
    (exp(x) @ v) / sum(exp(x))             -> softmax(x) @ v
    exp(x - logaddexp(logsumexp(x), t)), softmax(x) @ v * sigmoid(logsumexp(x) - t)
                                           -> softmax([x, t]) without its last column: t is a sink
    masked_fill(x, ids >= n, 0), clamp(ids, max=n - 1) with ids below n -> x, ids

Both keep the graph's meaning by themselves; recognition then has fewer spellings to know.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from attnc.passes.bounds import drop_without_effect
from attnc.passes.graph import GraphFacts, op_name, tensor_of

aten = torch.ops.aten


def normalize(gm: fx.GraphModule) -> fx.GraphModule:
    """Apply the rewrites to `gm` in place and return it."""
    _functionalize(gm.graph)
    for node in list(gm.graph.nodes):
        softmax = _hand_written(node)
        if softmax is not None:
            node.replace_all_uses_with(_softmax(gm.graph, node, node, *softmax))
        for rule in (_divided_late, _sink_in_norm, _sink_in_gate):
            result = rule(gm.graph, node)
            if result is not None:
                node.replace_all_uses_with(result)
                break
    drop_without_effect(gm.graph)
    gm.graph.eliminate_dead_code()
    return gm


# --------------------------------------------------------------------------------------------------------------------
# In-place updates
# --------------------------------------------------------------------------------------------------------------------


def _functionalize(graph: fx.Graph) -> None:
    facts, members = _families(graph)
    changed: set[fx.Node] = set()
    for node in list(graph.nodes):
        value = _functional(node)
        if value is None:
            continue
        if facts.root(node.args[0]) in changed:
            facts, members = _families(graph)
            changed = set()
        target = node.args[0]
        root = facts.root(target)
        if _is_private(facts, node, target, members[root]):
            _make_functional(facts, graph, node, value)
            changed.add(root)


def _families(graph: fx.Graph) -> tuple[GraphFacts, dict[fx.Node, list[fx.Node]]]:
    """The nodes that may share memory, by the node that made the memory."""
    facts = GraphFacts(graph)
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        members.setdefault(facts.root(node), []).append(node)
    return facts, members


def _functional(node: fx.Node) -> OpOverload | None:
    """The functional twin of an in-place operator on its first argument."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return None
    schema = node.target._schema
    name = schema.name.split("::")[-1]
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if not name.endswith("_") or name.endswith("__") or not schema.name.startswith("aten::"):
        return None
    if len(written) != 1 or (written[0] is not schema.arguments[0] and written[0].name != schema.arguments[0].name):
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


def _make_functional(facts: GraphFacts, graph: fx.Graph, node: fx.Node, op: OpOverload) -> None:
    target = node.args[0]
    assert isinstance(target, fx.Node)
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
    if name == "div" and len(node.args) == 2 and not node.kwargs:
        return _quotient(*node.args)
    if name == "exp" and isinstance(node.args[0], fx.Node):
        inner = node.args[0]
        if op_name(inner) in ("log_softmax", "_log_softmax"):
            return inner.args[0], int(inner.args[1])
        if op_name(inner) == "sub" and len(inner.args) == 2 and inner.kwargs.get("alpha", 1) == 1:
            x, norm = inner.args
            row = _row(norm)
            if row is not None and row[0] == "logsumexp" and row[1] is x:
                return x, row[2]
    return None


def _quotient(numerator: Any, total: Any) -> tuple[fx.Node, int] | None:
    """exp(x) / sum(exp(x)), with or without the row's maximum subtracted in x."""
    row = _row(total)
    if op_name(numerator) != "exp" or row is None or row[0] != "sum" or row[1] is not numerator:
        return None
    value, summed = tensor_of(numerator), tensor_of(total)
    x = numerator.args[0]
    if value is None or summed is None or value.dtype != summed.dtype or not isinstance(x, fx.Node):
        return None
    if op_name(x) == "sub" and len(x.args) == 2 and x.kwargs.get("alpha", 1) == 1:
        inner, peak = x.args
        found = _row(peak)
        if found is not None and found[0] in ("max", "amax") and found[2] == row[2] and _same(found[1], inner):
            return inner, row[2]
    return x, row[2]


def _same(a: Any, c: Any) -> bool:
    return a is c or (op_name(a) == "detach" and a.args[0] is c)


def _row(node: Any) -> tuple[str, fx.Node, int] | None:
    """(operator, source, dim) of a reduction over one axis that broadcasts back over that axis."""
    lifted: int | None = None
    if op_name(node) == "detach":
        node = node.args[0]
    if op_name(node) == "unsqueeze":
        value = tensor_of(node)
        lifted = int(node.args[1]) % (value.dim() if value is not None else 1)
        node = node.args[0]
    keep_at = 2
    if op_name(node) == "getitem" and node.args[1] == 0 and op_name(node.args[0]) == "max":
        node = node.args[0]
    if op_name(node) not in ("sum", "amax", "max", "logsumexp") or not isinstance(node.args[0], fx.Node):
        return None
    value = tensor_of(node.args[0])
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keep = node.args[keep_at] if len(node.args) > keep_at else node.kwargs.get("keepdim", False)
    dims = [dims] if isinstance(dims, int) else dims
    if value is None or not isinstance(dims, list | tuple) or len(dims) != 1 or not isinstance(dims[0], int):
        return None
    dim = dims[0] % value.dim()
    if bool(keep) == (lifted is not None) or (lifted is not None and lifted != dim):
        return None
    return op_name(node), node.args[0], dim


def _divided_late(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """(exp(x) @ v) / sum(exp(x)): the division moves in front of the product."""
    if op_name(node) != "div" or len(node.args) != 2 or node.kwargs or op_name(node.args[0]) != "matmul":
        return None
    dot, total = node.args
    found = _quotient(dot.args[0], total)
    value = tensor_of(dot.args[0])
    if found is None or value is None or found[1] != value.dim() - 1 or len(dot.users) != 1:
        return None
    return _again(graph, node, dot, _softmax(graph, node, dot.args[0], *found))


def _sink_in_norm(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """exp(x - logaddexp(logsumexp(x), t)), weights with a sink."""
    if op_name(node) != "exp" or op_name(node.args[0]) != "sub" or node.args[0].kwargs:
        return None
    x, norm = node.args[0].args[:2]
    if op_name(norm) != "logaddexp":
        return None
    for total, sink in (norm.args, norm.args[::-1]):
        row = _row(total)
        if row is not None and row[0] == "logsumexp" and row[1] is x:
            return _with_sink(graph, node, x, sink, row[2])
    return None


def _sink_in_gate(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """(softmax(x) @ v) * sigmoid(logsumexp(x) - t), output with a sink."""
    if op_name(node) != "mul" or len(node.args) != 2:
        return None
    for dot, gate in (node.args, node.args[::-1]):
        weights: Any = dot.args[0] if op_name(dot) == "matmul" else None
        if op_name(weights) != "softmax" or op_name(gate) != "sigmoid" or op_name(gate.args[0]) != "sub":
            continue
        total, sink = gate.args[0].args[:2]
        row, value = _row(total), tensor_of(weights)
        if row is None or value is None or row[0] != "logsumexp" or row[1] is not weights.args[0]:
            continue
        same_axis = int(weights.args[1]) % value.dim() == row[2] == value.dim() - 1
        if same_axis and len(weights.args) == 2 and not gate.args[0].kwargs and len(dot.users) == 1:
            return _again(graph, node, dot, _with_sink(graph, node, row[1], sink, row[2]))
    return None


def _with_sink(graph: fx.Graph, before: fx.Node, x: fx.Node, sink: Any, dim: int) -> fx.Node | None:
    """softmax([x, sink]) along `dim` without its last column."""
    value, logit = tensor_of(x), tensor_of(sink)
    if value is None or logit is None or logit.dtype != value.dtype or logit.dim() > value.dim():
        return None
    width = value.shape[dim]
    column = [1 if d == dim else extent for d, extent in enumerate(value.shape)]
    if (logit.dim() == value.dim() and logit.shape[dim] != 1) or isinstance(width, torch.SymInt):
        return None
    with graph.inserting_before(before):
        spread = _emit(graph, before, aten.expand.default, sink, column)
        joined = _emit(graph, before, aten.cat.default, [x, spread], dim)
        weights = _emit(graph, before, aten.softmax.int, joined, dim)
        return _emit(graph, before, aten.slice.Tensor, weights, dim, 0, width)


def _again(graph: fx.Graph, before: fx.Node, dot: fx.Node, weights: fx.Node | None) -> fx.Node | None:
    """The product `dot` with other weights."""
    if weights is None:
        return None
    with graph.inserting_before(before):
        product = graph.call_function(dot.target, (weights, *dot.args[1:]))
    product.meta.update(dot.meta)
    return product


def _emit(graph: fx.Graph, like: fx.Node, target: OpOverload, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta.update({k: v for k, v in like.meta.items() if k in ("nn_module_stack", "stack_trace")})
    node.meta["val"] = target(*_values(args))
    return node


def _softmax(graph: fx.Graph, before: fx.Node, like: fx.Node, x: fx.Node, dim: int) -> fx.Node:
    with graph.inserting_before(before):
        softmax = graph.call_function(aten.softmax.int, (x, dim))
    softmax.meta.update(like.meta)
    return softmax

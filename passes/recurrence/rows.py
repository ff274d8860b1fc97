"""Results written row by row into a new tensor, as the stack that they are.

    out = zeros_like(v);  out[:, t] = y_t for every t      ->      out = stack([y_0, y_1, ...], 1)

Source: scalar replacement of arrays, as in compilers that turn stores into values.
"""

from __future__ import annotations

import torch
from torch import fx

from attnc.passes.graph import GraphFacts, op_name, tensor_of

aten = torch.ops.aten
# fmt: off
FRESH = ("zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty", "ones", "ones_like", "full",
         "full_like", "new_full", "new_ones")
# fmt: on


def stack_rows(graph: fx.Graph) -> int:
    """Rewrite such tensors of `graph` in place; returns how many."""
    facts = GraphFacts(graph)
    family: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        family.setdefault(facts.root(node), []).append(node)
    found = 0
    for made, nodes in family.items():
        rows = _rows(facts, made, nodes) if op_name(made) in FRESH and len(nodes) > 2 else None
        if rows is None:
            continue
        dim, values, writes = rows
        value, dtype = tensor_of(made), tensor_of(made).dtype  # type: ignore[union-attr]
        last = max(writes, key=facts.order.__getitem__)
        with graph.inserting_after(last):
            stack = graph.call_function(aten.stack.default, (values, dim))
        stack.meta.update({k: v for k, v in last.meta.items() if k in ("stack_trace", "nn_module_stack")})
        stack.meta["val"] = aten.stack.default([v.meta["val"] for v in values], dim)
        result = stack
        if stack.meta["val"].dtype != dtype:
            with graph.inserting_after(stack):
                result = graph.call_function(aten.to.dtype, (stack, dtype))
            result.meta.update(stack.meta)
            result.meta["val"] = stack.meta["val"].to(dtype)
        after = facts.order[last]
        assert value is not None
        made.replace_all_uses_with(result, delete_user_cb=lambda user, after=after: facts.order.get(user, -1) > after)
        for write in writes:
            graph.erase_node(write)
        found += 1
    if found:
        graph.eliminate_dead_code()
    return found


def _rows(
    facts: GraphFacts, made: fx.Node, nodes: list[fx.Node]
) -> tuple[int, list[fx.Node], list[fx.Node]] | None:
    """(axis, the rows' values in order, the writes) where all that happens to `made` is a write of each row, once."""
    whole = tensor_of(made)
    writes = facts.writers(made)
    if whole is None or len(writes) < 2 or any(op_name(w) != "copy_" or len(w.users) for w in writes):
        return None
    last = max(map(facts.order.__getitem__, writes))
    targets = {w.args[0]: w for w in writes}
    if any(facts.order[n] < last for n in nodes if n is not made and n not in targets and n not in writes):
        return None
    if any(facts.order[u] < last for u in made.users if u not in targets):
        return None
    values: dict[int, fx.Node] = {}
    dims = set()
    for target, write in targets.items():
        row, value = tensor_of(target), tensor_of(write.args[1])
        if op_name(target) != "select" or target.args[0] is not made or set(target.users) != {write} or value is None:
            return None
        dim, at = int(target.args[1]) % whole.dim(), target.args[2]
        if not isinstance(at, int) or row is None or row.shape != value.shape or len(write.args) > 2:
            return None
        dims.add(dim)
        values[at] = write.args[1]
    if len(dims) != 1 or len(values) != len(writes) or not isinstance(whole.shape[dim], int):
        return None
    if sorted(values) != list(range(whole.shape[dim])):
        return None
    if len({tensor_of(v).dtype for v in values.values()}) != 1:  # type: ignore[union-attr]
        return None
    return dim, [values[k] for k in sorted(values)], writes

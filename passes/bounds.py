"""Upper bounds of whole numbers in a graph, and what they leave without effect: experts' ids against their number.

    masked_fill(x, ids >= 8, 0), clamp(ids, max=7)   with ids from a top-k over 8 experts   -> x, ids

Where experts may lie on other devices, ids beyond the own ones are masked; on one device there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from attnc.passes.graph import GraphFacts, op_name, tensor_of

# Operators whose values are some of their first operand's.
_PASS = {
    "alias", "clone", "contiguous", "detach", "expand", "flatten", "gather", "index", "index_select", "permute",
    "reshape", "select", "slice", "squeeze", "transpose", "unsqueeze", "view", "_unsafe_view",
}  # fmt: skip
_CASTS = {"to", "_to_copy"}
_WHOLE = (torch.int32, torch.int64)


def drop_without_effect(graph: fx.Graph) -> None:
    """Take out each masked_fill and where whose mask is false everywhere, and each clamp above all values.

    A new tensor stays a new one (a copy, which compilers drop); only an in-place clamp gives its own operand. What is
    read off numbers that something else writes to stays.
    """
    found = [(node, numbers) for node in graph.nodes if (numbers := _idle(node)) is not None]
    facts = GraphFacts(graph) if found else None
    for node in [node for node, numbers in found if facts is not None and not _written(facts, numbers)]:
        kept = node.args[2 if op_name(node) == "where" else 0]
        if op_name(node) != "clamp_":
            with graph.inserting_before(node):
                copied = graph.call_function(torch.ops.aten.clone.default, (kept,))
            copied.meta = dict(node.meta)
            kept = copied
        node.replace_all_uses_with(kept)
        graph.erase_node(node)


def _idle(node: fx.Node) -> fx.Node | None:
    """The numbers whose bound shows that `node` gives one of its operands as it is; None where that is not proven."""
    name, args = op_name(node), node.args
    if name in ("clamp", "clamp_") and len(args) == 3 and args[1] is None and isinstance(args[2], int):
        most = upper(args[0])
        return args[0] if most is not None and most <= args[2] and _same(node, args[0]) else None
    if name == "masked_fill":
        return _never(args[1]) if _same(node, args[0]) else None
    if name == "where" and len(args) == 3:
        return _never(args[0]) if _same(node, args[2]) else None
    return None


def _same(node: fx.Node, kept: Any) -> bool:
    """Whether `kept` is a tensor that is neither cast nor broadcast in `node`."""
    out, value = tensor_of(node), tensor_of(kept)
    return out is not None and value is not None and (out.shape, out.dtype) == (value.shape, value.dtype)


def _written(facts: GraphFacts, numbers: fx.Node) -> bool:
    """Whether anything writes to the memory that a bound was read off, other than a clamp from above."""
    chain = [numbers]
    while op_name(chain[-1]) in _PASS | _CASTS | set(_UPPER) and isinstance(chain[-1].args[0], fx.Node):
        chain.append(chain[-1].args[0])
    writers = [writer for node in chain for writer in facts.writers(node)]
    return not all(op_name(writer) == "clamp_" and writer.args[1:2] == (None,) for writer in writers)


def _never(mask: Any) -> fx.Node | None:
    """The numbers of a comparison that holds for none of them."""
    if not isinstance(mask, fx.Node):
        return None
    if op_name(mask) in _PASS and tensor_of(mask.args[0]) is not None:
        return _never(mask.args[0]) if _dtype(mask.args[0]) == torch.bool else None
    if op_name(mask) not in ("ge", "gt") or len(mask.args) < 2:
        return None
    numbers, limit = mask.args[0], mask.args[1]
    most = upper(numbers)
    if most is None or isinstance(limit, bool) or not isinstance(limit, int):
        return None
    return numbers if (most < limit if op_name(mask) == "ge" else most <= limit) else None


def upper(node: Any) -> int | None:
    """The largest value that a tensor of whole numbers may hold; None: unknown."""
    if not isinstance(node, fx.Node) or (op_name(node) != "getitem" and _dtype(node) not in _WHOLE):
        return None
    name = op_name(node)
    if name in _PASS | _CASTS:
        return upper(node.args[0]) if _dtype(node.args[0]) in _WHOLE else None
    rule = _UPPER.get(name)
    return None if rule is None else rule(node)


def _dtype(node: Any) -> torch.dtype | None:
    value = tensor_of(node)
    return None if value is None else value.dtype


def _of_pair(node: fx.Node) -> int | None:
    """Of (values, indices): indices lie below the length of what is searched, sorted values are its own."""
    source, which = node.args
    if not isinstance(source, fx.Node) or which not in (0, 1):
        return None
    if which == 0:
        return upper(source.args[0]) if op_name(source) in ("sort", "topk") else None
    return _length(source) if op_name(source) in ("sort", "topk", "max", "min") else None


def _length(node: fx.Node) -> int | None:
    """The last index along the axis that `node` searches."""
    value = tensor_of(node.args[0])
    if value is None or not value.dim():
        return None
    first = {"topk": 2, "argmax": 1, "argmin": 1, "argsort": 1, "sort": 1, "max": 1, "min": 1}[op_name(node)]
    axis = node.args[first] if len(node.args) > first else node.kwargs.get("dim")
    if axis is None:
        axis = -1 if op_name(node) in ("topk", "sort", "argsort") or value.dim() == 1 else None
    size = value.shape[axis] if isinstance(axis, int) and not isinstance(axis, bool) else None
    return size - 1 if isinstance(size, int) else None


def _clamped(node: fx.Node) -> int | None:
    least, most = (node.args[at] if len(node.args) > at else node.kwargs.get(name) for at, name in _ENDS)
    if not all(x is None or (isinstance(x, int) and not isinstance(x, bool)) for x in (least, most)):
        return None
    known = [x for x in (upper(node.args[0]), most) if isinstance(x, int)]
    if not known:
        return None
    return max(min(known), least) if isinstance(least, int) else min(known)


_ENDS = ((1, "min"), (2, "max"))
_UPPER: Mapping[str, Callable[[fx.Node], int | None]] = {
    "getitem": _of_pair,
    "argmax": _length,
    "argmin": _length,
    "argsort": _length,
    "clamp": _clamped,
}

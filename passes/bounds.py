"""Upper bounds of whole numbers in a graph, and what they leave without effect: experts' ids against their number.

    masked_fill(x, ids >= 8, 0), clamp(ids, max=7)   with ids from a top-k over 8 experts   -> x, ids

Where experts may lie on other devices, ids beyond the own ones are masked; on one device there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from attnc.passes.graph import GraphFacts, op_name, tensor_of

# Operators whose values are some of their first operand's.
_PASS = {
    "alias", "clone", "contiguous", "detach", "expand", "flatten", "gather", "index", "index_select", "permute",
    "reshape", "select", "slice", "squeeze", "transpose", "unsqueeze", "view", "_unsafe_view",
}  # fmt: skip
_CASTS = {"to", "_to_copy"}
_WHOLE = (torch.int32, torch.int64)


def without_effect(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """What stands for a masked_fill or where whose mask is false everywhere, or for a clamp above all values.

    A new tensor stays a new one (a copy, which compilers drop); only an in-place clamp gives its own operand.
    None: unproven, or something else writes to the numbers.
    """
    name, args = op_name(node), node.args
    numbers: fx.Node | None = None
    kept: Any = None
    if name in ("clamp", "clamp_") and len(args) == 3 and args[1] is None and isinstance(args[2], int):
        most = upper(args[0])
        numbers, kept = (args[0] if most is not None and most <= args[2] else None), args[0]
    elif name == "masked_fill":
        numbers, kept = _never(args[1]), args[0]
    elif name == "where" and len(args) == 3:
        numbers, kept = _never(args[0]), args[2]
    if numbers is None or not isinstance(kept, fx.Node) or not _same(node, kept) or _written(graph, numbers):
        return None
    if name == "clamp_":
        return kept
    with graph.inserting_before(node):
        copied = graph.call_function(torch.ops.aten.clone.default, (kept,))
    copied.meta = dict(node.meta)
    return copied


def _same(node: fx.Node, kept: fx.Node) -> bool:
    """Whether `kept` is neither cast nor broadcast in `node`."""
    out, value = tensor_of(node), tensor_of(kept)
    return out is not None and value is not None and (out.shape, out.dtype) == (value.shape, value.dtype)


def _written(graph: fx.Graph, numbers: fx.Node) -> bool:
    """Whether anything writes to the memory that a bound was read off, other than to lower what it holds."""
    facts, chain = GraphFacts(graph), [numbers]
    while op_name(chain[-1]) in _PASS | _CASTS | set(_UPPER) and isinstance(chain[-1].args[0], fx.Node):
        chain.append(chain[-1].args[0])
    held = {facts.root(node) for node in chain}
    return any(facts.root(place) in held for node in graph.nodes for place in _places(node))


def _places(node: fx.Node) -> list[fx.Node]:
    """What `node` writes to; an in-place clamp from above is no write."""
    if not isinstance(node.target, OpOverload) or (op_name(node) == "clamp_" and node.args[1:2] == (None,)):
        return []
    known = node.target._schema.arguments
    given = {a.name: node.args[at] if at < len(node.args) else node.kwargs.get(a.name) for at, a in enumerate(known)}
    return [
        place
        for a in known
        if a.alias_info is not None and a.alias_info.is_write and isinstance(place := given[a.name], fx.Node)
    ]


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

"""Upper bounds of whole numbers in a graph, and what they leave without effect: experts' ids against their number.

    masked_fill(x, ids >= 8, 0), clamp(ids, max=7)   with ids from a top-k over 8 experts   -> x, ids

Where experts may lie on other devices, ids beyond the own ones are masked; on one device there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from attnc.passes.graph import op_name, tensor_of

# Operators whose values are some of their first operand's.
_PASS = {
    "alias", "clone", "contiguous", "detach", "expand", "flatten", "gather", "index", "index_select", "permute",
    "reshape", "select", "slice", "squeeze", "to", "_to_copy", "transpose", "unsqueeze", "view", "_unsafe_view",
}  # fmt: skip


def without_effect(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """What a masked_fill or where gives whose mask is false everywhere, or a clamp above all values; None: unproven."""
    name = op_name(node)
    if name in ("clamp", "clamp_") and len(node.args) == 3 and node.args[1] is None and isinstance(node.args[2], int):
        most = upper(node.args[0])
        return _same(node, node.args[0]) if most is not None and most <= node.args[2] else None  # type: ignore[arg-type]
    if name == "masked_fill" and _never(node.args[1]) and isinstance(node.args[0], fx.Node):
        return _same(node, node.args[0])
    if name == "where" and len(node.args) == 3 and _never(node.args[0]) and isinstance(node.args[2], fx.Node):
        return _same(node, node.args[2])
    return None


def _same(node: fx.Node, kept: fx.Node) -> fx.Node | None:
    """`kept` where it is all that `node` is: not cast, not broadcast."""
    out, value = tensor_of(node), tensor_of(kept)
    if out is None or value is None or (out.shape, out.dtype) != (value.shape, value.dtype):
        return None
    return kept


def _never(mask: Any) -> bool:
    if not isinstance(mask, fx.Node):
        return False
    if op_name(mask) in _PASS:
        return _never(mask.args[0])
    if op_name(mask) not in ("ge", "gt") or len(mask.args) < 2:
        return False
    most, limit = upper(mask.args[0]), mask.args[1]
    if most is None or isinstance(limit, bool) or not isinstance(limit, int | float):
        return False
    return most < limit if op_name(mask) == "ge" else most <= limit


def upper(node: Any) -> int | None:
    """The largest value that a tensor of whole numbers may hold; None: unknown."""
    if not isinstance(node, fx.Node):
        return None
    name = op_name(node)
    if name in _PASS:
        return upper(node.args[0])
    rule = _UPPER.get(name)
    return None if rule is None else rule(node)


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
    most = node.args[2] if len(node.args) > 2 else node.kwargs.get("max")
    known = [x for x in (upper(node.args[0]), most) if isinstance(x, int) and not isinstance(x, bool)]
    return min(known) if known else None


_UPPER: Mapping[str, Callable[[fx.Node], int | None]] = {
    "getitem": _of_pair,
    "argmax": _length,
    "argmin": _length,
    "argsort": _length,
    "clamp": _clamped,
}

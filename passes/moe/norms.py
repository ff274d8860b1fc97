"""Norms over the last axes, as one operator or by hand: `x * rsqrt(mean(x^2) + eps)`."""

from __future__ import annotations

from typing import Any

from torch import fx

from attnc.passes.graph import op_name, tensor_of
from attnc.passes.moe.rows import CASTS


def normed(node: fx.Node) -> tuple[str, fx.Node, int] | None:
    """(name, what is normed, number of axes) where `node` is a norm without its gain, or an operator with one."""
    name = op_name(node)
    if name in ("rms_norm", "layer_norm"):
        return name, node.args[0], len(node.args[1])
    if name in ("mul", "div") and len(node.args) == 2:
        for x, root in (node.args, node.args[::-1]) if name == "mul" else (node.args,):
            if _is_root(_bare(x), _bare(root), "rsqrt" if name == "mul" else "sqrt"):
                return "rms_norm", x, 1
    return None


def _bare(node: Any) -> Any:
    while op_name(node) in CASTS:
        node = node.args[0]
    return node


def _is_root(x: Any, root: Any, wanted: str) -> bool:
    """Whether `root` is the root, or its inverse, of the mean square of `x` plus a constant."""
    power = {"rsqrt": -0.5, "sqrt": 0.5}[wanted]
    if op_name(root) != wanted and not (op_name(root) == "pow" and root.args[1] == power):
        return False
    total = _bare(root.args[0])
    if op_name(total) != "add" or not isinstance(total.args[1], int | float):
        return False
    mean = _bare(total.args[0])
    if op_name(mean) != "mean" or list(mean.args[1:2]) not in ([[-1]], [-1]) or tensor_of(mean.args[0]) is None:
        return False
    square = _bare(mean.args[0])
    if op_name(square) == "pow" and square.args[1] == 2:
        return _bare(square.args[0]) is x
    return op_name(square) in ("mul", "square") and all(_bare(a) is x for a in square.args)

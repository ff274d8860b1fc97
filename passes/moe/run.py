"""Runs a router's own nodes on random logits: what is chosen and weighted is seen, however it is written.

The nodes from the logits to what the experts are given hold a few numbers for each token, so they are run at the size
of the graph, on the CPU and in single precision, whatever the graph's device and dtype.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from attnc.passes.graph import hint, op_name, tensor_of

AFFORDABLE = 1 << 25  # elements of the largest tensor that is run
# Operators that ask for another tensor's shape or type only, by the position of that tensor.
_SHAPE_ONLY = ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")
_TYPE_ONLY = ("type_as",)
_SMALL = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float32}


def behind(targets: Sequence[fx.Node], cut: Collection[fx.Node]) -> list[fx.Node]:
    """What must be run for `targets`, in order; nodes of `cut` are given and not looked behind."""
    needed: set[fx.Node] = set()
    stack = list(targets)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            if node not in cut:
                stack += inputs(node)
    return [n for n in targets[0].graph.nodes if n in needed] if targets else []


def inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values `node` depends on."""
    if op_name(node) in _SHAPE_ONLY:
        return [x for x in node.all_input_nodes if x is not node.args[0] and tensor_of(x) is not None]
    if op_name(node) in _TYPE_ONLY:
        return [node.args[0]]
    return [x for x in node.all_input_nodes if not isinstance(x.meta.get("val"), torch.SymInt | torch.SymFloat)]


def run(targets: Sequence[fx.Node], given: Mapping[fx.Node, Tensor]) -> list[Any] | str:
    """The values of `targets`, or why they could not be computed."""
    nodes = behind(targets, given.keys())
    sizes = [hint(t.numel()) for n in nodes if (t := tensor_of(n)) is not None and n.op == "call_function"]
    if max(sizes, default=0) > AFFORDABLE:
        return f"a tensor of {max(sizes)} elements"
    env: dict[fx.Node, Any] = {}
    with ExitStack() as quiet:
        quiet.enter_context(_disable_current_modes())
        quiet.enter_context(torch._C.DisableTorchFunction())
        quiet.enter_context(torch.no_grad())
        quiet.enter_context(torch.autocast("cpu", enabled=False))
        quiet.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(0)
        at = ""
        try:
            for node in nodes:
                at = op_name(node) or node.op
                env[node] = given[node].clone() if node in given else _value(node, env)
        except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError, KeyError) as exc:
            return f"{at}: {str(exc).partition(chr(10))[0]}"
        return [env[t] for t in targets]


def _value(node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    number = node.meta.get("val")
    if isinstance(number, torch.SymInt | int) and not isinstance(number, bool):
        return hint(number)
    if node.op == "get_attr":
        held = attrgetter(str(node.target))(node.graph.owning_module)
        return held.detach().to(_SMALL.get(held.dtype, held.dtype)).clone()
    if node.op != "call_function":
        raise ValueError("an input that was not given")
    if op_name(node) in _TYPE_ONLY:
        return env[node.args[0]]

    def known(x: Any) -> Any:
        if isinstance(x, fx.Node):
            return env[x] if x in env else _stand_in(x)
        if isinstance(x, torch.SymInt):
            return hint(x)
        if isinstance(x, torch.device):
            return torch.device("cpu")
        return _SMALL.get(x, x) if isinstance(x, torch.dtype) else x

    args, kwargs = (fx.node.map_aggregate(part, known) for part in (node.args, dict(node.kwargs)))
    return node.target(*args, **kwargs)


def _stand_in(node: fx.Node) -> Any:
    """Zeros of the shape of `node`, whose values nobody asks for; a number as it was seen."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return torch.zeros([hint(s) for s in value.shape], dtype=_SMALL.get(value.dtype, value.dtype))
    return hint(node) if isinstance(value, torch.SymInt | int) else value

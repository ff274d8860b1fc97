"""torch.vmap inside a Dynamo graph, written out: the calls between its entry and exit as plain batched ATen.

Models use it for masks (a predicate of single positions) and inside associative scans. Pre-dispatch tracing sees the
batched tensors of functorch and loses track of them; below dispatch the batching rules have already run, so each such
span is traced there on its own and its ATen is what the retracer runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._functorch import predispatch
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx

_ENTER, _EXIT = predispatch._vmap_increment_nesting, predispatch._vmap_decrement_nesting
PARTS = (_ENTER, _EXIT, predispatch._add_batch_dim, predispatch._remove_batch_dim, predispatch.lazy_load_decompositions)


@dataclass(frozen=True)
class Span:
    """The nodes of one outermost vmap, what they read from before and what is read of them behind."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    def expand(self, values: Sequence[Any]) -> dict[fx.Node, Any]:
        """The value of each output for `values` of the inputs, computed without functorch."""

        def run(*given: Any) -> list[Any]:
            env = dict(zip(self.inputs, given, strict=True))
            for node in self.nodes:
                env[node] = _call(node, env)
            return [env[node] for node in self.outputs]

        with torch._C.DisableTorchFunction(), disable_proxy_modes_tracing():
            plain = make_fx(run)(*values)
        results = fx.Interpreter(plain).run(*values, enable_io_processing=False)
        return dict(zip(self.outputs, results, strict=True))


def _call(node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
    target: Callable[..., Any] | str = node.target
    if node.op == "call_method":
        return getattr(args[0], str(target))(*args[1:], **kwargs)
    assert callable(target)
    return target(*args, **kwargs)


def spans(graph: fx.Graph) -> list[Span]:
    """The outermost vmaps of `graph`, in order; none if one is not closed, draws at random or sets grad mode."""
    found: list[Span] = []
    inside: list[fx.Node] = []
    depth = 0
    for node in graph.nodes:
        if node.target is _ENTER:
            depth += 1
        if depth:
            inside.append(node)
        if node.target is _EXIT:
            depth -= 1
            if depth == 0:
                found.append(_span(inside))
                inside = []
    return found if depth == 0 and all(map(_is_plain, found)) else []


def _span(nodes: list[fx.Node]) -> Span:
    own = set(nodes)
    inputs = dict.fromkeys(x for node in nodes for x in node.all_input_nodes if x not in own)
    outputs = [node for node in nodes if any(user not in own for user in node.users)]
    return Span(tuple(nodes), tuple(inputs), tuple(outputs))


def _is_plain(span: Span) -> bool:
    """Whether tracing the span below autograd keeps its meaning."""
    return all(
        node.op in ("call_function", "call_method")
        and node.target is not torch._C._set_grad_enabled
        and not (node.target is _ENTER and node.args[1] != "error")
        for node in span.nodes
    )

"""Facts of a captured graph that recognition needs everywhere: order, aliases, writes, gradients, shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from attnc import operands
from attnc.expr import ONE, ZERO, Expr, add, const, floordiv, maximum, minimum, mod, mul, size


@dataclass(frozen=True)
class NoMatch:
    """Why something is not a region: a sentence and the node at which it was found."""

    reason: str
    node: fx.Node

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"{self.reason} (at {self.node.name})"


class Unliftable(Exception):
    """Raised inside one lift, caught at its entrance and returned as NoMatch; never leaves the passes."""

    def __init__(self, reason: str, node: fx.Node) -> None:
        super().__init__(reason)
        self.no_match = NoMatch(reason, node)


def op_name(node: Any) -> str:
    """`matmul` for aten.matmul.default; "" for anything that is no operator call."""
    if isinstance(node, fx.Node) and node.op == "call_function":
        target = node.target
        if isinstance(target, OpOverload):
            return target._schema.name.split("::")[-1]
        return getattr(target, "__name__", "")
    return ""


def tensor_of(node: Any) -> torch.Tensor | None:
    value = node.meta.get("val", node.meta.get("example_value")) if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


# Where Dynamo found the outermost module: a local, a global (also of an imported file), a closure or container of one.
_OUTERMOST = re.compile(
    r"^(?:G\['__import_[^']*'\]\.\w+|[LG]\[(?:'[^']*'|\"[^\"]*\")\])"
    r"(?:\.__closure__\[\d+\]\.cell_contents|\[[^\]]*\])*"
)


def module_path(node: fx.Node) -> str:
    """The module that produced `node`, as `layers.3.self_attn`: its place in the outermost module that was called."""
    return path_in(node.meta.get("nn_module_stack"))


def path_in(stack: Mapping[str, Any] | None) -> str:
    """The innermost module of a stack of modules, as Dynamo keeps it, by its place in the outermost one."""
    if not stack:
        return ""
    path = _OUTERMOST.sub("", str(list(stack.values())[-1][0])).replace("._modules", "")
    for quote in ("['", "']", '["', '"]'):
        path = path.replace(quote, "." if quote.startswith("[") else "")
    for call in (".slice(None, None, None)", "__call__"):
        path = path.replace(call, "")
    return path.replace("..", ".").strip(".").replace("[", ".").replace("]", "")


def integer(value: Any) -> Expr:
    """A Python integer, a SymInt, or the node of one, as an expression over shape symbols."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    if isinstance(value, torch.SymInt):
        return _from_sympy(value.node.expr)
    return const(int(value))


def _from_sympy(e: sympy.Expr) -> Expr:
    if e.is_Integer:
        return const(int(e))
    if e.is_Symbol:
        return size(e.name)
    args = [_from_sympy(a) for a in e.args]
    name = type(e).__name__
    if name == "Add":
        return add(*args)
    if name == "Mul":
        total = ONE
        for a in args:
            total = mul(total, a)
        return total
    rule = {
        "FloorDiv": floordiv,
        "CleanDiv": floordiv,
        "Mod": mod,
        "PythonMod": mod,
        "Max": maximum,
        "Min": minimum,
    }
    if name in rule and len(args) == 2:
        return rule[name](*args)
    return size(f"({e})")


def hint(value: Any) -> int:
    """The size seen at compile time, without a guard."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    return operands.hint(value)


def shape_of(node: fx.Node) -> tuple[Expr, ...]:
    value = tensor_of(node)
    assert value is not None, node
    return tuple(integer(s) for s in value.shape)


def is_one(e: Expr) -> bool:
    return e == ONE


def is_zero(e: Expr) -> bool:
    return e == ZERO


class GraphFacts:
    """Order, aliases and writes of one graph, computed once."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self._root: dict[fx.Node, fx.Node] = {}
        self.writes: dict[fx.Node, list[int]] = {}
        self.origins: dict[fx.Node, int] = {}  # inputs that nodes are made of, see `attention.crossing`
        for node in graph.nodes:
            self._alias(node)

    def _alias(self, node: fx.Node) -> None:
        if node.op != "call_function":
            return
        if not isinstance(node.target, OpOverload):
            if op_name(node) == "getitem" and isinstance(node.args[0], fx.Node):
                self._root[node] = self.root(node.args[0])
            return
        schema = node.target._schema
        returned = [r.alias_info for r in schema.returns if r.alias_info is not None]
        for position, argument in enumerate(schema.arguments):
            info = argument.alias_info
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            if info is None or not isinstance(value, fx.Node):
                continue
            if info.is_write and op_name(node) != "detach_":
                self.writes.setdefault(self.root(value), []).append(self.order[node])
            if returned and (
                info.before_set & returned[0].before_set or info.after_set & returned[0].after_set
            ):
                self._root.setdefault(node, self.root(value))
        if op_name(node) in (
            "reshape",
            "contiguous",
            "to",
            "flatten",
            "expand_as",
            "reshape_as",
            "chunk",
            "split",
        ):
            first = node.args[0]
            if isinstance(first, fx.Node):  # may alias: schema says nothing for composite operators
                self._root.setdefault(node, self.root(first))

    def root(self, node: fx.Node) -> fx.Node:
        while node in self._root and self._root[node] is not node:
            node = self._root[node]
        return node

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """What the value of `node` is made of: its inputs, and what is written into its memory."""
        return [*node.all_input_nodes, *self.writers(node)]

    def writers(self, node: fx.Node) -> list[fx.Node]:
        """What writes into the memory of `node`, at any time."""
        return [self._nodes[at] for at in self.writes.get(self.root(node), ())]

    @cached_property
    def _nodes(self) -> list[fx.Node]:
        return list(self.order)

    def unchanged(self, node: fx.Node, after: fx.Node, until: fx.Node) -> bool:
        """Whether nothing writes to `node`'s memory after `after` has read it and before `until`."""
        low, high = self.order[after], self.order[until]
        return not any(low < at < high for at in self.writes.get(self.root(node), ()))

    @cached_property
    def _with_grad(self) -> set[fx.Node]:
        enabled = torch.is_grad_enabled()
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            if op_name(node) == "_set_grad_enabled":
                enabled = bool(node.args[0])
            elif node.op == "placeholder":
                if node.meta.get("requires_grad") and torch.is_grad_enabled():
                    found.add(node)
            elif enabled and not op_name(node).startswith("detach"):
                value = tensor_of(node)
                if (value is None or value.is_floating_point()) and any(x in found for x in node.all_input_nodes):
                    found.add(node)
        return found

    def needs_grad(self, node: Any) -> bool:
        """Whether a gradient flows back through `node`."""
        return node in self._with_grad

    @cached_property
    def symbol_nodes(self) -> dict[str, fx.Node]:
        """Shape symbol -> the first node whose value is that symbol."""
        found: dict[str, fx.Node] = {}
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
                found.setdefault(value.node.expr.name, node)
        return found

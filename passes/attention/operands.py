"""Operands of an attention in one layout: find [B, H, length, width] behind views, repeats and scalar factors.

`trace_operand` walks back from the product through view operators as far as the index stays simple, so repeated key
heads (expand, repeat_interleave, reshape) end at the tensor before the repetition; `Operand.emit` writes the few nodes
that bring that tensor to (B, heads, length, width).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import floordiv as floor_divide
from typing import Any

import torch
from torch import fx

from attnc.expr import ONE, ZERO, B, Expr, H, add, const, floordiv, mod, scale
from attnc.passes.graph import GraphFacts, NoMatch, hint, op_name, shape_of, tensor_of
from attnc.passes.views import Index, Ranges, join_heads, through


@dataclass(frozen=True)
class Roles:
    """What the expressions in an operand's index mean, for one attention."""

    length: Expr
    width: Expr
    q_heads: int
    extents: tuple[Expr, Expr, Expr]  # batch, length, width
    scalars: bool = True  # whether a constant factor may be peeled off and applied to the scores

    def whole(self, found: tuple[str, int], extent: Expr) -> bool:
        """Whether an axis of `extent` holds all of the role, no more: a slice of a longer axis is not the operand."""
        kind, group = found
        if kind == "const":
            return True
        batch, length, width = self.extents
        wanted = {
            "b": batch, "n": length, "e": width, "h": const(self.q_heads // group), "g": const(group),
            "bh": scale(batch, group),
        }[kind]
        return extent == wanted

    def of(self, e: Expr) -> tuple[str, int] | None:
        """(role, group) of one index expression; the group is how many query heads share the head it names."""
        if e.is_const:
            return "const", 1
        if e in (B, self.length, self.width):
            return {B: "b", self.length: "n", self.width: "e"}[e], 1
        if e == H:
            return "h", 1
        if e.op == "floordiv" and e.args[0] == H and e.args[1].is_const:
            return "h", int(e.args[1].value)
        if e.op == "mod" and e.args[0] == H and e.args[1].is_const:
            return "g", int(e.args[1].value)
        if e.op == "lin" and e.args[0] == 0 and dict(e.args[1]).keys() == {B, H} and dict(e.args[1])[H] == 1:
            return "bh", int(dict(e.args[1])[B])
        return None


@dataclass(frozen=True)
class Operand:
    """`source[index]` is the operand's element; `factor` multiplies it, and is applied to the scores.

    more: further channels, behind these: operands of products that were added to this one's.
    weight: a factor of the emitted operand itself, where channels of one product weigh more than another's.
    """

    source: fx.Node
    index: Index
    roles: tuple[tuple[str, int], ...]
    factor: float = 1.0
    more: tuple[Operand, ...] = ()
    weight: float = 1.0

    @property
    def sources(self) -> list[fx.Node]:
        return [self.source, *(source for operand in self.more for source in operand.sources)]

    def moved(self, image: Mapping[fx.Node, fx.Node]) -> Operand:
        """This operand of another subgraph."""
        return replace(self, source=image[self.source], more=tuple(o.moved(image) for o in self.more))

    def _group(self, q_heads: int) -> int:
        """How many query heads share one of this operand's heads."""
        kinds = dict(self.roles)
        if "bh" in kinds:
            return 1
        if "h" not in kinds:
            return q_heads if "g" not in kinds else 0
        return kinds["h"] if "g" not in kinds else 1

    def heads(self, q_heads: int) -> int:
        group = self._group(q_heads)
        return max([q_heads // group if group else 0, *(operand.heads(q_heads) for operand in self.more)])

    def emit(self, graph: fx.Graph, batch: Any, q_heads: int) -> fx.Node:
        """Nodes that bring the source to (B, heads, length, width), as views where the layout allows."""
        if not self.more:
            return self._emit(graph, batch, q_heads)
        heads = self.heads(q_heads)
        parts = [operand._emit(graph, batch, q_heads) for operand in (self, *self.more)]
        for at, part in enumerate(parts):
            value = tensor_of(part)
            assert value is not None
            if value.shape[1] != heads:
                parts[at] = _call(
                    graph.call_function, torch.ops.aten.repeat_interleave.self_int, part, heads // value.shape[1], 1
                )
        return _call(graph.call_function, torch.ops.aten.cat.default, parts, -1)

    def _emit(self, graph: fx.Graph, batch: Any, q_heads: int) -> fx.Node:
        node, kinds = self.source, [kind for kind, _ in self.roles]
        call = graph.call_function
        aten = torch.ops.aten
        for dim in reversed(range(len(kinds))):
            if kinds[dim] == "const":
                node = _call(call, aten.select.int, node, dim, int(self.index[dim].value))
                del kinds[dim]
        if "bh" in kinds:
            dim = kinds.index("bh")
            heads = dict(self.roles)["bh"]
            node = _call(call, aten.unflatten.int, node, dim, [-1, heads])
            kinds[dim : dim + 1] = ["b", "h"]
        for kind in ("b", "h", "n"):
            if kind not in kinds:
                node = _call(call, aten.unsqueeze.default, node, 0)
                kinds.insert(0, kind)
        wanted = ["b", "h", *(["g"] if "g" in kinds else []), "n", "e"]
        order = [kinds.index(kind) for kind in wanted]
        if order != list(range(len(order))):
            node = _call(call, aten.permute.default, node, order)
        if "g" in kinds:
            node = _call(call, aten.flatten.using_ints, node, 1, 2)
        value = tensor_of(node)
        assert value is not None
        if value.shape[0] == 1 and hint(batch) != 1:
            node = _call(call, aten.expand.default, node, [batch, -1, -1, -1])
        return node if self.weight == 1.0 else _call(call, aten.mul.Tensor, node, self.weight)


def _call(call: Any, target: Any, *args: Any) -> fx.Node:
    """A call with its fake value computed, so that what follows can read shapes."""
    node = call(target, args)
    plain = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
    node.meta["val"] = target(*plain)
    return node


def batch_of(graph: fx.Graph, operands: Sequence[Operand], extent: Expr) -> Any:
    """The number of batches: an integer, or the node of one that is known at run time, read off an operand."""
    if extent.is_const:
        return int(extent.value)
    call, size = graph.call_function, torch.ops.aten.sym_size.int
    for operand in operands:
        kinds = [kind for kind, _ in operand.roles]
        if "b" in kinds:
            return _call(call, size, operand.source, kinds.index("b"))
        if "bh" in kinds:
            joined = _call(call, size, operand.source, kinds.index("bh"))
            return _call(call, floor_divide, joined, dict(operand.roles)["bh"])
    return 1


def trace_operand(
    facts: GraphFacts, node: fx.Node, index: Index, roles: Roles, ranges: Ranges, end: fx.Node
) -> Operand | NoMatch:
    """The operand whose element `index` of `node` is, walked back through views and scalar factors."""
    best: Operand | None = None
    factor, reader = 1.0, end
    while True:
        found = [roles.of(join_heads(e)) for e in index]
        if facts.unchanged(node, reader, end) and all(f is not None for f in found):
            kinds = [f[0] for f in found if f is not None]
            plain = [k for k in kinds if k != "const"]
            whole = all(roles.whole(f, x) for f, x in zip(found, shape_of(node), strict=True) if f is not None)
            needed = {"e"} if roles.extents[1] == ONE else {"n", "e"}
            distinct = len(set(plain)) == len(plain) and needed <= set(plain)
            if whole and distinct and ("g" not in plain or "h" in plain):
                best = Operand(node, index, tuple(f for f in found if f is not None), factor)
        if not facts.unchanged(node, node, end):  # what made it no longer says what it holds
            break
        step = _step(node, index, ranges, roles.scalars)
        if step is None or (op_name(node) == "detach" and facts.needs_grad(node.args[0])):
            break
        reader = node
        node, index, by = step
        factor *= by
    if best is None:
        return NoMatch("an operand of the product has no batch, head, length and width axes of its own", node)
    return best


def _step(node: fx.Node, index: Index, ranges: Ranges, scalars: bool = True) -> tuple[fx.Node, Index, float] | None:
    view = through(node, index, ranges)
    if view is not None:
        return (*view, 1.0)
    if scalars and op_name(node) in ("mul", "div") and len(node.args) == 2:
        source, scalar = node.args
        a, c = tensor_of(source), tensor_of(node)
        if isinstance(scalar, int | float) and scalar != 0 and a is not None and c is not None and a.dtype == c.dtype:
            return source, index, float(scalar) if op_name(node) == "mul" else 1.0 / scalar
    return None


def batch_roles(batch_vars: list[tuple[str, Expr]], sources: list[tuple[fx.Node, Index]], ranges: Ranges):
    """How the batch axes of the scores split into b and h: (substitution, B, Hq) or None.

    One axis is b * Hq + h where an operand's views show that split, else h; of more axes the first is b, the rest h.
    """
    live = [(name, extent) for name, extent in batch_vars if extent != ONE]
    unit: dict[str, Expr] = {name: ZERO for name, extent in batch_vars if extent == ONE}
    if not live:
        return unit, ONE, 1
    if len(live) == 1 and len(batch_vars) == 1:
        name, extent = live[0]
        heads = next((h for h in (_split_of(name, s, i, ranges) for s, i in sources) if h is not None), None)
        if heads is None or not extent.is_const or extent.value % heads:
            if not extent.is_const:
                return {**unit, name: B}, extent, 1
            return {**unit, name: H}, ONE, int(extent.value)
        return {**unit, name: _joined(heads)}, const(extent.value // heads), heads
    first = batch_vars[0]
    rest = batch_vars[1:]
    if any(not extent.is_const for _, extent in rest):
        return None
    q_heads = 1
    for _, extent in rest:
        q_heads *= int(extent.value)
    substitution = dict(unit)
    if first[1] != ONE:
        substitution[first[0]] = B
    below = q_heads
    for name, extent in rest:
        above, below = below, below // int(extent.value)
        if extent != ONE:
            part = floordiv(H, const(below))
            substitution[name] = part if above == q_heads else mod(part, extent)
    return substitution, first[1], q_heads


def _joined(heads: int) -> Expr:
    return add(scale(B, heads), H)


def _split_of(name: str, node: fx.Node, index: Index, ranges: Ranges) -> int | None:
    """Hq where some view behind `node` names `name % Hq`."""
    while True:
        for e in index:
            if e.op == "mod" and e.args[0].op == "var" and e.args[0].args[0] == name and e.args[1].is_const:
                return int(e.args[1].value)
        step = _step(node, index, ranges)
        if step is None:
            return None
        node, index, _ = step


"""All steps of a loop at once: what each step computes for itself, as one tensor with the steps in front.

`select(x, dim, t)` for t = 0, 1, ..., T - 1 is `x` with that axis in front, for t = T - 1, ..., 0 that turned around;
operators on such parts are the same operators on the whole, with their axes moved by one.

Source: Allen and Kennedy 1987, "Automatic translation of Fortran programs to vector form" (loop distribution).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnc.passes.graph import Unliftable, op_name, tensor_of
from attnc.passes.recurrence.emit import Draft
from attnc.passes.recurrence.terms import contraction

aten = torch.ops.aten


SPLITS = ("split", "split_with_sizes", "chunk", "unbind")


@dataclass(frozen=True)
class Stacked:
    """A node of the draft. moving: whether its first axis is the step; else it is the same at every step."""

    node: fx.Node
    moving: bool


class Stacker:
    """Stacks the nodes of `steps`, lists of the nodes of each step in order.

    given: what the steps read from outside, stacked already; where it is given, they read nothing else.
    """

    def __init__(
        self, draft: Draft, steps: Sequence[Sequence[fx.Node]], given: Mapping[fx.Node, Stacked] | None = None
    ) -> None:
        self.draft, self.steps, self.given = draft, steps, given
        self.known: dict[int, Stacked] = {}
        self.place = {node: (k, o) for k, step in enumerate(steps) for o, node in enumerate(step)}

    def at(self, place: int) -> Stacked:
        """What the steps compute at `place`.

        Raises: Unliftable where the steps differ in more than the step's own index, or an operator has no rule.
        """
        if place not in self.known:
            nodes = [step[place] for step in self.steps]
            outer = self._parts(nodes)
            self.known[place] = outer if outer is not None else self._operator(nodes)
        return self.known[place]

    def of(self, nodes: Sequence[fx.Node]) -> Stacked:
        """One argument of each step."""
        places = {self.place.get(n) for n in nodes}
        if None not in places:
            offsets = {o for _, o in places}  # type: ignore[misc]
            if len(offsets) == 1 and [self.place[n][0] for n in nodes] == list(range(len(nodes))):
                return self.at(offsets.pop())
            raise Unliftable("a step reads what another step has computed", nodes[-1])
        if self.given is not None:
            if nodes[0] not in self.given:
                raise Unliftable("a step reads something that is not handed to it", nodes[0])
            return self.given[nodes[0]]
        if len(set(nodes)) == 1:
            return Stacked(self.draft.leaf(nodes[0]), False)
        found = self._parts(nodes)
        if found is None:
            raise Unliftable("the steps read different tensors", nodes[-1])
        return found

    # Parts of a tensor that all steps read.

    def _parts(self, nodes: Sequence[fx.Node]) -> Stacked | None:
        """`select(x, dim, t)`, `slice(x, dim, t, t + 1)` or `unbind(x, dim)[t]` with one x for all t."""
        first = nodes[0]
        if len(nodes) == 1:
            return None
        if op_name(first) not in ("select", "slice", "getitem", "narrow"):
            return None
        if any(op_name(n) != op_name(first) or not isinstance(n.args[0], fx.Node) for n in nodes):
            return None
        if op_name(first) == "getitem":
            return self._unbound(nodes)
        if len(first.args) < 3 or len({n.args[1] for n in nodes}) != 1 or not isinstance(first.args[2], int):
            return None
        starts = [n.args[2] for n in nodes]
        source = self._whole([n.args[0] for n in nodes]) if len(set(starts)) > 1 else None
        if source is None:
            return None
        if op_name(first) != "select":
            ends = [n.args[3] for n in nodes if len(n.args) == 4]
            widths = {e - s * (op_name(first) == "slice") for s, e in zip(starts, ends, strict=False)}
            if len(ends) != len(nodes) or widths != {1}:
                raise Unliftable("a step reads more than one token", nodes[-1])
        return self._moved(nodes, source, int(first.args[1]), starts, op_name(first) == "select")

    def _unbound(self, nodes: Sequence[fx.Node]) -> Stacked | None:
        pieces = nodes[0].args[0]
        if any(n.args[0] is not pieces for n in nodes) or op_name(pieces) not in SPLITS or pieces in self.place:
            return None
        whole = pieces.args[0]
        at = pieces.args[1 if op_name(pieces) == "unbind" else 2 :]
        dim = int(at[0] if at else pieces.kwargs.get("dim", 0))
        values = pieces.meta["val"]
        if op_name(pieces) != "unbind" and any(v.shape[dim] != 1 for v in values):
            return None
        starts = [int(n.args[1]) % len(values) for n in nodes]
        return self._moved(nodes, self.draft.leaf(whole), dim, starts, op_name(pieces) == "unbind")

    def _whole(self, sources: Sequence[fx.Node]) -> fx.Node | None:
        """The tensor of which the steps take parts, if it is the same for all."""
        if len(set(sources)) == 1:
            return None if sources[0] in self.place else self.draft.leaf(sources[0])
        if not all(x in self.place for x in sources):
            return None
        found = self.of(sources)
        return None if found.moving else found.node

    def _moved(
        self, nodes: Sequence[fx.Node], source: fx.Node, dim: int, starts: Sequence[int], dropped: bool
    ) -> Stacked:
        """Rows of `source` along `dim` in the order of the steps, in front; their axis dropped or of one element."""
        value = tensor_of(source)
        assert value is not None
        rank = value.dim()
        dim %= rank
        extent = value.shape[dim]
        if min(starts) < 0:
            if not isinstance(extent, int):
                raise Unliftable("a step counts from the end of a length that is not known", nodes[0])
            starts = [s % extent for s in starts]
        stride = self._stride(nodes, starts)
        low, high = min(starts), max(starts) + 1
        if low or not isinstance(extent, int) or extent != high or abs(stride) > 1:
            source = self.draft.call(aten.slice.Tensor, source, dim, low, high, abs(stride))
        if stride < 0:
            source = self.draft.call(aten.flip.default, source, [dim])
        moved = self.draft.permuted(source, [dim, *(d for d in range(rank) if d != dim)])
        return Stacked(moved if dropped else self.draft.call(aten.unsqueeze.default, moved, dim + 1), True)

    def _stride(self, nodes: Sequence[fx.Node], starts: Sequence[int]) -> int:
        """From the token of one step to that of the next: negative where the loop runs backwards."""
        stride = starts[1] - starts[0]
        if stride == 0:
            raise Unliftable(f"two steps read token {starts[0]}, and others do not", nodes[1])
        for before, after, node in zip(starts, starts[1:], nodes[1:], strict=False):
            if after != before + stride:
                raise Unliftable(
                    f"a step reads token {after} after the one that reads token {before}, expected {before + stride}",
                    node,
                )
        return stride

    # Operators of the steps' own.

    def _operator(self, nodes: Sequence[fx.Node]) -> Stacked:
        node = nodes[-1]
        if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            raise Unliftable(f"a step draws random numbers ({op_name(node)}), which no draw for all repeats", node)
        arguments = [self._argument(nodes, [n.args[k] for n in nodes]) for k in range(len(node.args))]
        kwargs = {name: self._argument(nodes, [n.kwargs[name] for n in nodes]) for name in node.kwargs}
        flat = [x for x in _leaves((arguments, kwargs)) if isinstance(x, Stacked)]
        if not any(x.moving for x in flat):
            args, named = _plain(arguments), _plain(kwargs)
            return Stacked(self.draft.call(node.target, *args, **named), False)
        if isinstance(node.target, torch._ops.OpOverload) and any(a.alias_info is not None and a.alias_info.is_write
                                                                  for a in node.target._schema.arguments):
            raise Unliftable(f"a step writes in place ({op_name(node)})", node)
        rule = _RULES.get(op_name(node))
        if rule is None and isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
            rule = _pointwise
        if rule is None:
            raise Unliftable(f"{op_name(node) or node.op} of a step has no rule for all steps at once", node)
        return Stacked(rule(self.draft, node, arguments, kwargs), True)

    def _argument(self, nodes: Sequence[fx.Node], values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, fx.Node):
            if not all(isinstance(v, fx.Node) for v in values):
                raise Unliftable("a tensor at one step and a number at another", nodes[-1])
            if tensor_of(first) is None and op_name(first) not in SPLITS:
                raise Unliftable("a step reads a run-time number", nodes[-1])
            return self.of(values)
        if isinstance(first, list | tuple):
            return [self._argument(nodes, list(row)) for row in zip(*values, strict=True)]
        for step, value in enumerate(values):
            if value != first:
                raise Unliftable(f"step {step} uses the number {value}, the first one {first}", nodes[step])
        return first


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [x for v in tree.values() for x in _leaves(v)]
    if isinstance(tree, list | tuple):
        return [x for v in tree for x in _leaves(v)]
    return [tree]


def _plain(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _plain(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(v) for v in tree]
    return tree.node if isinstance(tree, Stacked) else tree


# One rule per kind of operator: the node of the draft for an operator with arguments of which some are stacked.

Rule = Callable[[Draft, fx.Node, list[Any], dict[str, Any]], fx.Node]


def rank_of(node: fx.Node) -> int:
    value = tensor_of(node)
    assert value is not None, node
    return value.dim()


def _pointwise(draft: Draft, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> fx.Node:
    rank = rank_of(node)

    def aligned(x: Any) -> Any:
        if isinstance(x, list):
            return [aligned(y) for y in x]
        if not isinstance(x, Stacked):
            return x
        here = x.node
        for _ in range(rank - (rank_of(here) - 1) if x.moving else 0):
            here = draft.call(aten.unsqueeze.default, here, 1)
        return here

    return draft.call(node.target, *map(aligned, args), **{k: aligned(v) for k, v in kwargs.items()})


def _same(draft: Draft, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> fx.Node:
    kept = {k: v for k, v in kwargs.items() if k == "dtype"}
    return draft.call(node.target, args[0].node, *args[1:], **kept)


def _behind(dim: int) -> int:
    return dim if dim < 0 else dim + 1


def _dims(*positions: int) -> Rule:
    """An operator whose arguments at `positions` are axes, or lists of them."""

    def rule(draft: Draft, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> fx.Node:
        moved = [x.node if isinstance(x, Stacked) else x for x in args]
        if any(p < len(args) and isinstance(args[p], Stacked) for p in positions) or len(args) <= positions[0]:
            raise Unliftable(f"{op_name(node)} over all axes of a step", node)
        for p in positions:
            if p < len(args):
                moved[p] = [_behind(d) for d in args[p]] if isinstance(args[p], list) else _behind(args[p])
        if len(args) > 1 and moved[positions[0]] == []:
            raise Unliftable(f"{op_name(node)} over all axes of a step", node)
        return draft.call(node.target, *moved, **{k: v for k, v in kwargs.items() if k != "memory_format"})

    return rule


def _permute(draft: Draft, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> fx.Node:
    rank = rank_of(node)
    return draft.permuted(args[0].node, [0, *(int(d) % rank + 1 for d in args[1])])


def _swapped(draft: Draft, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> fx.Node:
    return args[0].node if rank_of(node) < 2 else draft.call(aten.transpose.int, args[0].node, -1, -2)


def _shaped(draft: Draft, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> fx.Node:
    steps = draft.size(args[0].node, 0)
    return draft.call(aten.reshape.default, args[0].node, [steps, *args[1]])


def _expanded(draft: Draft, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> fx.Node:
    here = args[0].node
    value = tensor_of(node)
    assert value is not None
    for _ in range(value.dim() - (rank_of(here) - 1)):
        here = draft.call(aten.unsqueeze.default, here, 1)
    if op_name(node) == "expand_as":
        sizes = [d if isinstance(d, int) else -1 for d in value.shape]
    else:
        sizes = list(args[1])
    return draft.call(aten.expand.default, here, [-1, *sizes])


def _contracted(draft: Draft, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> fx.Node:
    found = contraction(node)
    if found is None:
        raise Unliftable(f"{op_name(node)} of this kind is not read", node)
    _, labels, out = found
    operands = args[1] if op_name(node) == "einsum" else args[:2]
    step = next(c for c in "zyxwvuts" if c not in "".join(labels))
    terms = [(step if x.moving else "") + t for x, t in zip(operands, labels, strict=True)]
    return draft.call(aten.einsum.default, f"{','.join(terms)}->{step}{out}", [x.node for x in operands])


def _joined(draft: Draft, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> fx.Node:
    if not all(isinstance(x, Stacked) and x.moving for x in args[0]):
        raise Unliftable("parts that move with the steps are joined with others that do not", node)
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return draft.call(node.target, [x.node for x in args[0]], _behind(dim))


def _split(draft: Draft, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> fx.Node:
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    return draft.call(node.target, args[0].node, args[1], _behind(dim))


def _item(draft: Draft, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> fx.Node:
    return draft.call(node.target, args[0].node, args[1])


def _normed(draft: Draft, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> fx.Node:
    """Operators over trailing axes: the step is one more axis in front."""
    return draft.call(node.target, *_plain(args), **_plain(kwargs))


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("to", "_to_copy", "clone", "contiguous", "alias", "detach", "float", "double"), _same),
    **dict.fromkeys(("unsqueeze", "select", "slice", "narrow", "unbind"), _dims(1)),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "softmax", "log_softmax", "cumsum", "norm"), _dims(1)),
    "squeeze": _dims(1),
    "linalg_vector_norm": _dims(2),
    "transpose": _dims(1, 2),
    "flatten": _dims(1, 2),
    "unflatten": _dims(1),
    "permute": _permute,
    **dict.fromkeys(("t", "mT"), _swapped),
    **dict.fromkeys(("view", "reshape", "_unsafe_view"), _shaped),
    **dict.fromkeys(("expand", "expand_as"), _expanded),
    **dict.fromkeys(("matmul", "bmm", "mm", "mv", "einsum", "__matmul__"), _contracted),
    **dict.fromkeys(("cat", "stack"), _joined),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    "getitem": _item,
    **dict.fromkeys(("layer_norm", "rms_norm", "linear"), _normed),
    **dict.fromkeys(("silu", "gelu", "relu", "softplus", "where", "masked_fill"), _pointwise),
}

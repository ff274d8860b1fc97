"""Index maps of view operators: which element of the source an element of the result is.

    through(node, index) -> (source, source_index)

One table serves masks (what is mask[b, h, i, j]?), heads (key head h // group behind expand and reshape) and layouts
(BSHD behind transpose), so a spelling of any of them is a row here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from attnc.expr import ONE, ZERO, Expr, add, const, floordiv, mod, mul, scale, sub, terms_of
from attnc.intervals import bounds
from attnc.passes.graph import integer, op_name, shape_of, tensor_of

Index = tuple[Expr, ...]


class Ranges:
    """Ranges of the index variables of one lift; simplifies quotients and remainders that they decide."""

    def __init__(self) -> None:
        self.box: dict[str, tuple[Any, Any]] = {}

    def declare(self, name: str, extent: Expr) -> None:
        if extent.is_const:
            self.box[name] = (0, max(int(extent.value) - 1, 0))

    def of(self, e: Expr) -> tuple[Any, Any] | None:
        return bounds(e, self.box)

    def floordiv(self, e: Expr, divisor: Expr) -> Expr:
        """`e // divisor`, each multiple of the divisor split off and what is left dropped where it is small."""
        quotient, rest = self._divide(e, divisor)
        if is_small(self.of(rest), divisor):
            return quotient
        return add(quotient, floordiv(rest, divisor))

    def mod(self, e: Expr, divisor: Expr) -> Expr:
        _, rest = self._divide(e, divisor)
        return rest if is_small(self.of(rest), divisor) else mod(rest, divisor)

    def _divide(self, e: Expr, divisor: Expr) -> tuple[Expr, Expr]:
        constant, terms = terms_of(e)
        quotient, rest = [ZERO], [const(constant)]
        for atom, coef in terms:
            if divisor.is_const and coef % divisor.value == 0:
                quotient.append(scale(atom, coef // divisor.value))
            elif atom.op == "mul" and divisor in atom.args and not divisor.is_const:
                others = list(atom.args)
                others.remove(divisor)
                left = ONE
                for other in others:
                    left = mul(left, other)
                quotient.append(scale(left, coef))
            else:
                rest.append(scale(atom, coef))
        return add(*quotient), join_heads(add(*rest))


def is_small(bound: tuple[Any, Any] | None, divisor: Expr) -> bool:
    return bound is not None and divisor.is_const and bound[0] >= 0 and bound[1] < divisor.value


def join_heads(e: Expr) -> Expr:
    """`c * (x // c) + x % c` is `x`."""
    constant, terms = terms_of(e)
    known = dict(terms)
    for atom, coef in terms:
        if atom.op == "mod" and atom.args[1].is_const:
            x, c = atom.args
            quotient = floordiv(x, c)
            if known.get(quotient) == coef * c.value:
                rest = [scale(a, k) for a, k in terms if a not in (atom, quotient)]
                return join_heads(add(const(constant), scale(x, coef), *rest))
    return e


def through(node: fx.Node, index: Index, ranges: Ranges) -> tuple[fx.Node, Index] | None:
    """The source of view `node` and the index there; None where `node` is no view."""
    rule, value = _VIEWS.get(op_name(node)), tensor_of(node)
    if rule is None or value is None:
        return None
    found = rule(node, index, ranges)
    if found is None or (source := tensor_of(found[0])) is None or source.dtype != value.dtype:
        return None
    return found


def is_view(node: fx.Node) -> bool:
    """Whether `node` is called as views are."""
    return op_name(node) in _VIEWS


def regroup(index: Index, outer: tuple[Expr, ...], inner: tuple[Expr, ...], ranges: Ranges) -> Index:
    """Index into shape `inner` of the element that `index` names in shape `outer`, same elements in the same order."""
    result: list[Expr] = []
    o, n = 0, 0
    while o < len(outer) or n < len(inner):
        o0, n0 = o, n
        left = outer[o] if o < len(outer) else ONE
        right = inner[n] if n < len(inner) else ONE
        o, n = min(o + 1, len(outer)), min(n + 1, len(inner))
        while left != right:
            if _grows(left, right, o, outer):
                left, o = mul(left, outer[o]), o + 1
            elif n < len(inner):
                right, n = mul(right, inner[n]), n + 1
            else:
                break
        result += _split(_flat(index[o0:o], outer[o0:o]), inner[n0:n], ranges)
    return tuple(result)


def _grows(left: Expr, right: Expr, o: int, outer: tuple[Expr, ...]) -> bool:
    if o >= len(outer):
        return False
    if left.is_const and right.is_const:
        return left.value < right.value
    # Symbolic products: take a factor on the side that lacks one that the other has.
    return len(_factors(left)) <= len(_factors(right)) and not set(_factors(left)) >= set(_factors(right))


def _factors(e: Expr) -> tuple[Expr, ...]:
    if e.op == "mul":
        return e.args
    constant, terms = terms_of(e)
    if constant == 0 and len(terms) == 1 and terms[0][1] != 1:
        return (const(terms[0][1]), *_factors(terms[0][0]))
    return (e,)


def _flat(index: Index, shape: tuple[Expr, ...]) -> Expr:
    offset = ZERO
    for position, extent in zip(index, shape, strict=True):
        offset = add(mul(offset, extent), position)
    return join_heads(offset)


def _split(offset: Expr, shape: tuple[Expr, ...], ranges: Ranges) -> list[Expr]:
    if not shape:
        return []
    parts: list[Expr] = []
    for extent in reversed(shape[1:]):
        parts.append(ranges.mod(offset, extent))
        offset = ranges.floordiv(offset, extent)
    return [join_heads(p) for p in (offset, *reversed(parts))]


# --------------------------------------------------------------------------------------------------------------------
# One rule per operator
# --------------------------------------------------------------------------------------------------------------------

Rule = Callable[[fx.Node, Index, Ranges], "tuple[fx.Node, Index] | None"]


def _arg(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _same(node: fx.Node, index: Index, ranges: Ranges):
    return _source(node), index


def _reshape(node: fx.Node, index: Index, ranges: Ranges):
    source = _source(node)
    return source, regroup(index, shape_of(node), shape_of(source), ranges)


def _permute(node: fx.Node, index: Index, ranges: Ranges):
    source = _source(node)
    rank = len(shape_of(source))
    dims = _arg(node, 1, "dims", None)
    order = [int(d) % rank for d in dims]
    inverse = [order.index(d) for d in range(rank)]
    return source, tuple(index[inverse[d]] for d in range(rank))


def _swap(first: int | None, second: int | None) -> Rule:
    def rule(node: fx.Node, index: Index, ranges: Ranges):
        rank = len(index)
        if rank < 2:
            return _source(node), index
        d0 = first if first is not None else int(_arg(node, 1, "dim0"))
        d1 = second if second is not None else int(_arg(node, 2, "dim1"))
        swapped = list(index)
        swapped[d0 % rank], swapped[d1 % rank] = swapped[d1 % rank], swapped[d0 % rank]
        return _source(node), tuple(swapped)

    return rule


def _unsqueeze(node: fx.Node, index: Index, ranges: Ranges):
    dim = int(_arg(node, 1, "dim")) % len(index)
    return _source(node), index[:dim] + index[dim + 1 :]


def _squeeze(node: fx.Node, index: Index, ranges: Ranges):
    source = _source(node)
    shape = shape_of(source)
    dims = _arg(node, 1, "dim", None)
    chosen = (
        range(len(shape))
        if dims is None
        else [int(d) % len(shape) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    )
    dropped = {d for d in chosen if shape[d] == ONE}
    left = iter(index)
    return source, tuple(ZERO if d in dropped else next(left) for d in range(len(shape)))


def _expand(node: fx.Node, index: Index, ranges: Ranges):
    source = _source(node)
    return source, broadcast_index(index, shape_of(source), shape_of(node))


def broadcast_index(index: Index, shape: tuple[Expr, ...], outer: tuple[Expr, ...]) -> Index:
    """Index into a tensor of `shape` that is broadcast to `outer`."""
    lead = len(index) - len(shape)
    return tuple(
        ZERO if extent == ONE and outer[lead + d] != ONE else index[lead + d]
        for d, extent in enumerate(shape)
    )


def _slice(node: fx.Node, index: Index, ranges: Ranges):
    source = _source(node)
    dim = int(_arg(node, 1, "dim", 0)) % len(index)
    start, step = _arg(node, 2, "start", None), _arg(node, 4, "step", 1)
    extent = shape_of(source)[dim]
    begin = ZERO if start is None else _from_end(integer(start), extent)
    if begin is None or not isinstance(step, int):
        return None
    at = add(scale(index[dim], step), begin)
    return source, index[:dim] + (at,) + index[dim + 1 :]


def _from_end(position: Expr, extent: Expr) -> Expr | None:
    if not position.is_const:
        constant, terms = terms_of(position)
        return position if constant >= 0 and all(coef > 0 for _, coef in terms) else None
    if position.value >= 0:
        return position if not extent.is_const else const(min(position.value, extent.value))
    return add(position, extent) if not extent.is_const else const(max(position.value + extent.value, 0))


def _narrow(node: fx.Node, index: Index, ranges: Ranges):
    dim = int(node.args[1]) % len(index)
    begin = integer(node.args[2])
    return _source(node), index[:dim] + (add(index[dim], begin),) + index[dim + 1 :]


def _select(node: fx.Node, index: Index, ranges: Ranges):
    source = _source(node)
    shape = shape_of(source)
    dim = int(node.args[1]) % len(shape)
    at = _from_end(integer(node.args[2]), shape[dim])
    return None if at is None else (source, index[:dim] + (at,) + index[dim:])


def _repeat_interleave(node: fx.Node, index: Index, ranges: Ranges):
    source = _source(node)
    repeats, dim = _arg(node, 1, "repeats"), _arg(node, 2, "dim", None)
    if not isinstance(repeats, int) or dim is None:
        return None
    d = int(dim) % len(index)
    return source, index[:d] + (ranges.floordiv(index[d], const(repeats)),) + index[d + 1 :]


def _repeat(node: fx.Node, index: Index, ranges: Ranges):
    source = _source(node)
    shape = shape_of(source)
    lead = len(index) - len(shape)
    if lead < 0:
        return None
    return source, tuple(ZERO if e == ONE else ranges.mod(index[lead + d], e) for d, e in enumerate(shape))


def _flip(node: fx.Node, index: Index, ranges: Ranges):
    source = _source(node)
    shape = shape_of(source)
    dims = {int(d) % len(shape) for d in _arg(node, 1, "dims")}
    return source, tuple(sub(sub(shape[d], ONE), x) if d in dims else x for d, x in enumerate(index))


def _item(node: fx.Node, index: Index, ranges: Ranges):
    """One piece of a split, chunk or unbind."""
    pieces, position = node.args
    if not isinstance(pieces, fx.Node) or not isinstance(position, int):
        return None
    name, source = op_name(pieces), pieces.args[0] if pieces.args else None
    values = pieces.meta.get("val")
    if not isinstance(source, fx.Node) or not isinstance(values, (list, tuple)):
        return None
    if name == "unbind":
        rank = len(shape_of(source))
        dim = int(_arg(pieces, 1, "dim", 0)) % rank
        return source, index[:dim] + (const(position % len(values)),) + index[dim:]
    if name not in ("split", "split_with_sizes", "chunk", "tensor_split"):
        return None
    dim = int(_arg(pieces, 2, "dim", 0)) % len(index)
    before = add(ZERO, *(integer(v.shape[dim]) for v in values[: position % len(values)]))
    return source, index[:dim] + (add(index[dim], before),) + index[dim + 1 :]


def _dropout(node: fx.Node, index: Index, ranges: Ranges):
    active = len(node.args) > 2 and node.args[2] and node.args[1] != 0
    return None if active else (_source(node), index)


_VIEWS: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "contiguous",
            "clone",
            "alias",
            "lift_fresh",
            "lift_fresh_copy",
            "positive",
            "resolve_conj",
            "resolve_neg",
        ),
        _same,
    ),
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten", "ravel"),
        _reshape,
    ),
    "permute": _permute,
    "transpose": _swap(None, None),
    "swapaxes": _swap(None, None),
    "swapdims": _swap(None, None),
    "t": _swap(0, 1),
    "mT": _swap(-1, -2),
    "matrix_H": _swap(-1, -2),
    "mH": _swap(-1, -2),
    "adjoint": _swap(-1, -2),
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "expand_as": _expand,
    "broadcast_to": _expand,
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "repeat_interleave": _repeat_interleave,
    "repeat": _repeat,
    "tile": _repeat,
    "flip": _flip,
    "getitem": _item,
    "detach": _same,  # callers that need gradients stop before it, see GraphFacts.needs_grad
    "detach_": _same,
    "dropout": _dropout,
    "dropout_": _dropout,
}

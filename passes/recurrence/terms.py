"""What reads and updates a state, as sums of products: element (b, k, v) of a node in terms of elements of the state.

    S_t[b, k, v] = exp(g)[b] S[b, k, v] + key[b, k] value[b, v]          two terms of two and two factors
    o_t[b, v]    = sum_k query[b, k] S_t[b, k, v]                        one term, summed over k

Views, products of matrices, einsums and sums of broadcast products all give the same terms, so that what is done with
them knows none of these spellings. What is not linear in the state has no terms, and says at which node.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import fx

from attnc.expr import ONE, ZERO, Expr, var
from attnc.expr_text import spell
from attnc.passes.graph import Unliftable, op_name, shape_of, tensor_of
from attnc.passes.views import Index, Ranges, broadcast_index, through

ZEROS = ("zeros", "zeros_like", "new_zeros")
CASTS = ("to", "_to_copy", "type_as", "float", "double")
MOST = 64  # terms of one node; more are no step of a recurrence


class PartOfAxis(Unliftable):
    """A tensor of which only the leading part of an axis is used: its indices do not run over all of it."""


@dataclass(frozen=True)
class Factor:
    """An element of a tensor, or with `power` -1 its reciprocal."""

    node: fx.Node
    index: Index
    power: int = 1

    @property
    def labels(self) -> frozenset[str]:
        return frozenset().union(*(e.names() for e in self.index))

    def renamed(self, names: dict[Expr, Expr]) -> Factor:
        return Factor(self.node, tuple(names.get(e, e) for e in self.index), self.power)


@dataclass(frozen=True)
class Term:
    """coef times the factors, summed over some indices."""

    coef: float
    factors: tuple[Factor, ...] = ()
    summed: frozenset[str] = frozenset()

    def of(self, nodes: Collection[fx.Node]) -> list[Factor]:
        return [f for f in self.factors if f.node in nodes]

    def without(self, *left: Factor) -> tuple[Factor, ...]:
        return tuple(f for f in self.factors if f not in left)


class Terms:
    """Expands nodes into terms.

    inside: the nodes that are looked into; all others are factors. states: factors although they are inside.
    uncut:  tells of a `detach` whether nothing is lost by looking through it.
    """

    def __init__(
        self,
        inside: Collection[fx.Node],
        states: Collection[fx.Node] = (),
        uncut: Callable[[fx.Node], bool] = lambda node: False,
    ) -> None:
        self.inside, self.states, self.uncut = inside, states, uncut
        self.ranges = Ranges()
        self.extents: dict[str, Expr] = {}
        self._count = 0

    def fresh(self, prefix: str, extent: Expr) -> Expr:
        """A new index that runs over `extent` elements."""
        self._count += 1
        name = f"{prefix}{self._count}"
        self.extents[name] = extent
        self.ranges.declare(name, extent)
        return var(name)

    def indices(self, node: fx.Node, prefix: str) -> Index:
        """A new index for each axis of `node`; 0 for axes of one element."""
        return tuple(ZERO if s == ONE else self.fresh(prefix, s) for s in shape_of(node))

    def of(self, node: Any, index: Index) -> list[Term]:
        """The terms of element `index` of `node`, which may also be a Python number.

        Raises: Unliftable at a node that is not linear.
        """
        if not isinstance(node, fx.Node):
            if isinstance(node, int | float) and not isinstance(node, bool):
                return [Term(float(node))] if node else []
            raise Unliftable(f"an operand is a {type(node).__name__}", next(iter(self.inside)))
        if node in self.states or node not in self.inside:
            return self._factor(node, index)
        if op_name(node).startswith("detach") and not self.uncut(node):
            raise Unliftable("a gradient is cut", node)
        view = through(node, index, self.ranges)
        if view is not None:
            return self.of(*view)
        rule = _RULES.get(op_name(node))
        if rule is None:
            raise Unliftable(f"{op_name(node) or node.op} is not linear in what the steps carry", node)
        found = rule(self, node, index)
        if len(found) > MOST:
            raise Unliftable(f"a sum of more than {MOST} products", node)
        return found

    def operand(self, node: fx.Node, argument: Any, index: Index) -> list[Term]:
        """An argument that is broadcast to the shape of `node`."""
        if not isinstance(argument, fx.Node):
            return self.of(argument, ())
        return self.of(argument, broadcast_index(index, shape_of(argument), shape_of(node)))

    def _factor(self, node: fx.Node, index: Index) -> list[Term]:
        if op_name(node) in ZEROS:
            return []
        if tensor_of(node) is None:
            raise Unliftable("a run-time number is no tensor", node)
        at = tuple(ZERO if s == ONE else e for s, e in zip(shape_of(node), index, strict=True))
        whole_axes(node, at, self.extents)
        return [Term(1.0, (Factor(node, at),))]


def whole_axes(node: fx.Node, index: Index, extents: Mapping[str, Expr]) -> None:
    """Raises: PartOfAxis where a plain index runs over another number of elements than its axis of `node` has."""
    for d, (e, size) in enumerate(zip(index, shape_of(node), strict=True)):
        used = extents.get(e.args[0]) if e.op == "var" else None
        if used is not None and used != size:
            counts = f"{spell(used)} elements of axis {d} are used, of which {node.name} has {spell(size)}"
            raise PartOfAxis(counts, node)


def times(*groups: Sequence[Term]) -> list[Term]:
    """The product of sums of terms."""
    found = []
    for parts in product(*groups):
        coef = 1.0
        factors: tuple[Factor, ...] = ()
        summed: frozenset[str] = frozenset()
        for part in parts:
            coef, factors, summed = coef * part.coef, factors + part.factors, summed | part.summed
        found.append(Term(coef, factors, summed))
    return found


def scaled(terms: Sequence[Term], factor: float) -> list[Term]:
    return [Term(t.coef * factor, t.factors, t.summed) for t in terms]


Rule = Callable[[Terms, fx.Node, Index], list[Term]]


def _add(sign: float) -> Rule:
    def rule(terms: Terms, node: fx.Node, index: Index) -> list[Term]:
        first, second = (terms.operand(node, x, index) for x in node.args[:2])
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        if not isinstance(alpha, int | float):
            raise Unliftable("alpha is no number", node)
        if op_name(node) == "rsub":
            first, second = second, first
        return [*first, *scaled(second, sign * alpha)]

    return rule


def _mul(terms: Terms, node: fx.Node, index: Index) -> list[Term]:
    return times(*(terms.operand(node, x, index) for x in node.args[:2]))


def _div(terms: Terms, node: fx.Node, index: Index) -> list[Term]:
    if node.kwargs.get("rounding_mode") is not None:
        raise Unliftable("a rounded quotient", node)
    above, below = (terms.operand(node, x, index) for x in node.args[:2])
    if len(below) != 1 or below[0].summed or below[0].of(terms.states):
        raise Unliftable("divided by what the steps carry, or by a sum", node)
    (only,) = below
    inverse = tuple(Factor(f.node, f.index, -f.power) for f in only.factors)
    return times(above, [Term(1.0 / only.coef, inverse)])


def _neg(terms: Terms, node: fx.Node, index: Index) -> list[Term]:
    return scaled(terms.of(node.args[0], index), -1.0)


def _cast(terms: Terms, node: fx.Node, index: Index) -> list[Term]:
    to, source = tensor_of(node), tensor_of(node.args[0])
    if to is None or source is None or torch.promote_types(to.dtype, source.dtype) != to.dtype:
        raise Unliftable("rounded to a narrower type", node)
    return terms.of(node.args[0], index)


def _sum(terms: Terms, node: fx.Node, index: Index) -> list[Term]:
    source = shape_of(node.args[0])
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if not source or dims is None or dims == []:
        raise Unliftable("a sum over all axes", node)
    axes = {int(d) % len(source) for d in ([dims] if isinstance(dims, int) else dims)}
    kept = len(index) == len(source)
    rest, at = iter(index), []
    names: set[str] = set()
    for d, extent in enumerate(source):
        if d not in axes:
            at.append(next(rest))
            continue
        if kept:
            next(rest)
        at.append(ZERO if extent == ONE else terms.fresh("c", extent))
        names |= at[-1].names()
    return [Term(t.coef, t.factors, t.summed | names) for t in terms.of(node.args[0], tuple(at))]


def _contract(terms: Terms, node: fx.Node, index: Index) -> list[Term]:
    found = contraction(node)
    if found is None:
        raise Unliftable(f"{op_name(node)} of this kind is not read", node)
    operands, labels, out = found
    at: dict[str, Expr] = dict(zip(out, index, strict=True))
    summed: set[str] = set()
    for operand, mine in zip(operands, labels, strict=True):
        for label, extent in zip(mine, shape_of(operand), strict=True):
            if label not in out and (label not in at or at[label] == ZERO):
                at[label] = ZERO if extent == ONE else terms.fresh("c", extent)
                summed |= at[label].names()
    groups = []
    for operand, mine in zip(operands, labels, strict=True):
        here = tuple(ZERO if s == ONE else at[x] for x, s in zip(mine, shape_of(operand), strict=True))
        groups.append(terms.of(operand, here))
    return [Term(t.coef, t.factors, t.summed | summed) for t in times(*groups)]


def contraction(node: fx.Node) -> tuple[list[fx.Node], list[str], str] | None:
    """A product of matrices or an einsum as its operands, the labels of their axes and those of the result."""
    if op_name(node) == "einsum":
        operands = list(node.args[1])
        if "->" not in node.args[0]:
            return None
        inputs, out = node.args[0].replace(" ", "").split("->")
        labels = inputs.split(",")
        hidden = [len(shape_of(x)) - len(t.replace("...", "")) for t, x in zip(labels, operands, strict=True)]
        spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in inputs]
        most = max((h for h, t in zip(hidden, labels, strict=True) if "..." in t), default=0)
        labels = [t.replace("...", "".join(spare[most - h : most])) for t, h in zip(labels, hidden, strict=True)]
        out = out.replace("...", "".join(spare[:most]))
        return (operands, labels, out) if all(len(set(t)) == len(t) for t in (*labels, out)) else None
    if op_name(node) not in ("matmul", "bmm", "mm", "mv", "__matmul__"):
        return None
    left, right = node.args[:2]
    nl, nr = len(shape_of(left)), len(shape_of(right))
    most = max(nl, nr) - 2
    batch = "ABCDEFGHIJ"[: max(most, 0)]
    mine = batch[len(batch) - (nl - 2) :] + "ik" if nl > 1 else "k"
    other = batch[len(batch) - (nr - 2) :] + "kj" if nr > 1 else "k"
    return [left, right], [mine, other], batch + ("i" if nl > 1 else "") + ("j" if nr > 1 else "")


def _added_product(terms: Terms, node: fx.Node, index: Index) -> list[Term]:
    """addcmul, baddbmm, addmm: what is added to a product."""
    base, left, right = node.args[:3]
    if op_name(node) == "addcmul":
        both = times(terms.operand(node, left, index), terms.operand(node, right, index))
        return [*terms.operand(node, base, index), *scaled(both, float(node.kwargs.get("value", 1)))]
    inner = shape_of(left)[-1]
    c = ZERO if inner == ONE else terms.fresh("c", inner)
    both = times(
        terms.of(left, (*index[:-1], c)), terms.of(right, (*index[:-2], c, index[-1]))
    )
    names = c.names()
    both = [Term(t.coef * float(node.kwargs.get("alpha", 1)), t.factors, t.summed | names) for t in both]
    return [*scaled(terms.operand(node, base, index), float(node.kwargs.get("beta", 1))), *both]


def _outer(terms: Terms, node: fx.Node, index: Index) -> list[Term]:
    return times(terms.of(node.args[0], index[:1]), terms.of(node.args[1], index[1:]))


def _lerp(terms: Terms, node: fx.Node, index: Index) -> list[Term]:
    """a + w (b - a)."""
    a, b, w = (terms.operand(node, x, index) for x in node.args[:3])
    return [*a, *times(w, b), *scaled(times(w, a), -1.0)]


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("add", "__add__"), _add(1.0)),
    **dict.fromkeys(("sub", "rsub", "subtract"), _add(-1.0)),
    **dict.fromkeys(("mul", "multiply"), _mul),
    **dict.fromkeys(("div", "divide", "true_divide"), _div),
    "neg": _neg,
    **dict.fromkeys(CASTS, _cast),
    "sum": _sum,
    **dict.fromkeys(("matmul", "bmm", "mm", "mv", "einsum", "__matmul__"), _contract),
    **dict.fromkeys(("addcmul", "baddbmm", "addmm"), _added_product),
    **dict.fromkeys(("outer", "ger"), _outer),
    "lerp": _lerp,
}

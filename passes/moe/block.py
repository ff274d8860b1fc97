"""One block: the terms of its output, checked to be one sum over every chosen expert of every token.

Each term must meet one token in its data, its routing weight and its output, and the terms together every (token, slot)
pair, or every expert, exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from attnc.expr import ONE, Expr, add, const, mul, var
from attnc.passes.graph import Unliftable, hint, op_name, shape_of, tensor_of
from attnc.passes.moe.combine import Sums
from attnc.passes.moe.data import ROW, SELECTIONS, data_of, origin
from attnc.passes.moe.norms import normed
from attnc.passes.moe.outcome import Wanted
from attnc.passes.moe.products import contraction, is_weight
from attnc.passes.moe.rows import Element, flat, order_of
from attnc.passes.moe.summand import Summand, Unit


@dataclass
class Block:
    """A block's output and terms.

    x: the node that tokens come from. experts: the units of the routed experts, one for all or one each.
    shared: terms that every token passes. identity: terms that are the input itself.
    dispatch: how tokens reach the experts, in a word.
    latent: the weights around the experts that all of them share.
    """

    out: fx.Node
    tokens: int
    x: fx.Node
    experts: list[Unit]
    routed: list[Summand]
    count: int
    dispatch: str
    wanted: Wanted
    weight_at: str
    scale: float
    shared: list[Summand] = field(default_factory=list)
    identity: list[Summand] = field(default_factory=list)
    latent: tuple[fx.Node, ...] = ()


def down_projection(x: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(weight, its data) where `x` is a product with one weight, or a norm of it."""
    for _ in range(2):
        dot = contraction(x)
        if dot is not None:
            found = is_weight(dot.right) and dot.offsets is None and dot.bias is None
            return (origin(dot.right), origin(dot.left)) if found else None
        norm = normed(x)
        if norm is None and op_name(x) == "mul":
            norm = next((n for a in x.all_input_nodes if (n := normed(origin(a))) is not None), None)
        if norm is None:
            return None
        x = origin(norm[1])
    return None


def block_of(sums: Sums, out: fx.Node) -> Block | None:
    """The block whose output is `out`; None where the sum is not complete. Raises: Unliftable."""
    shape = shape_of(out)
    index = tuple(sums.out(d, extent) for d, extent in enumerate(shape[:-1])) + (sums.col,)
    summands = sums.of(out, index)
    token = flat(index[:-1], shape[:-1])
    return _Checker(sums, out, token).block(summands)


class _Checker:
    def __init__(self, sums: Sums, out: fx.Node, token: Expr) -> None:
        self.sums, self.rows, self.out, self.token = sums, sums.rows, out, token
        value = tensor_of(out)
        assert value is not None
        self.tokens = 1
        for s in value.shape[:-1]:
            self.tokens *= hint(s)

    def block(self, summands: list[Summand]) -> Block | None:
        fed = [s for s in summands if s.unit is not None]
        identity = [s for s in summands if s.unit is None]
        chosen = [s for s in fed if isinstance(s.unit.second.expert, Element)]  # type: ignore[union-attr]
        every = [s for s in fed if isinstance(s.unit.second.expert, Expr) and s.unit.second.expert.names()]  # type: ignore[union-attr]
        if len(chosen) == 1:
            return self._slots(chosen[0], [s for s in fed if s is not chosen[0]], identity)
        if len(every) == 1 and not chosen:
            return self._axis(every[0], [s for s in fed if s is not every[0]], identity)
        if chosen or every:
            raise Unliftable("several routed terms stand in one sum", self.out)
        return self._loop(fed, identity)

    # Experts by ids.

    def _slots(self, term: Summand, others: list[Summand], identity: list[Summand]) -> Block | None:
        unit = term.unit
        assert unit is not None and isinstance(unit.second.expert, Element)
        ids = unit.second.expert
        slots, pair, token = self._pair(ids)
        data = data_of(self.rows, unit, token)
        x, inside = data.x, data.factors
        self._same_expert(unit, ids)
        if x.lead != token:
            raise Unliftable("an expert's data belong to another token than its id", unit.hidden.firsts[0].node)
        if not self._covers(term, pair, token, slots):
            return None
        settled = [self._weight(f, pair, token, slots) for f in (*term.factors, *unit.hidden.factors, *inside)]
        at = "input" if inside else "inner" if unit.hidden.factors else "output"
        wanted = Wanted(ids.node, tuple(e.node for e in settled))
        count = self._experts(unit)
        dispatch = "grouped_mm" if unit.second.grouped else "batched_mm"
        block = Block(self.out, self.tokens, origin(x.node), [unit], [term], count, dispatch, wanted, at, term.scale)
        return self._with_others(block, others, identity)

    def _pair(self, ids: Element) -> tuple[int, Expr, Expr]:
        """(slots, position of the pair, its token) of an element of the expert ids."""
        value = tensor_of(ids.node)
        assert value is not None
        total = 1
        for s in value.shape:
            total *= hint(s)
        slots = max(1, total // self.tokens)
        if slots * self.tokens != total:
            raise Unliftable("the expert ids are not a number of slots for each token", ids.node)
        if value.dim() > 1 and hint(value.shape[-1]) == slots:
            return slots, ids.flat, ids.lead
        return slots, ids.flat, self.rows.ranges.floordiv(ids.flat, const(slots))

    def _same_expert(self, unit: Unit, ids: Element) -> None:
        for first in unit.hidden.firsts:
            if first.expert != ids:
                raise Unliftable("the products of an expert have weights of different experts", first.node)

    def _covers(self, term: Summand, pair: Expr, token: Expr, slots: int) -> bool:
        """Whether the term runs over every slot of the output's token once."""
        if term.scatter is not None:
            if term.over:
                return False
            s = term.scatter
            by = self.rows.loaded(pair)
            whole = pair == s.row or (by is not None and order_of(by) is not None and pair.args[1] == s.row)
            return s.key == token and s.target == self.token and whole
        if slots == 1 and not term.over:
            return token == self.token
        if len(term.over) != 1:
            return False
        slot, extent = term.over[0]
        return extent == const(slots) and pair == add(mul(self.token, const(slots)), slot)

    def _weight(self, factor: Element, pair: Expr, token: Expr, slots: int) -> Element:
        """The tensor that holds the factor, one number for each pair or each token."""

        def fits(at: Element) -> bool:
            value = tensor_of(at.node)
            assert value is not None
            total = 1
            for s in value.shape:
                total *= hint(s)
            return (total == self.tokens * slots and at.flat == pair) or (total == self.tokens and at.flat == token)

        at = self.rows.settle(factor.node, factor.index, fits)
        if not fits(at):
            raise Unliftable("a factor of the experts belongs to another token or slot than they do", factor.node)
        return at

    # Experts along an axis.

    def _axis(self, term: Summand, others: list[Summand], identity: list[Summand]) -> Block | None:
        unit = term.unit
        assert unit is not None and isinstance(unit.second.expert, Expr)
        expert = unit.second.expert
        if any(first.expert != expert for first in unit.hidden.firsts):
            raise Unliftable("the products of an expert have weights of different experts", unit.second.node)
        data = data_of(self.rows, unit, self.token)
        x, inside = data.x, data.factors
        count = self._experts(unit)
        if data.mask is not None:
            block = self._by_capacity(term, x, data.mask, count)
            return None if block is None else self._with_others(block, others, identity)
        if x.lead != self.token:
            raise Unliftable("an expert's data belong to another token than its output", unit.hidden.firsts[0].node)
        if term.scatter is not None or len(term.over) != 1 or term.over[0] != (expert, const(count)):
            return None
        pair = add(mul(self.token, const(count)), expert)
        settled = [self._weight(f, pair, self.token, count) for f in (*term.factors, *unit.hidden.factors, *inside)]
        if not settled:
            raise Unliftable("all experts count alike: there is no router", unit.second.node)
        at = "input" if inside else "inner" if unit.hidden.factors else "output"
        wanted = Wanted(None, tuple(e.node for e in settled))
        x_node = origin(x.node)
        block = Block(self.out, self.tokens, x_node, [unit], [term], count, "every expert", wanted, at, term.scale)
        return self._with_others(block, others, identity)

    def _by_capacity(self, term: Summand, x: Element, mask: Element, count: int) -> Block | None:
        """Rows of experts, so many for each, filled and emptied by products with masks (token, expert, row)."""
        unit = term.unit
        assert unit is not None and isinstance(unit.second.expert, Expr)
        expert = unit.second.expert
        if len(term.factors) != 1 or unit.hidden.factors or len(term.over) not in (1, 2):
            raise Unliftable("rows of experts are combined by more than one mask", unit.second.node)
        weights = self.rows.settle(term.factors[0].node, term.factors[0].index)
        row = next((e for e in mask.index if not e.names() & {ROW, *expert.names()}), None)
        if row is None or len(shape_of(weights.node)) != 3 or weights.index != (self.token, expert, row):
            raise Unliftable("rows of experts are not combined as they were filled", term.factors[0].node)
        rows = shape_of(weights.node)[2]
        whole = x.lead == var(ROW) and shape_of(weights.node)[1] == const(count)
        if mask.index != (var(ROW), expert, row) or not whole or not rows.is_const:
            raise Unliftable("rows of experts are filled from other tokens than they are combined to", mask.node)
        if {e.args[0] for e, _ in term.over} != {*expert.names(), *row.names()}:
            return None
        wanted = Wanted(None, (weights.node,), rows=int(rows.value), mask=mask.node)
        how = "one-hot products"
        return Block(self.out, self.tokens, origin(x.node), [unit], [term], count, how, wanted, "output", term.scale)

    # Experts one by one.

    def _loop(self, terms: list[Summand], identity: list[Summand]) -> Block | None:
        own = [s for s in terms if s.scatter is not None or any(not self._is_gate(f) for f in s.factors)]
        own.sort(key=lambda s: self.rows.facts.order[s.unit.second.node])  # type: ignore[union-attr]
        if len(own) < 2:
            return None
        columns, sources = [], set()
        for number, s in enumerate(own):
            found = self._one_of_loop(s)
            if found is None or (s.scatter is not None and s.scatter.target != self.token):
                return None
            columns.append((number, found[0], None if s.scatter is None else s.scatter.keys))
            sources.add(found[1])
        if len(sources) > 1:
            return None
        units = [s.unit for s in own if s.unit is not None]
        at = "inner" if own[0].unit.hidden.factors else "output" if own[0].factors else "input"  # type: ignore[union-attr]
        wanted = Wanted(None, (), tuple(columns))
        block = Block(self.out, self.tokens, sources.pop(), units, own, len(own), "loop", wanted, at, own[0].scale)
        chosen = set(map(id, own))
        return self._with_others(block, [s for s in terms if id(s) not in chosen], identity)

    def _one_of_loop(self, s: Summand) -> tuple[tuple[tuple[fx.Node, int | None], ...], fx.Node] | None:
        """(weights, input) of an expert with a feed-forward of its own; kept, as sums grow one expert at a time."""
        assert s.unit is not None
        key = (s.unit.second.node, s.factors, s.scatter, s.over, self.token)
        if key not in self.sums.seen:
            row = self.token if s.scatter is None else s.scatter.row
            token = self.token if s.scatter is None else s.scatter.key
            data = data_of(self.rows, s.unit, token)
            x, inside = data.x, data.factors
            factors = tuple(self._column(f, row) for f in (*s.factors, *s.unit.hidden.factors, *inside))
            fits = x.lead == token and not s.over and bool(factors)
            self.sums.seen[key] = (factors, origin(x.node)) if fits else None
        return self.sums.seen[key]

    def _column(self, factor: Element, row: Expr) -> tuple[fx.Node, int | None]:
        """(tensor, its column) that holds one number for each row."""
        if factor.flat == row:
            return factor.node, None
        at = self.rows.settle(factor.node, factor.index)
        if at.lead != row or not at.index[-1].is_const:
            raise Unliftable("a factor of an expert belongs to another token than it does", factor.node)
        return at.node, int(at.index[-1].value)

    def _is_gate(self, factor: Element) -> bool:
        """Whether a factor is a function of one product with a single output."""
        node = origin(factor.node)
        while contraction(node) is None and len(node.all_input_nodes) == 1 and op_name(node) not in SELECTIONS:
            node = origin(node.all_input_nodes[0])
        return contraction(node) is not None and shape_of(node)[-1] == ONE

    # Around the experts.

    def _experts(self, unit: Unit) -> int:
        """How many experts the weights are of."""
        counts = {product.count for product in (unit.second, *unit.hidden.firsts)}
        if len(counts) != 1 or 0 in counts:
            raise Unliftable("the products of an expert have weights of different numbers of experts", unit.second.node)
        return counts.pop()

    def _with_others(self, block: Block, others: Sequence[Summand], identity: Sequence[Summand]) -> Block | None:
        for s in others:
            assert s.unit is not None
            data = data_of(self.rows, s.unit, self.token)
            x, inside = data.x, data.factors
            changed = s.scatter is not None or s.gained or s.latent is not None
            if x.lead != self.token or data.mask is not None or inside or changed:
                raise Unliftable("a term of the sum is no expert and reads other tokens", s.unit.second.node)
        if any(not s.factors for s in identity):
            raise Unliftable("the block's input is added to the sum as it is", self.out)
        if any(s.gained for s in block.routed):
            raise Unliftable("the channels of an expert's output are multiplied by a parameter", self.out)
        block.shared, block.identity = list(others), list(identity)
        return self._through_latent(block)

    def _through_latent(self, block: Block) -> Block:
        """The block with the projections around its experts, where there are both."""
        outer = {s.latent.weight.node for s in block.routed if s.latent is not None}
        inner = down_projection(block.x)
        if not outer:
            return block
        if len(outer) > 1 or inner is None or any(s.latent is None for s in block.routed):
            raise Unliftable("a projection follows the experts, and none precedes them", self.out)
        block.x = inner[1]
        block.latent = (inner[0], *outer)
        return block

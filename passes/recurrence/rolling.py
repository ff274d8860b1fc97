"""The operator for the steps of a loop, with what they compute before and after it, for all steps at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from attnc.expr import ONE, ZERO, Expr, var
from attnc.passes.graph import GraphFacts, Unliftable, op_name, shape_of, tensor_of
from attnc.passes.recurrence.emit import Draft
from attnc.passes.recurrence.mixer import TIME, Emitted, Mixer, arranged, emit
from attnc.passes.recurrence.reading import Reading, Steps
from attnc.passes.recurrence.roles import Read, Update, mixer_of, read_of
from attnc.passes.recurrence.stacking import Stacked, Stacker
from attnc.passes.recurrence.terms import Factor, PartOfAxis, Term

aten = torch.ops.aten


class Rolling:
    """Draws up the replacement of the steps, for the places that are asked for."""

    def __init__(self, facts: GraphFacts, steps: Steps, draft: Draft, stacker: Stacker) -> None:
        self.facts, self.steps, self.draft, self.stacker = facts, steps, draft, stacker
        self.reading = Reading(steps)
        self.block = steps.blocks[-1]
        self.place = {node: k for k, node in enumerate(self.block)}
        self.updates = self.reading.updates()
        self.final: dict[int, tuple[Emitted, Update]] = {}
        self.emitted: list[Emitted] = []

    def roll(self, wanted: Sequence[int]) -> None:
        """Stack what stands at the places `wanted` and is read from states."""
        for place in sorted(wanted):
            self._stack(self.block[place])

    def _stack(self, node: fx.Node) -> None:
        """Make `node` known to the stacker, reads of states behind it first."""
        place = self.place.get(node)
        if place is None or place in self.stacker.known or node not in self.reading.dependent:
            return
        if self._read(node, place):
            return
        if node in self.reading.carrying:
            raise Unliftable("a part of the state's update is used for something else", node)
        for x in node.all_input_nodes:
            if x in self.reading.entries:
                raise Unliftable("the state before a step is used as a whole", node)
            self._stack(x)

    def _read(self, node: fx.Node, place: int) -> bool:
        """Stack `node` if it is a read of states; False if it is computed from reads."""
        states = [*self.reading.entries, *self.reading.next]
        try:
            index, found = self.reading.terms(node, states, "r")
            held = [t for t in found if t.of(states)]
            whole = len(held) == 1 and len(found) == 1 and found[0].coef == 1.0 and len(found[0].factors) == 1
            if not held or (not whole and not all(t.summed for t in held)):
                return False
            if self._deeper(node, states):
                return False
            reads = [read_of(t, states, node) for t in held]
        except PartOfAxis:
            raise
        except Unliftable:
            return False
        self._emit(node, place, index, reads, [t for t in found if not t.of(states)])
        return True

    def _deeper(self, node: fx.Node, states: Sequence[fx.Node]) -> bool:
        """Whether an input of `node` is a read already: then `node` is computed from that."""
        if op_name(node) in ("add", "sub", "mul", "div", "neg", "rsub"):
            for x in node.all_input_nodes:
                if x in self.reading.dependent and x not in states:
                    try:
                        _, found = self.reading.terms(x, states, "q")
                    except Unliftable:
                        return True
                    held = [t for t in found if t.of(states)]
                    if held and all(t.summed for t in held):
                        return True
        return False

    def _emit(
        self, node: fx.Node, place: int, index: Sequence[Expr], reads: Sequence[Read], rest: Sequence[Term]
    ) -> None:
        """Put the operator in the draft and its results, plus what has no state in it, where `node` stands."""
        if len(reads) != 1:
            raise Unliftable(f"the state is read in {len(reads)} ways at once, expected one", node)
        (read,) = reads
        owner = next(p for p, own in self.steps.states.items() if read.state.node in (own, self.block[p]))
        value = tensor_of(node)
        assert value is not None
        mixer, renames = mixer_of(self.updates[owner], read, tensor_of(self.block[owner]).dtype)  # type: ignore[union-attr]
        mixer.before = read.state.node is self.steps.states[owner]
        if mixer.before and mixer.delta:
            raise Unliftable("a delta rule whose state is read before the update", node)
        mixer = self._placed(mixer, owner)
        made = emit(self.draft, mixer, self.facts)
        wanted = [TIME, *(renames.get(e, e).args[0] if e != ZERO else None for e in index)]
        out = arranged(self.draft, made.out, made.labels, wanted)
        if rest:
            out = self.draft.call(aten.add.Tensor, out, self._without_state(node, index, rest))
        self.stacker.known[place] = Stacked(self.draft.cast(out, value.dtype), True)
        self.emitted.append(made)
        self.final.setdefault(owner, (made, self.updates[owner]))

    def _placed(self, mixer: Mixer, owner: int) -> Mixer:
        """The mixer over the draft, its operands stacked."""
        for name in ("query", "outputs", "keys", "values", "beta"):
            setattr(mixer, name, [self._factor(f) for f in getattr(mixer, name)])
        mixer.decay = [Term(t.coef, tuple(map(self._factor, t.factors)), t.summed) for t in mixer.decay]
        if mixer.low_rank is not None:
            a, b, coef = mixer.low_rank
            mixer.low_rank = [self._factor(f) for f in a], [self._factor(f) for f in b], coef
        first = self.steps.first[owner]
        if first is not None:
            at = tuple(ZERO if s == ONE else e for s, e in zip(shape_of(first), self.updates[owner].index, strict=True))
            mixer.initial = Factor(self.draft.leaf(first), at)
        mixer.length = self.steps.count
        return mixer

    def _factor(self, factor: Factor) -> Factor:
        node = factor.node
        stacked = self.stacker.at(self.place[node]) if node in self.place else self._outer(node)
        lead = (var(TIME),) if stacked.moving else ()
        return Factor(stacked.node, (*lead, *factor.index), factor.power)

    def _outer(self, node: fx.Node) -> Stacked:
        return self.stacker.of(self.steps.outer.get(node, [node] * len(self.steps.blocks)))

    def _without_state(self, node: fx.Node, index: Sequence[Expr], rest: Sequence[Term]) -> fx.Node:
        """What is added to a read and has no state in it, with the steps in front."""
        total: fx.Node | None = None
        wanted = [e.args[0] for e in index if e != ZERO]
        for term in rest:
            factors = [self._factor(f) for f in term.factors]
            order = [TIME, *wanted, *sorted(term.summed)]
            part = self.draft.product(factors, order)
            if part is None:
                raise Unliftable("a number is added to what is read", node)
            if term.summed:
                dims = list(range(len(order) - len(term.summed), len(order)))
                part = self.draft.call(aten.sum.dim_IntList, part, dims)
            part = part if term.coef == 1.0 else self.draft.call(aten.mul.Tensor, part, term.coef)
            total = part if total is None else self.draft.call(aten.add.Tensor, total, part)
        assert total is not None
        return arranged(
            self.draft, total, [TIME, *wanted], [TIME, *(e.args[0] if e != ZERO else None for e in index)]
        )

    def last_state(self, place: int) -> fx.Node:
        """The state after the last step, laid out as written."""
        if place not in self.final:
            mixer, _ = mixer_of(self.updates[place], None, tensor_of(self.block[place]).dtype)  # type: ignore[union-attr]
            made = emit(self.draft, self._placed(mixer, place), self.facts)
            self.emitted.append(made)
            self.final[place] = made, self.updates[place]
        made, update = self.final[place]
        state, labels = made.state, list(made.state_labels)
        known = {e.args[0] for e in update.index if e != ZERO}
        for position in reversed(range(len(labels))):  # axes that only the reads have: the state is the same along them
            if labels[position] not in known:
                state = self.draft.call(aten.select.int, state, position, 0)
                del labels[position]
        node = arranged(self.draft, state, labels, [e.args[0] if e != ZERO else None for e in update.index])
        return self.draft.cast(node, tensor_of(self.block[place]).dtype)  # type: ignore[union-attr]

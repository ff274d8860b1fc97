"""What a mixer written in chunks computes, asked of it: proposed from what its results depend on, proved by running it.

The gradient of one result says which elements of each input it reads, and so which axes are batch, heads, tokens, keys
and values; setting an input to zero says whether it is a factor or a decay; doubling the keys, whether the state is
corrected. That is one recurrence at most. It takes the place of what is written where both agree in float64 on inputs
of both signs and ragged sizes, with mild and with strong decays.

Source: Pnueli, Siegel, Singerman 1998, "Translation validation"; the algebra of `attnc.rule_recurrence`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from attnc.expr import ZERO, Expr, const, floordiv, var
from attnc.passes.graph import GraphFacts, NoMatch, Unliftable, tensor_of
from attnc.passes.recurrence.check import instance, widened
from attnc.passes.recurrence.chunks import Chunks, sizes
from attnc.passes.recurrence.emit import Draft
from attnc.passes.recurrence.mixer import TIME, Emitted, Mixer, arranged, emit
from attnc.passes.recurrence.rewriting import Rewriting, finished, misplaced
from attnc.passes.recurrence.terms import Factor, Term

aten = torch.ops.aten
T, CHANNEL = var(TIME), var("c")
# An axis is told by where it is read at two results: at its end (1) or at its start (0).
ENDS = ((1, 0), (0, 1), (1, 1), (0, 0))
NOTHING = 1e-10  # of the largest gradient: rounding in float64
EQUAL = 1e-8
AFFORDABLE = 1 << 26  # elements of all that is computed between the borders
LARGEST = 1e8
STRONG = 20.0


@dataclass
class Named:
    """The inputs by role, by position; axes of each, of the result and of the last state by name."""

    axes: list[tuple[Expr, ...]]
    out: tuple[Expr, ...]
    last: tuple[Expr, ...] | None
    value: str | None
    query: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    values: list[int] = field(default_factory=list)
    gates: list[int] = field(default_factory=list)
    decays: list[int] = field(default_factory=list)
    state: int | None = None
    delta: bool = False
    before: bool = False
    scale: float = 1.0
    logs: list[tuple[float, list[int]]] = field(default_factory=list)  # products of inputs that add up to the decay


def whole(facts: GraphFacts, chunks: Chunks) -> Rewriting | NoMatch:
    """The operator that computes what lies between the borders; why there is none."""
    try:
        return _Asked(facts, chunks).answer()
    except Unliftable as exc:
        return exc.no_match
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as exc:
        reason = f"its chunks cannot be run by themselves: {type(exc).__name__}: {str(exc).partition(chr(10))[0]}"
        return NoMatch(reason, chunks.out)


class _Asked:
    def __init__(self, facts: GraphFacts, chunks: Chunks) -> None:
        self.facts, self.chunks, self.node = facts, chunks, chunks.out
        self.leaves, self.outs = list(chunks.leaves), [chunks.out, *chunks.finals]
        values = [tensor_of(x) for x in self.leaves]
        if any(v is None or not v.is_floating_point() for v in values):
            raise Unliftable("it reads something that is no floating tensor", self.node)
        if len(chunks.finals) > 1:
            raise Unliftable("more of it than its results and its last state is read elsewhere", chunks.finals[0])
        work = sum(v.numel() for n in chunks.inside if (v := tensor_of(n)) is not None and v.is_floating_point())
        if not work <= AFFORDABLE:
            raise Unliftable(f"{work} numbers are computed in it, {AFFORDABLE} are affordable for its check", self.node)
        self.shapes = [sizes(x) for x in self.leaves]
        self.gm, self.places = instance(self.leaves, chunks.inside, self.outs)
        widened(self.gm)
        self.draw = torch.Generator().manual_seed(0)

    # Running it.

    def run(self, data: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(self.gm(*(x.clone() for x in data)))

    def small(self) -> list[Tensor]:
        """Numbers so small that nothing grows over the tokens."""
        by = self.chunks.length**-0.5
        return [by * torch.randn(s, generator=self.draw, dtype=torch.float64) for s in self.shapes]

    def points(self, which: int) -> Iterator[tuple[int, ...]]:
        """Two elements of a result, as `ENDS` says, at tokens of the last chunk and of one before."""
        shape, c = sizes(self.outs[which]), self.chunks
        time = c.time if which == 0 else ()
        for point, chunk in enumerate((-(-c.length // c.size) - 1, 1)):
            t = min(chunk * c.size + c.size // 2, c.length - 1)
            at, rank = [], 0
            for d, extent in enumerate(shape):
                if d in time:
                    at.append(t if len(time) == 1 else t // c.size if d == time[0] else t % c.size)
                elif extent == 1:
                    at.append(0)
                elif rank == len(ENDS):
                    raise Unliftable("its result has more axes than batch, heads, tokens and values", self.node)
                else:
                    at.append((extent - 1) * ENDS[rank][point])
                    rank += 1
            yield tuple(at)

    def read(self, which: int) -> list[list[list[list[int]]]]:
        """[point][input][axis] -> the positions that an element of a result depends on."""
        found = []
        with torch.enable_grad():
            data = [x.requires_grad_() for x in self.small()]
            result = self.gm(*(x * 1.0 for x in data))[which]
            for at in self.points(which):
                grads = torch.autograd.grad(result[at], data, retain_graph=True, allow_unused=True)
                found.append([self._support(g, s) for g, s in zip(grads, self.shapes, strict=True)])
        return found

    def _support(self, grad: Tensor | None, shape: Sequence[int]) -> list[list[int]]:
        if grad is None or not bool(torch.isfinite(grad).all()) or not bool(grad.abs().max() > 0):
            return [[] for _ in shape]
        there = grad.abs() > NOTHING * float(grad.abs().max())
        axes = range(there.dim())
        return [there.sum([a for a in axes if a != d]).nonzero().flatten().tolist() if len(axes) > 1
                else there.nonzero().flatten().tolist() for d in axes]  # fmt: skip

    # Naming axes.

    def axis(self, supports: Sequence[list[int]], extent: int, names: Sequence[tuple[Expr, int]]) -> Expr | None:
        """An axis of an input by what is read along it at two points; None where only a part of it is."""
        if extent == 1:
            return ZERO
        if all(len(s) == 1 for s in supports):
            ends = tuple(int(s[0] == extent - 1) for s in supports)
            for (name, size), own in zip(names, ENDS, strict=False):
                if own == ends and size % extent == 0:
                    return name if size == extent else floordiv(name, const(size // extent))
            return None
        return CHANNEL if all(len(s) == extent for s in supports) else None

    def names(self) -> Named:
        """Axes and roles. Raises: Unliftable where one of them has no name."""
        shape, time = sizes(self.node), self.chunks.time
        free = [(var(f"y{d}"), s) for d, s in enumerate(shape) if d not in time and s > 1]
        read = self.read(0)
        axes: list[tuple[Expr, ...]] = []
        for k, leaf in enumerate(self.leaves):
            found: list[Expr] = []
            for d, extent in enumerate(self.shapes[k]):
                if d == self.chunks.leaves[leaf]:
                    found.append(T)
                    continue
                at = self.axis([p[k][d] for p in read], extent, free)
                if at is None:
                    raise Unliftable(f"a result reads a part of axis {d}, which is no axis of a recurrence", leaf)
                found.append(at)
            axes.append(tuple(found))
        out = tuple(ZERO if s == 1 else T if d in time else var(f"y{d}") for d, s in enumerate(shape))
        named = Named(axes, out, None, None)
        named.value = self._value(named, [e.args[0] for e, _ in free])
        self._sides(named, read)
        return named

    def _value(self, named: Named, free: Sequence[str]) -> str | None:
        """The last axis of the results that nothing with keys varies over."""
        keyed = {x for at in named.axes if CHANNEL in at and T in at for e in at for x in e.names()}
        return next((x for x in reversed(free) if x not in keyed), None)

    def _sides(self, named: Named, read: list[list[list[list[int]]]]) -> None:
        """What stands on the side of queries and what is written, and of that what decays."""
        data, written = self.small(), []
        times = [self._token(at) for at in self.points(0)]
        for k, at in enumerate(named.axes):
            labels = {x for e in at for x in e.names()}
            if T not in at:
                if CHANNEL in at and named.value in labels:
                    named.state = k
                else:
                    written.append(k)
                continue
            spans = [p[k][at.index(T)] for p in read]
            if any(not s for s in spans):
                raise Unliftable("an input of which the results are independent", self.leaves[k])
            if any(s[-1] > t for s, t in zip(spans, times, strict=True)):
                raise Unliftable("a result depends on later tokens", self.leaves[k])
            if all(s == [t] for s, t in zip(spans, times, strict=True)):
                (named.query if CHANNEL in at else named.outputs).append(k)
                continue
            written.append(k)
            if named.value in labels:
                named.before = all(s[-1] == t - 1 for s, t in zip(spans, times, strict=True))
        if named.state is not None:
            data[named.state].zero_()
        base = self.run(data)[0]
        for k in written:
            labels = {x for e in named.axes[k] for x in e.names()}
            without = self.run([torch.zeros_like(x) if n == k else x for n, x in enumerate(data)])[0]
            if float(without.abs().max()) > NOTHING * float(base.abs().max()):
                named.decays.append(k)
            else:
                side = named.values if named.value in labels else named.gates
                (named.keys if CHANNEL in named.axes[k] else side).append(k)
        if not named.keys or not named.query or not named.values:
            raise Unliftable("its results are not queries times keys times values", self.node)
        twice = self.run([2 * x if n == named.keys[0] else x for n, x in enumerate(data)])[0]
        named.delta = not self._equal(twice, 2 * base)

    def _token(self, at: Sequence[int]) -> int:
        time = self.chunks.time
        return at[time[0]] if len(time) == 1 else at[time[0]] * self.chunks.size + at[time[1]]

    def last_state(self, named: Named) -> tuple[Expr, ...]:
        """The axes of the last state, by those of keys and values that its elements depend on."""
        shape, read = sizes(self.outs[1]), self.read(1)
        own = [(d, s) for d, s in enumerate(shape) if s > 1]
        found: list[Expr] = [ZERO] * len(shape)
        for k in (*named.keys, *named.values):
            for d, (e, extent) in enumerate(zip(named.axes[k], self.shapes[k], strict=True)):
                ends = tuple(int(p[k][d] == [extent - 1]) for p in read)
                alone = all(len(p[k][d]) == 1 for p in read)
                for (axis, size), pattern in zip(own, ENDS, strict=False):
                    if alone and extent > 1 and pattern == ends and size == extent and e.op == "var" and e != T:
                        found[axis] = e
        unnamed = [d for d, _ in own if found[d] == ZERO]
        if len(unnamed) == 1 and CHANNEL not in found:  # with a delta rule, keys are mixed
            found[unnamed[0]] = CHANNEL
        elif unnamed:
            raise Unliftable("what is read besides the results is not the last state", self.outs[1])
        return tuple(found)

    # The operator.

    def answer(self) -> Rewriting | NoMatch:
        named = self.names()
        if len(self.outs) > 1:
            named.last = self.last_state(named)
        data = self.small()
        want = self.run(data)[0]
        for logs in self._decays(named):
            trial = replace(named, logs=logs, scale=1.0)
            got = self.drawn(trial, wide=True)
            out = self._changed(got)(data)[0]
            norm = float((out * out).sum())
            scale = float((out * want).sum()) / norm if norm else 0.0
            if scale and self._equal(want, scale * out):
                trial.scale = 1.0 if abs(scale - 1) < EQUAL else float(f"{scale:.13g}")
                return self._proved(trial)
        return NoMatch("it differs from every recurrence of its inputs", self.node)

    def _decays(self, named: Named) -> Iterator[list[tuple[float, list[int]]]]:
        """What the logarithm of the decay may be made of: the inputs that decay, times a gate, or their sum."""
        if not named.decays:
            yield []
            return
        for sign in (1.0, -1.0):
            yield [(sign, named.decays)]
            for gate in named.gates:
                yield [(sign, [*named.decays, gate])]
            if len(named.decays) > 1:
                yield [(sign, [k]) for k in named.decays]

    def _proved(self, named: Named) -> Rewriting | NoMatch:
        """The rewriting, where it holds on ragged numbers."""
        changed = self._changed(self.drawn(named, wide=True))
        told = 0
        for data in self._ragged(named):
            want = self.run(data)
            if not all(bool(torch.isfinite(x).all()) and float(x.abs().max()) < LARGEST for x in want):
                continue
            told += 1
            if not all(self._equal(a, b) for a, b in zip(want, changed(data), strict=True)):
                return NoMatch("it is like a recurrence on some numbers and differs on others", self.node)
        if told < 2:
            return NoMatch("its results grow without bound on random inputs", self.node)
        found = self.drawn(named, wide=False)
        found.inside = self.chunks.inside
        wrong = misplaced(self.facts, found)
        return found if wrong is None else wrong

    def _ragged(self, named: Named) -> Iterator[list[Tensor]]:
        """Numbers of both signs and sizes from 1/30 to 3; decays around 1, below, and down to exp(-20) and zero."""
        width = max(self.shapes[k][d] for k in named.keys for d, e in enumerate(named.axes[k]) if e == CHANNEL)
        sides = {k for _, part in named.logs for k in part}
        for strength in (0.1, 1.0, STRONG):
            data = []
            for k, shape in enumerate(self.shapes):
                x = torch.randn(shape, generator=self.draw, dtype=torch.float64)
                ragged = 10 ** (2 * torch.rand(shape, generator=self.draw, dtype=torch.float64) - 1.5)
                data.append(x * ragged * (width**-0.5 if k in (*named.keys, *named.query) else 1.0))
                if k in sides and k in named.decays:
                    below = x.abs() * strength * (torch.rand(shape, generator=self.draw) < 0.5)
                    data[k] = x * self.chunks.length**-0.5 if strength < 1 else -below * named.logs[0][0]
                elif k in sides:
                    data[k] = data[k].abs()
            yield data

    def drawn(self, named: Named, *, wide: bool) -> Rewriting:
        """The operator in the place of the results, of the graph in float64 or of the one that is compiled."""
        draft = Draft()
        leaves = self.places if wide else self.leaves
        outs = next(iter(self.gm.graph.find_nodes(op="output"))).args[0] if wide else self.outs

        def factors(which: Sequence[int]) -> list[Factor]:
            return [Factor(draft.leaf(leaves[k]), named.axes[k]) for k in which]

        batch = [e.args[0] for e in named.out if e.op == "var" and e != T and e.args[0] != named.value]
        batch = list(dict.fromkeys(batch))
        dtypes = [tensor_of(leaves[k]).dtype for k in (*named.keys, *named.values)]  # type: ignore[union-attr]
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        mixer = Mixer(batch, CHANNEL.args[0], named.value, dtype, decay=[Term(1.0)])
        mixer.query, mixer.outputs = factors(named.query), factors(named.outputs)
        mixer.keys, mixer.values, mixer.beta = factors(named.keys), factors(named.values), factors(named.gates)
        mixer.scale, mixer.delta, mixer.before = named.scale, named.delta, named.before
        if named.state is not None:
            (mixer.initial,) = factors([named.state])
        if named.logs:
            mixer.log_decay = [(c, self._product(draft, factors(part))) for c, part in named.logs]
        made = emit(draft, mixer, self.facts)
        results = [(outs[0], self._laid_out(draft, named, made))]
        if named.last is not None:
            labels = [None if e == ZERO else e.args[0] for e in named.last]
            last = arranged(draft, made.state, made.state_labels, labels)
            results.append((outs[1], last))
        if not wide:
            results = [(out, draft.cast(new, tensor_of(out).dtype)) for out, new in results]  # type: ignore[union-attr]
        return finished(draft, results, made.rule, made.shape)

    def _product(self, draft: Draft, factors: Sequence[Factor]) -> Factor:
        if len(factors) == 1:
            return factors[0]
        order = sorted({x for f in factors for x in f.labels})
        node = draft.product(factors, order)
        assert node is not None
        return Factor(node, tuple(map(var, order)))

    def _laid_out(self, draft: Draft, named: Named, made: Emitted) -> fx.Node:
        """The operator's result with the axes of the written one."""
        first, *place = self.chunks.time
        wanted = [TIME if d == first else None if e == ZERO else e.args[0]
                  for d, e in enumerate(named.out) if d not in place]  # fmt: skip
        out = arranged(draft, made.out, made.labels, wanted)
        return draft.call(aten.unflatten.int, out, first, [-1, self.chunks.size]) if place else out

    def _changed(self, found: Rewriting) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        gm = fx.GraphModule(self.gm, found.graph)
        chosen = [self.places.index(x) for x in found.leaves]

        def run(data: Sequence[Tensor]) -> list[Tensor]:
            with torch.no_grad():
                return list(gm(*(data[k] for k in chosen)))

        return run

    def _equal(self, a: Tensor, b: Tensor) -> bool:
        return float((a - b).abs().max()) <= EQUAL * float(a.abs().max())

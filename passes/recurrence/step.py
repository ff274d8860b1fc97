"""What one step of a loop does to its state, found by running it on random numbers.

A linear recurrence is affine in its state, `S' = A S + b`; from `A` follow the kind of decay and whether a delta rule
mixes the keys. Asking the step itself makes every spelling equal: exp of a sum, a product of gates, an einsum.

Source: Yang et al. 2024, "Gated Delta Networks", arXiv:2412.06464, equation 10; Gu and Dao 2023, "Mamba",
arXiv:2312.00752, equation 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnc.passes.graph import NoMatch, hint, op_name, tensor_of
from attnc.passes.products import product
from attnc.passes.recurrence.loops import Loop

PARTS = ("select", "slice", "narrow")  # rows of a triangular system that is solved by substitution, for one
TOLERANCE = 1e-3  # a step computes in float32 where the model says so


@dataclass(frozen=True)
class Step:
    """Facts of the state at `place` in each block of a loop.

    decay: "none", "constant" (the same at every step), or what the factor varies over: "head", "key", "value", "state".
    delta: whether the state is corrected by its own prediction (keys are mixed).
    shape: of the state, padded in front to (B, H, K, V). chunk: tokens per step.
    """

    place: int
    decay: str
    delta: bool
    shape: tuple[int, ...]
    chunk: int


def step_facts(loop: Loop, place: int) -> Step | NoMatch:
    """The facts of the state that the blocks of `loop` carry at `place`."""
    node = loop.blocks[-1][place]
    value = tensor_of(node)
    if value is None or not value.is_floating_point() or value.dim() < 2:
        return NoMatch("what is carried is no state: a floating tensor of 2 or more axes is expected", node)
    if op_name(node) in PARTS:
        return NoMatch("what is carried is a part of a tensor, of which other parts are mixed in", node)
    before = tensor_of(entry(loop, -1, place))
    if before is None or before.shape != value.shape:
        return NoMatch("what is carried changes its shape from step to step", node)
    if not is_read(loop, place):
        return NoMatch("what is carried is summed up and read only after the loop", node)
    try:
        last, step = (_linear(_Probe(loop, k, place)) for k in (-2, -1))
    except (RuntimeError, IndexError, ValueError) as exc:
        return NoMatch(f"the step does not run by itself: {str(exc).partition(chr(10))[0]}", node)
    if last is None or step is None:
        return NoMatch("the step is not affine in what it carries, as a linear recurrence is", node)
    if not any(bool(at.base.abs().max() > 0) for at in (last, step)):
        return NoMatch("nothing is added to what the step carries", node)
    decay = _decay(last, step)
    delta = decay is None
    if decay is None:
        decay = _decay_under_delta(step)
    if decay is None:
        return NoMatch("the step mixes its state in another way than a decay and a delta rule do", node)
    return Step(place, decay, delta, tuple(map(hint, value.shape)), _chunk(loop, node, value))


def is_read(loop: Loop, place: int) -> bool:
    """Whether a step's state is used for more than the next state."""
    members, block = set(loop.nodes), loop.blocks[-2]
    reached = {block[k] for k in loop.carried[place]}
    for node in block:
        if any(x in reached for x in node.all_input_nodes):
            reached.add(node)
    behind, stack = {block[place]}, [block[place]]
    while stack:
        fresh = [x for x in stack.pop().all_input_nodes if x not in behind]
        behind.update(fresh)
        stack.extend(fresh)
    return any(node not in behind or not members.issuperset(node.users) for node in reached)


class _Probe:
    """One step as a function of the state, on numbers of its own; steps of equal seeds see the same ones."""

    def __init__(self, loop: Loop, step: int, place: int) -> None:
        self.place, self.block = place, loop.blocks[step]
        self.entry = entry(loop, step, place)
        self.shape = tuple(map(hint, _value(self.block[place]).shape))
        inner = {*self.block, self.entry}
        outer = dict.fromkeys(x for n in self.block for x in n.all_input_nodes if x not in inner)
        generator = torch.Generator().manual_seed(0)
        self.outside = {node: _random(node, generator) for node in outer}
        self.base = self.run(torch.zeros(self.shape, dtype=torch.float64))

    def run(self, state: torch.Tensor) -> torch.Tensor:
        """The next state."""
        values = {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in self.outside.items()}
        values[self.entry] = state.to(_wide(_value(self.entry).dtype))

        def given(x: Any) -> Any:
            return values[x] if isinstance(x, fx.Node) else _wide(x)

        with torch.no_grad():
            for node in self.block:
                args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), given)
                values[node] = node.target(*args, **kwargs)
        return values[self.block[self.place]].to(torch.float64)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """A x, for the step A x + b."""
        return self.run(x) - self.base


def _linear(probe: _Probe) -> _Probe | None:
    """The step, where it is affine in the state."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(probe.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    if probe.base.shape != x.shape:
        return None
    return probe if _close(probe.apply(x + 2 * y), probe.apply(x) + 2 * probe.apply(y)) else None


def entry(loop: Loop, step: int, place: int) -> fx.Node:
    """The state that a step begins with: of the step before, or what the loop began with."""
    step %= loop.steps
    if step:
        return loop.blocks[step - 1][place]
    reader = loop.carried[place][0]
    at = loop.blocks[1][reader].all_input_nodes.index(loop.blocks[0][place])
    return loop.blocks[0][reader].all_input_nodes[at]


def _value(node: fx.Node) -> torch.Tensor:
    value = tensor_of(node)
    assert value is not None, node
    return value


def _wide(x: Any) -> Any:
    """float32 for types of 16 bits, in which rounding would hide what a step does; all else as it is."""
    return torch.float32 if x is torch.bfloat16 or x is torch.float16 else x


def _random(node: fx.Node, generator: torch.Generator) -> Any:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return hint(value) if isinstance(value, int | torch.SymInt) else value
    shape = [hint(s) for s in value.shape]
    if value.is_floating_point():
        return (0.5 * torch.randn(shape, generator=generator)).to(_wide(value.dtype))
    return torch.ones(shape, dtype=value.dtype) if value.dtype == torch.bool else torch.zeros(shape, dtype=value.dtype)


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or not bool(torch.isfinite(a).all() & torch.isfinite(b).all()):
        return False
    return bool((a - b).abs().max() <= TOLERANCE * max(1e-6, float(b.abs().max())))


def _decay(first: _Probe, second: _Probe) -> str | None:
    """What a diagonal step's factor varies over; None where the step is not diagonal."""
    factors = []
    generator = torch.Generator().manual_seed(2)
    x, y = (0.5 + torch.rand(first.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    for linear in (first, second):
        factor = linear.apply(x) / x
        if not _close(linear.apply(y) / y, factor):
            return None
        factors.append(factor)
    if _close(factors[0], torch.ones_like(factors[0])):
        return "none"
    if not bool(factors[0].abs().max() > 0):
        return None
    if _close(*factors):
        return "constant"
    return _varies(factors[0])


def _varies(factor: torch.Tensor) -> str:
    """Over which of the two state axes a factor varies."""
    over_value = factor.size(-1) > 1 and not _close(factor, factor[..., :1].expand_as(factor))
    over_key = factor.size(-2) > 1 and not _close(factor, factor[..., :1, :].expand_as(factor))
    return {(False, False): "head", (True, False): "key", (False, True): "value", (True, True): "state"}[
        over_key, over_value
    ]


def _decay_under_delta(linear: _Probe) -> str | None:
    """The decay of `S' = (I - beta k k^T) D S`, from the matrix of the step over the keys of one head."""
    shape = linear.shape
    if len(shape) < 3 or shape[-2] < 3:
        return None
    size = shape[-2]
    columns = []
    for k in range(size):
        x = torch.zeros(shape, dtype=torch.float64)
        x[..., k, 0] = 1.0
        moved = linear.apply(x)
        if shape[-1] > 1 and not _close(moved[..., 1:] + 1, torch.ones_like(moved[..., 1:])):
            return None  # values are mixed
        columns.append(moved[..., 0])
    matrix = torch.stack(columns, -1).reshape(-1, size, size)[0]
    spectrum = torch.linalg.eigvals(matrix).real.sort().values
    middle = spectrum[size // 2]
    rest = torch.linalg.svdvals(matrix - middle * torch.eye(size, dtype=torch.float64))
    if rest[1] <= 0.1 * TOLERANCE * max(1.0, float(rest[0])):
        return "none" if abs(float(middle) - 1) <= 10 * TOLERANCE else "head"
    return "key" if size > 2 else None


def _chunk(loop: Loop, node: fx.Node, value: torch.Tensor) -> int:
    """Tokens per step: the length over which keys and values are summed into the state."""
    block = set(loop.blocks[-1])
    lengths = [1]
    stack, seen = [node], {node}
    while stack:
        at = stack.pop()
        found = product(at)
        if found is not None and tuple(_value(at).shape[-2:]) == tuple(value.shape[-2:]):
            axis = found.left_labels.index(found.contracted)
            lengths.append(hint(_value(found.left).shape[axis]))
            continue
        if op_name(at) in ("select", "slice"):
            continue
        fresh = [x for x in at.all_input_nodes if x in block and x not in seen and tensor_of(x) is not None]
        seen.update(fresh)
        stack.extend(fresh)
    return max(lengths)

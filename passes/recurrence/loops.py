"""Loops that tracing unrolled, found again: a run of equal blocks of nodes, and what each hands to the next.

Blocks are equal up to the integers in them (the step's index) and the lengths of slices; what a block reads of the one
before it, at the same place in every block, is carried: the state of the loop.

Source: re-rolling of unrolled loops as in compilers of straight-line code, applied to fx graphs; DESIGN.md section 4.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from attnc.passes.graph import op_name, tensor_of

# A block longer than this is a layer, not the step of a recurrence.
LONGEST = 160
SHORTEST = 2
TRIED = 4  # blocks that are compared to find where a step begins


@dataclass
class Loop:
    """`steps` blocks of equal nodes, one after the other.

    blocks:  the nodes of each step, in order.
    carried: places in a block whose value the next block reads: consumer's view, place -> the nodes that read it there.
    """

    blocks: list[list[fx.Node]]
    carried: dict[int, list[int]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return len(self.blocks)

    @property
    def nodes(self) -> list[fx.Node]:
        return [node for block in self.blocks for node in block]


def loops(graph: fx.Graph, taken: Collection[fx.Node] = ()) -> Iterator[Loop]:
    """The loops of `graph` that carry something from step to step, inner before outer."""
    nodes = [n for n in graph.nodes if n.op == "call_function" and n not in taken]
    for start, period, end in _runs([_signature(n) for n in nodes]):
        best: tuple[int, int, int] | None = None
        for shift in range(period):  # where a step begins is not known: where least is carried over the boundary
            steps = (end - start - shift) // period
            trial = _loop(_blocks(nodes, start + shift, period, min(steps, TRIED)))
            if trial is not None and (best is None or (len(trial.carried), -steps) < best[:2]):
                best = len(trial.carried), -steps, start + shift
        found = _loop(_blocks(nodes, best[2], period, -best[1])) if best is not None else None
        if found is not None:
            yield found


def _blocks(nodes: list[fx.Node], start: int, period: int, steps: int) -> list[list[fx.Node]]:
    return [nodes[at : at + period] for at in range(start, start + steps * period, period)]


def _signature(node: fx.Node) -> Hashable:
    """What two nodes of equal blocks have in common: operator, kind of value, arguments without integers."""
    value = tensor_of(node)
    shown = None if value is None else (value.dtype, value.dim())
    return node.target, shown, _outline(node.args), _outline(node.kwargs)


def _outline(value: Any) -> Hashable:
    if isinstance(value, fx.Node):
        return "node"
    if isinstance(value, list | tuple):
        return tuple(map(_outline, value))
    if isinstance(value, dict):
        return tuple((k, _outline(v)) for k, v in value.items())
    if isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
        return "int"
    return value if isinstance(value, Hashable) else repr(value)


def _runs(signatures: list[Hashable]) -> Iterator[tuple[int, int, int]]:
    """(start, period, end) of each stretch that repeats at least once, each period by itself."""
    last: dict[Hashable, int] = {}
    active: dict[int, int] = {}
    for at, signature in enumerate([*signatures, object()]):
        ahead: dict[int, int] = {}
        for period, start in active.items():
            if at < len(signatures) and signature == signatures[at - period]:
                ahead[period] = start
            elif at - start >= 2 * period:
                yield start, period, at
        period = at - last.get(signature, at)
        if SHORTEST <= period <= LONGEST and period not in ahead:
            start = at - period
            while start and signatures[start - 1] == signatures[start - 1 + period]:
                start -= 1
            ahead[period] = start
        last[signature] = at
        active = ahead


def _loop(blocks: list[list[fx.Node]]) -> Loop | None:
    """The blocks as a loop; None where what they read does not repeat or nothing is carried."""
    if len(blocks) < 2:
        return None
    place = {node: (k, o) for k, block in enumerate(blocks) for o, node in enumerate(block)}
    carried: dict[int, list[int]] = {}
    for offset in range(len(blocks[0])):
        reads = [[place.get(x) for x in block[offset].all_input_nodes] for block in blocks]
        pattern = [_relative(k, read) for k, read in enumerate(reads)]
        if any(p != pattern[-1] for p in pattern[1:]):
            return None
        for back, producer in filter(None, pattern[-1]):
            if back > 1:
                return None
            if back == 1:
                carried.setdefault(producer, []).append(offset)
    return Loop(blocks, carried) if carried else None


def _relative(step: int, reads: list[tuple[int, int] | None]) -> list[tuple[int, int] | None]:
    """What a node reads as (steps back, place); None for what lies outside of the loop."""
    return [None if x is None else (step - x[0], x[1]) for x in reads]


def operators(loop: Loop) -> list[str]:
    """The operators of one step, in order."""
    return [op_name(node) for node in loop.blocks[-1]]

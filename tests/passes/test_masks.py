"""What a mask is lifted to agrees with the mask itself, on every element."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from attnc.expr import B, H, I, J
from attnc.expr_text import parse, spell
from attnc.intervals import bounds
from attnc.passes.graph import GraphFacts, Unliftable, integer, tensor_of
from attnc.passes.masks import Lift
from attnc.passes.views import broadcast_index
from attnc.predicate import rebuild
from attnc.reading import read, span
from tests.passes.mask_programs import Data, Program, programs

BATCH = 2


def example(length_q: int, length_k: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(length_q)
    draw = lambda *shape, high: torch.randint(0, high, shape, generator=generator)  # noqa: E731
    ids = draw(BATCH, length_k, high=3).cumsum(1)
    return torch.empty(length_q), torch.empty(length_k), ids, draw(BATCH, length_k, high=2), draw(7, 7, high=2).bool()


def as_function(program: Program):
    def build(rows, cols, ids, padding, table):
        positions = torch.arange(rows.shape[0])[:, None], torch.arange(cols.shape[0])[None, :]
        return program(Data(*positions, ids, padding, table))

    return build


def traced(program: Program, inputs: tuple[torch.Tensor, ...], symbolic: bool):
    mode = FakeTensorMode(shape_env=ShapeEnv() if symbolic else None, allow_non_fake_inputs=True)
    with mode:
        fakes = [mode.from_tensor(x, static_shapes=not symbolic or (x.dim() == 2 and x.shape[0] == 7)) for x in inputs]
        return make_fx(as_function(program), pre_dispatch=True)(*fakes)


def lifted(gm: torch.fx.GraphModule, shape: tuple[int, ...]):
    (output,) = gm.graph.find_nodes(op="output")
    mask = output.args[0]
    facts = GraphFacts(gm.graph)
    lift = Lift(facts, output)
    value = tensor_of(mask)
    assert value is not None
    inner = tuple(integer(s) for s in value.shape)
    for name, extent in zip("bhij", shape, strict=True):
        lift.ranges.box[name] = (0, extent - 1)
    at = broadcast_index((B, H, I, J)[4 - len(inner):], inner, tuple(integer(s) for s in shape)[4 - len(inner):])
    return lift.element(mask, at), lift, facts


def values_of(nodes, gm, inputs) -> list:
    """The values of nodes of the graph on `inputs`."""
    env = {}

    class Keep(torch.fx.Interpreter):
        def run_node(self, n):
            env[n] = super().run_node(n)
            return env[n]

    Keep(gm).run(*inputs)
    return [env[n] for n in nodes]


LENGTHS = [(1, 1), (1, 33), (33, 33), (17, 40), (24, 24)]


@pytest.mark.parametrize("symbolic", [False, True])
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(program=programs(), lengths=st.sampled_from(LENGTHS))
def test_lifted_mask_is_the_mask(symbolic, program, lengths):
    check_program(program, lengths, symbolic)


@pytest.mark.slow
@pytest.mark.parametrize("symbolic", [False, True])
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(program=programs(), lengths=st.sampled_from(LENGTHS))
def test_lifted_mask_is_the_mask_for_many_programs(symbolic, program, lengths):
    check_program(program, lengths, symbolic)


def check_program(program: Program, lengths: tuple[int, int], symbolic: bool) -> None:
    if symbolic and 1 in lengths:
        lengths = (33, 33)
    inputs = example(*lengths)
    want = as_function(program)(*inputs)
    shape = (BATCH, 1, *lengths)
    gm = traced(program, inputs, symbolic)
    e, lift, facts = lifted(gm, shape)
    reads_data = any(node.users for node in gm.graph.find_nodes(op="placeholder")[2:])
    assert reads_data or not lift.captured, "a mask of positions alone is lifted whole"
    sizes = sorted({x.args[0] for x in e.walk() if x.op == "size"})
    numbers = [int(v) for v in values_of([facts.symbol_nodes[s] for s in sizes], gm, inputs)] if sizes else []
    e = rebuild(e, lambda x: integer(numbers[sizes.index(x.args[0])]) if x.op == "size" else None)
    captured = values_of(lift.captured, gm, inputs)
    axes = {name: span(name, 0, extent, torch.device("cpu")) for name, extent in zip("bhij", shape, strict=True)}
    got = read(e, axes, captured, [])
    got = got if isinstance(got, torch.Tensor) else torch.tensor(got)
    assert torch.equal(got.expand(shape), want.expand(shape)), spell(e)
    assert parse(spell(e)) == e
    whole = bounds(e, {name: (0, extent - 1) for name, extent in zip("bhij", shape, strict=True)})
    assert whole is not None
    assert bool(whole[0]) or not bool(want.any())
    assert not bool(whole[1]) or bool(want.all())


def test_a_chain_longer_than_any_mask_is_refused_and_not_followed_to_its_end():
    def chain(x):
        y = torch.arange(4) * x
        for _ in range(400):
            y = y + x
        return y

    graph = make_fx(chain)(torch.ones(4)).graph
    end = graph.output_node()
    with pytest.raises(Unliftable, match="more than 96 operators"):
        Lift(GraphFacts(graph), end).element(end.args[0], (I,))

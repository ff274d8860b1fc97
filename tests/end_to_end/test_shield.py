"""What attnc leaves alone comes out right through Inductor too, and plain Inductor in the same process is unchanged."""
from __future__ import annotations

import warnings

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache

import attnc
from attnc.passes import shield
from tests.tolerance import error

SHAPE = (4, 4, 16, 16)  # square, with as many heads as batches: what torch 2.13 takes for attention


def over_queries(q, k, v):
    return (q @ k.mT / 4).softmax(-2) @ v


def inputs(train: bool = False):
    torch.manual_seed(0)
    return [torch.randn(SHAPE, requires_grad=train) for _ in range(3)]


def fused() -> int:
    return counters["inductor"]["fuse_attention"]


def plain(settings: dict | None = None) -> tuple[torch.Tensor, int]:
    """The result of plain Inductor and how often its attention pass matched."""
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        out = torch.compile(over_queries, options=settings)(*inputs())
    return out, fused()


def ours(settings: dict | None = None, train: bool = False) -> list[torch.Tensor]:
    """Output, and gradients where asked, of the function compiled by attnc."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(over_queries, backend="attnc", options={"inductor": settings or {}})
    args = inputs(train)
    with torch.set_grad_enabled(train):
        out = compiled(*args)
    assert attnc.last_report(compiled).counts()["rewritten"] == 0
    if train:
        out.sin().sum().backward()
    return [out.detach(), *(x.grad for x in args if train)]


def wanted(train: bool = False) -> list[torch.Tensor]:
    args = inputs(train)
    out = over_queries(*args)
    if train:
        out.sin().sum().backward()
    return [out.detach(), *(x.grad for x in args if train)]


@pytest.fixture(autouse=True)
def cold():
    with fresh_cache():
        yield


def test_softmax_over_queries_is_right_and_plain_inductor_is_unchanged_before_and_after():
    before, matched = plain()
    assert error(ours()[0], wanted()[0]) < 1e-6
    assert fused() == 0
    with fresh_cache():
        after, again = plain()
    assert matched == again
    assert torch.equal(before, after)


def test_attnc_first_leaves_plain_inductor_as_it_is():
    assert error(ours()[0], wanted()[0]) < 1e-6
    first, matched = plain()
    hooks = config.joint_custom_pre_pass, config.joint_custom_post_pass
    assert hooks == (None, None)
    with fresh_cache():
        torch._dynamo.reset()
        second, again = plain()
    assert matched == again
    assert torch.equal(first, second)


def test_gradients_of_what_is_left_alone_are_right():
    for got, want in zip(ours(train=True), wanted(train=True), strict=True):
        assert error(got, want) < 1e-5
    assert fused() == 0


def test_no_identity_is_left_in_the_graph_that_inductor_lowers():
    class Look(CustomGraphPass):
        def __call__(self, graph):
            seen.extend(str(n.target) for n in graph.nodes)

        def uuid(self):
            return "look"

    seen: list[str] = []
    ours({"post_grad_custom_pre_pass": Look()})
    assert any("exp" in name or "softmax" in name for name in seen)
    assert not any("shielded" in name for name in seen)


def test_users_own_passes_run_and_see_no_shield():
    class Note(CustomGraphPass):
        def __init__(self, name):
            self.name = name

        def __call__(self, graph):
            notes.append((self.name, any(n.target is shield.shielded for n in graph.nodes)))

        def uuid(self):
            return self.name

    notes: list[tuple[str, bool]] = []
    ours({"joint_custom_pre_pass": Note("before"), "joint_custom_post_pass": Note("after")})
    assert notes == [("before", False), ("after", False)]
    notes.clear()
    with config.patch(joint_custom_pre_pass=Note("global")), fresh_cache():
        ours()
    assert notes == [("global", False)]


def test_a_users_pass_without_a_key_keeps_the_compile_out_of_the_cache():
    keyless = shield.settings({"joint_custom_pre_pass": lambda graph: None})
    assert keyless["joint_custom_pre_pass"].uuid() is None
    keyed = shield.settings({})
    assert keyed["joint_custom_pre_pass"].uuid() != keyed["joint_custom_post_pass"].uuid()


def test_inductors_graph_cache_hits_in_the_second_compile():
    ours()
    assert counters["inductor"]["fxgraph_cache_hit"] == 0
    with torch._functorch.config.patch(enable_autograd_cache=False):
        ours()
    assert counters["inductor"]["fxgraph_cache_miss"] == 0
    assert counters["inductor"]["fxgraph_cache_hit"] == 1


def test_shields_inside_subgraphs_that_a_pass_made_are_removed():
    inner, outer = torch.fx.Graph(), torch.fx.Graph()
    x = inner.placeholder("x")
    inner.output(inner.call_function(torch.ops.aten.exp.default, (x,)))
    shield.shield(inner)
    root = torch.nn.Module()
    root.part = torch.fx.GraphModule(torch.nn.Module(), inner)
    y = outer.placeholder("y")
    outer.output(outer.call_module("part", (y,)))
    gm = torch.fx.GraphModule(root, outer)
    shield.unshield(gm.graph)
    assert not any(n.target is shield.shielded for n in gm.part.graph.nodes)
    assert torch.equal(gm(torch.ones(2)), torch.ones(2).exp())


def test_other_patterns_of_inductor_still_apply():
    def scaled(x, w):
        return torch.permute(x, (0, 2, 1)).transpose(1, 2) @ w.t().t(), (x * 2).softmax(-1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch._dynamo.reset()
        counters.clear()
        args = torch.randn(2, 8, 8), torch.randn(8, 8)
        torch.compile(scaled)(*args)
        want = counters["inductor"]["pattern_matcher_count"]
        torch._dynamo.reset()
        counters.clear()
        with fresh_cache():
            torch.compile(scaled, backend="attnc")(*args)
    assert counters["inductor"]["pattern_matcher_count"] == want

"""attnc.last_report finds the latest compile of any compiled object, and of no other."""
from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn

import attnc
from attnc.reports import KEPT, Place, Reports
from tests import tiny
from tests.tiny import CausalAttention, Net, rewritten, tokens

compiled = partial(tiny.compiled, inner="eager")  # reports are of what comes before the inner compiler


def paths(fast) -> list[str]:
    return [region.path for region in attnc.last_report(fast).regions]


def lengths(fast) -> list[int]:
    return [region.shape.L for region in attnc.last_report(fast).regions]


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = CausalAttention(), CausalAttention(), CausalAttention()

    def forward(self, x):
        y = self.second(self.first(x))
        torch._dynamo.graph_break()
        return self.third(y)


@torch.no_grad()
def test_module_function_bound_method_and_module_compiled_in_place():
    x, model = tokens(), Net()
    module = compiled(Net())
    function = compiled(lambda x: model(x))
    method = compiled(Net().forward)
    replaced, in_place = Net(), Net()
    replaced.forward = compiled(replaced.forward)
    in_place.compile(backend="attnc", options={"inner": "eager", "force": "dense"})
    for fast in (module, function, method, replaced, in_place):
        fast(x)
    for fast in (module, function, method, replaced, replaced.forward, in_place):
        assert rewritten(fast) == 2
        assert attnc.last_report(fast).graphs == 1


@torch.no_grad()
def test_models_of_one_class_keep_their_own_reports():
    first, second = compiled(Net(1), dynamic=False), compiled(Net(3), dynamic=False)
    first(tokens(16))
    second(tokens(24))
    assert lengths(first) == [16]
    assert lengths(second) == [24] * 3


@torch.no_grad()
def test_one_model_compiled_twice_with_other_options():
    model = Net()
    one, other = compiled(model), compiled(model, options={"forms": (), "force": None})
    one(tokens())
    other(tokens())
    assert (rewritten(one), rewritten(other)) == (2, 0)


@torch.no_grad()
def test_an_equal_compile_that_reuses_dynamos_code_has_the_report_too():
    model = Net()
    compiled(model)(tokens())
    again = compiled(model)
    again(tokens())
    assert rewritten(again) == 2


@torch.no_grad()
def test_another_module_of_the_class_that_reuses_the_code():
    compiled(Broken())(tokens())
    again = compiled(Broken())
    again(tokens())
    assert paths(again) == ["first", "second", "third"]


@torch.no_grad()
def test_graph_breaks_are_merged_in_their_order_and_a_recompile_replaces():
    model = Broken()
    fast = compiled(model, dynamic=False)
    fast(tokens(16))
    assert paths(fast) == ["first", "second", "third"]
    fast(tokens(24))
    assert paths(fast) == ["first", "second", "third"]
    assert lengths(fast) == [24] * 3
    assert attnc.last_report(fast).graphs == 2


@torch.no_grad()
def test_breaks_inside_layers_of_one_class_compile_once_for_all_of_them():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = CausalAttention()

        def forward(self, x):
            y = self.attention(x)
            torch._dynamo.graph_break()
            return x + y

    model = nn.Sequential(*(Layer() for _ in range(3)))
    fast = compiled(model)
    fast(tokens())
    assert rewritten(fast) == 1


@torch.no_grad()
def test_a_part_compiled_by_itself():
    model = Broken()
    whole, part = compiled(model), compiled(model.third)
    whole(tokens())
    part(tokens(24))
    assert len(paths(whole)) == 3
    assert lengths(part) == [24]


@torch.no_grad()
def test_weights_put_in_other_tensors_keep_the_report():
    model = Net()
    fast = compiled(model)
    fast(tokens())
    model.load_state_dict(Net().state_dict(), assign=True)
    fast(tokens())
    assert rewritten(fast) == 2


@torch.no_grad()
def test_no_compile_is_a_sentence():
    class New(Net):
        def forward(self, x):
            return super().forward(x)

    uncalled = compiled(New())
    with pytest.raises(attnc.UsageError, match="last_report of OptimizedModule: found no compile of it by attnc"):
        attnc.last_report(uncalled)
    with pytest.raises(attnc.UsageError, match="Call the compiled model once first"):
        attnc.last_report(New())
    with pytest.raises(attnc.UsageError):
        attnc.last_report(lambda x: x)
    plain = torch.compile(New(), backend="eager")
    plain(tokens())
    with pytest.raises(attnc.UsageError):
        attnc.last_report(plain)


@torch.no_grad()
def test_the_newest_compile_is_the_latest_report():
    fast = compiled(Net(), dynamic=False)
    for length in (16, 24, 32):
        fast(tokens(length))
        assert lengths(fast) == [length] * 2


@torch.no_grad()
def test_a_report_keeps_no_model_alive():
    model = Net()
    compiled(model)(tokens())
    watch = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert watch() is None


def test_old_reports_are_dropped():
    reports = Reports()
    for at in range(KEPT + 3):
        reports.add(Place((lambda: 0).__code__.replace(co_firstlineno=at + 1), (), (), ()), attnc.Report())
    assert len(reports._frames) == KEPT

"""torch.compile(model, backend="attnc") in every way a model is run: modes, types, shapes, breaks, changed weights."""
from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import attnc
from attnc import backend
from tests.tiny import (
    CausalAttention,
    Net,
    assert_same_step,
    compiled,
    gradients,
    rewritten,
    tokens,
    trained,
)
from tests.tolerance import assert_close, error

LENGTHS = (48, 64, 80, 33, 100, 17)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that attnc is given, counted."""
    seen = []
    analyse = backend.analyse

    def counted(gm, *args, **kwargs):
        seen.append(gm)
        return analyse(gm, *args, **kwargs)

    monkeypatch.setattr(backend, "analyse", counted)
    return seen


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_output_equals_eager_in_each_grad_mode(mode):
    model, x = Net().eval(), tokens()
    fast = compiled(model)
    with mode():
        got, want = fast(x), model(x)
    assert_close(got, want)
    assert got.requires_grad == want.requires_grad
    assert rewritten(fast) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_output_and_gradients_equal_eager_in_each_dtype(dtype):
    model, x = Net().to(dtype), tokens(dtype=dtype)
    fast = compiled(model)
    limit = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert_same_step(trained(model, x, fast), trained(model, x), limit)
    assert rewritten(fast) == 2
    assert {region.dtype for region in attnc.last_report(fast).regions} == {str(dtype).removeprefix("torch.")}


@pytest.mark.parametrize("train", [False, True])
def test_autocast_around_the_call(train):
    model, x = Net(), tokens()
    fast = compiled(model)

    def call(f):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(train):
            return f(x)

    if train:
        assert_same_step(trained(model, x, lambda _: call(fast)), trained(model, x, lambda _: call(model)), 2e-2)
    else:
        assert_close(call(fast), call(model), torch.bfloat16, terms=4)
    assert {region.dtype for region in attnc.last_report(fast).regions} == {"bfloat16"}
    assert rewritten(fast) == 2


def test_autocast_inside_the_model_and_switched_off_again():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.low, self.high = Net(1), Net(1)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                y = self.low(x)
                with torch.autocast("cpu", enabled=False):
                    y = self.high(y.float())
            return y

    model, x = Mixed(), tokens()
    fast = compiled(model)
    assert_same_step(trained(model, x, fast), trained(model, x), 2e-2)
    assert [region.dtype for region in attnc.last_report(fast).regions] == ["bfloat16", "float32"]


def test_autocast_switched_between_calls_compiles_for_each():
    model, x = Net().eval(), tokens()
    fast = compiled(model)
    with torch.no_grad():
        for _ in range(2):
            assert_close(fast(x), model(x))
            with torch.autocast("cpu", torch.bfloat16):
                assert_close(fast(x), model(x), torch.bfloat16, terms=4)


@pytest.mark.parametrize(("dynamic", "lengths", "most"), [(None, LENGTHS, 2), (False, LENGTHS[:3], 3)])
def test_lengths_recompile_no_more_than_expected(dynamic, lengths, most, graphs):
    model = Net().eval()
    fast = compiled(model, dynamic=dynamic)
    with torch.no_grad():
        for length in lengths:
            assert_close(fast(tokens(length)), model(tokens(length)))
    assert len(graphs) == most
    assert rewritten(fast) == 2


def test_dynamic_shapes_compile_as_often_as_without_attnc(graphs):
    model = Net(1).eval()
    fast = compiled(model, dynamic=True)
    counter = CompileCounterWithBackend("aot_eager")
    with torch.no_grad():
        for length in LENGTHS:
            assert_close(fast(tokens(length, length % 3 + 2)), model(tokens(length, length % 3 + 2)))
        torch._dynamo.reset()
        plain = torch.compile(model, backend=counter, dynamic=True)
        for length in LENGTHS:
            plain(tokens(length, length % 3 + 2))
    assert len(graphs) == counter.frame_count
    assert rewritten(fast) == 1
    assert attnc.last_report(fast).regions[0].shape.symbols


def test_training_under_a_changing_length():
    model = Net()
    fast = compiled(model)
    for length in LENGTHS[:4]:
        assert_same_step(trained(model, tokens(length), fast), trained(model, tokens(length)))


def test_graph_breaks_leave_each_part_compiled():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = CausalAttention(), CausalAttention()

        def forward(self, x):
            y = self.first(x)
            torch._dynamo.graph_break()
            return self.second(y)

    model, x = Broken(), tokens()
    fast = compiled(model)
    assert_same_step(trained(model, x, fast), trained(model, x))
    report = attnc.last_report(fast)
    assert report.graphs == 2
    assert [region.path for region in report.regions] == ["first", "second"]
    assert rewritten(fast) == 2


def test_layers_that_share_their_weights():
    model, x = Net(), tokens()
    model.layers[1] = model.layers[0]
    fast = compiled(model)
    assert_same_step(trained(model, x, fast), trained(model, x))
    assert rewritten(fast) == 2


def test_weights_changed_after_compiling_are_used(graphs):
    model, x = Net().eval(), tokens()
    fast = compiled(model)
    with torch.no_grad():
        fast(x)
        model.layers[0].qkv.weight.mul_(2)
        assert_close(fast(x), model(x))
        model.load_state_dict(Net().state_dict())
        assert_close(fast(x), model(x))
        assert len(graphs) == 1
        model.load_state_dict(Net().state_dict(), assign=True)
        assert_close(fast(x), model(x))
        model.layers[0].qkv.weight.data = torch.randn(96, 32)
        assert_close(fast(x), model(x))
    assert rewritten(fast) == 2


def test_optimizer_steps_follow_eager():
    runs = []
    for through in (lambda m: m, compiled):
        torch.manual_seed(0)
        model = Net()
        call, optimizer = through(model), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for step in range(4):
            call(tokens(40 + step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(dict(model.named_parameters()))
    for name, want in runs[0].items():
        assert error(runs[1][name], want) < 1e-5, name


def test_buffers_and_inputs_written_by_the_model():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(32, 96)
            self.register_buffer("keys", torch.zeros(2, 4, 48, 8))

        def forward(self, x, written):
            q, k, v = self.qkv(x).view(2, 48, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
            self.keys.copy_(k.detach())
            written.add_(k)  # with a gradient: the input becomes part of the graph
            written.transpose_(0, 1)
            return (q @ self.keys.mT / 8**0.5).softmax(-1) @ v + written.transpose(0, 1)

    runs = []
    for through in (lambda m: m, compiled):
        torch.manual_seed(0)
        model, written = Caching(), torch.randn(2, 4, 48, 8)
        through(model)(tokens(), written).square().mean().backward()
        runs.append([*gradients(model).values(), model.keys, written])
    for got, want in zip(*runs, strict=True):
        assert got.shape == want.shape
        assert error(got, want) < 1e-5


def test_module_compiled_in_place_and_functions():
    model, x = Net().eval(), tokens()
    with torch.no_grad():
        want = model(x)
        fast = compiled(lambda x: model(x) + 1)
        assert_close(fast(x), want + 1)
        model.compile(backend="attnc", options={"inner": "aot_eager", "force": "dense"})
        assert_close(model(x), want)
    assert rewritten(fast) == rewritten(model) == 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_exported_program(dynamic):
    layers = 1 if dynamic else 2
    model, x = Net(layers).eval(), tokens()
    shapes = {"x": {1: torch.export.Dim("length", min=8, max=4096)}} if dynamic else None
    program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False)
    report = attnc.explain(program)
    assert [region.path for region in report.regions] == ["layers.0", "layers.1"][:layers]
    fast = compiled(program.module())
    with torch.no_grad():
        for length in (48, 77) if dynamic else (48,):
            assert_close(fast(tokens(length)), model(tokens(length)))
    assert rewritten(fast) == layers


@pytest.mark.parametrize("train", [False, True])
def test_through_inductor(train):
    model, x = Net(1), tokens()
    fast = compiled(model, inner="inductor")
    if train:
        assert_same_step(trained(model, x, fast), trained(model, x))
    else:
        with torch.no_grad():
            assert_close(fast(x), model(x))
    assert rewritten(fast) == 1


def test_through_the_eager_inner_backend():
    model, x = Net(), tokens()
    fast = compiled(model, inner="eager")
    assert_same_step(trained(model, x, fast), trained(model, x))
    assert rewritten(fast) == 2

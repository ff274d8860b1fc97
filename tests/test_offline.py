"""`attnc.explain`: modules, functions, exported programs; what it finds, and that it leaves no trace."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

import attnc
from attnc.errors import AttncError, UsageError
from attnc.offline import explain
from attnc.options import Options

E = 16


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (t.unflatten(-1, (2, E // 2)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + out.transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Two layers; `broken`: a graph break in each layer; `noisy`: draws, counts, normalises."""

    def __init__(self, broken: bool = False, noisy: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.norm = nn.BatchNorm1d(E)
        self.broken, self.noisy = broken, noisy
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            if self.broken:
                torch._dynamo.graph_break()
        if self.noisy:
            self.calls = self.calls + 1
            x = F.dropout(self.norm(x.mT).mT, 0.5)
        return x


def attention(q: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ q.mT / 4, -1) @ q


def inputs(length: int = 33) -> torch.Tensor:
    return torch.randn(2, length, E)


def paths(report: attnc.Report) -> list[str]:
    return [region.path for region in report.regions]


def test_a_model_on_meta_is_explained_as_one_with_memory():
    with torch.device("meta"):
        model, x = Model(), inputs()
    report, there = explain(model, x, device="h100"), explain(Model(), inputs(), device="h100")
    assert paths(report) == ["layers.0", "layers.1"] and not report.problems
    assert [r.choice for r in report.regions] == [r.choice for r in there.regions]


def test_every_attention_of_a_module_is_found_where_it_is():
    report = explain(Model(), inputs())
    assert paths(report) == ["layers.0", "layers.1"]
    region = report.regions[0]
    assert (region.kind, region.mask) == ("attention", "causal")
    assert region.written.startswith("sdpa")
    assert (region.shape.B, region.shape.Hq, region.shape.L, region.shape.E) == (2, 2, 33, E // 2)
    assert region.choice is not None
    assert region.choice.reason
    assert (report.model, report.device, report.graphs) == ("Model", "cpu", 1)
    assert (report.unmatched, report.problems) == ((), ())
    assert set(report.timings) >= {"capture", "lift", "choose"}


def test_the_report_of_a_real_run_prints_and_reads_back():
    report = explain(Model(), inputs())
    assert "layers.{0-1} x2" in report.to_text(160)
    assert attnc.Report.from_json(report.to_json()) == report


def test_a_function_is_explained():
    report = explain(attention, inputs())
    assert [r.written for r in report.regions] == ["composed"]
    assert report.model == "attention"


def test_a_bound_method_has_the_paths_of_its_module():
    model = Model()
    assert paths(explain(model.forward, inputs())) == ["layers.0", "layers.1"]


def test_what_does_not_fit_is_listed_with_its_node():
    report = explain(lambda q: torch.softmax(q @ q.mT, -2) @ q, inputs())
    assert report.regions == ()
    (unmatched,) = report.unmatched
    assert unmatched.reason
    assert unmatched.node


def test_graphs_of_a_broken_model_are_merged_and_keep_their_paths():
    report = explain(Model(broken=True), inputs())
    assert report.graphs >= 2
    assert sorted(set(paths(report))) == ["layers.0", "layers.1"]


def test_keywords_reach_the_model():
    def scaled(q: torch.Tensor, *, factor: float) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q, scale=factor)

    (region,) = explain(scaled, inputs(), factor=0.5).regions
    assert region.rule.scale == 0.5


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, lambda m: torch.compile(torch.compile(m)), lambda m: m],
    ids=["compiled", "compiled twice", "as it is"],
)
def test_a_compiled_model_is_explained_like_the_model(wrap):
    assert paths(explain(wrap(Model()), inputs())) == ["layers.0", "layers.1"]
    assert len(explain(wrap(attention), inputs()).regions) == 1


def test_a_model_compiled_in_place_is_explained_like_the_model():
    model = Model()
    model.compile(backend="eager")
    assert paths(explain(model, inputs())) == ["layers.0", "layers.1"]


def test_training_is_the_grad_mode_of_the_caller():
    assert all(r.training for r in explain(Model(), inputs()).regions)
    with torch.no_grad():
        assert not any(r.training for r in explain(Model(), inputs()).regions)
    with torch.inference_mode():
        assert len(explain(Model(), inputs()).regions) == 2


def test_lengths_are_static_unless_marked():
    model = Model()
    assert all(explain(model, inputs(length)).regions[0].shape.is_static for length in (33, 70, 34))
    marked = inputs()
    torch._dynamo.mark_dynamic(marked, 1)
    assert not explain(model, marked).regions[0].shape.is_static


def test_an_exported_program_is_read_without_running():
    program = torch.export.export(Model().eval(), (inputs(),))
    for report in (explain(program), explain(program, inputs())):
        assert paths(report) == ["layers.0", "layers.1"]
        assert (report.model, report.graphs) == ("ExportedProgram", 1)


def test_an_exported_program_keeps_its_symbols():
    program = torch.export.export(Model().eval(), (inputs(),), dynamic_shapes=({1: torch.export.Dim("length")},))
    assert "L" in explain(program).regions[0].shape.symbols


# No trace.


def test_the_model_and_the_random_streams_are_as_before():
    model, x = Model(noisy=True).train(), inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = model.calls
    torch.manual_seed(3)
    random.seed(3)
    drawn, python_drawn = torch.rand(4), random.random()
    torch.manual_seed(3)
    random.seed(3)
    explain(model, x)
    assert torch.equal(torch.rand(4), drawn)
    assert random.random() == python_drawn
    assert model.calls is calls
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training


@pytest.mark.parametrize("broken", [False, True])
def test_other_compiled_functions_keep_their_caches(broken):
    model, x = Model(broken=broken).eval(), inputs()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    expected = compiled(x)
    frames = counter.frame_count
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(3):  # more than the limit
            assert set(paths(explain(model, x))) == {"layers.0", "layers.1"}
        assert torch.equal(compiled(x), expected)
    assert counter.frame_count == frames
    fresh = CompileCounter()
    torch.compile(model, backend=fresh)(x)
    assert fresh.frame_count == frames


def test_lengths_seen_by_explain_make_nothing_dynamic():
    model = Model(broken=True).eval()
    for length in (33, 70):
        explain(model, inputs(length))
    shapes: list[object] = []

    def note(gm, example_inputs):
        shapes.extend(type(value) for value in example_inputs if not isinstance(value, torch.Tensor))
        return gm.forward

    torch.compile(model, backend=note)(inputs(41))
    assert shapes == []


def test_the_model_is_let_go():
    model = Model(broken=True)
    explain(model, inputs())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# Mistakes of the caller.


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "missing 1 required positional argument"),
        ((1, 2, 3), "takes 2 positional arguments but 4 were given"),
        ((torch.randn(2, 33, E + 1),), "RuntimeError"),
    ],
)
def test_inputs_that_do_not_fit_are_a_usage_error(args, says):
    with pytest.raises(UsageError, match=says) as caught:
        explain(Model(), *args)
    assert str(caught.value).startswith("explain Model on the given inputs: ")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("model", [3, "llama", None, Model])
def test_what_is_no_model_is_a_usage_error(model):
    with pytest.raises(UsageError, match=r"allowed are an nn.Module, a function or a torch.export.ExportedProgram"):
        explain(model)


def test_an_unknown_device_names_the_known_ones():
    with pytest.raises(UsageError, match=r"device 'cpuu': no such device; .* Did you mean 'cpu'"):
        explain(Model(), inputs(), device="cpuu")
    assert explain(Model(), inputs(), device="cpu").device == "cpu"


def test_options_are_checked_and_used():
    with pytest.raises(UsageError, match="Did you mean 'strict'"):
        explain(Model(), inputs(), options={"strickt": True})
    for options in (Options(strict=True), {"strict": True}):
        assert len(explain(Model(), inputs(), options=options).regions) == 2


def test_a_model_without_a_graph_says_why_nothing_is_shown():
    report = explain(lambda: 3)
    assert report.graphs == 0
    assert "Dynamo made no graph" in report.problems[0]


def test_trouble_in_reading_is_raised_as_it_is(monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise AttncError("cannot read it")

    monkeypatch.setattr("attnc.graphs.analyse", broken)
    with pytest.raises(AttncError, match=r"^cannot read it$"):
        explain(Model(), inputs())


def test_errors_of_autotune_name_autotune() -> None:
    for model, x in ((3, ()), (Model(), (torch.zeros(1),))):
        with pytest.raises(UsageError, match=r"^autotune ") as raised:
            attnc.autotune(model, *x, device="cpu", trials=0)
        assert "explain" not in str(raised.value)

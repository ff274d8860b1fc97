"""Trouble stays where it is: a planted fault is caught, the region left as written, one warning says which and why."""
from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import attnc
from attnc.forms.dense import Dense
from attnc.passes import pipeline
from tests.tiny import CausalAttention, Net, compiled, rewritten, tokens
from tests.tolerance import assert_close


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    """No verdict of another test, and none for another test."""
    monkeypatch.setenv("ATTNC_STORE", str(tmp_path))


@pytest.fixture
def plant(monkeypatch):
    """Change what the dense form computes."""
    right = Dense.cpu

    def put(change):
        monkeypatch.setattr(Dense, "cpu", lambda *args: change(right, *args))

    return put


def run(fast, x) -> tuple[torch.Tensor, list[str]]:
    """The output without gradients and attnc's warnings."""
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        out = fast(x)
    return out, [str(w.message) for w in caught if str(w.message).startswith("attnc:")]


def slightly_wrong(right, form, query, *rest):
    out, lse = right(form, query, *rest)
    return out * 1.01, lse


def wrong_gradient(right, form, query, *rest):
    out, lse = right(form, query, *rest)
    return out.detach() + 0.5 * (out - out.detach()), lse


def raising(right, form, *args):
    raise RuntimeError("planted fault")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (slightly_wrong, r"its output differs by .* is allowed"),
        (raising, r"its check raised RuntimeError: planted fault"),
    ],
)
def test_a_planted_fault_leaves_the_region_as_written(plant, change, reason):
    plant(change)
    model, x = Net(1).eval(), tokens()
    fast = compiled(model, options={"strict": False})
    got, said = run(fast, x)
    with torch.no_grad():
        assert torch.equal(got, model(x))
    assert len(said) == 1
    assert re.search(rf"rewrite layers\.0 \(node softmax\w*\) as dense: {reason}", said[0])
    report = attnc.last_report(fast)
    assert rewritten(fast) == 0
    assert len(report.problems) == 1
    assert re.search(reason, report.regions[0].choice.reason)
    assert run(fast, x)[1] == []


def test_a_planted_wrong_gradient_is_caught_in_training(plant):
    plant(wrong_gradient)
    model, x = Net(1), tokens()
    fast = compiled(model, options={"strict": False})
    with pytest.warns(UserWarning, match="its gradient differs by"):
        out = fast(x)
    out.square().mean().backward()
    got = model.layers[0].qkv.weight.grad.clone()
    model.zero_grad()
    model(x).square().mean().backward()
    assert_close(got, model.layers[0].qkv.weight.grad)


@pytest.mark.parametrize("change", [slightly_wrong, raising])
def test_strict_raises_naming_the_region(plant, change):
    plant(change)
    with pytest.raises(BackendCompilerFailed, match=r"LoweringError: rewrite layers\.0 \(node softmax"):
        compiled(Net())(tokens())


def test_a_fault_in_one_region_leaves_the_others_rewritten(plant):
    def wrong_for_wide(right, form, given):
        out, lse = right(form, given)
        return (out * 2 if given.query.shape[1] == 8 else out), lse

    plant(wrong_for_wide)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.bad = CausalAttention(), nn.MultiheadAttention(32, 8, batch_first=True)

        def forward(self, x):
            y = self.good(x)
            return self.bad(y, y, y, need_weights=False)[0]

    model, x = Two().eval(), tokens()
    fast = compiled(model, options={"strict": False})
    got, said = run(fast, x)
    with torch.no_grad():
        assert_close(got, model(x))
    assert len(said) == 1
    assert "rewrite bad" in said[0]
    assert rewritten(fast) == 1


def test_a_fault_while_the_rewritten_graph_is_compiled_falls_back_to_the_graph_as_written(plant):
    plant(raising)
    model, x = Net(1), tokens()
    fast = compiled(model, options={"strict": False, "check": False})
    got, said = run(fast, x)
    with torch.no_grad():
        assert_close(got, model(x))
    assert len(said) == 1
    assert re.search("compile the rewritten graph with aot_eager: .*planted fault", said[0])
    assert rewritten(fast) == 0
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="planted fault"):
        compiled(model, options={"check": False})(x)


def test_a_fault_of_a_pass_does_not_stop_the_model(monkeypatch):
    def broken(*_):
        raise KeyError("planted fault")

    monkeypatch.setattr(pipeline, "lift", broken)
    model, x = Net().eval(), tokens()
    fast = compiled(model, options={"strict": False})
    got, said = run(fast, x)
    with torch.no_grad():
        assert torch.equal(got, model(x))
    assert len(said) == 1
    assert "analyse the graph: KeyError: 'planted fault'" in said[0]
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match=r"LoweringError: analyse the graph: KeyError"):
        compiled(model)(x)


def untraceable(x):
    return torch.func.grad(lambda y: (y.softmax(-1) * y).sum())(x)


def test_a_graph_that_cannot_be_captured_warns_once_for_all_its_recompiles():
    fast = compiled(untraceable, options={"strict": False}, dynamic=False)
    said = []
    for length in (4, 5, 6):
        x = torch.randn(2, length)
        got, told = run(fast, x)
        assert_close(got, untraceable(x))
        said += told
    assert len(said) == 1
    assert "goes to the inner backend as written" in said[0]
    assert attnc.last_report(fast).problems


def test_strict_refuses_a_graph_that_cannot_be_captured():
    with pytest.raises(BackendCompilerFailed, match=r"CaptureError: retrace the graph to ATen.*transform grad"):
        compiled(untraceable)(torch.randn(2, 4))

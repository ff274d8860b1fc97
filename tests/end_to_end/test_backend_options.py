"""Options on their way through torch.compile to attnc and on to the inner backend."""
from __future__ import annotations

import re

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import config

import attnc
from attnc import backend
from attnc.codegen.cpu_recurrence import Given
from attnc.codegen.load import kernel_folder, listing
from attnc.forms import parse_form
from attnc.forms.chunked import Chunked
from attnc.forms.flash import Flash
from attnc.op_recurrence import RECURRENCE
from attnc.options import Options
from attnc.rule_recurrence import RecurrenceRule
from tests.tiny import Net, compiled, rewritten, tokens
from tests.tolerance import assert_close


def failure(model=None, **given) -> str:
    """What torch.compile says when it is given these options."""
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(model or Net(), backend="attnc", **given)(tokens())
    return str(caught.value)


def test_backend_is_found_by_name():
    assert "attnc" in torch._dynamo.list_backends()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"strikt": True}, "UsageError: option strikt=True: no such option.*Did you mean 'strict'"),
        ({"inner": "inductr"}, "no such inner compiler.*Did you mean 'inductor'"),
        ({"strict": 1}, "found int, allowed is bool"),
        ({"force": "dens"}, "form 'dens': no such form.*Did you mean 'dense'"),
        ({"forms": ["dense", "spars"]}, "form 'spars': no such form"),
        ({"max_autotune": True}, "setting of Inductor.*inductor"),
        ({"inductor": {"max_autotun": True}}, "max_autotun"),
        ({"inner": "aot_eager", "inductor": {"max_autotune": True}}, "only the inner compiler 'inductor'"),
    ],
)
def test_wrong_options_are_named(options, says):
    text = failure(options=options).replace("\n", " ")
    assert re.search(says, text), text


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_kernels_lie_in_the_store_that_the_options_name(inner, tmp_path, monkeypatch):
    for asked in ("refuse", "misfit"):  # a CPU will do: Triton's interpreter runs the kernels
        monkeypatch.setattr(Flash, asked, lambda *_: None)
    model, x, own = Net(1), tokens(17, 1), listing(kernel_folder(Options().store))
    tiles = {f"{kernel}block_{axis}": 16 for kernel in ("", "dq_", "dkv_") for axis in "mn"}
    force = Flash(**tiles, precision="ieee").spell()
    fast = compiled(model, inner=inner, force=force, options={"store": str(tmp_path / "a | b @ c")})
    fast(x).sum().backward()
    assert rewritten(fast) == 1
    found = listing(kernel_folder(tmp_path / "a | b @ c"))
    assert len(found) == 2, "forward and backward"
    assert listing(kernel_folder(Options().store)) == own


class Retention(torch.nn.Module):
    """A recurrence, written as its operator."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = x.unflatten(-1, (3, 1, -1)).transpose(1, 3).unbind(2)
        return RECURRENCE(q, k, v, *[None] * 5, RecurrenceRule(scale=0.25, chunk=16).spell())[0]


def test_kernels_of_recurrences_lie_in_the_store_that_the_options_name(tmp_path, monkeypatch):
    monkeypatch.setattr(Chunked, "launches", lambda *_: True)
    monkeypatch.setattr(Chunked, "run", Chunked.launch)
    monkeypatch.setattr(Chunked, "gradients", Chunked.launch_gradients)
    x, own = torch.randn(1, 20, 48, requires_grad=True), listing(kernel_folder(Options().store))
    options = {"store": str(tmp_path / "a | b @ c"), "force": Chunked(16, block_v=16).spell(), "inner": "eager"}
    out = torch.compile(Retention(), backend="attnc", options=options)(x)
    found = listing(kernel_folder(options["store"]))
    (got,) = torch.autograd.grad(out.sum(), x)
    (want,) = torch.autograd.grad(Retention()(x).sum(), x)
    assert len(found) == 3 and len(listing(kernel_folder(options["store"]))) == 6, "forward, then backward"
    assert listing(kernel_folder(Options().store)) == own
    assert_close(got, want)


@pytest.mark.parametrize("form", ["scan", "step"])
def test_every_form_of_a_recurrence_follows_its_store(form, tmp_path):
    given, rule = Given(torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)), RecurrenceRule()
    parse_form(form).launch(given, rule, store=str(tmp_path))
    assert len(listing(kernel_folder(tmp_path))) == 1


def test_the_device_may_be_one_of_a_file(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text('[mine]\nlike = "cpu"\nsource = { figures = "me" }\n')
    fast = torch.compile(Net(1), backend="attnc", options={"device": str(file), "inner": "eager"})
    fast(tokens())
    (region,) = attnc.last_report(fast).regions
    assert "mine" in region.choice.reason or region.choice.predicted_s is not None
    assert "no such device in" in failure(options={"device": f"{file}:h100"})
    file.write_text('[mine]\nlike = "h100"\ntitle = "Mine"\nsource = { figures = "me" }\n')
    assert "found a model on cpu, allowed is one on a GPU" in failure(options={"device": str(file)})


def test_unknown_mode_is_named():
    assert "no such mode of Inductor" in failure(mode="max-autotun")


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_inner_backends(inner):
    model, x = Net().eval(), tokens()
    fast = compiled(model, inner=inner)
    with torch.no_grad():
        assert_close(fast(x), model(x))
    assert rewritten(fast) == 2


@pytest.fixture
def patches(monkeypatch):
    """What Inductor is called with, instead of a compile."""
    seen = []

    def compile_fx(gm, example_inputs, *, config_patches):
        seen.append(config_patches)
        return gm.forward

    monkeypatch.setattr(backend, "compile_fx", compile_fx)
    return seen


def test_mode_and_settings_reach_inductor(patches):
    model, x = Net(), tokens()
    torch.compile(model, backend="attnc", mode="max-autotune")(x)
    torch._dynamo.reset()
    settings = {"mode": "max-autotune", "inductor": {"max-fusion-size": 7}}  # torch.compile takes either of the two
    torch.compile(model, backend="attnc", options=settings)(x)
    first, found = patches
    assert first["max_autotune"] is found["max_autotune"] is True
    assert found["max_fusion_size"] == 7
    assert set(found) - {"joint_custom_pre_pass", "joint_custom_post_pass"} <= set(config.get_config_copy())


def test_settings_win_over_the_mode_and_nothing_leaks(patches):
    before = config.get_config_copy()
    settings = {"mode": "max-autotune", "inductor": {"max_autotune": False}}
    torch.compile(Net(), backend="attnc", options=settings)(tokens())
    assert patches[0]["max_autotune"] is False
    assert config.get_config_copy() == before


def test_default_mode_sets_nothing(patches):
    torch.compile(Net(), backend="attnc", mode="default")(tokens())
    assert set(patches[0]) == {"joint_custom_pre_pass", "joint_custom_post_pass"}


def test_max_autotune_runs_through_inductor():
    model, x = Net(1).eval(), tokens()
    fast = compiled(model, inner="inductor", options={"mode": "max-autotune-no-cudagraphs"})
    with torch.no_grad():
        assert_close(fast(x), model(x))
    assert rewritten(fast) == 1


def test_forms_limits_the_choice_and_check_can_be_switched_off(monkeypatch):
    model, x = Net().eval(), tokens()
    fast = torch.compile(model, backend="attnc", options={"inner": "eager", "forms": ("dense",), "check": False})
    monkeypatch.setattr("attnc.passes.apply.check", lambda *_: pytest.fail("checked"))
    unchecked = compiled(model, inner="eager", options={"check": False})
    with torch.no_grad():
        assert_close(unchecked(x), model(x))
        torch._dynamo.reset()
        fast(x)
    assert rewritten(unchecked) == 2
    forms = {name for region in attnc.last_report(fast).regions for name in region.choice.refused}
    assert not any(name.startswith("block_sparse") for name in forms)

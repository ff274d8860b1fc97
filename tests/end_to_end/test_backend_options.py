"""Options on their way through torch.compile to attnc and on to the inner backend."""
from __future__ import annotations

import re

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import config

import attnc
from attnc import backend
from attnc.codegen.load import kernel_folder, listing
from attnc.forms.flash import Flash
from attnc.options import Options
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
    model, x, own = Net(1), tokens(33), listing(kernel_folder(Options().store))
    tiles = {f"{kernel}block_{axis}": 16 for kernel in ("", "dq_", "dkv_") for axis in "mn"}
    force = Flash(**tiles, precision="ieee").spell()
    fast = compiled(model, inner=inner, force=force, options={"store": str(tmp_path / "a | b @ c")})
    fast(x).sum().backward()
    assert rewritten(fast) == 1
    found = listing(kernel_folder(tmp_path / "a | b @ c"))
    assert len(found) == 2, "forward and backward"
    assert listing(kernel_folder(Options().store)) == own


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

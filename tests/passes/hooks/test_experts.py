"""Substitutes for loops over experts agree with transformers' own code, and keep a model in one graph."""
from __future__ import annotations

import sys

import pytest
import torch

import attnc
from attnc.passes.hooks import experts as hook_experts
from attnc.passes.hooks.table import HOOKS, hook_of
from tests.gallery_run import attnc_compiled

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install attnc[dev]")

T, D, W, N = 7, 24, 40, 6


def modeling(name: str):
    """A module of transformers by model type, or a skip where the release has no such model."""
    return pytest.importorskip(f"transformers.models.{name}.modeling_{name}")


def modeling_interface():
    return pytest.importorskip(hook_experts.INTERFACE)


def ids(count: int, slots: int = 2):
    return torch.rand(T, count).topk(slots, dim=-1).indices


def dbrx():
    config = transformers.DbrxConfig(d_model=D, ffn_config={"ffn_hidden_size": W, "moe_num_experts": N}).ffn_config
    config.hidden_size = D
    experts = modeling("dbrx").DbrxExperts(config)
    return experts, {"hidden_states": torch.randn(1, T, D), "top_k_index": ids(N), "top_k_weights": torch.rand(T, 2)}


def longcat():
    config = transformers.LongcatFlashConfig(
        hidden_size=D, expert_ffn_hidden_size=W, n_routed_experts=N, zero_expert_num=3
    )
    experts = modeling("longcat_flash").LongcatFlashExperts(config)
    return experts, {"hidden_states": torch.randn(T, D), "top_k_index": ids(N + 3), "top_k_weights": torch.rand(T, 2)}


def switch():
    config = transformers.SwitchTransformersConfig(d_model=D, d_ff=W, num_experts=N, dropout_rate=0.0)
    chosen = torch.nn.functional.one_hot(torch.randint(0, N, (T, 1)), N)
    given = {"hidden_states": torch.randn(T, D), "selected_experts": chosen, "routing_weights": torch.rand(T, 1)}
    return modeling("switch_transformers").SwitchTransformersExperts(config), given


def nllb():
    config = transformers.NllbMoeConfig(d_model=D, num_experts=N, moe_token_dropout=0.2)
    mask = torch.nn.functional.one_hot(torch.randint(0, N, (T,)), N)
    given = {"hidden_states": torch.randn(T, D), "router_mask": mask, "router_probs": torch.rand(T, N)}
    return modeling("nllb_moe").NllbMoeExperts(config, W).eval(), given


def jetmoe_gating():
    return modeling("jetmoe").JetMoeTopKGating(D, N, 2), {"hidden_states": torch.randn(T, D)}


def jetmoe_experts():
    module = modeling("jetmoe").JetMoeParallelExperts(N, D, W)
    return module, {"inputs": torch.randn(T, D), "expert_size": [2, 0, 1, 3, 1, 0]}


CASES = (dbrx, longcat, switch, nllb, jetmoe_gating, jetmoe_experts)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_substitute_agrees_with_the_loop(case, dtype):
    module, given = case()
    module = module.to(dtype)
    arguments = {"self": module} | {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in given.items()
    }
    function = type(module).forward
    hook = hook_of(function)
    assert hook is not None
    with torch.no_grad():
        assert hook.refuse(arguments) is None
    assert hook.disagreement(function, arguments) == ""


def of_interface():
    """Each class that the installed release decorates, with a model type to build it from."""
    rows = {"mixtral": "Mixtral", "gpt_oss": "GptOss", "qwen3_moe": "Qwen3Moe", "nemotron_h": "NemotronH",
            "deepseek_v4": "DeepseekV4", "muse_spark": "MuseSpark"}
    return [(name, f"{prefix}Experts") for name, prefix in rows.items()]


@pytest.mark.parametrize(("name", "owner"), of_interface())
def test_eager_forward_of_the_interface_is_the_row_and_its_wrapper_is_not(name, owner):
    experts = getattr(modeling(name), owner)
    assert isinstance(hook_of(experts.forward.__wrapped__), hook_experts.InterfaceHook)
    assert hook_of(experts.forward) is None


def test_experts_without_the_interface_are_not_its_row():
    llama = modeling("llama4").Llama4TextExperts
    assert hook_of(llama.forward) is None


@pytest.mark.parametrize("training", [False, True])
def test_dropout_inside_experts_is_refused_in_training(training):
    config = transformers.SwitchTransformersConfig(d_model=D, d_ff=W, num_experts=N, dropout_rate=0.1)
    module = modeling("switch_transformers").SwitchTransformersExperts(config).train(training)
    with torch.no_grad():
        assert (hook_experts.unfit({"self": module}) is not None) == training


def test_narrow_types_need_whole_groups_of_bytes():
    weight = torch.nn.Linear(24, 20, bias=False)
    with torch.no_grad():
        assert hook_experts.unfit({"self": weight}) is None
        assert "20 numbers" in hook_experts.unfit({"self": weight.to(torch.bfloat16)})


def test_training_needs_a_grouped_product_with_a_traceable_backward(monkeypatch):
    weight = torch.nn.Linear(24, 20, bias=False)
    interface = modeling_interface()
    monkeypatch.setattr(interface, hook_experts.BACKWARD, None, raising=False)
    assert hook_experts.unfit({"self": weight}) is None
    monkeypatch.delattr(interface, hook_experts.BACKWARD)
    assert "cannot be traced" in hook_experts.unfit({"self": weight})
    with torch.no_grad():
        assert hook_experts.unfit({"self": weight}) is None


def small_mixtral():
    config = transformers.MixtralConfig(
        hidden_size=D, intermediate_size=W, num_local_experts=N, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=12, vocab_size=32, max_position_embeddings=64, use_cache=False,
    )
    model = transformers.MixtralForCausalLM._from_config(config, attn_implementation="eager")
    model.set_experts_implementation("eager")
    return model.eval()


@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_eager_experts_stay_in_one_graph_and_compute_the_same(train):
    if train and not hasattr(modeling_interface(), hook_experts.BACKWARD):
        pytest.skip(f"transformers {transformers.__version__} has no grouped product that trains in one graph")
    torch.manual_seed(0)
    model, tokens = small_mixtral().train(train), torch.randint(0, 32, (2, 9))
    with torch.set_grad_enabled(train):
        want = model(tokens).logits
        compiled = attnc_compiled(model)
        got = compiled(tokens).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    report = attnc.last_report(compiled)
    found = [region for region in report.regions if region.kind == "moe"]
    assert report.graphs == 1
    assert [(r.rule.normalise, r.shape.num_experts, r.shape.top_k, r.written) for r in found] == [
        ("chosen", N, 2, "grouped_mm")] * 2
    if train:
        weight = model.model.layers[0].mlp.experts.down_proj
        (grad,) = torch.autograd.grad(want.square().sum(), weight, retain_graph=True)
        (own,) = torch.autograd.grad(got.square().sum(), weight)
        torch.testing.assert_close(own, grad, rtol=1e-3, atol=1e-4)


def test_rows_of_experts_name_functions_of_the_installed_release():
    for hook in HOOKS:
        if hook.home and hook.substitute.__module__ == hook_experts.__name__:
            __import__(hook.home)
            found = sys.modules[hook.home]
            for part in hook.name.split("."):
                found = getattr(found, part)
            assert hook_of(found) == hook

"""The rows for transformers: each agrees with its function; small models of each kind have one node for a mixer."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import attnc
from attnc.backend import attnc_backend
from attnc.passes.hooks import table as hooks
from attnc.passes.hooks.hook import Hook
from tests.tolerance import assert_close

transformers = pytest.importorskip("transformers")

MIXERS = [
    hook
    for hook in hooks.HOOKS
    if hook.substitute.__module__.rpartition(".")[2] in ("recurrence", "state_space")
]
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 31, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip


def original(hook: Hook) -> Callable[..., Any]:
    """The library's own function, without what picks a kernel for it. Skips where this release has none."""
    found: Any = pytest.importorskip(hook.home)
    for name in hook.name.split("."):
        found = getattr(found, name, None)
    if found is None:
        pytest.skip(f"transformers {transformers.__version__} has no {hook.name}")
    return inspect.unwrap(found)


# What calls are made of, tensors by their number of dimensions: (B, L, H, K) and the like, larger than a sample.
DIMS = {
    "torch_chunk_gated_delta_rule": {"query": 4, "key": 4, "value": 4, "g": 3, "beta": 3},
    "chunk_kimi_delta_attention": {"query": 4, "key": 4, "value": 4, "g": 4, "beta": 3},
    "mamba_selective_scan": {"hidden_states": 3, "dt": 3, "A": 2, "B": 3, "C": 3},
    "mamba_selective_state_update": {"state": 3, "hidden_states": 2, "dt": 2, "A": 2, "B": 2, "C": 2},
    "mamba2_chunk_scan": {"hidden_states": 4, "dt": 3, "A": 1, "B": 4, "C": 4},
    "mamba2_selective_state_update": {"state": 4, "hidden_states": 3, "dt": 3, "A": 3, "B": 3, "C": 3},
    "_rnn_scan": {"hidden_states": 3, "recurrent_gate": 3, "reset": 3},
    "rwkv_linear_attention_cpu": {"time_decay": 1, "time_first": 1, "key": 3, "value": 3},
    "mlstm_recurrent_step_native": {
        "query": 3, "key": 3, "value": 3, "igate": 3, "fgate": 3, "cstate": 4, "nstate": 3, "mstate": 3,
    },
}  # fmt: skip
DIMS["torch_recurrent_gated_delta_rule"] = DIMS["torch_chunk_gated_delta_rule"]
DIMS["recurrent_kimi_delta_attention"] = DIMS["chunk_kimi_delta_attention"]
for _name in ("mlstm_chunkwise_native_autograd", "mlstm_recurrent_sequence_native", "wrap_chunkwise_pad_zeros",
              "wrap_chunkwise_arbitrary_sequence_length"):  # fmt: skip
    DIMS[_name] = {"query": 4, "key": 4, "value": 4, "igate": 3, "fgate": 3}
MORE = {
    "initial_state": 4, "initial_states": 4, "z": 3, "D": 1, "delta_bias": 1, "dt_bias": 1, "recurrent_states": 2,
    "c_initial": 4, "n_initial": 3, "m_initial": 3,
}  # fmt: skip
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "use_qk_l2norm_in_kernel": [{"use_qk_l2norm_in_kernel": True}],
    "delta_softplus": [{"delta_softplus": True}],
    "dt_softplus": [{"dt_softplus": True}],
}
STATES = ("output_final_state", "return_last_state", "return_final_states", "return_state", "return_last_states")
KERNELS = {
    "mlstm_chunkwise_kernel": "mlstm_chunkwise_native_autograd",
    "mlstm_sequence_kernel": "mlstm_recurrent_sequence_native",
    "mlstm_step_kernel": "mlstm_recurrent_step_native",
}


def calls(hook: Hook, function: Callable[..., Any], dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Arguments of calls: the least, and with all that may be given."""
    known = inspect.signature(function).parameters
    least = {
        name: None if p.default is p.empty else p.default for name, p in known.items() if p.kind < 2 or p.kind == 3
    }
    least |= {name: torch.ones((4,) * dims, dtype=dtype) for name, dims in DIMS[hook.last_name].items()}
    least |= {"chunk_size": 8} if "chunk_size" in known else {}
    home = inspect.getmodule(function)
    least |= {name: getattr(home, kernel) for name, kernel in KERNELS.items() if name in known}
    yield least
    given = {name: torch.ones((4,) * dims, dtype=dtype) for name, dims in MORE.items() if name in known}
    if hook.last_name == "mamba2_selective_state_update":
        given = {name: torch.ones((4,) * 2, dtype=dtype) for name in ("D", "dt_bias")}
    if hook.last_name == "mamba_selective_state_update":
        given["z"] = torch.ones(4, 4, dtype=dtype)
    if hook.last_name == "rwkv_linear_attention_cpu":
        given["state"] = [torch.ones(4, 4)] * 3
    flags = dict.fromkeys((name for name in (*STATES, *SETTINGS) if name in known), True)
    if hook.last_name == "wrap_chunkwise_pad_zeros":  # padding would change the states
        flags, given = {}, {}
    yield {**least, **given, **flags}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("hook", [h for h in MIXERS if h.last_name in DIMS], ids=lambda h: h.last_name)
def test_each_substitute_agrees_with_its_function(hook: Hook, dtype: torch.dtype) -> None:
    function = original(hook)
    for arguments in calls(hook, function, dtype):
        try:
            function(**hook.sample(arguments, torch.Generator()))
        except RuntimeError:  # transformers mixes dtypes in some of them
            continue
        assert hook.disagreement(function, arguments) == ""


def test_every_row_of_a_mixer_is_tested() -> None:
    assert {h.last_name for h in MIXERS} == {*DIMS, "forward"}
    assert all(importlib.util.find_spec(h.home) for h in MIXERS)


def made(name: str, config: str, **given: Any) -> torch.nn.Module:
    if not hasattr(transformers, config):
        pytest.skip(f"transformers {transformers.__version__} has no {config}")
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**{**SIZES, **given})).eval()


def qwen3_next(*kinds: str) -> torch.nn.Module:
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    return made(
        "Qwen3NextForCausalLM", "Qwen3NextConfig", **LINEAR, **experts, shared_expert_intermediate_size=16, head_dim=8,
        mlp_only_layers=[0, 1], layer_types=list(kinds),
    )  # fmt: skip


def minimax(*kinds: str) -> torch.nn.Module:
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    return made("MiniMaxForCausalLM", "MiniMaxConfig", **experts, head_dim=16, block_size=16, layer_types=list(kinds))


def recurrent_gemma() -> torch.nn.Module:
    sizes = {"lru_width": 32, "head_dim": 16, "attention_window_size": 16, "block_types": ["recurrent", "attention"]}
    return made("RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", **sizes)


def llama() -> torch.nn.Module:
    return made("LlamaForCausalLM", "LlamaConfig")


HYBRID, ATTENTION = ("linear_attention", "full_attention"), ("full_attention",) * 2
# How many recurrences; the model; a model of the same depth with attention in their place.
MODELS: dict[str, tuple[int, Callable[[], torch.nn.Module], Callable[[], torch.nn.Module]]] = {
    "qwen3_next": (1, lambda: qwen3_next(*HYBRID), lambda: qwen3_next(*ATTENTION)),
    "minimax": (1, lambda: minimax(*HYBRID), lambda: minimax(*ATTENTION)),
    "recurrent_gemma": (1, recurrent_gemma, llama),
    "mamba": (2, lambda: made("MambaForCausalLM", "MambaConfig", state_size=4), llama),
    "mamba2": (
        2,
        lambda: made("Mamba2ForCausalLM", "Mamba2Config", num_heads=8, head_dim=8, state_size=8, n_groups=2),
        llama,
    ),
    "xlstm": (2, lambda: made("xLSTMForCausalLM", "xLSTMConfig", num_blocks=2, num_heads=2, chunk_size=16), llama),
    "rwkv": (2, lambda: made("RwkvForCausalLM", "RwkvConfig", attention_hidden_size=32), llama),
}


def slow_but(*quick: str) -> Any:
    """Every model; all but `quick` are slow."""
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in MODELS]
    )


IDS = torch.arange(2 * 48).reshape(2, 48) * 7 % 31


def counted(model: torch.nn.Module, graphs: list[int], **given: Any) -> Callable[..., Any]:
    """`model` compiled by attnc; nodes of each graph are entered in `graphs`."""

    @hooks.mine
    def backend(gm: torch.fx.GraphModule, inputs: list) -> Callable[..., Any]:
        graphs.append(sum(node.op != "placeholder" for node in gm.graph.nodes))
        return attnc_backend(gm, inputs, options={"inner": "aot_eager", "strict": True})

    return torch.compile(model, backend=backend, **given)


def logits(model: Callable[..., Any], ids: Tensor = IDS) -> Tensor:
    return model(ids, use_cache=False).logits


@slow_but("qwen3_next", "xlstm")
def test_small_models_are_one_small_graph_and_compute_the_same(name: str) -> None:
    expected, make, attention = MODELS[name]
    model, graphs = make(), []
    compiled = counted(model, graphs)
    with torch.no_grad():
        assert_close(logits(compiled), logits(model))
        logits(counted(attention(), graphs))
    report = attnc.last_report(compiled)
    assert report.counts()["kinds"]["recurrence"] == expected and not report.problems
    assert all(r.written == "operator" for r in report.regions if r.kind == "recurrence")
    assert len(graphs) == 2 and graphs[0] <= 1.5 * graphs[1]


@slow_but("mamba")
def test_gradients_of_small_models(name: str) -> None:
    model = MODELS[name][1]()
    grads = []
    for run in (model, counted(model, [])):
        model.zero_grad()
        logits(run).square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    scale = max(g.abs().max() for g in grads[0].values())
    for n, grad in grads[0].items():
        assert (grad - grads[1][n]).abs().max() <= 1e-4 * max(grad.abs().max(), 1e-2 * scale), n


@pytest.mark.slow
def test_one_graph_for_every_length() -> None:
    model, graphs = MODELS["mamba2"][1](), []
    compiled = counted(model, graphs, dynamic=True)
    with torch.no_grad():
        for length in (17, 33, 48):
            ids = IDS[:, :length].contiguous()
            with torch._dynamo.config.patch(error_on_recompile=length != 17):
                assert_close(logits(compiled, ids), logits(model, ids))


@pytest.mark.parametrize("name", [pytest.param("mamba", marks=pytest.mark.slow), "mamba2"])
def test_cached_decode_gives_the_tokens_of_eager(name: str) -> None:
    given = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    want = MODELS[name][1]().generate(IDS[:, :9], disable_compile=True, **given)
    model = MODELS[name][1]()
    model.forward = torch.compile(model.forward, backend="attnc", options={"inner": "aot_eager", "strict": True})
    assert torch.equal(model.generate(IDS[:, :9], disable_compile=True, **given), want)
    regions = [r for r in attnc.last_report(model.forward).regions if r.kind == "recurrence"]
    assert regions and all(r.rule.state_in and r.rule.state_out for r in regions)

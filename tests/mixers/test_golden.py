"""Named mixers against the original authors' vectors (shared/golden), outputs, states and gradients in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc.codegen import feature_maps, linear_attention
from attnc.mixers import linear, log_linear, test_time
from attnc.mixers.native_sparse import native_sparse, selected_blocks
from tests.conftest import Golden

T = Mapping[str, Tensor]
Run = Callable[[T, Mapping[str, Any]], dict[str, Tensor]]


def _linear(t: T, o: Mapping[str, Any]) -> dict[str, Tensor]:
    initial = torch.cat([t["initial_state"], t["initial_z"][..., None]], -1) if "initial_z" in t else None
    out, last = linear_attention.linear_attention(
        t["q"], t["k"], t["v"], scale=o["scale"], eps=1e-10, initial_state=initial
    )
    return {"out": out, "final_state": last[..., :-1], "final_z": last[..., -1]}


def _bidirectional(t: T, o: Mapping[str, Any]) -> dict[str, Tensor]:
    q, k = feature_maps.elu1(t["q"]), feature_maps.elu1(t["k"])
    if "key_lengths" in t:
        seen = torch.arange(k.shape[2]) < t["key_lengths"].long()[:, None]
        k = k * seen[:, None, :, None]
    return {"out": q @ (k.mT @ t["v"]) / (q @ k.sum(2)[..., None] + o["eps"])}


def _mapped(name: str) -> Run:
    def run(t: T, o: Mapping[str, Any]) -> dict[str, Tensor]:
        q, k = (getattr(feature_maps, name)(t[x], o["scale"]) for x in "qk")
        return {"out": linear_attention.linear_attention(q, k, t["v"], normalise=o["use_norm"])[0]}

    return run


def _hedgehog(t: T, o: Mapping[str, Any]) -> dict[str, Tensor]:
    kind = o["activation"].removesuffix("_dim")
    q, k = (feature_maps.hedgehog(t[x], t[f"fm_{x}"], kind=kind, skip=o["skip"]) for x in "qk")
    return {"out": linear_attention.linear_attention(q, k, t["v"], eps=1e-12)[0], "phi_q": q}


def _lolcats(t: T, o: Mapping[str, Any]) -> dict[str, Tensor]:
    operands = (t[x] for x in ("q", "k", "v", "phi_q", "phi_k", "window_factor", "linear_factor"))
    return {"out": linear_attention.window_and_linear(*operands, window=o["window_size"], scale=o["scale"])[0]}


def _gsa(t: T, o: Mapping[str, Any]) -> dict[str, Tensor]:
    first, second = t.get("initial_state_k"), t.get("initial_state_v")
    found = linear.gated_slots(
        t["q"], t["k"], t["v"], t["s"], t["g"], scale=o["scale"], initial_key=first, initial_value=second
    )
    return dict(zip(("out", "final_state_k", "final_state_v"), found, strict=True))


def _stated(found: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(("out", "final_state", "final_state_bias"), found, strict=False))


def _product(t: T, o: Mapping[str, Any]) -> dict[str, Tensor]:
    operands = (t[x] for x in ("q", "k", "v", "g", "beta"))
    return _stated(linear.delta_product(*operands, o["num_householder"], initial_state=t["initial_state"]))


def _comba(t: T, o: Mapping[str, Any]) -> dict[str, Tensor]:
    operands = (t[x] for x in ("q", "k", "v", "p", "g", "beta"))
    return _stated(linear.comba(*operands, scale=o["scale"], initial_state=t["initial_state"]))


def _log_linear(t: T, o: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"out": log_linear.log_linear_attention(*(t[x] for x in ("q", "k", "v", "g", "level_scales")))}


def _flow(t: T, o: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"out": linear.flow_attention(t["q"], t["k"], t["v"], causal=o["causal"], eps=o["eps"])}


def _ttt(t: T, o: Mapping[str, Any]) -> dict[str, Tensor]:
    operands = (t[x] for x in ("q", "k", "v", "w", "b", "eta"))
    state, bias = t.get("initial_state"), t.get("initial_state_bias")
    return _stated(
        test_time.ttt_linear(
            *operands, mini_batch=o["mini_batch"], scale=o["scale"], initial_state=state, initial_bias=bias
        )
    )


def _titans(t: T, o: Mapping[str, Any]) -> dict[str, Tensor]:
    operands = (t[x] for x in ("q", "k", "v", "w", "b", "theta", "alpha", "eta"))
    return _stated(test_time.titans_linear(*operands, chunk=o["chunk"], initial_state=t["initial_state"]))


def _memory(t: T, o: Mapping[str, Any]) -> dict[str, Tensor]:
    x = t["x"]
    q, k, v = ((x @ t[f"w.to_{name}.weight"].mT)[:, None] for name in ("queries", "keys", "values"))
    rate = (x @ t["w.to_adaptive_step.0.weight"].mT + t["w.to_adaptive_step.0.bias"]).sigmoid()[:, None]
    mean = x.unflatten(1, (-1, o["chunk"])).mean(2)
    momentum, forget = (
        (mean @ t[f"w.{name}.0.weight"].mT + t[f"w.{name}.0.bias"]).sigmoid().mT
        for name in ("to_momentum", "to_decay_factor")
    )
    start = t["w.memory_model_parameters.0"]
    out = test_time.neural_memory(q, k, v, rate, momentum, forget, start, chunk=o["chunk"])
    return {"out": out.squeeze(1)}


def _native_sparse(t: T, o: Mapping[str, Any]) -> dict[str, Tensor]:
    knobs = {"block": o["block_size"], "top_k": o["block_counts"], "scale": o["scale"]}
    gates = (t["g_cmp"], t["g_slc"], t["g_swa"])
    out = native_sparse(t["q"], t["k"], t["v"], gates, window=o["window"], **knobs)
    return {"out": out, "block_indices": selected_blocks(t["q"], t["k"], **knobs)}


FILES: dict[str, Run] = {
    "linear_attention/n70_norm_state_grad": _linear,
    "linear_attention/n200_norm": _linear,
    "linear_attention_elu_bidirectional/n64_grad": _bidirectional,
    "linear_attention_elu_bidirectional/n200_pad": _bidirectional,
    "based/n64_norm_grad": _mapped("taylor"),
    "based/n200_nonorm": _mapped("taylor"),
    "rebased/n64_norm_grad": _mapped("squares"),
    "hedgehog/n64_softmax_dim_grad": _hedgehog,
    "hedgehog/n150_exp_dim": _hedgehog,
    "lolcats_hybrid/n64_w16_grad": _lolcats,
    "gsa/n64_state_grad": _gsa,
    "gsa/n200": _gsa,
    "gated_delta_product/n48_nh2_state_grad": _product,
    "comba/n64_state_grad": _comba,
    "log_linear_attention/n64_grad": _log_linear,
    "log_linear_attention/n200": _log_linear,
    "flow_attention/n64_bidir_grad": _flow,
    "flow_attention/n100_causal": _flow,
    "ttt_linear/n64_state_grad": _ttt,
    "ttt_linear/n128": _ttt,
    "titans_linear/n48_c16_grad": _titans,
    "titans_neural_memory/n32_chunk1_grad": _memory,
    "titans_neural_memory/n48_chunk4_batch4": _memory,
    "nsa/n64_g2_grad": _native_sparse,
    "nsa/n200_g2": _native_sparse,
}


@pytest.mark.parametrize("name", FILES)
def test_golden_vectors_are_reproduced(name: str, golden: Callable[[str], Golden]) -> None:
    file = golden(name)
    given = {key: x.double() if x.is_floating_point() else x for key, x in file.inputs.items()}
    learned = [key for key in given if f"grad_{key}" in file.tensors]
    for key in learned:
        given[key].requires_grad_()
    found = FILES[name](given, file.options)
    for key, want in file.outputs.items():
        if not want.is_floating_point() and key in found:  # a choice, in any order
            want, found[key] = (x.long().sort(-1).values for x in (want, found[key]))
        assert key not in found or off(found[key], want) < 2e-6, key
    assert "out" in found
    reached = [(found[key], file.tensors[f"cot_{key}"].double()) for key in found if f"cot_{key}" in file.tensors]
    if learned:
        outs, cotangents = zip(*reached, strict=True)
        grads = torch.autograd.grad(outs, [given[key] for key in learned], cotangents)
        for key, grad in zip(learned, grads, strict=True):
            assert off(grad, file.tensors[f"grad_{key}"]) < 2e-6, key


def off(got: Tensor, want: Tensor) -> float:
    return ((got.detach().double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)).item()

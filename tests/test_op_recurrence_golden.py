"""The recurrence operator against third-party golden vectors (shared/golden), outputs, states and gradients.

Each form says what of its file is the operand of which name, and what of its file the results are; in between stands
the operator, with the rule's settings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnc.rule_recurrence import RecurrenceRule
from tests.recurrences import INPUTS, apply

Held = dict[str, Tensor]
DELTA, BY_CHANNEL, BY_TOKEN = {"delta": True, "gate": "write"}, {"decay": "channel"}, {"decay": "token"}
GATED_DELTA, LOW_RANK = {**DELTA, **BY_TOKEN}, {"low_rank": True}

FILES: dict[str, dict[str, Any]] = {
    "linear_attention/n64_unnorm_state_grad": {},
    "linear_attention/n200_norm": {"normaliser": "sum", "eps": 1e-10},
    "linear_attention/n70_norm_state_grad": {"normaliser": "sum", "eps": 1e-10},
    "lightning_attention/n64_grad": {"decay": "head"},
    "lightning_attention/n200_dv24": {"decay": "head"},
    "retention/n64_grad": {"decay": "head"},
    "retention/n200_dv32": {"decay": "head"},
    "simple_gla/n64_state_grad": BY_TOKEN,
    "simple_gla/n200": BY_TOKEN,
    "gla/n64_state_grad": BY_CHANNEL,
    "gla/n200": BY_CHANNEL,
    "gla/n128_strong_decay": BY_CHANNEL,
    "hgrn2/n64_state_grad": BY_CHANNEL,
    "hgrn2/n200": BY_CHANNEL,
    "deltanet/n64_state_grad": DELTA,
    "deltanet/n200": DELTA,
    "deltanet/n128_beta2": DELTA,
    "gated_deltanet/n64_fla_state_grad": GATED_DELTA,
    "gated_deltanet/n200_fla": GATED_DELTA,
    "gated_deltanet/n200_hfchunk_l2_gva": GATED_DELTA,
    "gated_delta_product/n48_nh2_state_grad": GATED_DELTA,
    "kda/n64_state_grad": {**DELTA, **BY_CHANNEL},
    "kda/n200": {**DELTA, **BY_CHANNEL},
    "kda/n200_hfchunk_l2": {**DELTA, **BY_CHANNEL},
    "comba/n64_state_grad": {**LOW_RANK, **BY_TOKEN, "gate": "write"},
    "dplr_delta_rule/n64_state_grad": {**LOW_RANK, **BY_CHANNEL},
    "dplr_delta_rule/n200": {**LOW_RANK, **BY_CHANNEL},
    "rwkv7_time_mixing/n48_h2": {**LOW_RANK, **BY_CHANNEL},
    "rwkv6/n64_state_grad": {**BY_CHANNEL, "read": "before"},
    "rwkv6/n200_dv24": {**BY_CHANNEL, "read": "before"},
    "hgrn/n64_state_grad": BY_TOKEN,
    "hgrn/n200": BY_TOKEN,
    "ssd_minimal/n64_state_grad": BY_TOKEN,
    "ssd_minimal/n192": BY_TOKEN,
    "mamba2_scan/n64_state_grad": {**BY_TOKEN, "gate": "write"},
    "mamba2_scan/n200_step": {**BY_TOKEN, "gate": "write"},
    "mamba1_selective_scan/n64_grad": {"decay": "state", "gate": "write"},
    "hedgehog/n64_softmax_dim_grad": {"normaliser": "sum", "eps": 1e-12},
    "based/n64_norm_grad": {"normaliser": "sum", "eps": 1e-6},
    "based/n200_nonorm": {},
    "rebased/n64_norm_grad": {"normaliser": "sum", "eps": 1e-6},
}


# What of a file is which operand. Names that stand in the file under the operand's own name, or as here, need no more.

ALIKE = {
    "query": "q", "key": "k", "value": "v", "decay": "g", "beta": "beta", "initial_state": "initial_state",
    "a": "a", "b": "b",
}  # fmt: skip


def _linear(t: Held) -> Held:
    if "initial_z" not in t:
        return {}
    return {"initial_state": torch.cat([t["initial_state"], t["initial_z"][..., None]], -1)}


def _mamba2(t: Held) -> Held:
    dt = F.softplus(t["dt"] + t["dt_bias"])
    q, k, v, w = (x.transpose(1, 2) for x in (t["C"], t["Bm"], t["x"], dt))
    start = {"initial_state": t["initial_state"].mT} if "initial_state" in t else {}
    return {"query": q, "key": k, "value": v, "beta": w, "decay": (dt * t["A"]).transpose(1, 2), **start}


def _mamba1(t: Held) -> Held:
    dt = F.softplus(t["delta"] + t["delta_bias"][:, None])
    q, k = (x.mT[:, None] for x in (t["C"], t["Bm"]))
    return {"query": q, "key": k, "value": t["u"][..., None], "decay": dt, "rates": t["A"], "beta": dt}


def _product(t: Held) -> Held:
    """Each step of a token is one of the rule: the decay comes with the first, the output with the last."""
    steps = t["k"].shape[2] // t["q"].shape[2]
    q = F.pad(t["q"][..., None, :], (0, 0, steps - 1, 0)).flatten(2, 3)
    return {"query": q, "decay": F.pad(t["g"][..., None], (0, steps - 1)).flatten(2, 3)}


def _comba(t: Held) -> Held:
    return {"a": t["p"] * t["g"].exp()[..., None], "b": -t["k"] * t["beta"][..., None]}


def _rwkv7(t: Held) -> Held:
    w = {name.removeprefix("w."): x for name, x in t.items()}
    x = t["x"]
    before = F.pad(x[:-1], (0, 0, 1, 0))
    r, d, k, v, a = (x + w[f"m{name}"] * (before - x) for name in "rwkva")
    heads = lambda y: y.unflatten(-1, w["r_k"].reshape(2, -1).shape)[None].transpose(1, 2)  # noqa: E731
    decay = -torch.sigmoid(torch.tanh(d @ w["Ww1"]) @ w["Ww2"] + w["w_bias"]) * torch.tensor(-0.5).double().exp()
    k, a = k @ w["Wk"].T, torch.sigmoid(a @ w["Wa1"] @ w["Wa2"] + w["a_bias"])
    normed = F.normalize(heads(k * w["k_k"]), dim=-1, eps=1e-12)
    operands = {
        "query": heads(r @ w["Wr"].T),
        "key": heads(k * (1 + (a - 1) * w["k_a"])),
        "value": heads(v @ w["Wv"].T),
    }
    return {**operands, "decay": heads(decay), "a": -normed, "b": normed * heads(a)}


def _squares(x: Tensor) -> Tensor:
    return (x[..., None] * x[..., None, :]).flatten(-2)


def _based(t: Held) -> Held:
    def features(x: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(x[..., :1]), x, _squares(x) / 2**0.5], -1)

    return {"query": features(t["q"] * 0.25), "key": features(t["k"])}


def _hedgehog(t: Held) -> Held:
    def features(x: Tensor, weight: Tensor) -> Tensor:
        z = x @ weight
        return torch.cat([z.softmax(-1), (-z).softmax(-1)], -1).clamp(min=1e-12)

    return {"query": features(t["q"], t["fm_q"]), "key": features(t["k"], t["fm_k"])}


OPERANDS: dict[str, Callable[[Held], Held]] = {
    "linear_attention": _linear,
    "lightning_attention": lambda t: {"decay": -t["slope"]},
    "retention": lambda t: {"decay": t["log_gamma"]},
    "hgrn2": lambda t: {"key": 1 - t["g"].exp()},
    "rwkv6": lambda t: {"decay": t["w"], "bonus": t["u"]},
    # Elementwise: as many heads of one state each.
    "hgrn": lambda t: {
        "value": t["x"].mT[..., None],
        "decay": t["g"].mT,
        "initial_state": t["initial_state"][..., None, None],
    },
    "ssd_minimal": lambda t: {
        "query": t["C"],
        "key": t["Bm"],
        "value": t["X"],
        "decay": t["A"],
        **({"initial_state": t["initial_state"].mT} if "initial_state" in t else {}),
    },
    "mamba2_scan": _mamba2,
    "mamba1_selective_scan": _mamba1,
    "gated_delta_product": _product,
    "comba": _comba,
    "rwkv7_time_mixing": _rwkv7,
    "based": _based,
    "rebased": lambda t: {"query": _squares(t["q"] * 0.25), "key": _squares(t["k"])},
    "hedgehog": _hedgehog,
}


# What of a file the results are.


def _after_mamba2(out: Tensor, state: Tensor, t: Held) -> Held:
    return {"out": out.transpose(1, 2) + t["D"][:, None] * t["x"], "final_state": state.mT}


def _after_mamba1(out: Tensor, state: Tensor, t: Held) -> Held:
    y = out.squeeze(-1) + t["Dskip"][:, None] * t["u"]
    return {"out": y * F.silu(t["z"]), "final_state": state.squeeze(-1)}


def _after_rwkv7(out: Tensor, state: Tensor, t: Held) -> Held:
    w, operands = {name.removeprefix("w."): x for name, x in t.items()}, _rwkv7(t)
    y = F.group_norm(out[0].transpose(0, 1).flatten(1), 2, w["ln_w"], w["ln_b"], eps=64e-5)
    r_k = w["r_k"].view(1, 2, 1, -1)
    own = (operands["query"] * operands["key"] * r_k).sum(-1, keepdim=True) * operands["value"]
    x = t["x"] + w["mg"] * (F.pad(t["x"][:-1], (0, 0, 1, 0)) - t["x"])
    gate = torch.sigmoid(x @ w["Wg1"]) @ w["Wg2"]
    return {"out": ((y + own[0].transpose(0, 1).flatten(1)) * gate) @ w["Wo"].T, "final_state": state[0].mT}


def _after_linear(out: Tensor, state: Tensor, t: Held) -> Held:
    return {"out": out, "final_state": state[..., : out.shape[-1]], "final_z": state[..., -1]}


RESULTS: dict[str, Callable[[Tensor, Tensor, Held], Held]] = {
    "linear_attention": _after_linear,
    "hgrn": lambda out, state, _: {"out": out[..., 0].mT, "final_state": state[..., 0, 0]},
    "ssd_minimal": lambda out, state, _: {"out": out, "final_state": state.mT},
    "mamba2_scan": _after_mamba2,
    "mamba1_selective_scan": _after_mamba1,
    "rwkv7_time_mixing": _after_rwkv7,
    "gated_delta_product": lambda out, state, t: {
        "out": out[:, :, t["k"].shape[2] // t["q"].shape[2] - 1 :: t["k"].shape[2] // t["q"].shape[2]],
        "final_state": state,
    },
}
OWN_SCALE = ("based", "rebased")  # inside of the feature map


@pytest.mark.parametrize("name", FILES)
def test_golden_vectors_are_reproduced(name: str, golden) -> None:
    file, form = golden(name), name.partition("/")[0]
    results = _run(form, FILES[name], held := _held(file), file.options)
    wanted = {key: x.double() for key, x in file.outputs.items() if key in results}
    assert "out" in wanted
    for key, want in wanted.items():
        assert off(results[key], want) < 2e-6, key
    reached = {key: file.tensors[f"cot_{key}"].double() for key in results if f"cot_{key}" in file.tensors}
    learned = {key: x for key, x in held.items() if x.requires_grad}
    if not learned:
        return
    outs = [results[key] for key in reached]
    grads = torch.autograd.grad(outs, list(learned.values()), list(reached.values()))
    for key, grad in zip(learned, grads, strict=True):
        assert off(grad, file.tensors[f"grad_{key}"]) < 2e-6, key


def _held(file: Any) -> Held:
    """The tensors of a file in float64; those with a stored gradient are learned."""
    names = [key for key in file.tensors if not key.startswith(("grad_", "cot_"))]
    held = {key: file.tensors[key].double() for key in names}
    return {key: x.requires_grad_(f"grad_{key}" in file.tensors) for key, x in held.items()}


def _run(form: str, settings: dict[str, Any], t: Held, options: dict[str, Any]) -> Held:
    operands = {ours: t[theirs] for ours, theirs in ALIKE.items() if theirs in t}
    operands |= OPERANDS.get(form, lambda _: {})(t)
    unused = () if settings.get("low_rank") else ("a", "b")
    rule = RecurrenceRule(
        **settings,
        scale=1.0 if form in OWN_SCALE else float(options.get("scale") or 1.0),
        qk_norm=1e-6 if options.get("qk_l2norm") else None,
        chunk=16,
        state="float64",
    )
    out, state = apply([None if name in unused else operands.get(name) for name in INPUTS], rule)
    return RESULTS.get(form, lambda o, s, _: {"out": o, "final_state": s})(out, state, t)


def test_golden_step_follows_the_scan(golden) -> None:
    file = golden("mamba2_scan/n200_step")
    t = _held(file)
    step = {"x": "x_step", "dt": "dt_step", "Bm": "B_step", "C": "C_step"}
    one = {**t, **{ours: t[theirs][:, None] for ours, theirs in step.items()}, "initial_state": t["final_state"]}
    found = _run("mamba2_scan", FILES["mamba2_scan/n200_step"], one, file.options)
    assert off(found["out"][:, 0], t["out_step"]) < 2e-6
    assert off(found["final_state"], t["state_step"]) < 2e-6


def off(got: Tensor, want: Tensor) -> float:
    return ((got.detach().double() - want.double()).abs().max() / want.double().abs().max()).item()

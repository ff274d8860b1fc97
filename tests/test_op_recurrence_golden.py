"""The recurrence operator against third-party golden vectors (shared/golden), outputs, states and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnc.op_recurrence import RECURRENCE
from attnc.rule_recurrence import RecurrenceRule

R = RecurrenceRule
DELTA, BY_CHANNEL = {"delta": True, "gate": "write"}, {"decay": "channel"}

# file -> (rule without scale and norm, tensor of the file for each operand)
QKV = {"query": "q", "key": "k", "value": "v", "initial_state": "initial_state"}
GATED = {**QKV, "decay": "g"}
WRITTEN = {**GATED, "beta": "beta"}
FILES: dict[str, tuple[dict, dict[str, str]]] = {
    "linear_attention/n64_unnorm_state_grad": ({}, QKV),
    "linear_attention/n200_norm": ({"normaliser": "sum", "eps": 1e-10}, QKV),
    "lightning_attention/n64_grad": ({"decay": "head"}, {**QKV, "decay": "slope"}),
    "retention/n64_grad": ({"decay": "head"}, {**QKV, "decay": "log_gamma"}),
    "retention/n200_dv32": ({"decay": "head"}, {**QKV, "decay": "log_gamma"}),
    "simple_gla/n64_state_grad": ({"decay": "token"}, GATED),
    "simple_gla/n200": ({"decay": "token"}, GATED),
    "gla/n64_state_grad": (BY_CHANNEL, GATED),
    "gla/n200": (BY_CHANNEL, GATED),
    "gla/n128_strong_decay": (BY_CHANNEL, GATED),
    "deltanet/n64_state_grad": (DELTA, {**QKV, "beta": "beta"}),
    "deltanet/n128_beta2": (DELTA, {**QKV, "beta": "beta"}),
    "gated_deltanet/n64_fla_state_grad": ({**DELTA, "decay": "token"}, WRITTEN),
    "gated_deltanet/n200_hfchunk_l2_gva": ({**DELTA, "decay": "token"}, WRITTEN),
    "kda/n64_state_grad": ({**DELTA, **BY_CHANNEL}, WRITTEN),
    "kda/n200_hfchunk_l2": ({**DELTA, **BY_CHANNEL}, WRITTEN),
    "rwkv6/n64_state_grad": ({**BY_CHANNEL, "read": "before"}, {**QKV, "decay": "w", "bonus": "u"}),
    "rwkv6/n200_dv24": ({**BY_CHANNEL, "read": "before"}, {**QKV, "decay": "w", "bonus": "u"}),
    "hgrn/n64_state_grad": ({"decay": "token"}, {"value": "x", "decay": "g", "initial_state": "initial_state"}),
    "ssd_minimal/n64_state_grad": (
        {"decay": "token"},
        {"query": "C", "key": "Bm", "value": "X", "decay": "A", "initial_state": "initial_state"},
    ),
}
OPERANDS = ("query", "key", "value", "decay", "rates", "beta", "bonus", "initial_state")


def _by_channel(name: str, x: Tensor) -> Tensor:
    """(B, N, D) elementwise as D heads of one state each."""
    return {"value": lambda: x.mT[..., None], "decay": lambda: x.mT, "initial_state": lambda: x[..., None, None]}[
        name
    ]()


# How operands and results of a file are laid out otherwise: elementwise, the state transposed, the rate positive.
TO_US = {
    "hgrn": _by_channel,
    "ssd_minimal": lambda name, x: x.mT if name == "initial_state" else x,
    "lightning_attention": lambda name, x: -x if name == "decay" else x,
}
FROM_US = {"hgrn": lambda out, state: (out[..., 0].mT, state[..., 0, 0]), "ssd_minimal": lambda o, s: (o, s.mT)}


@pytest.mark.parametrize("name", FILES)
def test_golden_vectors_are_reproduced(name: str, golden) -> None:
    file, form = golden(name), name.partition("/")[0]
    settings, tensors = FILES[name]
    held = {t: file.tensors[t].double() for t in tensors.values() if t in file.tensors}
    learned = {t: x.requires_grad_() for t, x in held.items() if f"grad_{t}" in file.tensors}
    change = TO_US.get(form, lambda name, x: x)
    operands: list[Tensor | None] = [
        change(operand, held[tensors[operand]]) if tensors.get(operand) in held else None for operand in OPERANDS
    ]
    rule = R(
        **settings,
        scale=float(file.options.get("scale") or 1.0),
        qk_norm=1e-6 if file.options.get("qk_l2norm") else None,
        chunk=16,
        state="float64",
    )
    out, state = FROM_US.get(form, lambda o, s: (o, s))(*RECURRENCE(*operands, rule.spell()))
    assert off(out, file.outputs["out"]) < 2e-6
    if "final_state" in file.outputs and rule.normaliser == "none":
        assert off(state, file.outputs["final_state"]) < 2e-6
    given_grads = {"cot_out": out, "cot_final_state": state}
    reached = [(y, file.tensors[c].double()) for c, y in given_grads.items() if c in file.tensors]
    if learned and reached:
        outs, cotangents = zip(*reached, strict=True)
        grads = torch.autograd.grad(outs, list(learned.values()), cotangents)
        for (given, _), grad in zip(learned.items(), grads, strict=True):
            assert off(grad, file.tensors[f"grad_{given}"]) < 2e-6, given


def off(got: Tensor, want: Tensor) -> float:
    return ((got.detach().double() - want.double()).abs().max() / want.double().abs().max()).item()

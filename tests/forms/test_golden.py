"""Every form against third-party golden vectors that fit a rule (shared/golden), outputs and gradients, in float64."""

from __future__ import annotations

import pytest
import torch

from attnc import ops
from attnc.rule_attention import AttentionRule

FORMS = (
    "dense",
    "block_sparse{provider=blocked,block_m=16,block_n=16}",
    "block_sparse{provider=flex,block_m=32,block_n=32}",
)
CAUSAL = "j <= i"

# file -> (rule, names of captured tensors)
FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "softmax_attention/n64_causal_grad": (f"score=0.25 * s; keep={CAUSAL}", ()),
    "softmax_attention/n200_gqa_causal": (f"score=0.25 * s; keep={CAUSAL}", ()),
    "softmax_attention/n200_window32_gqa": (f"score=0.25 * s; keep={CAUSAL} and i - j < 32", ()),
    "softmax_attention/n70_bidir_pad_grad": ("score=0.25 * s; keep=j < t0[b]", ("kv_valid",)),
    "softmax_softcap/n64_grad": (f"score=5.0 * tanh(0.05 * s); keep={CAUSAL}", ()),
    "softmax_softcap/n200_window": (f"score=2.0 * tanh(0.5 * s); keep={CAUSAL} and i - j < 40", ()),
    "softmax_sinks/n64_gqa_grad": (f"score=0.25 * s; keep={CAUSAL}; sink=f0[h]", ("sinks",)),
    "softmax_sinks/n200_window32": (f"score=0.25 * s; keep={CAUSAL} and i - j < 32; sink=f0[h]", ("sinks",)),
    "softmax_alibi/n64_h4_grad": (f"score=0.25 * s + f0[h] * float(j - i); keep={CAUSAL}", ("slopes",)),
    "softmax_alibi/n200_h3": (f"score={8**-0.5!r} * s + f0[h] * float(j - i); keep={CAUSAL}", ("slopes",)),
    "forgetting_attention/n64_gqa_grad": (f"score=0.25 * s + f0[b, h, i] - f0[b, h, j]; keep={CAUSAL}", ("g",)),
    "forgetting_attention/n200": (f"score=0.25 * s + f0[b, h, i] - f0[b, h, j]; keep={CAUSAL}", ("g",)),
    "softmax_t5_bias/n48_encoder_grad": ("score=s + f0[t1[i, j], h]", ("rel_bias", "bucket")),
    "softmax_t5_bias/n100_decoder": (f"score=s + f0[t1[i, j], h]; keep={CAUSAL}", ("rel_bias", "bucket")),
    "streaming_llm/n64_s4_w20_grad": (f"score=0.25 * s; keep={CAUSAL} and (j < 4 or i - j < 20)", ()),
    "streaming_llm/n200_s8_w40": (f"score=0.25 * s; keep={CAUSAL} and (j < 8 or i - j < 40)", ()),
    "minference_a_shape/n120_v30_s50": (f"score=0.25 * s; keep={CAUSAL} and (j < 30 or i - j <= 50)", ()),
    "neighborhood_attention/1d_n64_k7_grad": ("score=0.25 * s; keep=abs(j - min(max(i, 3), 60)) <= 3", ()),
    "neighborhood_attention/1d_n100_k9_dil3_causal": (
        f"score=0.25 * s; keep={CAUSAL} and (i - j) % 3 == 0 and i - j < 27",
        (),
    ),
}
# What a rule looks up instead of the file's tensor.
DERIVED = {"forgetting_attention": lambda gate: gate.cumsum(-1)}


@pytest.mark.parametrize("name", FILES)
def test_golden_vectors_are_reproduced(name: str, golden) -> None:
    file = golden(name)
    text, captured_names = FILES[name]
    options = file.options
    rule = AttentionRule.parse(text)
    if "scale" in options and "softcap" not in name:
        assert rule.scale == pytest.approx(float(options["scale"]), rel=1e-5)
    qkv = [file.inputs[n].double() for n in "qkv"]
    captured = [
        file.tensors[n] if not file.tensors[n].is_floating_point() else file.tensors[n].double() for n in captured_names
    ]
    cotangent = file.tensors.get("cot_out")
    held = dict(zip(("q", "k", "v", *captured_names), (*qkv, *captured), strict=True))
    leaves = {n: t.requires_grad_() for n, t in held.items() if f"grad_{n}" in file.tensors}
    derive = DERIVED.get(name.partition("/")[0], lambda tensor: tensor)
    captured = [derive(tensor) for tensor in captured]
    for form in FORMS:
        flex = "flex" in form
        with torch.set_grad_enabled(not flex):
            out, _ = torch.ops.attnc.attention(*qkv, captured, [], ops.spell_attention(form, rule))
        assert off(out, file.outputs["out"]) < 2e-7, form
        if cotangent is not None and not flex:
            grads = torch.autograd.grad(out, list(leaves.values()), cotangent.double(), retain_graph=True)
            for given, grad in zip(leaves, grads, strict=True):
                assert off(grad, file.tensors[f"grad_{given}"]) < 2e-7, (form, given)


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.detach().double() - want.double()).abs().max() / want.double().abs().max()).item()

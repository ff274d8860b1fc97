"""Facts of real architectures against their configurations: small models of transformers, random weights."""
from __future__ import annotations

import pytest
import torch

import attnc

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install attnc[dev]")

D, W = 32, 24
SIZES = {
    "hidden_size": D, "vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 48, "moe_intermediate_size": W, "max_position_embeddings": 32, "use_cache": False,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}


def mixtral(c):
    return {"score": "softmax", "over": "all", "normalise": "chosen", "num_experts": c.num_local_experts,
            "top_k": c.num_experts_per_tok, "d_ff": c.intermediate_size, "activation": c.hidden_act, "shared": 0}


def qwen2_moe(c):
    return {"score": "softmax", "normalise": "chosen" if c.norm_topk_prob else "", "num_experts": c.num_experts,
            "top_k": c.num_experts_per_tok, "d_ff": c.moe_intermediate_size, "shared_gate": "sigmoid",
            "shared_d_ff": c.shared_expert_intermediate_size}


def deepseek_v3(c):
    return {"score": "sigmoid", "choice_bias": True, "groups": c.n_group, "top_groups": c.topk_group,
            "group_score": "top2", "normalise": "chosen" if c.norm_topk_prob else "", "scale": c.routed_scaling_factor,
            "num_experts": c.n_routed_experts, "top_k": c.num_experts_per_tok,
            "shared_d_ff": c.n_shared_experts * c.moe_intermediate_size}


def gpt_oss(c):
    return {"score": "softmax", "over": "chosen", "logit_bias": True, "expert_bias": True, "interleaved": True,
            "activation": "quick_gelu", "num_experts": c.num_local_experts, "top_k": c.num_experts_per_tok}


def llama4_text(c):
    return {"score": "sigmoid", "weight_at": "input", "num_experts": c.num_local_experts,
            "top_k": c.num_experts_per_tok, "shared": 1, "written": "every expert"}


def nemotron_h(c):
    return {"score": "sigmoid", "activation": "relu2", "gated": False, "num_experts": c.n_routed_experts,
            "top_k": c.num_experts_per_tok, "shared_gated": False}


CASES = [
    (mixtral, {"num_local_experts": 6, "num_experts_per_tok": 2}, 2),
    (qwen2_moe, {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True, "decoder_sparse_step": 1,
                 "shared_expert_intermediate_size": 16}, 2),
    (deepseek_v3, {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
                   "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.7, **LATENT}, 1),
    (gpt_oss, {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 16, "layer_types": ["full_attention"] * 2},
     2),
    (llama4_text, {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "head_dim": 16,
                   "intermediate_size_mlp": 48}, 2),
    (nemotron_h, {"n_routed_experts": 6, "num_experts_per_tok": 2, "layers_block_type": ["attention", "moe"],
                  "head_dim": 16, "moe_shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1}, 1),
]


@pytest.mark.parametrize(("expected", "given", "blocks"), [
    pytest.param(*case, id=case[0].__name__, marks=() if case[0] is mixtral else pytest.mark.slow) for case in CASES])
def test_facts_are_those_of_the_configuration(expected, given, blocks):
    name = expected.__name__
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this release of transformers has no {name}")
    config = transformers.CONFIG_MAPPING[name](**{**SIZES, **given})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    report = attnc.explain(model, torch.randint(0, 40, (2, 7)))
    found = [region for region in report.regions if region.kind == "moe"]
    assert len(found) == blocks, [f"{item.path}: {item.reason}" for item in report.unmatched]
    want = expected(config)
    for region in found:
        assert {fact: region.facts[fact] for fact in want} == want

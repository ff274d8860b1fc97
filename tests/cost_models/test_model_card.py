"""Reading configs: totals against the transformers classes, both ways to write a plan, what is refused and how."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.cost_models.families import ALIASES, FAMILIES
from attnc.cost_models.layers import Conventions, Experts
from attnc.cost_models.mixers import Attention
from attnc.cost_models.model_card import ModelCard, model_card
from attnc.errors import UsageError
from tests.cost_models.headlines import CONFIGS

SMALL = {
    "num_hidden_layers": 8,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 200,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_layer": 3, "n_embd": 64, "n_head": 4, "vocab_size": 200, "n_positions": 50}
LATENT = {
    "kv_lora_rank": 24,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
EXPERTS = {"moe_intermediate_size": 40, "num_experts_per_tok": 2}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 12,
    "head_dim": 32,
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 10, "mamba_n_groups": 2, "mamba_expand": 2}

# Small configs: model_type, what differs from SMALL.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "apertus": {},
    "arcee": {},
    "glm": {"head_dim": 24},
    "olmo": {},
    "nemotron": {"norm_eps": 1e-5, "head_dim": 16},
    "granite": {"tie_word_embeddings": True},
    "helium": {"head_dim": 16},
    "mistral": {"head_dim": 20, "sliding_window": 5},
    "ministral3": {"head_dim": 20},
    "smollm3": {},
    "seed_oss": {"head_dim": 24},
    "qwen2": {},
    "qwen3": {"head_dim": 24, "attention_bias": True},
    "qwen2_moe": {**EXPERTS, "num_experts": 6, "shared_expert_intermediate_size": 56, "mlp_only_layers": [1]},
    "qwen3_moe": {**EXPERTS, "num_local_experts": 6, "num_experts": 6, "decoder_sparse_step": 2, "head_dim": 24},
    "qwen3_next": {**EXPERTS, **DELTA, "num_experts": 6, "shared_expert_intermediate_size": 56},
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": {**EXPERTS, **DELTA, "num_experts": 6, "shared_expert_intermediate_size": 56},
    "gemma": {"head_dim": 24},
    "gemma2": {"head_dim": 24},
    "gemma3_text": {"head_dim": 24},
    "cohere": {},
    "cohere2": {"head_dim": 24},
    "mixtral": {"num_local_experts": 6},
    "phimoe": {"num_local_experts": 6, "attention_bias": True, "lm_head_bias": True},
    "granitemoe": {"num_local_experts": 6},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "olmo2": {},
    "olmo3": {},
    "exaone4": {},
    "flex_olmo": {},
    "minimax": {"num_local_experts": 6, "head_dim": 24},
    "minimax_m2": {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 24},
    "deepseek_v2": {**LATENT, **EXPERTS, "n_routed_experts": 6, "first_k_dense_replace": 2, "n_group": 1},
    "deepseek_v3": {**LATENT, **EXPERTS, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "q_lora_rank": None},
    "deepseek_v32": {
        **LATENT,
        **EXPERTS,
        "n_routed_experts": 8,
        "index_n_heads": 6,
        "index_head_dim": 10,
        "index_topk": 4,
        "first_k_dense_replace": 3,
    },
    "afmoe": {**EXPERTS, "num_experts": 6, "head_dim": 24, "num_dense_layers": 2},
    "kimi_linear": {**LATENT, **EXPERTS, "q_lora_rank": None, "num_experts": 6, "num_experts_per_token": 2},
    "longcat_flash": {**LATENT, "num_layers": 3, "ffn_hidden_size": 90, "expert_ffn_hidden_size": 20},
    "glm4": {"head_dim": 24},
    "glm4_moe": {**EXPERTS, "n_routed_experts": 6, "use_qk_norm": True, "head_dim": 24, "attention_bias": True},
    "solar_open": {**EXPERTS, "n_routed_experts": 6, "head_dim": 24},
    "gpt_oss": {"num_local_experts": 6, "head_dim": 24},
    "llama4_text": {"intermediate_size_mlp": 120, "interleave_moe_layer_step": 2, "num_local_experts": 6},
    "ernie4_5": {"use_bias": True, "head_dim": 24},
    "ernie4_5_moe": {"moe_intermediate_size": 40, "moe_num_experts": 6, "moe_k": 2, "moe_layer_end_index": 6},
    "phi3": {},
    "phi": {},
    "stablelm": {"use_qkv_bias": True},
    "starcoder2": {},
    "gpt2": {**GPT2, "intermediate_size": None},
    "opt": {"ffn_dim": 90, "intermediate_size": None, "word_embed_proj_dim": 64, "max_position_embeddings": 50},
    "bloom": {"n_layer": 3, "n_head": 4},
    "gpt_neox": {},
    "gptj": {**GPT2, "rotary_dim": 8, "intermediate_size": None},
    "gpt_bigcode": {**GPT2, "intermediate_size": None},
    "mamba": {"state_size": 6, "num_hidden_layers": 3},
    "falcon_mamba": {"state_size": 6, "num_hidden_layers": 3, "use_bias": True},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 10, "n_groups": 2, "expand": 2},
    "nemotron_h": {
        **EXPERTS,
        "num_hidden_layers": None,
        "layers_block_type": ["mamba", "moe", "attention", "mamba", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 10,
        "n_groups": 2,
        "head_dim": 24,
        "n_routed_experts": 6,
        "moe_latent_size": 28,
        "moe_shared_expert_intermediate_size": 50,
    },
    "jamba": {"mamba_dt_rank": 4, "num_experts": 6, "mamba_d_state": 6},
    "bamba": {**MAMBA2, "attn_layer_indices": [2, 5]},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 128},
    "granitemoehybrid": {**MAMBA2, "num_local_experts": 6, "shared_intermediate_size": 50},
    "lfm2": {"block_multiple_of": 8},
}
# Lists that transformers writes out and published files leave to a rule.
LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "moe_layers")
# Rules of transformers' own default that no published file follows.
OWN_RULE = {"minimax", "granitemoehybrid", "kimi_linear"}


def transformers_total(name: str) -> tuple[dict[str, Any], int]:
    """The config dict as transformers writes it, and the number of parameters of its class on the meta device."""
    transformers = pytest.importorskip("transformers")
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    changes = {k: v for k, v in {**SMALL, **ARCHITECTURES[name]}.items() if v is not None or k == "q_lora_rank"}
    if name == "longcat_flash" or ("num_hidden_layers" in ARCHITECTURES[name] and changes.get("layers_block_type")):
        changes.pop("num_hidden_layers", None)
    config = transformers.AutoConfig.for_model(name, **changes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return config.to_dict(), sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_total_parameters_are_those_of_transformers(name: str) -> None:
    config, total = transformers_total(name)
    card = model_card(config)
    if name == "longcat_flash":  # the class allocates gate and up of the zero experts, which have none
        moe = next((layer, n) for layer, n in card if isinstance(layer, Experts))
        total -= moe[1] * moe[0].zero_experts * 2 * moe[0].d * moe[0].width
    if name == "apertus":  # two scalars of the activation per layer are not counted
        total -= 2 * SMALL["num_hidden_layers"]
    assert card.parameters().total == total
    assert not any("not known" in note for note in card.notes)
    without = {k: v for k, v in config.items() if k not in LISTS}
    if name not in OWN_RULE:
        assert model_card(without).parameters().total == total


def test_an_indexer_reads_all_keys_and_attention_the_best_of_them() -> None:
    plain = CONFIGS["DeepSeek-V3"]
    sparse = {**plain, "model_type": "deepseek_v32", "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
    dense, indexed = model_card(plain), model_card(sparse)
    at_end = [card.flops("decode", 131_072).mixing / 61 for card in (dense, indexed)]
    assert at_end == [2 * 128 * 1088 * 131_072, 2 * 128 * 1088 * 2048 + 2 * 64 * 128 * 131_072]
    assert indexed.kv_bytes_per_token() - dense.kv_bytes_per_token() == 61 * 128 * 2


def test_most_families_are_held_against_transformers() -> None:
    assert len(ARCHITECTURES) >= 50
    assert len(set(FAMILIES) - set(ARCHITECTURES)) <= 12


# Published files where they are written differently.


def test_lists_and_rules_give_the_same_layers() -> None:
    listed = {
        **CONFIGS["Qwen3-Next"],
        "layer_types": ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(48)],
    }
    assert model_card(listed) == model_card(CONFIGS["Qwen3-Next"])
    m1 = CONFIGS["MiniMax-M1"]
    typed = {
        **m1,
        "layer_types": ["full_attention" if kind else "linear_attention" for kind in m1["attn_type_list"]],
    }
    assert model_card(typed) == model_card(m1)


def test_a_text_config_is_read_and_said() -> None:
    card = model_card({"model_type": "llama4", "text_config": CONFIGS["Llama-4-Maverick"]})
    assert card.parameters() == model_card(CONFIGS["Llama-4-Maverick"]).parameters()
    assert "text_config" in card.notes[0]


def test_an_unknown_architecture_with_the_standard_keys_is_read_as_a_llama_with_a_note() -> None:
    config = {**CONFIGS["LLaMA-3.1-8B"], "model_type": "novel"}
    card = model_card(config)
    assert card.parameters() == model_card(CONFIGS["LLaMA-3.1-8B"]).parameters()
    assert "'novel' is not known" in card.notes[0]
    assert model_card({**config, "num_experts": 4, "num_experts_per_tok": 2}).parameters().total > 2e10


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "llamaa"}, "Did you mean 'llama'"),
        ({"model_type": "llama", "hidden_size": 8}, "found no .*num_attention_heads.*vocab_size"),
        ({"model_type": "novel", "hidden_size": 8, "vocab_size": 9}, "lacks num_layers, num_attention_heads"),
        ({**CONFIGS["DeepSeek-V3"], "num_experts_per_tok": None}, "found no num_experts_per_tok"),
        ({**CONFIGS["LLaMA-3.1-8B"], "hidden_size": "big"}, "hidden_size='big': found str"),
        ({**CONFIGS["LLaMA-3.1-8B"], "hidden_size": -3}, "whole number"),
        ({**CONFIGS["LLaMA-3.1-8B"], "num_hidden_layers": 10**9}, "from 0 to 10000"),
        ({**CONFIGS["LLaMA-3.1-8B"], "tie_word_embeddings": 1}, "true and false"),
        ({**CONFIGS["LLaMA-3.1-8B"], "layer_types": ["full_attention"]}, "1 entries for 32 layers"),
        ({**CONFIGS["LLaMA-3.1-8B"], "layer_types": ["hyena"] * 32}, "'hyena'; known are"),
        ({**CONFIGS["Nemotron 3 Nano"], "hybrid_override_pattern": "MX"}, "'X'; known are"),
        ({"model_type": 3}, "allowed is a name"),
        ([], "allowed is the dict"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused_in_a_sentence(config: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        model_card(config)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.floats(), st.text(max_size=3), st.lists(st.integers(-1, 9))
)


@given(st.sampled_from(sorted(CONFIGS)), st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_config_gives_a_card_or_a_sentence(name: str, data: st.DataObject) -> None:
    config = dict(CONFIGS[name])
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
        config[key] = data.draw(VALUES)
    try:
        assert isinstance(model_card(config), ModelCard)
    except UsageError as exc:
        assert len(str(exc)) > 20


# Counts.


def test_a_shorter_window_never_costs_more() -> None:
    base = {**CONFIGS["LLaMA-3.1-8B"], "model_type": "mistral"}
    wide, narrow = (model_card({**base, "sliding_window": w}) for w in (4096, 512))
    for length in (1, 511, 512, 513, 4096, 100_000):
        assert narrow.decode_flops(length) <= wide.decode_flops(length)
        assert narrow.kv_bytes(length) <= wide.kv_bytes(length)
        assert narrow.prefill_flops(length) <= wide.prefill_flops(length)


def test_summed_decode_is_the_sum_of_its_positions() -> None:
    for name in ("LLaMA-3.1-8B", "Llama-4-Maverick", "DeepSeek-V3", "Kimi Linear", "gpt-oss-120b"):
        card, length = model_card(CONFIGS[name]), 2000
        each = sum(card.decode_flops(i + 0.5) for i in range(length))
        assert card.generation_flops(length) == pytest.approx(each, rel=1e-6)


def test_the_two_spellings_of_latent_attention_have_the_same_projections() -> None:
    card = model_card(CONFIGS["DeepSeek-V3"])
    naive, absorbed = (card.flops("decode", 4096, Conventions(mla=m)) for m in ("naive", "absorbed"))
    assert naive.projections == absorbed.projections
    assert absorbed.mixing / naive.mixing == (576 + 512) / (192 + 128)


def test_heads_of_an_output_gate_and_of_biases_are_parameters() -> None:
    plain = Attention(64, 4, 2, 16)
    assert Attention(64, 4, 2, 16, gate=True).total - plain.total == 64 * 64
    assert Attention(64, 4, 2, 16, qkv_bias=True, sinks=True).total - plain.total == 64 + 64 + 4


def test_experts_touched_grow_with_the_batch_up_to_all() -> None:
    card = model_card(CONFIGS["Qwen3-30B-A3B"])
    one, many = card.touched_weights(1), card.touched_weights(10_000)
    assert one == pytest.approx(card.parameters().active_head, rel=0.001)
    assert many == pytest.approx(card.parameters().total - card.embedding.total / 2, rel=0.001)


@pytest.mark.parametrize("how", [{"causal": "third"}, {"mla": "raw"}, {"recurrence": "x"}, {"head": "none"}])
def test_an_unknown_convention_is_refused(how: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="allowed are"):
        model_card(CONFIGS["LLaMA-3.1-8B"]).prefill_flops(10, Conventions(**how))


def test_aliases_lead_to_families() -> None:
    assert set(ALIASES.values()) <= set(FAMILIES)
    assert not set(ALIASES) & set(FAMILIES)

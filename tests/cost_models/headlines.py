"""Published configurations and figures that the cost model must reproduce.

Source: shared/headlines.md, which names the report, table and configuration file of each figure.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def _dense(layers: int, d: int, heads: int, kv: int, d_ff: int, vocab: int, **more: Any) -> Config:
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": d,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": d_ff,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        **more,
    }


def _latent(layers: int, heads: int, experts: int, dense: int, vocab: int) -> Config:
    return {
        "model_type": "deepseek_v3",
        "num_hidden_layers": layers,
        "hidden_size": 7168,
        "num_attention_heads": heads,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": experts,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 2048,
        "intermediate_size": 18432,
        "first_k_dense_replace": dense,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
    }


def _deepseek_moe(layers: int, d: int, heads: int, vocab: int, dense: int, d_ff: int, **experts: int) -> Config:
    names = {"experts": "n_routed_experts", "shared": "n_shared_experts", "top": "num_experts_per_tok"}
    base = _dense(layers, d, heads, heads, d_ff, vocab)
    moe = {names.get(k, "moe_intermediate_size"): v for k, v in experts.items()}
    return {**base, "model_type": "deepseek", "first_k_dense_replace": dense, **moe}


def _nemotron(d: int, letters: str, heads: int, mamba_heads: int, **experts: Any) -> Config:
    return {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": letters,
        "hidden_size": d,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "mamba_num_heads": mamba_heads,
        "mamba_head_dim": 64,
        "ssm_state_size": 128,
        "n_groups": 8,
        "conv_kernel": 4,
        "use_conv_bias": True,
        "intermediate_size": 1856,
        "vocab_size": 131072,
        "tie_word_embeddings": False,
        **experts,
    }


def _jet(d: int, d_ff: int, heads: int, layers: str, jet_heads: int, dim: int, expand: float, window: int) -> Config:
    types = {"J": "jet", "A": "attn", "W": "swa"}
    jet = {"num_heads": jet_heads, "head_dim": dim, "expand_v": expand, "conv_size": 4, "dconv_generator_reduction": 8}
    return {
        **_dense(len(layers), d, heads, 2, d_ff, 151936),
        "model_type": "jet_nemotron",
        "tie_word_embeddings": True,
        "layer_types": [types[letter] for letter in layers],
        "efficient_attention_config": {"jet": jet, "swa": {"window_size": window}},
    }


def _moe(kind: str, base: Config, experts: int, top: int, width: int, **more: Any) -> Config:
    moe = {"num_experts": experts, "num_experts_per_tok": top, "moe_intermediate_size": width}
    return {**base, "model_type": kind, **moe, **more}


KIMI_FULL = [4, 8, 12, 16, 20, 24, 27]
KIMI: Config = {
    **_latent(27, 32, 256, 1, 163840),
    "model_type": "kimi_linear",
    "hidden_size": 2304,
    "q_lora_rank": None,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "linear_attn_config": {
        "full_attn_layers": KIMI_FULL,
        "num_heads": 32,
        "head_dim": 128,
        "short_conv_kernel_size": 4,
    },
}

CONFIGS: dict[str, Config] = {
    "Mixtral 8x7B": {
        **_dense(32, 4096, 32, 8, 14336, 32000),
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "MiniMax-M1": {
        **_dense(80, 6144, 64, 8, 9216, 200064, head_dim=128),
        "model_type": "minimax_m1",
        "num_local_experts": 32,
        "num_experts_per_tok": 2,
        "attn_type_list": [int(i % 8 == 7) for i in range(80)],
    },
    "DeepSeek-V3": _latent(61, 128, 256, 3, 129280),
    "Kimi K2": _latent(61, 64, 384, 1, 163840),
    "LongCat-Flash": {
        **_latent(28, 64, 512, 0, 131072),
        "model_type": "longcat_flash",
        "num_layers": 28,
        "hidden_size": 6144,
        "ffn_hidden_size": 12288,
        "intermediate_size": None,
        "expert_ffn_hidden_size": 2048,
        "moe_intermediate_size": None,
        "num_experts_per_tok": None,
        "n_shared_experts": None,
        "moe_topk": 12,
        "zero_expert_num": 256,
    },
    "gpt-oss-120b": {
        **_dense(36, 2880, 64, 8, 2880, 201088, head_dim=64, attention_bias=True, sliding_window=128),
        "model_type": "gpt_oss",
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
    },
    "Nemotron 3 Nano": _nemotron(
        2688,
        "ME" * 23 + "*" * 6,
        32,
        64,
        n_routed_experts=128,
        num_experts_per_tok=6,
        moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712,
    ),
    "Nemotron 3 Super": _nemotron(
        4096,
        "ME" * 40 + "*" * 8,
        32,
        128,
        n_routed_experts=512,
        num_experts_per_tok=22,
        moe_intermediate_size=2688,
        moe_shared_expert_intermediate_size=5376,
        moe_latent_size=1024,
    ),
    "Kimi Linear": KIMI,
    "Kimi Linear, all MLA": {
        **KIMI,
        "linear_attn_config": {**KIMI["linear_attn_config"], "full_attn_layers": list(range(1, 28))},
    },
    "Kimi Linear, three to one": {
        **KIMI,
        "num_hidden_layers": 28,
        "linear_attn_config": {**KIMI["linear_attn_config"], "full_attn_layers": list(range(4, 29, 4))},
    },
    "Qwen3-Next": {
        **_moe("qwen3_next", _dense(48, 2048, 16, 2, 5632, 151936, head_dim=256), 512, 10, 512),
        "shared_expert_intermediate_size": 512,
        "full_attention_interval": 4,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    },
    "Step-3": {
        **_dense(61, 7168, 64, 1, 18432, 128815, head_dim=256),
        "model_type": "step3_text",
        "share_q_dim": 2048,
        "moe_num_experts": 48,
        "moe_top_k": 3,
        "moe_intermediate_size": 5120,
        "share_expert_dim": 5120,
        "moe_layers_enum": ",".join(str(i) for i in range(4, 60)),
    },
    "Qwen3-235B": _moe("qwen3_moe", _dense(94, 4096, 64, 4, 12288, 151936, head_dim=128), 128, 8, 1536),
    "Qwen3-30B-A3B": _moe("qwen3_moe", _dense(48, 2048, 32, 4, 6144, 151936, head_dim=128), 128, 8, 768),
    "Qwen3-32B": {**_dense(64, 5120, 64, 8, 25600, 151936, head_dim=128), "model_type": "qwen3"},
    "Qwen3-1.7B": {
        **_dense(28, 2048, 16, 8, 6144, 151936, head_dim=128),
        "model_type": "qwen3",
        "tie_word_embeddings": True,
    },
    "Llama-4-Maverick": {
        **_dense(48, 5120, 40, 8, 8192, 202048, head_dim=128),
        "model_type": "llama4_text",
        "intermediate_size_mlp": 16384,
        "attention_chunk_size": 8192,
        "num_local_experts": 128,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
    },
    "ERNIE-4.5-300B": {
        **_dense(54, 8192, 64, 8, 28672, 103424),
        "model_type": "ernie4_5_moe",
        "moe_num_experts": 64,
        "moe_k": 8,
        "moe_intermediate_size": 3584,
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": 3,
        "moe_layer_end_index": 53,
        "moe_layer_interval": 1,
    },
    "Pangu Pro": _moe(
        "PanguProMoE",
        _dense(48, 5120, 40, 8, 1344, 153600),
        64,
        8,
        1344,
        shared_expert_intermediate_size=4 * 1344,
    ),
    "Qwen2.5-72B": {**_dense(80, 8192, 64, 8, 29568, 152064), "model_type": "qwen2"},
    "LLaMA-3.1-405B": _dense(126, 16384, 128, 8, 53248, 128256),
    "LLaMA-3.1-8B": _dense(32, 4096, 32, 8, 14336, 128256),
    "28-layer 7B": {**_dense(28, 3584, 28, 4, 18944, 152064), "model_type": "qwen2"},
    "DeepSeek 7B": _dense(30, 4096, 32, 32, 11008, 102400),
    "LLaMA2 7B": _dense(32, 4096, 32, 32, 11008, 32000),
    "DeepSeek 67B": _dense(95, 8192, 64, 8, 22016, 102400),
    "DeepSeek 67B as MHA": _dense(95, 8192, 64, 64, 22016, 102400),
    "DeepSeekMoE 16B": _deepseek_moe(28, 2048, 16, 102400, 1, 10944, experts=64, shared=2, top=6, width=1408),
    "DeepSeekMoE 145B": _deepseek_moe(62, 4096, 32, 102400, 1, 10944, experts=128, shared=4, top=12, width=1408),
    "DeepSeekMoE 142B": _deepseek_moe(62, 4096, 32, 102400, 1, 10944, experts=128, shared=2, top=6, width=1408),
    "GShard 137B": _deepseek_moe(62, 4096, 32, 102400, 1, 10944, experts=16, shared=0, top=2, width=11008),
    "DeepSeekMoE 2B": _deepseek_moe(9, 1280, 10, 8000, 0, 3413, experts=63, shared=1, top=7, width=854),
    "GShard x1.5": _deepseek_moe(9, 1280, 10, 8000, 0, 3413, experts=16, shared=0, top=2, width=5120),
    "Jet-Nemotron-2B": _jet(1536, 8960, 12, "J" * 14 + "A" + "J" * 4 + "AWW" + "J" * 6, 12, 96, 2.6666666667, 1152),
    "Jet-Nemotron-4B": _jet(2048, 11008, 16, "J" * 26 + "W" * 7 + "A" * 3, 16, 128, 2, 2048),
}
CONFIGS["gpt-oss-20b"] = {**CONFIGS["gpt-oss-120b"], "num_hidden_layers": 24, "num_local_experts": 32}

# model, what is counted, published figure in 1e9 parameters, tolerance.
PARAMETERS = (
    ("Mixtral 8x7B", "total", 46.7, 0.01),
    ("Mixtral 8x7B", "active_both", 12.9, 0.01),
    ("MiniMax-M1", "total", 456, 0.01),
    ("MiniMax-M1", "active", 45.9, 0.01),
    ("DeepSeek-V3", "total", 671, 0.01),
    ("DeepSeek-V3", "active_head", 37, 0.015),
    ("DeepSeek-V3", "active_both", 37, 0.015),
    ("Kimi K2", "total", 1026, 0.01),
    ("Kimi K2", "active_head", 32, 0.01),
    ("LongCat-Flash", "total", 560, 0.01),
    ("LongCat-Flash", "active_head", 27, 0.01),
    ("gpt-oss-120b", "total", 116.83, 0.01),
    ("gpt-oss-120b", "active_head", 5.13, 0.01),
    ("gpt-oss-20b", "total", 20.91, 0.01),
    ("gpt-oss-20b", "active_head", 3.61, 0.01),
    ("Nemotron 3 Nano", "total", 31.6, 0.01),
    ("Nemotron 3 Nano", "active_head", 3.2, 0.01),
    ("Nemotron 3 Nano", "active_both", 3.6, 0.01),
    ("Nemotron 3 Super", "total", 120.6, 0.01),
    ("Nemotron 3 Super", "active_both", 12.7, 0.01),
    ("Kimi Linear", "total", 48, 0.025),
    ("Kimi Linear", "active_head", 3, 0.04),
    ("Qwen3-Next", "total", 80, 0.01),
    ("Step-3", "total", 316, 0.01),
    ("Step-3", "active", 38, 0.03),
    ("Step-3", "active_both", 38, 0.03),
)

# Cost per decoded token: model, (KV bytes, attention FLOP) at 8K and at 32K, linear FLOP, FFN FLOP.
STEP3_TABLES = (
    ("DeepSeek-V3", (2.88e8, 1.47e11), (1.15e9, 5.89e11), 2.28e10, 4.84e10),
    ("Kimi K2", (2.88e8, 7.37e10), (1.15e9, 2.95e11), 1.23e10, 4.84e10),
    ("Qwen3-235B", (7.89e8, 2.52e10), (3.15e9, 1.01e11), 1.34e10, 2.84e10),
    ("Qwen3-32B", (1.07e9, 1.72e10), (4.29e9, 6.87e10), 1.21e10, 5.03e10),
    ("Llama-4-Maverick", (1.01e9, 8.05e9), (2.21e9, 1.41e10), 6.04e9, 2.42e10),
    ("MiniMax-M1", (9.23e8, 3.42e9), (1.93e9, 1.15e10), 3.75e10, 5.44e10),
    ("ERNIE-4.5-300B", (9.06e8, 1.45e10), (3.62e9, 5.80e10), 1.63e10, 7.61e10),
    ("Pangu Pro", (8.05e8, 8.05e9), (3.22e9, 3.22e10), 6.04e9, 2.38e10),
    ("Step-3", (2.56e8, 3.27e10), (1.02e9, 1.31e11), 2.07e10, 5.33e10),
)

# Its cache is FP8 throughout, but for the layers of these hybrids that keep every key: 2 bytes there.
STEP3_TWO_BYTES = ("Llama-4-Maverick", "MiniMax-M1")

# Training FLOP per sequence, 1e12: model, length, published.
TRAINING = (
    ("DeepSeek 7B", 4096, 183.5),
    ("LLaMA2 7B", 4096, 187.9),
    ("DeepSeekMoE 16B", 4096, 74.4),
    ("DeepSeekMoE 145B", 4096, 585.6),
    ("DeepSeekMoE 142B", 4096, 374.6),
    ("GShard 137B", 4096, 572.7),
    ("DeepSeekMoE 2B", 2048, 4.3),
    ("GShard x1.5", 2048, 5.8),
    ("DeepSeek 67B as MHA", 4096, 2057.5),
)
# Ratios of those: model, baseline, published.
TRAINING_RATIOS = (
    ("DeepSeekMoE 16B", "DeepSeek 7B", 0.405),
    ("DeepSeekMoE 16B", "LLaMA2 7B", 0.396),
    ("DeepSeekMoE 145B", "DeepSeek 67B as MHA", 0.285),
    ("DeepSeekMoE 142B", "DeepSeek 67B as MHA", 0.182),
)

# Keys and values, bytes per token in bf16: model, published.
KV_PER_TOKEN = (
    ("DeepSeek-V3", 70272),
    ("Qwen2.5-72B", 327680),
    ("LLaMA-3.1-405B", 516096),
    ("MiniMax-M1", 40960),
    ("Kimi Linear", 8064),
    ("Kimi Linear, all MLA", 31104),
    ("Nemotron 3 Nano", 6144),
    ("Qwen3-30B-A3B", 98304),
)
# Cache at 64K tokens, MiB: model, published, tolerance. The repository swaps the columns of 2B and 4B.
# 154 is no sum of parts of the authors' config (jetai/modeling/configs/jetlm_2B.json): 2 full layers take 128 MiB, 24
# float32 states of 12 x 96 x 256 take 27, windows of 1152 take 2.25, convolutions 0.56: 155.0 for the first two, 157.8
# for all. The same sum is 258.0 for the 4B model before its convolutions, as published.
CACHE_64K = (
    ("Qwen3-1.7B", 7168, 0.01),
    ("Jet-Nemotron-2B", 154, 0.025),
    ("Jet-Nemotron-4B", 258, 0.01),
)
# Of it: full layers, windows, float32 states, convolutions; by hand from the authors' configs.
CACHE_PARTS = (
    ("Jet-Nemotron-2B", 2 * 64, 2 * 1.125, 24 * 12 * 96 * 256 * 4 / 2**20, 24 * 12 * 256 * 4 * 2 / 2**20),
    ("Jet-Nemotron-4B", 3 * 64, 7 * 2, 26 * 16 * 128 * 256 * 4 / 2**20, 26 * 16 * 256 * 4 * 2 / 2**20),
)

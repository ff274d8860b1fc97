"""Architecture families: which facts of a config they fix, and how they plan their layers. One row per model_type.

Source: configuration and modeling files of transformers 5.23; jet_nemotron from the config.json of its authors, step3
from the vLLM configuration. Parameter totals are held against the transformers classes in test_model_card.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from attnc.cost_models.config_keys import Facts
from attnc.cost_models.config_layers import (
    Plan,
    Rule,
    ernie_range,
    every,
    first_dense,
    if_experts,
    late_window,
    latent_or_full,
    listed,
    llama4_chunks,
    llama4_experts,
    minimax_types,
    one_in,
    periodic,
    sparse_step,
)
from attnc.errors import UsageError

# Words of `layer_types` and its kin; `linear` is replaced by the family's own recurrence.
TYPES = {
    "full_attention": "full",
    "attention": "full",
    "indexed_attention": "full",
    "attn": "full",
    "sliding_attention": "window",
    "swa": "jet_window",
    "jet": "jet",
    "chunked_attention": "chunk",
    "linear_attention": "linear",
    "mamba": "linear",
    "mamba2": "linear",
    "conv": "conv",
    "moe": "moe",
    "mlp": "dense",
}
LETTERS = {"M": "linear", "E": "moe", "*": "full", "-": "dense"}
FFN_TYPES = {"dense": "dense", "sparse": "moe"}
ALL_FULL, ALL_DENSE = every("full"), every("dense")


@dataclass(frozen=True)
class Family:
    """One row. mixers, ffns: rules for configs that do not list their layers. linear: what "linear_attention" is.

    block: "pair" of a mixer and a feed-forward, "single" layers of either, "mixer" layers without feed-forward,
    "double" LongCat's two pairs with experts between, "parallel" attention and recurrence beside each other. norms: per
    layer. final_norms: after the last layer (or before the first).
    """

    mixers: Rule = ALL_FULL
    ffns: Rule = ALL_DENSE
    linear: str = "gdn"
    block: str = "pair"
    norms: int = 2
    norm_bias: bool = False
    final_norms: int = 1
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def plan(self, facts: Facts) -> Plan:
        """One tuple of words per layer.

        Raises: UsageError for a list of layers that cannot be read.
        """
        if (letters := facts.words("hybrid_override_pattern", LETTERS)) is not None:
            return [(self._own(word),) for word in letters]
        listed_as = "layers_block_type" if facts.raw("layers_block_type") is not None else "layer_types"
        types = facts.words(listed_as, TYPES)
        if self.block == "single":
            return [(self._own(word),) for word in types or self.mixers(facts, facts.need("layers"))]
        layers = facts.need("layers")
        types = facts.words(listed_as, TYPES, layers) or self.mixers(facts, layers)
        ffns = facts.words("mlp_layer_types", FFN_TYPES, layers) or self.ffns(facts, layers)
        if self.block == "double":
            return [("mla", "dense", "mla", "dense", "moe")] * layers
        if self.block == "parallel":
            return [(self.linear, "full", ffn) for ffn in ffns]
        if self.block == "mixer":
            return [(self._own(word),) for word in types]
        if len(types) != layers or len(ffns) != layers:
            raise UsageError(f"config: found {len(types)} mixers and {len(ffns)} feed-forwards for {layers} layers.")
        return [(self._own(mixer), ffn) for mixer, ffn in zip(types, ffns, strict=True)]

    def _own(self, word: str) -> str:
        if word == "linear":
            return self.linear
        return "mla" if word == "full" and self.fixed.get("latent_keys") else word


NO_BIAS = {"qkv_bias": False, "out_bias": False, "ffn_bias": False}
ALL_BIAS = {"qkv_bias": True, "out_bias": True, "ffn_bias": True}
UNTIED = {"tied": False}
MLA = {"latent_keys": True}

LLAMA = Family(defaults=UNTIED)
QWEN = replace(LLAMA, mixers=late_window)
QWEN3 = replace(QWEN, defaults={**UNTIED, "head_dim": 128}, fixed={"qk_norm": "head"})
MIXTRAL = replace(LLAMA, mixers=every("window"), ffns=every("moe"))
QWEN3_NEXT = Family(
    mixers=one_in("gdn", "full", "full_every", 4),
    ffns=sparse_step,
    defaults={**UNTIED, "head_dim": 256},
    fixed={"qk_norm": "head", "gate": True, "shared_gate": True},
)
GEMMA = Family(defaults={"head_dim": 256, "tied": True})
GEMMA2 = replace(GEMMA, mixers=one_in("window", "full", "window_pattern", 2), norms=4)
DEEPSEEK = Family(mixers=every("mla"), ffns=first_dense, defaults=UNTIED, fixed=MLA)
GPT2 = Family(
    norm_bias=True, defaults={"tied": True}, fixed={**ALL_BIAS, "plain_ffn": True, "d_ff_of_d": 4, "kv_heads": None}
)
MAMBA = Family(
    mixers=every("mamba"),
    block="mixer",
    norms=1,
    linear="mamba",
    defaults={"tied": True},
    fixed={"ssm_own_width": True},
)
BAMBA = Family(mixers=listed("attn_layer_indices", "full", "mamba2"), linear="mamba2", defaults=UNTIED)
NEMOTRON_H = Family(
    block="single",
    norms=1,
    linear="mamba2",
    defaults={**UNTIED, "head_dim": 128},
    fixed={"plain_ffn": True, "qk_norm": False},
)
OLMO2 = replace(LLAMA, fixed={"qk_norm": "wide"})
MINIMAX = Family(mixers=minimax_types, ffns=every("moe"), linear="lightning", defaults=UNTIED, fixed=NO_BIAS)
LAYER_NORM = replace(LLAMA, norm_bias=True)

FAMILIES: Mapping[str, Family] = {
    "llama": LLAMA,
    "arcee": replace(LLAMA, fixed={"plain_ffn": True}),
    "apertus": replace(LLAMA, fixed={"plain_ffn": True, "qk_norm": "head"}),
    "glm": replace(LLAMA, defaults={**UNTIED, "qkv_bias": True}, fixed={"out_bias": False}),
    "granite": LLAMA,
    "nemotron": replace(LLAMA, norm_bias=True, fixed={"plain_ffn": True}),
    "olmo": replace(LLAMA, norms=0, final_norms=0),
    "helium": LLAMA,
    "mistral": replace(LLAMA, mixers=every("window"), fixed=NO_BIAS),
    "ministral3": replace(LLAMA, mixers=every("window"), fixed=NO_BIAS),
    "smollm3": replace(QWEN, defaults={"tied": True}),
    "seed_oss": replace(LLAMA, defaults={**UNTIED, "qkv_bias": True}),
    "hunyuan_v1_dense": replace(LLAMA, fixed={"qk_norm": "head"}),
    "qwen2": replace(QWEN, fixed={"qkv_bias": True, "out_bias": False, "ffn_bias": False}),
    "qwen3": QWEN3,
    "qwen2_moe": replace(
        QWEN,
        ffns=sparse_step,
        defaults={**UNTIED, "qkv_bias": True},
        fixed={"out_bias": False, "shared_gate": True},
    ),
    "qwen3_moe": replace(QWEN3, ffns=sparse_step, defaults=UNTIED),
    "qwen3_next": QWEN3_NEXT,
    "qwen3_5_text": replace(QWEN3_NEXT, ffns=every("dense")),
    "qwen3_5_moe_text": QWEN3_NEXT,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": replace(
        GEMMA2,
        mixers=one_in("window", "full", "window_pattern", 6),
        defaults={**GEMMA.defaults, "heads": 8, "kv_heads": 4, "vocab": 262208, "window": 4096},
        fixed={"qk_norm": "head"},
    ),
    "cohere": replace(LLAMA, norms=1, defaults={"tied": True}),
    "cohere2": replace(LLAMA, mixers=one_in("window", "full", "window_pattern", 4), norms=1, defaults={"tied": True}),
    "mixtral": replace(MIXTRAL, fixed=NO_BIAS),
    "phimoe": replace(MIXTRAL, norm_bias=True, fixed={"ffn_bias": False}),
    "granitemoe": replace(MIXTRAL, mixers=every("full")),
    "olmoe": replace(OLMO2, ffns=every("moe")),
    "olmo2": OLMO2,
    "olmo3": replace(OLMO2, mixers=one_in("window", "full", "window_pattern", 4)),
    "exaone4": replace(
        LLAMA, mixers=one_in("window", "full", "window_pattern", 4), fixed={"qk_norm": "head", **NO_BIAS}
    ),
    "flex_olmo": replace(OLMO2, ffns=every("moe")),
    "minimax": MINIMAX,
    "minimax_m1": MINIMAX,
    "minimax_text_01": MINIMAX,
    "minimax_m2": replace(MINIMAX, mixers=every("full"), fixed={**NO_BIAS, "qk_norm": "wide"}),
    "deepseek": replace(LLAMA, ffns=first_dense),
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "kimi_k2": DEEPSEEK,
    "mistral4": DEEPSEEK,
    "deepseek_v32": DEEPSEEK,
    "glm_moe_dsa": DEEPSEEK,
    "afmoe": Family(
        mixers=one_in("window", "full", "full_every", 4),
        ffns=first_dense,
        norms=4,
        defaults=UNTIED,
        fixed={"gate": True, "qk_norm": "head", "correction": True},
    ),
    "glm4": replace(
        LLAMA,
        norms=4,
        defaults={**UNTIED, "qkv_bias": True},
        fixed={"out_bias": False},
    ),
    "glm4_moe": replace(LLAMA, ffns=first_dense, fixed={"out_bias": False}),
    "dots1": replace(LLAMA, ffns=first_dense, fixed={"qk_norm": "head"}),
    "solar_open": replace(LLAMA, ffns=every("moe")),
    "kimi_linear": Family(
        mixers=listed("full_attn_layers", "mla", "kda", base=1, nested="linear_attn_config"),
        ffns=first_dense,
        linear="kda",
        defaults=UNTIED,
        fixed=MLA,
    ),
    "longcat_flash": Family(block="double", norms=4, defaults=UNTIED, fixed=MLA),
    "gpt_oss": Family(
        mixers=one_in("window", "full", "window_pattern", 2),
        ffns=every("moe"),
        defaults={**UNTIED, "head_dim": 64, "qkv_bias": True, "out_bias": True},
        fixed={"sinks": True, "router_bias": True, "expert_bias": True},
    ),
    "step3_text": Family(
        mixers=every("full"),
        ffns=listed("moe_layers_enum", "moe", "dense"),
        defaults={**UNTIED, "kv_heads": 1},
    ),
    "llama4_text": Family(
        mixers=llama4_chunks,
        ffns=llama4_experts,
        defaults={**UNTIED, "head_dim": 128, "window": 8192},
        fixed={"shared_like_expert": True, "qk_norm": ""},
    ),
    "ernie4_5": Family(defaults={"tied": True, "head_dim": 128}),
    "ernie4_5_moe": Family(
        ffns=ernie_range,
        defaults={"tied": True},
        fixed={"correction": True},
    ),
    "pangu_pro_moe": replace(LLAMA, ffns=every("moe"), fixed=NO_BIAS),
    "phi3": replace(LLAMA, mixers=every("window"), fixed=NO_BIAS),
    "phi": replace(LAYER_NORM, norms=1, fixed={**ALL_BIAS, "plain_ffn": True, "head_bias": True, "qk_norm": ""}),
    "stablelm": LAYER_NORM,
    "starcoder2": replace(
        LAYER_NORM,
        mixers=every("window"),
        defaults={"tied": True, **ALL_BIAS},
        fixed={"plain_ffn": True},
    ),
    "gpt2": replace(GPT2, fixed={**GPT2.fixed, "learned": True}),
    "opt": replace(GPT2, fixed={**GPT2.fixed, "learned": True, "extra_positions": 2}),
    "bloom": replace(GPT2, final_norms=2, fixed={**GPT2.fixed, "d_ff": None}),
    "gpt_neox": replace(GPT2, defaults=UNTIED),
    "gptj": replace(
        GPT2,
        norms=1,
        defaults=UNTIED,
        fixed={**GPT2.fixed, "qkv_bias": False, "out_bias": False, "head_bias": True},
    ),
    "gpt_bigcode": replace(GPT2, fixed={**GPT2.fixed, "learned": True, "kv_heads": 1}),
    "mamba": MAMBA,
    "falcon_mamba": MAMBA,
    "mamba2": replace(MAMBA, mixers=every("mamba2"), linear="mamba2", defaults=UNTIED),
    "nemotron_h": NEMOTRON_H,
    "jamba": Family(
        mixers=periodic("attn_layer", "full", "mamba"),
        ffns=periodic("expert_layer", "moe", "dense"),
        linear="mamba",
        defaults=UNTIED,
        fixed={**NO_BIAS, "ssm_norms": True},
    ),
    "bamba": BAMBA,
    "falcon_h1": replace(BAMBA, block="parallel"),
    "granitemoehybrid": replace(BAMBA, ffns=if_experts, fixed={"dense_is_shared": True}),
    "lfm2": Family(
        mixers=listed("full_attn_idxs", "full", "conv"),
        defaults={"tied": True},
        fixed={"qk_norm": "head", "qkv_bias": False, "out_bias": False, "ffn_bias": False},
    ),
    "jet_nemotron": Family(
        linear="jet", defaults={"tied": True}, fixed={"qkv_bias": True, "out_bias": False, "ffn_bias": False}
    ),
}
# Other names of the same architecture.
ALIASES: Mapping[str, str] = {
    "gemma3": "gemma3_text",
    "llama4": "llama4_text",
    "step3": "step3_text",
    "step3_vl": "step3_text",
    "kimi_k25": "deepseek_v3",
    "minimaxm1": "minimax_m1",
    "minimaxtext01": "minimax_text_01",
    "pangupromoe": "pangu_pro_moe",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "ministral": "mistral",
}
LIKE_LLAMA = replace(LLAMA, mixers=latent_or_full, ffns=if_experts)

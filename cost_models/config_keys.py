"""What a transformers config.json calls the facts of a model: one table of names, read strictly.

Source: the published config.json files and configuration classes of transformers 5.23; where they differ in a name, the
table lists all of them and the first one present counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attnc.errors import UsageError

KEYS: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_layers", "num_hidden_layers", "n_layer", "n_layers"),
    "d_model": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "num_attention_groups"),
    "head_dim": ("head_dim", "attention_head_dim"),
    "vocab": ("vocab_size",),
    "positions": ("n_positions", "max_position_embeddings"),
    "tied": ("tie_word_embeddings",),
    "d_ff": ("intermediate_size_mlp", "intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim"),
    "qkv_bias": ("qkv_bias", "use_qkv_bias", "attention_bias", "use_bias", "enable_bias"),
    "out_bias": ("attention_out_bias", "attention_bias", "use_bias", "enable_bias"),
    "ffn_bias": ("mlp_bias", "use_bias", "enable_bias"),
    "qk_norm": ("use_qk_norm", "qk_layernorm"),
    "head_bias": ("lm_head_bias",),
    "q_rank": ("q_lora_rank", "share_q_dim"),
    "kv_rank": ("kv_lora_rank",),
    "nope": ("qk_nope_head_dim",),
    "rope": ("qk_rope_head_dim",),
    "v_dim": ("v_head_dim",),
    "index_heads": ("index_n_heads",),
    "index_dim": ("index_head_dim",),
    "index_top": ("index_topk",),
    "window": ("sliding_window", "attention_chunk_size"),
    "window_layers_from": ("max_window_layers",),
    "window_pattern": ("sliding_window_pattern", "_sliding_window_pattern"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k"),
    "d_expert": ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"),
    "shared_width": (
        "shared_expert_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "share_expert_dim",
        "shared_intermediate_size",
    ),
    "shared_experts": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    "zero_experts": ("zero_expert_num",),
    "latent": ("moe_latent_size",),
    "conv": ("linear_conv_kernel_dim", "short_conv_kernel_size", "mamba_d_conv", "conv_kernel", "conv_L_cache"),
    "conv_bias": ("mamba_conv_bias", "use_conv_bias", "conv_bias"),
    "proj_bias": ("mamba_proj_bias", "use_bias"),
    "k_heads": ("linear_num_key_heads", "linear_num_heads"),
    "v_heads": ("linear_num_value_heads",),
    "k_dim": ("linear_key_head_dim", "linear_head_dim"),
    "linear_v_dim": ("linear_value_head_dim",),
    "ssm_heads": ("mamba_num_heads", "mamba_n_heads", "num_heads"),
    "ssm_head_dim": ("mamba_head_dim", "mamba_d_head", "head_dim"),
    "ssm_state": ("ssm_state_size", "mamba_d_state", "state_size"),
    "ssm_groups": ("n_groups", "mamba_n_groups"),
    "ssm_expand": ("mamba_expand", "expand"),
    "ssm_rank": ("mamba_dt_rank", "time_step_rank"),
    "dense_first": ("first_k_dense_replace", "num_dense_layers"),
    "full_every": ("full_attention_interval", "global_attn_every_n_layers", "no_rope_layer_interval"),
}
FLAGS = {"tied", "qkv_bias", "out_bias", "ffn_bias", "qk_norm", "head_bias", "conv_bias", "proj_bias"}
LARGEST, MOST_LAYERS = 10**9, 10_000  # no model comes near them; a config beyond them is a mistake


class Facts:
    """The facts of one config: `need` and `size` read numbers, `flag` truth values, `raw` a key as it is written.

    defaults: what the architecture assumes where the config is silent. fixed: what it does whatever the config says.
    Missing numbers are gathered, so that one sentence names them all.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
        self.config, self.defaults, self.fixed = config, defaults, fixed
        self.missing: list[str] = []

    def find(self, word: str) -> tuple[str, Any]:
        """The key and value of `word`; (first key, default) where the config has none."""
        if word in self.fixed:
            return "", self.fixed[word]
        for key in KEYS[word]:
            if self.config.get(key) is not None:
                return key, self.config[key]
        return KEYS[word][0], self.defaults.get(word)

    def size(self, word: str, default: int = 0) -> int:
        """A whole number, `default` where there is none.

        Raises: UsageError for anything else.
        """
        key, value = self.find(word)
        most = MOST_LAYERS if word == "layers" else LARGEST
        return default if value is None else int(_number(key, value, 0, most, whole=True))

    def need(self, word: str, default: int | None = None) -> int:
        """A positive whole number; without one, 1 stands in and the key is noted as missing."""
        if default is None and self.find(word)[1] is None:
            self.missing.append(KEYS[word][0])
            return 1
        value = self.size(word, default or 0)
        if value < 1:
            raise UsageError(f"config {self.find(word)[0]}={value}: found {value}, allowed is at least 1. Correct it.")
        return value

    def flag(self, word: str, default: bool = False) -> bool:
        key, value = self.find(word)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise UsageError(f"config {key}={value!r}: found {type(value).__name__}, allowed are true and false.")
        return value

    def raw(self, key: str) -> Any:
        """The value of a key as it is written; None where it is absent."""
        return self.config.get(key)

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least` under a key that one family alone has; needed where there is no default.

        Raises: UsageError for anything else.
        """
        value = self.config.get(key)
        if value is not None:
            return int(_number(key, value, least, whole=True))
        if default is None:
            self.missing.append(key)
        return 1 if default is None else default

    def ratio(self, key: str, default: float) -> float:
        """A positive number. Raises: UsageError for anything else."""
        value = self.config.get(key)
        return default if value is None else _number(key, value, 1e-6, whole=False)

    def words(self, key: str, allowed: Mapping[str, str], count: int | None = None) -> list[str] | None:
        """A list (or a string of letters) under `key`, each entry through `allowed`; None where the key is absent."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
            raise UsageError(f"config {key}: found {type(value).__name__}, allowed is a list of words.")
        unknown = sorted({item for item in value if item not in allowed})
        if unknown:
            raise UsageError(
                f"config {key}: found {', '.join(map(repr, unknown))}; known are {', '.join(sorted(allowed))}. "
                "A layer of another kind cannot be counted."
            )
        if count is not None and len(value) != count:
            raise UsageError(f"config {key}: found {len(value)} entries for {count} layers. Give one per layer.")
        return [allowed[item] for item in value]

    def numbers(self, key: str) -> list[int] | None:
        """A list of whole numbers under `key`, or the same written as one string with commas."""
        value = self.raw(key)
        if isinstance(value, str):
            value = [int(part) if part.strip().lstrip("-").isdigit() else part for part in value.split(",") if part]
        if value is None:
            return None
        if not isinstance(value, Sequence) or not all(type(item) is int for item in value):
            raise UsageError(f"config {key}: found {value!r:.60}, allowed is a list of whole numbers.")
        return list(value)

    def inside(self, key: str) -> Facts:
        """The facts of a dict nested under `key`, without this one's defaults; what it lacks is missing here."""
        value = self.raw(key)
        if value is not None and not isinstance(value, Mapping):
            raise UsageError(f"config {key}: found {type(value).__name__}, allowed is a dict.")
        inner = Facts(value or {}, {}, {})
        inner.missing = self.missing
        return inner


def _number(key: str, value: object, least: float, most: int = LARGEST, *, whole: bool) -> float:
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most
    if not numeric or (whole and int(value) != value):  # type: ignore[call-overload]
        raise UsageError(
            f"config {key}={value!r:.60}: found {type(value).__name__}, allowed is a {'whole ' if whole else ''}number "
            f"from {least:g} to {most}. Correct the config."
        )
    return value  # type: ignore[return-value]

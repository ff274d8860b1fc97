"""Small models of real architectures, from their transformers configurations, with random weights and no download.

All are about d=512, 4 layers, head width 64, vocabulary 1000. Weights are drawn with a deviation of 0.05 and not the
usual 0.02: at this width scores would otherwise be so even that an error in a mask hardly showed.

    python benchmarks/architectures.py        prints the table
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from timing import print_table

VOCABULARY = 1000
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1536,
    "initializer_range": 0.05,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALL = ("sdpa", "eager", "flex_attention")


@dataclass(frozen=True)
class Architecture:
    """One transformers architecture at benchmark size.

    kind: model_type of its configuration. fields: of the configuration, over SIZES; a field that is None in `fields`
    is left out. length: tokens it is timed at. window: the field that holds its window, and its value.
    spellings: attention implementations that transformers offers for it. task: its Auto class. mixes: whether layers
    of it are linear mixers.
    """

    kind: str
    fields: Mapping[str, object] = field(default_factory=dict)
    length: int = 4096
    window: tuple[str, int] | None = None
    spellings: tuple[str, ...] = ALL
    task: str = "AutoModelForCausalLM"
    mixes: bool = False


# transformers has no sdpa for a softcap (gemma2) or for sinks (gpt_oss), no FlexAttention for gpt2, and refuses
# FlexAttention with sinks on the CPU.
ARCHITECTURES = {
    "mistral": Architecture("mistral", length=8192, window=("sliding_window", 512)),
    "gemma2": Architecture(
        "gemma2",
        {"query_pre_attn_scalar": 64},
        window=("sliding_window", 512),
        spellings=("eager", "flex_attention"),
    ),
    "gemma3": Architecture(
        "gemma3_text", {"query_pre_attn_scalar": 64, "sliding_window_pattern": 4}, window=("sliding_window", 512)
    ),
    "gpt_oss": Architecture(
        "gpt_oss",
        {"intermediate_size": 512, "num_local_experts": 4, "num_experts_per_tok": 2},
        window=("sliding_window", 128),
        spellings=("eager",),
    ),
    "phi3": Architecture("phi3", {"head_dim": None}, window=("sliding_window", 512)),
    "modernbert": Architecture(
        "modernbert",
        {"head_dim": None, "num_key_value_heads": None, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
        window=("local_attention", 128),
        task="AutoModelForMaskedLM",
    ),
    "llama4": Architecture(
        "llama4_text",
        {"intermediate_size": 512, "intermediate_size_mlp": 1536, "num_local_experts": 4},
        window=("attention_chunk_size", 512),
    ),
    "llama": Architecture("llama"),
    "gpt2": Architecture(
        "gpt2",
        {
            **dict.fromkeys(("head_dim", "num_key_value_heads", "intermediate_size")),
            **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
            "n_inner": 1536,
        },
        spellings=("sdpa", "eager"),
    ),
    "qwen3": Architecture("qwen3"),
    "qwen3_next": Architecture(
        "qwen3_next",
        {
            "linear_num_key_heads": 8, "linear_num_value_heads": 8, "linear_key_head_dim": 64,
            "linear_value_head_dim": 64, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
        },
        spellings=("sdpa",),
        mixes=True,
    ),
    "minimax": Architecture(
        "minimax", {"intermediate_size": 512, "num_local_experts": 4}, spellings=("sdpa",), mixes=True
    ),
    "mamba2": Architecture(
        "mamba2",
        {
            **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "intermediate_size")),
            "num_heads": 16, "n_groups": 1, "state_size": 128,
        },
        spellings=("eager",),
        mixes=True,
    ),
}  # fmt: skip
WINDOWED = tuple(name for name, architecture in ARCHITECTURES.items() if architecture.window)
MIXED = tuple(name for name, architecture in ARCHITECTURES.items() if architecture.mixes)
DENSE = tuple(name for name in ARCHITECTURES if name not in WINDOWED + MIXED)


def build(
    name: str, spelling: str, length: int, layers: int = 4, window: int | None = None, use_cache: bool = False
) -> torch.nn.Module:
    """The architecture `name` with attention spelled `spelling`, in eval mode; equal calls give equal weights."""
    import transformers

    architecture = ARCHITECTURES[name]
    fields = {**SIZES, **architecture.fields}
    # `None` takes a field out that the configuration does not have; a padding token of None is meant.
    fields = {key: value for key, value in fields.items() if value is not None or key == "pad_token_id"}
    fields |= {"num_hidden_layers": layers, "max_position_embeddings": max(length, 4096)}
    if architecture.window:
        fields[architecture.window[0]] = window or architecture.window[1]
    config = transformers.AutoConfig.for_model(architecture.kind, **fields)
    config.use_cache = use_cache
    torch.manual_seed(0)
    return getattr(transformers, architecture.task).from_config(config, attn_implementation=spelling).eval()


def tokens(length: int) -> torch.Tensor:
    """One random sequence; the ids below 3 have meanings and are left out."""
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))


def main() -> None:
    rows = []
    for name, architecture in ARCHITECTURES.items():
        model = build(name, architecture.spellings[0], architecture.length)
        million = sum(p.numel() for p in model.parameters()) / 1e6
        kinds = getattr(model.config, "layer_types", None) or []
        window = "{}={}".format(*architecture.window) if architecture.window else "-"
        layers = ", ".join(f"{kind} x{kinds.count(kind)}" for kind in dict.fromkeys(kinds)) or "-"
        rows.append([name, f"{million:.1f}", architecture.length, window, layers, ", ".join(architecture.spellings)])
    print_table(["architecture", "M weights", "tokens", "window", "layers", "spellings"], rows)


if __name__ == "__main__":
    main()

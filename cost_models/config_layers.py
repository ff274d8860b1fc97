"""From the facts of a config to layers: one builder per word of the layer plan, one rule per way to write a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil

from attnc.cost_models.config_keys import Facts
from attnc.cost_models.layers import WHOLE, Embedding, Experts, FeedForward, Layer, Reach
from attnc.cost_models.mixers import (
    Attention,
    LatentAttention,
    Recurrence,
    gated_delta,
    jet_block,
    kimi_delta,
    lightning,
    mamba,
    mamba2,
    short_conv,
)
from attnc.errors import UsageError

Plan = list[tuple[str, ...]]

# Builders, by the word of a layer in the plan.


def _head_dim(facts: Facts, d: int, heads: int) -> int:
    return facts.need("head_dim", max(1, d // heads))


def _attention(shape: str) -> Callable[[Facts], Layer]:
    def build(facts: Facts) -> Layer:
        d, heads = facts.need("d_model"), facts.need("heads")
        width = facts.size("window")
        norm = facts.find("qk_norm")[1]
        return Attention(
            d,
            heads,
            facts.need("kv_heads", heads),
            _head_dim(facts, d, heads),
            span=Reach(shape, width) if width and shape != "all" else WHOLE,
            q_rank=facts.size("q_rank"),
            gate=bool(facts.fixed.get("gate")),
            qkv_bias=facts.flag("qkv_bias"),
            out_bias=facts.flag("out_bias"),
            qk_norm="head" if norm is True else norm or "",
            sinks=bool(facts.fixed.get("sinks")),
        )

    return build


def _mla(facts: Facts) -> Layer:
    indexed = facts.size("index_top")
    return LatentAttention(
        facts.need("d_model"),
        facts.need("heads"),
        facts.size("q_rank"),
        facts.need("kv_rank"),
        facts.need("nope"),
        facts.need("rope"),
        facts.need("v_dim"),
        facts.flag("qkv_bias"),
        facts.need("index_heads") if indexed else 0,
        facts.need("index_dim") if indexed else 0,
        indexed,
    )


def _lightning(facts: Facts) -> Layer:
    d, heads = facts.need("d_model"), facts.need("heads")
    return lightning(d, heads, _head_dim(facts, d, heads))


def _gdn(facts: Facts) -> Layer:
    return gated_delta(
        facts.need("d_model"),
        facts.need("k_heads"),
        facts.need("v_heads"),
        facts.need("k_dim"),
        facts.need("linear_v_dim"),
        facts.need("conv", 4),
    )


def _kda(facts: Facts) -> Layer:
    inner = facts.inside("linear_attn_config")
    heads = facts.size("k_heads") or inner.whole("num_heads")
    dim = facts.size("k_dim") or inner.whole("head_dim")
    return kimi_delta(facts.need("d_model"), heads, dim, facts.size("conv") or inner.need("conv", 4))


def _mamba2(facts: Facts) -> Layer:
    return mamba2(
        facts.need("d_model"),
        facts.need("ssm_heads"),
        facts.need("ssm_head_dim"),
        facts.need("ssm_state"),
        facts.need("ssm_groups", 1),
        facts.need("conv", 4),
        facts.flag("conv_bias", True),
        facts.flag("proj_bias"),
        facts.raw("mamba_rms_norm") is not False,
    )


def _mamba(facts: Facts) -> Layer:
    d = facts.need("d_model")
    width = facts.need("ssm_expand", 2) * d
    if facts.fixed.get("ssm_own_width"):  # falcon-mamba writes a width that its expand does not give
        width = facts.need("d_ff", width)
    rank = ceil(d / 16) if facts.find("ssm_rank")[1] == "auto" else facts.need("ssm_rank", ceil(d / 16))
    bias, conv_bias = facts.flag("proj_bias"), facts.flag("conv_bias", True)
    norms = bool(facts.fixed.get("ssm_norms"))
    return mamba(d, width, facts.need("ssm_state", 16), rank, facts.need("conv", 4), conv_bias, bias, norms)


def _jet(facts: Facts) -> Layer:
    inner = facts.inside("efficient_attention_config").inside("jet")
    heads, dim = inner.whole("num_heads"), inner.whole("head_dim")
    values = max(1, round(dim * inner.ratio("expand_v", 2.0)))
    conv, reduction = inner.whole("conv_size", 4), inner.whole("dconv_generator_reduction", 8)
    return jet_block(facts.need("d_model"), heads, dim, values, conv, reduction)


def _jet_window(facts: Facts) -> Layer:
    width = facts.inside("efficient_attention_config").inside("swa").raw("window_size")
    inner = Facts({**facts.config, "sliding_window": width}, facts.defaults, facts.fixed)
    layer = _attention("window")(inner)
    facts.missing += inner.missing
    return layer


def _conv(facts: Facts) -> Recurrence:
    return short_conv(facts.need("d_model"), facts.need("conv", 3), facts.flag("conv_bias"))


def _dense(facts: Facts) -> Layer:
    d = facts.need("d_model")
    word = "shared_width" if facts.fixed.get("dense_is_shared") else "d_ff"
    d_ff = facts.need(word, facts.fixed.get("d_ff_of_d", 0) * d or None)
    if facts.raw("block_auto_adjust_ff_dim"):  # LFM2 takes two thirds of it, rounded up to a multiple
        step = facts.whole("block_multiple_of", 256)
        d_ff = step * ceil(int(facts.ratio("block_ffn_dim_multiplier", 1.0) * (2 * d_ff // 3)) / step)
    return FeedForward(d, d_ff, not facts.fixed.get("plain_ffn"), facts.flag("ffn_bias"))


def _moe(facts: Facts) -> Layer:
    width = facts.need("d_expert")
    experts, top, zero = facts.need("experts"), facts.need("top_k"), facts.size("zero_experts")
    if top > experts + zero and not facts.missing:
        raise UsageError(f"config {facts.find('top_k')[0]}={top}: allowed is at most the {experts + zero} experts.")
    shared = facts.size("shared_width") or facts.size("shared_experts") * width
    return Experts(
        facts.need("d_model"),
        width,
        experts,
        top,
        gated=not facts.fixed.get("plain_ffn"),
        shared_width=facts.need("d_expert") if facts.fixed.get("shared_like_expert") else shared,
        shared_gate=bool(facts.fixed.get("shared_gate")),
        zero_experts=zero,
        latent=facts.size("latent"),
        router_bias=bool(facts.fixed.get("router_bias")),
        expert_bias=bool(facts.fixed.get("expert_bias")),
        correction=bool(facts.fixed.get("correction")),
    )


BUILDERS: Mapping[str, Callable[[Facts], Layer]] = {
    "full": _attention("all"),
    "window": _attention("window"),
    "chunk": _attention("chunk"),
    "mla": _mla,
    "lightning": _lightning,
    "gdn": _gdn,
    "kda": _kda,
    "mamba2": _mamba2,
    "mamba": _mamba,
    "jet": _jet,
    "jet_window": _jet_window,
    "conv": _conv,
    "dense": _dense,
    "moe": _moe,
}


def embedding(facts: Facts) -> Embedding:
    positions = facts.need("positions") + facts.fixed.get("extra_positions", 0) if facts.fixed.get("learned") else 0
    tied, bias = facts.flag("tied", True), facts.flag("head_bias")
    return Embedding(facts.need("vocab"), facts.need("d_model"), tied, positions, bias)


# Which mixer each layer has, where the config does not list them. Layers count from 0.

Rule = Callable[[Facts, int], list[str]]


def every(word: str) -> Rule:
    return lambda facts, layers: [word] * layers


def one_in(often: str, rare: str, word: str, default: int, offset: int = -1) -> Rule:
    """`rare` once every `word` layers (by default `default`), at `offset` of each group; `often` elsewhere."""

    def rule(facts: Facts, layers: int) -> list[str]:
        period = facts.need(word, default)
        return [rare if i % period == offset % period else often for i in range(layers)]

    return rule


def latent_or_full(facts: Facts, layers: int) -> list[str]:
    """Latent attention where the config has a rank for keys and values."""
    return ["mla" if facts.size("kv_rank") else "full"] * layers


def late_window(facts: Facts, layers: int) -> list[str]:
    """Qwen: where a window is used at all, the layers from max_window_layers on have it."""
    start = facts.size("window_layers_from", layers) if facts.raw("use_sliding_window") else layers
    return ["full" if i < start else "window" for i in range(layers)]


def llama4_chunks(facts: Facts, layers: int) -> list[str]:
    """Layers with rotary embedding read their own chunk, the others everything."""
    rotary = facts.numbers("no_rope_layers")
    if rotary and len(rotary) == layers:
        return ["chunk" if i else "full" for i in rotary]
    return one_in("chunk", "full", "full_every", 4)(facts, layers)


def listed(key: str, inside: str, often: str, base: int = 0, nested: str = "") -> Rule:
    """`inside` for the layers that a list names (counted from `base`), `often` for the others."""

    def rule(facts: Facts, layers: int) -> list[str]:
        found = (facts.inside(nested) if nested else facts).numbers(key) or []
        return [inside if i + base in found else often for i in range(layers)]

    return rule


def minimax_types(facts: Facts, layers: int) -> list[str]:
    found = facts.numbers("attn_type_list")
    if not found:
        return one_in("lightning", "full", "full_every", 8)(facts, layers)
    return ["full" if kind == 1 else "lightning" for kind in found[:layers]]


def periodic(name: str, rare: str, often: str) -> Rule:
    """Jamba: `rare` where (i - offset) is a multiple of the period."""

    def rule(facts: Facts, layers: int) -> list[str]:
        period, offset = facts.whole(f"{name}_period"), facts.whole(f"{name}_offset", 0, least=0)
        return [rare if i % period == offset else often for i in range(layers)]

    return rule


# Which feed-forward each layer has.


def first_dense(facts: Facts, layers: int) -> list[str]:
    """DeepSeek: the first layers dense, then experts, every moe_layer_freq layers; a list of it names each layer."""
    if isinstance(facts.raw("moe_layer_freq"), list):
        return ["moe" if i else "dense" for i in facts.numbers("moe_layer_freq") or []]
    dense, step = facts.size("dense_first"), facts.whole("moe_layer_freq", 1)
    return ["moe" if i >= dense and i % step == 0 else "dense" for i in range(layers)]


def sparse_step(facts: Facts, layers: int) -> list[str]:
    """Qwen: every decoder_sparse_step-th layer has experts, but for mlp_only_layers."""
    step, only = facts.whole("decoder_sparse_step", 1), facts.numbers("mlp_only_layers") or []
    return ["dense" if i in only or (i + 1) % step else "moe" for i in range(layers)]


def ernie_range(facts: Facts, layers: int) -> list[str]:
    """ERNIE: experts from moe_layer_start_index to moe_layer_end_index, every moe_layer_interval layers."""
    start, step = facts.whole("moe_layer_start_index", 0, least=0), facts.whole("moe_layer_interval", 1)
    end = facts.whole("moe_layer_end_index", -1, least=-1)
    end = layers - 1 if end < 0 else end
    return ["moe" if start <= i <= end and (i + 1) % step == 0 else "dense" for i in range(layers)]


def llama4_experts(facts: Facts, layers: int) -> list[str]:
    """Llama 4: layers named in moe_layers, else every interleave_moe_layer_step-th."""
    step = facts.whole("interleave_moe_layer_step", 1)
    named = facts.numbers("moe_layers")
    named = list(range(step - 1, layers, step)) if named is None else named
    return ["moe" if i in named else "dense" for i in range(layers)]


def if_experts(facts: Facts, layers: int) -> list[str]:
    return first_dense(facts, layers) if facts.size("experts") > 1 else ["dense"] * layers

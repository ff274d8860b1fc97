"""Published counts, ratios and speed-ups against the cost model: shared/headlines.md, section 6."""

from __future__ import annotations

from functools import cache

import pytest

from attnc.cost_models.layers import LENGTH, WHOLE, Conventions, FeedForward, Reach
from attnc.cost_models.mixers import Attention
from attnc.cost_models.model_card import ModelCard, model_card
from attnc.cost_models.sparse_counts import (
    kept_of_square,
    latent_per_device,
    moba_pairs,
    nsa_keys,
    nsa_mean_keys,
)
from tests.cost_models.headlines import (
    CACHE_64K,
    CACHE_PARTS,
    CONFIGS,
    KV_PER_TOKEN,
    PARAMETERS,
    STEP3_TABLES,
    STEP3_TWO_BYTES,
    TRAINING,
    TRAINING_RATIOS,
)

K = 1024
STEP3 = Conventions(mla="padded", state_flops=10)


@cache
def card(name: str) -> ModelCard:
    return model_card(CONFIGS[name], name)


# 1. Parameters.


@pytest.mark.parametrize(("name", "convention", "billions", "within"), PARAMETERS)
def test_parameters_are_the_published_ones(name: str, convention: str, billions: float, within: float) -> None:
    assert getattr(card(name).parameters(), convention) / 1e9 == pytest.approx(billions, rel=within)


def test_zero_experts_give_a_range_of_active_parameters() -> None:
    fewest, most = card("LongCat-Flash").active_range
    assert fewest / 1e9 == pytest.approx(18.6, rel=0.01)
    assert most / 1e9 == pytest.approx(31.3, rel=0.01)


def test_kimi_linear_is_48b_without_its_embeddings() -> None:
    c = card("Kimi Linear")
    assert (c.parameters().total - c.embedding.total) / 1e9 == pytest.approx(48, rel=0.01)


def test_qwen3_next_activates_three_to_four_billion_by_every_convention() -> None:
    p = card("Qwen3-Next").parameters()
    assert [round(n / 1e9, 2) for n in (p.active, p.active_head, p.active_both)] == [3.25, 3.56, 3.87]


# 2. Step-3: bytes and FLOP per decoded token, FP8 cache, float32 states read and written.


@pytest.mark.parametrize(("name", "at_8k", "at_32k", "linear", "ffn"), STEP3_TABLES)
def test_step3_tables(
    name: str, at_8k: tuple[float, float], at_32k: tuple[float, float], linear: float, ffn: float
) -> None:
    for context, (kv, attention) in ((8 * K, at_8k), (32 * K, at_32k)):
        flops = card(name).flops("decode", context, STEP3)
        wider = card(name).kv_bytes_per_token(item=1) * context if name in STEP3_TWO_BYTES else 0
        assert card(name).decode_traffic(context, item=1) + wider == pytest.approx(kv, rel=0.005)
        assert flops.mixing == pytest.approx(attention, rel=0.005)
    assert flops.projections == pytest.approx(linear, rel=0.005)
    assert flops.ffn == pytest.approx(ffn, rel=0.005)


def test_step3_prices_per_million_tokens() -> None:
    h800 = {"flop": 2 / 3600 / 1.98e15, "byte": 2 / 3600 / 3.35e12}
    h20 = {"flop": 0.8 / 3600 / 2.96e14, "byte": 0.8 / 3600 / 4e12}

    def attention(name: str, price: dict[str, float]) -> float:
        flops, kv = card(name).flops("decode", 8 * K, STEP3), card(name).decode_traffic(8 * K, item=1)
        return max(flops.mixing * price["flop"], kv * price["byte"]) + flops.projections * price["flop"]

    assert 1e6 * attention("DeepSeek-V3", h800) == pytest.approx(0.054, rel=0.01)
    ffn = card("Step-3").flops("decode", 8 * K, STEP3).ffn * h800["flop"]
    assert 1e6 * (attention("Step-3", h20) + ffn) == pytest.approx(0.055, rel=0.01)


@pytest.mark.parametrize(("name", "published"), [("DeepSeek-V3", 512), ("Qwen3-235B", 32), ("Step-3", 128)])
def test_attention_flops_per_byte_of_cache(name: str, published: float) -> None:
    c = card(name)
    intensity = c.flops("decode", 8 * K, STEP3).mixing / c.kv_bytes(8 * K, item=1)
    assert intensity == pytest.approx(published, rel=0.001)


@pytest.mark.parametrize(("flops", "bandwidth", "published"), [(1.98e15, 3.35e12, 0.058), (2.96e14, 4e12, 0.007)])
def test_least_sparsity_of_experts_on_h800_and_h20(flops: float, bandwidth: float, published: float) -> None:
    d, layers = 7168, CONFIGS["Step-3"]["num_hidden_layers"]
    assert d * flops * layers / (400e9 * bandwidth * 11.1e-3) == pytest.approx(published, rel=0.05)


# 3. DeepSeekMoE: training FLOP per sequence over the full square.

FULL = Conventions(causal="full")


@pytest.mark.parametrize(("name", "length", "tera"), TRAINING)
def test_training_flops_of_deepseek_moe(name: str, length: int, tera: float) -> None:
    assert card(name).training_flops(length, FULL) / 1e12 == pytest.approx(tera, rel=0.025)


@pytest.mark.parametrize(("name", "base", "published"), TRAINING_RATIOS)
def test_training_ratios_of_deepseek_moe(name: str, base: str, published: float) -> None:
    ratio = card(name).training_flops(4096, FULL) / card(base).training_flops(4096, FULL)
    assert ratio == pytest.approx(published, rel=0.025)


def test_deepseek_67b_matches_only_when_counted_with_as_many_key_heads_as_query_heads() -> None:
    assert card("DeepSeek 67B").training_flops(4096, FULL) / 1e12 == pytest.approx(1793, rel=0.01)


def test_deepseek_v3_trains_at_250_gflop_per_token_with_causal_attention() -> None:
    assert card("DeepSeek-V3").training_flops(4096) / 4096 / 1e9 == pytest.approx(250, rel=0.005)


# 4. Sparse attention, keys and values.


@pytest.mark.parametrize(("length", "published"), [(8 * K, 4), (16 * K, 6.4), (32 * K, 9.1), (64 * K, 11.6)])
def test_nsa_decode_reads(length: int, published: float) -> None:
    assert length / float(nsa_keys().subs(LENGTH, length)) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    ("length", "block", "top", "published"),
    [(8 * K, 512, 3, 0.8125), (32 * K, 512, 3, 0.9531), (K * K, 4096, 12, 0.9531), (128 * K, 4096, 12, 0.625)],
)
def test_moba_sparsity_of_the_full_square(length: int, block: int, top: int, published: float) -> None:
    assert 1 - kept_of_square(top * block, length) == pytest.approx(published, rel=0.001)


def test_moba_saves_half_as_much_of_the_causal_half_as_of_the_square() -> None:
    length, block, top = K * K, 4096, 12
    causal = length**2 / 2 / float(moba_pairs(block, top).subs(LENGTH, length))
    assert causal == pytest.approx(11.1, rel=0.01)
    assert length / (top * block) == pytest.approx(21.3, rel=0.01)


def vmoba_flops(tokens: int, kept: float = 1.0) -> float:
    """Wan-2.1-1.3B: self-attention over the full square, cross-attention to 300 text tokens, plain feed-forward."""
    d, text = 1536, 300
    attention, ffn = Attention(d, 12, 12, 128), FeedForward(d, 8960, gated=False)
    square = attention.mixing("prefill", FULL)[0].pair * tokens * tokens
    scored = 0.0 if kept == 1.0 else 2.0 * tokens * d * sum((7, 40, 60)) / 3  # blocks of the three layouts
    own = 2 * tokens * attention.active_weights("mixer") + kept * square + scored
    cross = 4 * d * d * (tokens + text) + attention.mixing("prefill", FULL)[0].pair * tokens * text
    return own + cross + 2 * tokens * ffn.active_weights("ffn")


@pytest.mark.parametrize(("kept", "published"), [(0.18, 2.92), (0.27, 2.40)])
def test_vmoba_flops(kept: float, published: float) -> None:
    tokens = 24 * 36 * 64
    assert vmoba_flops(tokens) / vmoba_flops(tokens, kept) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(("name", "published"), KV_PER_TOKEN)
def test_kv_bytes_per_token(name: str, published: int) -> None:
    assert card(name).kv_bytes_per_token() == published


def test_cache_claims_of_hybrids() -> None:
    every_layer = 80 * 2 * 8 * 128 * 2
    assert 1 - card("MiniMax-M1").kv_bytes_per_token() / every_layer == 7 / 8
    assert card("MiniMax-M1").state_bytes() / 1e6 == pytest.approx(293.6, rel=0.001)
    # "Up to 75%" is the ratio 3:1 of the design; the released model has 27 layers, 7 of them full: 20 / 27 = 74.1%.
    layer = card("Kimi Linear, all MLA").kv_bytes_per_token() / 27
    assert 1 - card("Kimi Linear, three to one").kv_bytes_per_token() / (28 * layer) == 0.75
    assert 1 - card("Kimi Linear").kv_bytes_per_token() / (27 * layer) == pytest.approx(20 / 27)
    assert card("Kimi Linear").state_bytes() / 1e6 == pytest.approx(42, rel=0.01)


@pytest.mark.parametrize(("context", "published"), [(8 * K, 2.56e8), (32 * K, 4 * 2.56e8)])
def test_kv_size_of_mfa(context: int, published: float) -> None:
    assert card("Step-3").kv_bytes(context, item=1) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(("name", "published", "within"), CACHE_64K)
def test_cache_at_64k(name: str, published: float, within: float) -> None:
    assert card(name).cache_bytes(64 * K) / 2**20 == pytest.approx(published, rel=within)


@pytest.mark.parametrize(("name", "full", "windows", "states", "convolutions"), CACHE_PARTS)
def test_cache_of_jet_nemotron_is_the_sum_of_its_parts(
    name: str, full: float, windows: float, states: float, convolutions: float
) -> None:
    c = card(name)
    found = (c.kv_bytes(64 * K), c.state_bytes(), c.conv_bytes(2))
    assert [part / 2**20 for part in found] == [full + windows, states, convolutions]


def test_tpla_halves_the_latent_but_not_the_rotary_key() -> None:
    assert 576 / latent_per_device(512, 64, 2) == pytest.approx(1.79, rel=0.01)


def test_exchange_of_experts_and_least_time_per_token_of_deepseek_v3() -> None:
    exchange = 32 * 9 * 7000 * 3 / 50e9
    assert exchange * 1e6 == pytest.approx(120.96)
    assert 2 * CONFIGS["DeepSeek-V3"]["num_hidden_layers"] * exchange * 1e3 == pytest.approx(14.76, rel=0.001)


# 5. Jet-Nemotron: throughput at the largest batch goes as the inverse of the cache.


@pytest.mark.parametrize(("context", "measured"), [(64 * K, 2885 / 61), (256 * K, 53.6)])
def test_throughput_ratio_of_jet_nemotron_is_the_ratio_of_caches(context: int, measured: float) -> None:
    ratio = card("Qwen3-1.7B").cache_bytes(context) / card("Jet-Nemotron-2B").cache_bytes(context)
    assert ratio == pytest.approx(measured, rel=0.05)


def test_for_jet_nemotron_4b_the_cache_alone_promises_a_third_too_much() -> None:
    ratio = card("Qwen3-1.7B").cache_bytes(64 * K) / card("Jet-Nemotron-4B").cache_bytes(64 * K)
    assert ratio / (1271 / 61) == pytest.approx(1.33, rel=0.02)


# 7. MiniMax-M1 against DeepSeek-R1.


def test_m1_against_r1_depends_on_the_convention_and_says_which() -> None:
    how, length = Conventions(mla="naive"), 100_000
    m1, r1 = card("MiniMax-M1"), card("DeepSeek-V3")
    summed = m1.generation_flops(length, how) / r1.generation_flops(length, how)
    last = m1.decode_flops(length, how) / r1.decode_flops(length, how)
    print(f"M1/R1 at 100K: {summed:.1%} summed over 1 to 100K, {last:.1%} at the last token ({how})")
    assert summed == pytest.approx(0.344, abs=0.005)
    assert last == pytest.approx(0.222, abs=0.005)
    assert 0.20 <= last <= summed <= 0.35
    assert m1.generation_flops(64 * K, how) < 0.5 * r1.generation_flops(64 * K, how)
    assert "half the square" in str(how) and "MLA naive" in str(how)
    absorbed = Conventions(mla="absorbed")
    assert m1.generation_flops(length) / r1.generation_flops(length, absorbed) == pytest.approx(0.120, abs=0.002)


def test_nsa_mean_keys_bound_the_kernel() -> None:
    assert 32 * K / float(nsa_mean_keys().subs(LENGTH, 64 * K)) == pytest.approx(9.14, rel=0.001)


def test_a_window_longer_than_the_prompt_counts_as_none() -> None:
    window, none = Reach("window", 4096), WHOLE
    for causal in ("half", "full"):
        assert window.pairs(causal).subs(LENGTH, 1000) == none.pairs(causal).subs(LENGTH, 1000)

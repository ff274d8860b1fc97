"""Latency of multi-head latent attention: prompt with 192/128-wide heads, decode absorbed over one 576-wide cache.

Source: DeepSeek-AI 2024, arXiv:2405.04434 (the absorbed form); Dao 2023, arXiv:2307.08691 (tiles, FLOP).
"""

from __future__ import annotations

from collections.abc import Mapping

from sympy import symbols

from attnc.cost_models.latency.terms import (
    EXPONENTIALS,
    TRAFFIC,
    Coefficient,
    Model,
    asynchronous,
    bf16,
    causal_pairs,
    clock,
    exp2_rate,
    exponentials,
    largest,
    power_coefficients,
    smem,
    smooth_largest,
    sms,
    sustained,
    symbol,
    tiles,
    traffic,
)

batch, seq, keys, heads, d_qk, d_v = symbols("batch seq keys heads d_qk d_v")
C = symbol


def _prefill() -> Model:
    work = batch * heads
    rows = tiles(seq, 64) * 64
    scores = work * causal_pairs(rows, rows, 128, C("pad_keys"))
    crowd = 1 + C("narrow") / (1 + (0.9 * smem / (256 * (d_qk + d_v))) ** 6)
    rate = C("efficiency") * bf16 / crowd
    score_s = 2 * (d_qk + d_v) / rate + exponentials(1)
    products = scores * score_s + work * tiles(seq, 128) * C("prologue") / (sms * clock)
    longest = (seq + C("pad_keys")) * 128 * sms * score_s
    flops = work * seq**2 * (d_qk + d_v)
    power_s = sustained(flops)
    qkv = batch * seq * heads * (2 * d_qk + 2 * d_v) * 2 + batch * seq * 576 * 4
    moved = C("passes") * traffic(qkv, qkv)
    fixed = C("launch") / clock
    seconds = fixed + largest(products, power_s) + C("tail") * longest + moved
    return Model(
        "mla_prefill",
        (batch, seq, heads, d_qk, d_v),
        (
            Coefficient("launch", 16000, "cycles", "launch, drain and the kernels beside", low=100),
            Coefficient("efficiency", 0.75, "1", "share of the matrix peak of full tiles", True, 0.1, 1.0, 0.2),
            Coefficient("narrow", 0.25, "1", "loss where the tiles of a wide head crowd shared memory", high=2),
            Coefficient("pad_keys", 64, "keys", "keys visited beyond the triangle, a row", low=1, high=512),
            *EXPONENTIALS,
            *power_coefficients(1.6)[:2],
            Coefficient("prologue", 2000, "cycles", "start and end of a row block", low=10, high=20000),
            Coefficient("tail", 0.5, "1", "share of the longest row that is not overlapped", low=0.01, high=3),
            Coefficient("passes", 1, "1", "passes over queries, keys and values", low=0.1, high=10),
            *TRAFFIC,
        ),
        seconds,
        fixed,
        flops,
        batch * seq * heads * (2 * d_qk + 2 * d_v) * 2,
    )


def _decode() -> Model:
    cache = batch * keys * d_qk * 2
    rest = batch * heads * (d_qk + d_v) * 2
    group = tiles(heads, 16) * 16
    flops = 2 * batch * heads * keys * (d_qk + d_v)
    # FlashMLA and its like are written for wgmma and tcgen05; elsewhere a generic kernel runs.
    sync = 1 - asynchronous
    rate = (asynchronous * C("efficiency") + sync * C("efficiency_sync")) * bf16
    products = 2 * batch * keys * (d_qk + d_v) * (group + C("pad_heads")) / rate
    softmax = batch * group * keys / (sms * clock * exp2_rate) * C("exp_share")
    total = cache + rest
    moved = traffic(total, total)
    fixed = C("launch") / clock
    chain = (asynchronous * C("chain") + sync * C("chain_sync")) * keys / (keys + C("split")) + sync * C("key") * keys
    body = smooth_largest(moved, products + softmax)
    seconds = fixed + chain / clock + body + batch * C("block") / (sms * clock)
    return Model(
        "mla_decode",
        (batch, keys, heads, d_qk, d_v),
        (
            Coefficient("launch", 20000, "cycles", "launch, drain and the kernels beside", low=100),
            Coefficient("chain", 12000, "cycles", "sequential part: splits and their merge", low=10),
            Coefficient("chain_sync", 60000, "cycles", "the same of mma kernels", True, 10, class_spread=0.7),
            Coefficient("split", 2000, "keys", "keys at which half of it shows", low=16, high=1e5),
            Coefficient("key", 2, "cycles", "what every key adds to it", True, 0.01, 1e4, class_spread=1),
            *TRAFFIC,
            Coefficient("efficiency", 0.65, "1", "share of the matrix peak", low=0.02, high=1.0, spread=0.2),
            Coefficient("efficiency_sync", 0.3, "1", "the same of mma kernels", low=0.02, high=1.0, spread=0.2),
            Coefficient("pad_heads", 16, "heads", "heads a tile holds beyond those asked", low=1, high=128),
            Coefficient("exp_share", 0.5, "1", "exponentials not hidden", low=0.01, high=10),
            Coefficient("block", 2000, "cycles", "start and end of a block", low=1, high=100000),
        ),
        seconds,
        fixed,
        flops,
        cache,
    )


MODELS = {model.name: model for model in (_prefill(), _decode())}


def encode(kind: str, shape: Mapping) -> tuple[str, tuple[float, ...]]:
    """The model of the call and its numeric columns."""
    length = shape["seq_q"] if kind == "mla_prefill" else shape["seq_kv"]
    return kind, (shape["batch"], length, shape["q_heads"], shape["head_dim_qk"], shape["head_dim_v"])

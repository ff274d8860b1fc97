"""Latency of softmax attention: prompt (causal), one new token against a cache, encoder.

Prompt and encoder: tiles of 128 query rows; each row block costs its matrix products, one exponential a score, and the
longest row is added because the last block runs alone. Decode: the cache is read once, from L2 as far as it fits.

Source: Dao 2023, arXiv:2307.08691 (tiles, FLOP); Shah et al. 2024, arXiv:2407.08608 (exponentials beside products).
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
    least,
    peak,
    power_coefficients,
    smem,
    sms,
    sustained,
    symbol,
    tiles,
    traffic,
)

batch, seq, keys, q_heads, kv_heads, head_dim, window, item, rare = symbols(
    "batch seq keys q_heads kv_heads head_dim window item rare"
)
C = symbol


def _prefill() -> Model:
    work = batch * q_heads
    # The heads of one group share a tile where the prompt is short.
    rows = batch * kv_heads * tiles(seq * q_heads / kv_heads, 64) * 64
    wide = tiles(head_dim, 32) * 32
    is_fp8 = 2 - item
    scores = rows * causal_pairs(seq, window, 128, C("pad_keys")) / seq
    blocks = largest(batch * kv_heads * tiles(seq * q_heads / kv_heads, 128), work * seq / 128)
    crowd = 1 + C("narrow") / (1 + (C("fit") * smem / (512 * wide)) ** 6) + C("too_wide") / (1 + (384 / wide) ** 12)
    gain = asynchronous * C("fp8_gain") + (1 - asynchronous) * C("fp8_gain_sync")
    rate = C("efficiency") * bf16 * gain**is_fp8 / crowd
    softmax = exponentials(1 + C("fp8_exp") * is_fp8)
    score_s = 4 * wide / rate + softmax
    products = scores * score_s + blocks * C("prologue") / (sms * clock)
    longest = (least(window + 128 + C("pad_keys"), seq) + C("pad_keys")) * 128 * sms * score_s
    pairs = seq * least(window, seq) - least(window, seq) ** 2 / 2
    power_s = sustained(4 * work * pairs * wide, is_fp8)
    qkv = batch * seq * head_dim * (2 * q_heads + 2 * kv_heads) * 2
    cache = batch * seq * head_dim * kv_heads * 2 * (2 + item)
    moved = traffic(qkv + cache, qkv + cache)
    fixed = C("launch") * (1 + C("rare_launch") * rare) / clock
    seconds = fixed + largest(products * (1 + C("rare_loss") * rare), power_s) + C("tail") * longest + moved
    return Model(
        "attn_prefill",
        (batch, seq, q_heads, kv_heads, head_dim, window, item, rare),
        (
            Coefficient(
                "launch", 18000, "cycles", "launch, drain and the kernels beside", True, 100, class_spread=0.15
            ),
            Coefficient("rare_launch", 0.15, "1", "what they take longer where few libraries have a kernel", low=0.01),
            Coefficient("rare_loss", 0.1, "1", "what its products take longer", low=0.001),
            Coefficient("efficiency", 0.75, "1", "share of the matrix peak of full tiles", True, 0.1, 1.0, 0.2),
            Coefficient("fp8_gain", 1.6, "1", "rate of fp8 over bf16 products, asynchronous", low=0.5, high=2.0),
            Coefficient("fp8_gain_sync", 0.9, "1", "the same of mma", low=0.5, high=2.0),
            Coefficient("fp8_exp", 0.3, "1", "work on fp8 scores beside the exponential", low=0.01, high=3),
            Coefficient("narrow", 0.25, "1", "loss where the tiles of a wide head crowd shared memory", high=2),
            Coefficient("too_wide", 0.8, "1", "loss where the outputs of a tile exceed the registers", high=3),
            Coefficient("fit", 0.9, "1", "share of shared memory that tiles may take", low=0.3, high=2, spread=0.2),
            Coefficient("pad_keys", 96, "keys", "keys visited beyond the triangle, a row", low=1, high=512),
            *EXPONENTIALS,
            *power_coefficients(1.6),
            Coefficient("prologue", 2000, "cycles", "start and end of a row block", low=10, high=20000),
            Coefficient("tail", 0.5, "1", "share of the longest row that is not overlapped", low=0.01, high=3),
            *TRAFFIC,
        ),
        seconds,
        fixed,
        4 * work * pairs * head_dim,
        batch * seq * head_dim * (2 * q_heads + 2 * kv_heads) * 2,
        flags=1,
    )


def _encoder() -> Model:
    wide = tiles(head_dim, 32) * 32
    blocks = batch * q_heads * tiles(seq, 128)
    padded = tiles(seq, 64) * 64
    rate = C("efficiency") * peak
    block_s = padded * (4 * 128 * wide * sms / rate + exponentials(128 * sms)) + C("prologue") / clock
    products = blocks * block_s / sms
    power_s = sustained(4 * batch * q_heads * seq**2 * wide)
    qkv = 4 * batch * seq * head_dim * q_heads * 2
    moved = traffic(qkv, qkv)
    # Heads that are no whole swizzle of 64 are copied to padded tensors first.
    odd = asynchronous * (tiles(head_dim, 64) * 64 - head_dim) / (tiles(head_dim, 64) * 64 - head_dim + 1)
    fixed = (C("launch") + C("pad_launch") * odd) / clock
    seconds = fixed + largest(products, power_s) + C("tail") * block_s + moved
    return Model(
        "attn_encoder",
        (batch, seq, q_heads, head_dim),
        (
            Coefficient("launch", 12000, "cycles", "launch, drain and the kernels beside", low=100),
            Coefficient("pad_launch", 5000, "cycles", "padding odd head widths for wgmma", low=100),
            Coefficient("efficiency", 0.6, "1", "share of the matrix peak of full tiles", True, 0.1, 1.2),
            *EXPONENTIALS,
            *power_coefficients(1.6)[:2],
            Coefficient("prologue", 1000, "cycles", "start and end of a block", low=10, high=10000),
            Coefficient("tail", 0.5, "1", "share of one block that is not overlapped", low=0.01, high=3),
            *TRAFFIC,
        ),
        seconds,
        fixed,
        4 * batch * q_heads * seq**2 * head_dim,
        qkv,
    )


def _decode() -> Model:
    reach = least(window, keys)
    cache = batch * reach * kv_heads * head_dim * 2 * item
    rest = batch * head_dim * (2 * q_heads + 4 * kv_heads) * 2
    elements = batch * reach * kv_heads * head_dim * 2
    # Tiles of 16 query heads and whole pages of keys.
    group = tiles(q_heads / kv_heads, 16) * 16
    visited = batch * kv_heads * group * (reach + C("pad_keys"))
    products = 4 * visited * head_dim / (C("efficiency") * bf16)
    softmax = visited / (sms * clock * exp2_rate) * C("exp_share")
    total = cache + rest
    moved = traffic(total, total)
    is_fp8 = 2 - item
    convert = is_fp8 * elements / (sms * clock * C("convert_rate"))
    # Kernels for fp8 caches hold up to 8 query heads of a group in one warp; larger groups run another.
    wide_group = 1 + C("wide_group") * is_fp8 / (1 + (12 * kv_heads / q_heads) ** 8)
    fixed = C("launch") * C("fp8_launch") ** is_fp8 * (1 + C("rare_launch") * rare) * wide_group / clock
    chain = C("chain") * reach / (reach + C("split")) / clock
    rows = C("row") * q_heads / kv_heads
    blocks = batch * kv_heads * (C("block") + rows) / (sms * clock) * (1 + C("rare_loss") * rare)
    seconds = fixed + chain + moved + products + softmax + convert + blocks
    return Model(
        "attn_decode",
        (batch, keys, q_heads, kv_heads, head_dim, window, item, rare),
        (
            Coefficient(
                "launch", 17000, "cycles", "launch, drain and the kernels beside", True, 100, class_spread=0.15
            ),
            Coefficient("fp8_launch", 1.0, "1", "the same with an fp8 cache", True, 0.3, 2, 0.3, 0.3),
            Coefficient("wide_group", 0.2, "1", "what they take longer for groups above 8 heads", low=0.01, high=2),
            Coefficient("rare_launch", 0.15, "1", "what they take longer where few libraries have a kernel", low=0.01),
            Coefficient("rare_loss", 0.1, "1", "what its blocks take longer", low=0.001),
            Coefficient("chain", 5000, "cycles", "sequential part of a long cache: splits and their merge", low=10),
            Coefficient("split", 1000, "keys", "keys at which half of it shows", low=16, high=1e5),
            *TRAFFIC,
            Coefficient("efficiency", 0.4, "1", "share of the matrix peak", True, 0.02, 1.2),
            Coefficient("exp_share", 0.5, "1", "exponentials not hidden", low=0.01, high=10),
            Coefficient("convert_rate", 64, "1/cycle/SM", "fp8 elements widened", True, 4, 2000, 0.7, 0.5),
            Coefficient("pad_keys", 32, "keys", "keys visited beyond those asked", low=1, high=256),
            Coefficient("row", 100, "cycles", "start and end of one query head", low=1, high=2000),
            Coefficient("block", 500, "cycles", "start and end of a block", low=1, high=20000),
        ),
        seconds,
        fixed,
        4 * batch * q_heads * reach * head_dim,
        cache,
        flags=1,
    )


MODELS = {model.name: model for model in (_prefill(), _encoder(), _decode())}
# Head widths for which every library has a kernel, without a window.
TUNED = (128, 256)
ITEM = {"bf16": 2.0, "fp8": 1.0, "bf16_kvfp8": 1.0}


def encode(kind: str, shape: Mapping) -> tuple[str, tuple[float, ...]]:
    """The model of the call and its numeric columns."""
    item = ITEM[shape["dtype"]]
    if kind == "attn_encoder":
        return kind, (shape["batch"], shape["seq_q"], shape["q_heads"], shape["head_dim"])
    length = shape["seq_q"] if kind == "attn_prefill" else shape["seq_kv"]
    if kind == "attn_prefill":
        rare = 0.0 if shape["head_dim"] in TUNED and not shape["window"] else 1.0
    else:
        rare = 0.0 if shape["head_dim"] <= TUNED[0] else 1.0
    return kind, (
        shape["batch"],
        length,
        shape["q_heads"],
        shape["kv_heads"],
        shape["head_dim"],
        shape["window"] or length,
        item,
        rare,
    )

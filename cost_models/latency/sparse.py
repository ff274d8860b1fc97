"""Latency of the kernels of DeepSeek-style sparse attention: index logits, top-k, attention over the keys chosen.

Source: DeepSeek-AI 2025, DeepSeek-V3.2 report (lightning indexer, 2048 keys a query).
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy
from sympy import symbols

from attnc.cost_models.latency.terms import (
    Coefficient,
    Model,
    bf16,
    clock,
    l2,
    l2_halves,
    largest,
    least,
    mem,
    peak,
    smooth_largest,
    sms,
    spill,
    symbol,
    tiles,
)

batch, seq, prefix, heads, index_heads, index_dim, topk, d_qk, d_v, flat = symbols(
    "batch seq prefix heads index_heads index_dim topk d_qk d_v flat"
)
C = symbol
SHAPE = (batch, seq, heads, index_heads, index_dim, topk, d_qk, d_v, prefix, flat)
queries = batch * seq
pairs = queries * (prefix + (seq + 1) / 2)


def _logits() -> Model:
    """Blocks of 4 queries (their heads fill 128 rows) walk over keys; no block serves two sequences.

    The measured kernel packs 4 sequences of one query into a block that walks over the keys of all, up to 4 times as
    long as it takes with 4 queries each. Padded to blocks of their own they take no longer than those, so this is not
    followed: more queries never take less time.
    """
    rows = index_heads * 4
    blocks = largest(queries / 4, 1)
    walks = batch * largest(seq / 4, 1)
    keys = prefix + seq / 2 + C("pad_keys")
    longest = prefix + seq + C("pad_keys")
    key_s = 2 * rows * index_dim * sms / (C("efficiency") * peak)
    block_s = C("block") / clock
    crowd = 1 + C("crowd") / (1 + sms / blocks)
    walk = smooth_largest((walks * keys * key_s + blocks * block_s) * crowd / sms, longest * key_s + block_s)
    written = 4 * pairs
    moved = written / (C("mem_share") * mem) * spill(written, l2)
    fixed = C("launch") / clock
    seconds = fixed + smooth_largest(walk, moved)
    return Model(
        "dsa.index_logits",
        SHAPE,
        (
            Coefficient("launch", 6000, "cycles", "launch and drain", low=100),
            Coefficient("efficiency", 0.5, "1", "share of the fp8 matrix peak", True, 0.01, 1.0, 0.2),
            Coefficient("pad_keys", 128, "keys", "keys visited beyond the triangle, a block", low=1, high=1024),
            Coefficient("block", 1000, "cycles", "start and end of a block", low=10),
            Coefficient("crowd", 0.2, "1", "slowing when all multiprocessors work", low=0.001, high=2),
            Coefficient("mem_share", 0.85, "1", "share of the memory's bandwidth", low=0.2, high=1.1, spread=0.15),
        ),
        seconds,
        fixed,
        2 * pairs * index_heads * index_dim,
        4 * pairs,
        flags=2,
    )


def _topk() -> Model:
    """One block a query: passes over its logits, from memory when they spill."""
    read = 4 * pairs
    busy = least(1, largest(0, prefix + seq - topk) / seq)
    row = C("row") * (1 + C("flat_row") * flat) * busy
    scan = row + (prefix + seq / 2) * C("key") * (1 + C("flat_key") * flat)
    waves = smooth_largest(1, queries / (sms * C("resident")))
    moved = read / (C("mem_share") * mem) * spill(read, C("kept") * l2 / l2_halves)
    fixed = C("launch") / clock
    seconds = fixed + waves * scan / clock + moved
    return Model(
        "dsa.topk",
        SHAPE,
        (
            Coefficient("launch", 4500, "cycles", "launch and drain", low=100),
            Coefficient("row", 3000, "cycles", "one query, start and end", low=10),
            Coefficient("flat_row", 4, "1", "what flat scores add to it", low=0.01, high=50),
            Coefficient("key", 0.45, "cycles", "one logit of one query", low=0.01, high=100),
            Coefficient("flat_key", 1, "1", "what flat scores add to it", low=0.01, high=10),
            Coefficient("resident", 1.2, "1", "queries that a multiprocessor works on at a time", low=0.5, high=4),
            Coefficient("mem_share", 0.85, "1", "share of the memory's bandwidth", low=0.2, high=1.1, spread=0.15),
            Coefficient("kept", 0.8, "1", "share of one half of L2 that keeps data", low=0.05, high=3, spread=0.3),
        ),
        seconds,
        fixed,
        sympy.Integer(0),
        read,
        flags=2,
    )


def _attention() -> Model:
    """A block takes one query and 64 heads over the keys chosen, and pads them to top-k where there are fewer."""
    waves = tiles(queries * tiles(heads, 64), sms)
    block_s = topk * (2 * 64 * (d_qk + d_v) / (C("efficiency") * bf16 / sms) + d_qk * 2 / (clock * C("gather_rate")))
    fixed = C("launch") / clock
    seconds = fixed + waves * (block_s + C("prologue") / clock)
    return Model(
        "dsa.sparse_attn",
        SHAPE,
        (
            Coefficient("launch", 6000, "cycles", "launch and drain", low=100),
            Coefficient("efficiency", 0.6, "1", "share of the matrix peak", True, 0.01, 1.0),
            Coefficient("gather_rate", 40, "B/cycle/SM", "gathered keys", low=1, high=300),
            Coefficient("prologue", 2000, "cycles", "start and end of a query", low=10),
        ),
        seconds,
        fixed,
        2 * queries * heads * least(topk, prefix + 1) * (d_qk + d_v),
        queries * heads * (d_qk + d_v) * 2,
        flags=2,
    )


MODELS = {model.name: model for model in (_logits(), _topk(), _attention())}


def encode(kind: str, shape: Mapping) -> tuple[str, tuple[float, ...]]:
    """The model of the call and its numeric columns."""
    return f"dsa.{shape['stage']}", (
        shape["batch"],
        shape["seq_q"],
        shape["q_heads"],
        shape["index_heads"],
        shape["index_dim"],
        shape["topk"],
        shape["head_dim_qk"],
        shape["head_dim_v"],
        shape["prefix"],
        1.0 if shape["score_mode"] == "flat" else 0.0,
    )

"""Latency of a routed feed-forward: permute, grouped products of the experts reached, combine.

Source: Gale et al. 2022, arXiv:2211.15841 (rows padded to the tile of each expert).
"""

from __future__ import annotations

from collections.abc import Mapping

from sympy import exp, symbols

from attnc.cost_models.latency.gemm import ITEM
from attnc.cost_models.latency.terms import (
    Coefficient,
    Model,
    asynchronous,
    clock,
    l2,
    largest,
    least,
    mem,
    peak,
    power_coefficients,
    sms,
    spill,
    sustained,
    symbol,
    tiles,
)

tokens, d_model, d_ff, experts, topk, matrices, item, skew = symbols(
    "tokens d_model d_ff experts topk matrices item skew"
)
C = symbol
ROW_TILES = (16, 32, 64, 128, 256)


def _moe() -> Model:
    is_fp8 = 2 - item
    rows = tokens * topk
    spread = experts * (1 - exp(-rows / experts))
    even = least(rows, experts)
    used = (1 - skew) * even + skew * spread * (1 - C("skew_idle") * skew)
    rate = C("efficiency") * C("fp8_share") ** is_fp8 * peak / sms
    near = clock * C("l2_rate") / (1 - asynchronous * C("multicast"))
    weights = used * matrices * d_model * d_ff * item
    candidates = []
    for bm in ROW_TILES:
        blocks = (1 - skew) * used * tiles(rows / used, bm) + skew * (rows / bm + C("part_tile") * used)
        width = (matrices - 1) * d_ff / 128 * d_model + d_model / 128 * d_ff
        per_k = largest(2 * max(bm, 32) * 128 / (rate * bm / (bm + C("small_tile"))), (bm + 128) * item / near)
        candidates.append(blocks * width * per_k / sms)
    products = least(*candidates)
    dram = weights / (C("mem_share") * mem) * spill(weights, C("kept") * l2)
    flops = 2 * rows * matrices * d_model * d_ff
    power_s = sustained(flops, is_fp8)
    permuted = rows * (d_model * 2 * 2 + d_ff * matrices * 2) + tokens * d_model * 2
    moved = C("passes") * permuted * (1 / (sms * clock * C("l2_rate")) + spill(permuted, l2) / mem)
    fixed = C("launch") / clock + is_fp8 * C("quantise") / clock
    body = (products**3 + dram**3) ** (1 / 3)
    seconds = fixed + largest(body, power_s) + moved + C("per_expert") * experts / clock
    return Model(
        "moe",
        (tokens, d_model, d_ff, experts, topk, matrices, item, skew),
        (
            Coefficient("launch", 40000, "cycles", "launches of the kernels of one call", low=100),
            Coefficient("quantise", 5000, "cycles", "launches that fp8 adds", low=10),
            Coefficient("efficiency", 0.7, "1", "share of the matrix peak of full tiles", True, 0.1, 1.0, 0.15),
            Coefficient("fp8_share", 0.8, "1", "the same of fp8 over bf16", low=0.3, high=1.2, spread=0.2),
            Coefficient("small_tile", 16, "rows", "rows at which a tile reaches half of the rate", low=1, high=200),
            Coefficient("part_tile", 0.5, "1", "padding, tiles an expert", low=0.1, high=1.2, spread=0.3),
            Coefficient("skew_idle", 0.1, "1", "experts that skewed routing leaves out", low=0.01, high=0.8),
            Coefficient(
                "multicast", 0.35, "1", "operands that clusters do not draw twice", low=0.05, high=0.5, spread=0.1
            ),
            Coefficient("l2_rate", 40, "B/cycle/SM", "bytes through L2", low=2, high=200),
            Coefficient("mem_share", 0.85, "1", "share of the memory's bandwidth", low=0.3, high=1.1, spread=0.15),
            Coefficient("kept", 0.8, "1", "share of L2 that keeps data between calls", low=0.05, high=3),
            *power_coefficients(1.4),
            Coefficient("passes", 1.0, "1", "passes over permuted activations", low=0.1, high=10),
            Coefficient("per_expert", 10, "cycles", "sorting and scheduling, an expert", low=0.01, high=1000),
        ),
        seconds,
        fixed,
        flops,
        weights,
        flags=1,
    )


MODELS = {"moe": _moe()}


def encode(kind: str, shape: Mapping) -> tuple[str, tuple[float, ...]]:
    """The model of the call and its numeric columns."""
    routing = shape["routing"]
    skew = 0.0 if routing == "balanced" else float(routing.removeprefix("power_law_")) / 1.2
    return "moe", (
        shape["tokens"],
        shape["d_model"],
        shape["d_ff"],
        shape["experts"],
        shape["topk"],
        3.0 if shape["gated"] else 2.0,
        ITEM[shape["dtype"]],
        skew,
    )

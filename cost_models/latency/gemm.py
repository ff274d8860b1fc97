"""Latency of `out[m, n] = x[m, k] @ w[n, k].T`: the best of several tiles and splits of k, rounded to whole waves.

A tile of bm x bn outputs is limited by its matrix products or by the operands it draws through L2; the whole call by
the bytes from memory and by the power limit. fp8 quantises the activations in a pass of its own.

Source: NVIDIA CUTLASS documentation, "Efficient GEMM in CUDA" (tiles, split-K, waves).
"""

from __future__ import annotations

from collections.abc import Mapping

from sympy import symbols

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
    tensor_memory,
    tiles,
)

m, n, k, item = symbols("m n k item")
C = symbol

TILES = ((256, 256), (256, 128), (128, 128), (128, 64), (64, 128), (64, 64), (32, 64), (16, 64), (16, 32))
SPLITS = (1, 2, 4, 8, 16)


def _gemm() -> Model:
    is_fp8 = 2 - item
    rate = C("efficiency") * C("fp8_share") ** is_fp8 * peak / sms
    # Clusters (2 blocks of tcgen05 are one) draw an operand through L2 once for two blocks.
    near = clock * C("l2_rate") / (1 - asynchronous * C("multicast"))
    candidates = []
    for bm, bn in TILES:
        per_k = largest(2 * max(bm, 64) * bn / rate, (bm + bn) * item / near)
        for split in SPLITS if bm * bn <= 128 * 128 else (1,):
            waves = tiles(tiles(m, bm) * tiles(n, bn) * split, sms)
            # 256 x 256 sums in float32 fill tensor memory; no register file holds them.
            absent = (1 - tensor_memory) * 1e3 if bm * bn > 256 * 128 else 0
            merge = m * n * 4 * split / (sms * near) + C("merge") / clock if split > 1 else 0
            candidates.append(waves * (tiles(k, 64 * split) * 64 * per_k + C("prologue") / clock) + merge + absent)
    products = least(*candidates)
    weights = n * k * item
    rest = m * k * item + m * n * 2
    dram = (weights * spill(6 * weights + rest, C("kept") * l2) + rest * spill(6 * weights + rest, C("kept") * l2)) / (
        C("mem_share") * mem
    )
    power_s = sustained(2 * m * n * k, is_fp8)
    quantise = is_fp8 * (C("quantise") / clock + m * k * 3 / (sms * near) + m * k * 3 / mem * spill(m * k * 3, l2))
    fixed = C("launch") / clock
    body = (products**3 + dram**3) ** (1 / 3)
    seconds = fixed + largest(body, power_s) + quantise
    return Model(
        "gemm",
        (m, n, k, item),
        (
            Coefficient("launch", 5000, "cycles", "launch and drain", low=100),
            Coefficient("efficiency", 0.85, "1", "share of the matrix peak of full tiles", True, 0.1, 1.0, 0.15),
            Coefficient("fp8_share", 0.9, "1", "the same of fp8 over bf16", low=0.3, high=1.2, spread=0.2),
            Coefficient("prologue", 1500, "cycles", "filling the pipeline and writing out a tile", low=10),
            Coefficient("merge", 2000, "cycles", "merging the parts of a split", low=10),
            Coefficient(
                "multicast", 0.35, "1", "operands that clusters do not draw twice", low=0.05, high=0.5, spread=0.1
            ),
            Coefficient("l2_rate", 40, "B/cycle/SM", "bytes through L2", low=2, high=200),
            Coefficient("mem_share", 0.85, "1", "share of the memory's bandwidth", low=0.3, high=1.1, spread=0.15),
            Coefficient("kept", 0.8, "1", "share of L2 that keeps data between calls", low=0.05, high=3),
            *power_coefficients(1.4),
            Coefficient("quantise", 3000, "cycles", "the pass that quantises activations", low=10),
        ),
        seconds,
        fixed,
        2 * m * n * k,
        (m * k + n * k) * item + m * n * 2,
    )


MODELS = {"gemm": _gemm()}


# Bytes of a weight; float32 is in no table.
ITEM = {"bf16": 2.0, "bf16_kvfp8": 2.0, "fp8": 1.0, "fp8_block": 1.0}


def encode(kind: str, shape: Mapping) -> tuple[str, tuple[float, ...]]:
    """The model of the call and its numeric columns."""
    return "gemm", (shape["m"], shape["n"], shape["k"], ITEM[shape["dtype"]])

"""Latency of the kernels of a gated-delta (`gdn`) or Kimi-delta (`kda`) layer: convolution, chunked scan, one step.

The scan is a chain: the chunks of one head of one sequence follow each other, and what many heads fill beside it.

Source: Yang et al. 2024, arXiv:2412.06464 (gated delta rule, chunks).
"""

from __future__ import annotations

from collections.abc import Mapping

from sympy import symbols

from attnc.cost_models.latency.terms import (
    TRAFFIC,
    Coefficient,
    Model,
    asynchronous,
    bf16,
    clock,
    least,
    smooth_largest,
    sms,
    symbol,
    tiles,
    traffic,
)

batch, seq, k_heads, v_heads, d_k, d_v, d_conv, gates = symbols("batch seq k_heads v_heads d_k d_v d_conv gates")
C = symbol
SHAPE = (batch, seq, k_heads, v_heads, d_k, d_v, d_conv)
CHUNK = 64
GAP = Coefficient("gap", 1.0, "us", "between kernels of a graph, whatever the clock", low=0.1, high=5, spread=0.3)


def _conv(name: str, calls: int, step: bool) -> Model:
    channels = 2 * k_heads * d_k + v_heads * d_v
    total = batch * channels * 2 * (2 * seq + (2 * d_conv if step else 0))
    fixed = calls * (C("launch") / clock + C("gap") * 1e-6)
    blocks = batch * tiles(seq, 256) * tiles(channels, 256)
    seconds = fixed + traffic(total, total, False) + C("row") * blocks / (sms * clock)
    return Model(
        name,
        SHAPE,
        (
            Coefficient("launch", 2000, "cycles", "launch and drain of one call", low=10),
            GAP,
            Coefficient("row", 500, "cycles", "start and end of a block of 256 channels", low=1, high=20000),
            *TRAFFIC,
        ),
        seconds,
        fixed,
        2 * batch * seq * channels * d_conv,
        batch * channels * 2 * 2 * seq,
    )


def _staged() -> tuple:
    """Chunks in passes over memory: gates, inverse, states, outputs; states follow each other, heads run beside."""
    chunks = tiles(seq, CHUNK)
    heads = batch * v_heads
    per_head = 2 * CHUNK * (3 * d_k * d_v + 2 * CHUNK * d_k + 2 * CHUNK * d_v)
    chain = chunks * C("chunk") / clock
    products = heads * chunks * per_head / (C("efficiency") * bf16)
    rows = batch * seq * 2 * k_heads * d_k * 2
    total = rows + heads * (seq * 2 * (d_k + d_v) * 2 * C("passes") + chunks * d_k * d_v * 4 * C("states"))
    fixed = C("launch") / clock
    fill = C("fill") * (1 - 1 / (1 + seq / 32)) / clock
    return fixed, fixed + fill + chain + smooth_largest(products, traffic(total, total, False), 2.0)


STAGED = (
    Coefficient("launch", 40000, "cycles", "launches of the kernels of one call", low=100),
    Coefficient("fill", 20000, "cycles", "first chunk of the kernels of one call", low=100),
    Coefficient("chunk", 2000, "cycles", "one chunk after another", low=50),
    Coefficient("efficiency", 0.3, "1", "share of the matrix peak", low=0.01, high=1.0),
    Coefficient("passes", 2, "1", "passes over rows of keys and values", low=0.3, high=20),
    Coefficient("states", 1, "1", "states written and read between chunks", low=0.01, high=4),
)


def _scan(name: str, fused: bool) -> Model:
    fixed, seconds = _staged()
    chunks, heads = tiles(seq, CHUNK), batch * v_heads
    coefficients: tuple[Coefficient, ...] = (*STAGED, *TRAFFIC)
    if fused:
        waves = tiles(heads, sms)
        one = (C("fused_launch") + waves * (chunks * C("fused_chunk") + C("fused_block"))) / clock
        reached = one * (1 + C("contention") * heads / (heads + sms))
        seconds = least(seconds, reached + (1 - asynchronous) * 1e6)
        coefficients += (
            Coefficient("fused_launch", 6000, "cycles", "launch of the fused kernel", low=100),
            Coefficient("fused_chunk", 6000, "cycles", "its chunk after chunk, a head on a multiprocessor", low=500),
            Coefficient("fused_block", 15000, "cycles", "its start and end for one head", low=100),
            Coefficient("contention", 0.1, "1", "slowing by memory when all multiprocessors work", low=0.001, high=1),
        )
    rows = batch * seq * (2 * k_heads * d_k + 2 * v_heads * d_v) * 2
    return Model(name, SHAPE, coefficients, seconds, fixed, heads * seq * 4 * d_k * d_v, rows)


def _recurrent(name: str) -> Model:
    heads = batch * v_heads
    total = heads * d_k * d_v * 8
    fixed = C("launch") / clock + C("gap") * 1e-6
    seconds = fixed + traffic(total, total / 2, False) + C("block") * tiles(heads, sms) / clock
    return Model(
        name,
        SHAPE,
        (
            Coefficient("launch", 4000, "cycles", "launch and drain", low=10),
            GAP,
            Coefficient("block", 500, "cycles", "one head's step, each wave", low=1, high=20000),
            *TRAFFIC,
        ),
        seconds,
        fixed,
        heads * 4 * d_k * d_v,
        total / 2,
    )


MODELS = {
    model.name: model
    for model in (
        _conv("gdn.conv", 1, False),
        _conv("gdn.conv_step", 1, True),
        _conv("kda.conv", 3, False),
        _conv("kda.conv_step", 1, True),
        _scan("gdn.scan", True),
        _scan("kda.scan", False),
        _recurrent("gdn.recurrent"),
        _recurrent("kda.recurrent"),
    )
}


def encode(kind: str, shape: Mapping) -> tuple[str, tuple[float, ...]]:
    """The model of the call and its numeric columns."""
    name = f"{shape['variant']}.{shape['stage']}"
    if shape["stage"] == "conv" and shape["phase"] == "decode":
        name += "_step"
    return name, (
        shape["batch"],
        shape["seq"],
        shape["k_heads"],
        shape["v_heads"],
        shape["head_k_dim"],
        shape["head_v_dim"],
        shape["d_conv"],
    )

"""Time of one kernel that goes over tiles, as a sympy expression of what a tile costs, the grid and the device.

A tile takes the largest of its pipes (matrix, softmax, shared memory) and the rest of them as far as too few warp
groups are there to hide it; loads that come too late stop it. A grid takes what the busiest SM has to do, and no less
than its longest block. Over the SMs stand the L2, the memory and the power limit.

Source: Williams, Waterman, Patterson 2009, "Roofline", doi:10.1145/1498765.1498785; Shah et al. 2024,
arXiv:2407.08608, section 3 (softmax beside products); Dao 2023, arXiv:2307.08691, section 3.2 (grid).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache

import sympy
from sympy import Max, ceiling

SHARPNESS = 4  # of roofs that overlap imperfectly: between their maximum and their sum


@dataclass(frozen=True)
class TileFigures:
    """What a tile costs and how many there are.

    Of a tile: matrix (cycles of the matrix unit at its peak), exps, vector (FP32 operations), issue (instructions a
    warp), shared and loads (bytes), spilled (bytes to and from the stack), barriers.
    Of the kernel: grid (blocks), tiles (of all blocks), longest (tiles of a block), resident (blocks on an SM), groups
    (of four warps in a block), ahead (tiles in flight), unique and again (bytes from memory, first and later reads),
    flops, even (0 to 1: how much blocks resemble each other).
    """

    matrix: float
    exps: float
    vector: float
    issue: float
    shared: float
    loads: float
    spilled: float
    barriers: float
    grid: float
    tiles: float
    longest: float
    resident: float
    groups: float
    ahead: float
    unique: float
    again: float
    flops: float
    even: float


@dataclass(frozen=True)
class SmFigures:
    """The device: SMs, clock in Hz, per SM and clock exponentials, FP32 lanes and bytes of shared memory; bytes/s, L2
    in bytes, W."""

    sms: float
    clock: float
    exp2: float
    fma: float
    smem: float
    bandwidth: float
    l2: float
    power: float


@dataclass(frozen=True)
class Coefficients:
    """Fitted constants of one class of matrix instruction.

    efficiency: share of the matrix peak of a full tile. serial: share of the lesser pipes that one group of four warps
    cannot hide. softmax: of exponentials and vector work that issues. sync, block: cycles of a tile, of a block.
    latency: cycles from asking for a tile to having it. l2_bytes: per SM and clock. memory: share of the bandwidth.
    joule: pJ per FLOP. launch: seconds.
    """

    efficiency: float
    serial: float
    softmax: float
    sync: float
    block: float
    latency: float
    l2_bytes: float
    memory: float
    joule: float
    launch: float


def seconds_expression() -> sympy.Expr:
    """Seconds of a kernel in symbols named after the fields of the three classes above."""
    s = {f.name: sympy.Symbol(f.name, positive=True) for c in _CLASSES for f in fields(c)}
    products = s["matrix"] / s["efficiency"]
    soft = Max(s["softmax"] * (s["exps"] / s["exp2"] + s["vector"] / s["fma"]), s["issue"] / 4, evaluate=False)
    shared = s["shared"] / s["smem"]
    top = Max(products, soft, shared, evaluate=False)
    rest = s["serial"] * (products + soft + shared - top)
    stack = s["spilled"] / s["smem"]

    def tile(resident: sympy.Expr) -> sympy.Expr:
        busy = top + rest / (resident * s["groups"]) + s["sync"] * s["barriers"] / resident + stack
        # Some loads take much longer than most: more of them in flight always help, less and less.
        # Below the cube root the wait would fall by more than the work grows, and more work would take less time.
        arrived = 1 + s["ahead"] * busy * resident / s["latency"]
        late = s["latency"] / Max(arrived, sympy.cbrt(2 * s["ahead"]), evaluate=False) ** 2
        return busy + late / resident

    per_sm = ceiling(s["grid"] / s["sms"])
    mean = s["tiles"] / s["grid"]
    spread = s["tiles"] / s["sms"]
    load = spread + s["even"] * (per_sm * mean - spread)
    cycles = Max(load * tile(s["resident"]), s["longest"] * tile(sympy.Integer(1)), evaluate=False)
    cycles += per_sm * s["block"] / s["resident"]
    sm_s = cycles / s["clock"]
    l2_s = s["tiles"] * s["loads"] / (s["sms"] * s["clock"] * s["l2_bytes"])
    memory_s = (s["unique"] * _missed(s["unique"], s["l2"]) + s["again"]) / (s["bandwidth"] * s["memory"])
    body = (sm_s**SHARPNESS + l2_s**SHARPNESS + memory_s**SHARPNESS) ** sympy.Rational(1, SHARPNESS)
    power_s = s["flops"] * s["joule"] * sympy.Float(1e-12) / s["power"]
    return s["launch"] + Max(body, power_s, evaluate=False)


def _missed(footprint: sympy.Expr, l2: sympy.Expr) -> sympy.Expr:
    """Share of a footprint that L2 does not keep from one call to the next."""
    ratio = (footprint / l2) ** 3
    return ratio / (1 + ratio)


_CLASSES = (TileFigures, SmFigures, Coefficients)


@lru_cache(maxsize=1)
def seconds_function() -> Callable[..., float]:
    """`seconds_expression`, lambdified: a function of the fields of the three classes, in their order."""
    names = [f.name for c in _CLASSES for f in fields(c)]
    symbols = [sympy.Symbol(name, positive=True) for name in names]
    return sympy.lambdify(symbols, seconds_expression(), modules="math", cse=True)

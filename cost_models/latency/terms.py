"""Physical terms that the latency formulas share: symbols of a device, tiles, waves, residency in L2, the power limit.

Every formula is a sympy expression of three sorts of symbols: columns of the shape, figures of the device (SI units)
and coefficients (`coefficients.json`). Sizes are positive.

Source: Williams, Waterman, Patterson 2009, "Roofline", doi:10.1145/1498765.1498785; shared/measurements/README.md,
"Terms that paid".
"""

from __future__ import annotations

from dataclasses import dataclass

from sympy import Expr, Function, Symbol, ceiling, symbols

# Figures of a device: FLOP/s of the matrix units in the operands' type and in bf16, bytes/s, bytes, multiprocessors,
# Hz, W, bytes of shared memory of a multiprocessor, exponentials and float32 FMAs per clock and multiprocessor; halves
# of L2 (what both sides read is kept twice), whether matrix instructions run asynchronously (wgmma, tcgen05), whether
# accumulators lie in tensor memory (tcgen05).
peak, bf16, mem, l2, sms, clock, power, smem, exp2_rate, fma_rate, l2_halves, asynchronous, tensor_memory = symbols(
    "peak bf16 mem l2 sms clock power smem exp2_rate fma_rate l2_halves asynchronous tensor_memory"
)
FIGURES: tuple[Symbol, ...] = (
    peak,
    bf16,
    mem,
    l2,
    sms,
    clock,
    power,
    smem,
    exp2_rate,
    fma_rate,
    l2_halves,
    asynchronous,
    tensor_memory,
)


@dataclass(frozen=True)
class Coefficient:
    """One fitted constant. start: expected value, spread: how sure that is (factor exp(spread) either way); low, high:
    where the fit may end; per_class: one value for each class of matrix instruction (sm80, sm90 ...), inherited where
    no table shows the class."""

    name: str
    start: float
    unit: str
    meaning: str
    per_class: bool = False
    low: float = 1e-12
    high: float = 1e12
    spread: float = 0.7
    class_spread: float = 0.12


@dataclass(frozen=True)
class Model:
    """The latency of one kind of call (one `stage` of it).

    columns: numeric columns of the shape, in order, as `encode` gives them. seconds: the formula; fixed: the part of
    it that stays when all sizes are one; flops, bytes: the work no kernel can avoid, for the roofs.
    flags: how many columns at the end may be 0.
    """

    name: str
    columns: tuple[Symbol, ...]
    coefficients: tuple[Coefficient, ...]
    seconds: Expr
    fixed: Expr
    flops: Expr
    bytes: Expr
    flags: int = 0

    @property
    def floor(self) -> Expr:
        """No kernel is faster: matrix work at peak; bytes that L2 cannot keep from one call to the next."""
        return largest(self.flops / peak, (self.bytes - l2) / mem)

    @property
    def latency(self) -> Expr:
        return largest(self.seconds, self.floor)

    @property
    def roofline(self) -> Expr:
        """The peak roofline, for comparison."""
        return largest(self.flops / peak, self.bytes / mem)

    @property
    def arguments(self) -> tuple[Symbol, ...]:
        return self.columns + FIGURES + tuple(symbol(c.name) for c in self.coefficients)


def symbol(name: str) -> Symbol:
    return Symbol(name)


# Maximum and minimum as plain functions: sympy's own compare their arguments symbolically, for seconds.
largest, least = Function("largest"), Function("least")


def tiles(size: Expr, tile: Expr | int) -> Expr:
    """Tiles of `tile` that cover `size`."""
    return ceiling(size / tile)


def smooth_largest(a: Expr, b: Expr, sharpness: float = 3.0) -> Expr:
    """Two roofs that overlap imperfectly: between their maximum and their sum."""
    return (a**sharpness + b**sharpness) ** (1 / sharpness)


def spill(footprint: Expr, kept: Expr) -> Expr:
    """Share of repeated traffic that misses L2: 0 for a footprint far below the `kept` bytes, 1 far above."""
    ratio = (footprint / kept) ** 3.0
    return ratio / (1 + ratio)


def traffic(total: Expr, resident: Expr, streamed: bool = True) -> Expr:
    """Seconds to move `total` bytes of which `resident` are wanted again by the next call: from memory as far as L2
    does not keep them, and all through L2. streamed: L2 is the only limit beside memory, and no L2 is slower than
    memory; else instructions beside the loads are, by cycle. Coefficients: mem_share, kept, l2_rate."""
    dram = total / (symbol("mem_share") * mem) * spill(resident, symbol("kept") * l2 / l2_halves)
    rate = sms * clock * symbol("l2_rate")
    return smooth_largest(dram, total / (largest(rate, L2_OVER_MEMORY * mem) if streamed else rate), 6.0)


# A100 and H100 measure 1.6 and 1.7; H200 has the L2 of H100 and 1.43 times its memory rate.
L2_OVER_MEMORY = 1.25
TRAFFIC = (
    Coefficient("mem_share", 0.85, "1", "share of the memory's bandwidth", low=0.2, high=1.1, spread=0.15),
    Coefficient("kept", 0.8, "1", "share of one half of L2 that stays", low=0.05, high=3, spread=0.3),
    Coefficient("l2_rate", 30, "B/cycle/SM", "bytes through L2", low=1, high=200, spread=0.5),
)


def sustained(flops: Expr, is_fp8: Expr | None = None) -> Expr:
    """Seconds that the power limit asks for matrix work. Asynchronous instructions read operands from shared memory
    and so spend less. Coefficients: joule, joule_async, joule_fp8."""
    joule = (1 - asynchronous) * symbol("joule") + asynchronous * symbol("joule_async")
    share = 1 if is_fp8 is None else symbol("joule_fp8") ** is_fp8
    return flops * joule * share * 1e-12 / power


def power_coefficients(joule: float) -> tuple[Coefficient, ...]:
    """joule: of mma, in pJ/FLOP; attention spends more than a plain product, its exponentials included."""
    return (
        Coefficient("joule", joule, "pJ/FLOP", "energy of products by mma", low=0.5, high=3, spread=0.1),
        Coefficient("joule_async", 0.6, "pJ/FLOP", "the same by wgmma and tcgen05", low=0.3, high=1.5, spread=0.1),
        Coefficient("joule_fp8", 0.55, "1", "energy of an fp8 product over bf16", low=0.3, high=1, spread=0.15),
    )


def exponentials(count: Expr) -> Expr:
    """Seconds of the exponentials that matrix products do not hide. Coefficients: exp_share, tensor_memory_hides."""
    shown = symbol("exp_share") * (1 - tensor_memory * symbol("tensor_memory_hides"))
    return count * shown / (sms * clock * exp2_rate)


EXPONENTIALS = (
    Coefficient("exp_share", 0.7, "1", "exponentials not hidden behind products", True, 0.01, 4, 0.3),
    Coefficient("tensor_memory_hides", 0.5, "1", "share of them that tensor memory hides", low=0.1, high=1, spread=0.1),
)


def causal_pairs(length: Expr, window: Expr, rows: Expr | float, pad: Expr | float) -> Expr:
    """Pairs of query and key that tiles of `rows` queries visit for one head: a triangle cut to the window and one
    tile, and the overshoot of `pad` keys at the diagonal."""
    reach = least(window + rows + pad, length)
    return length * reach - reach**2 / 2 + length * pad

"""How many keys, pairs or bytes published sparse attentions touch: sympy expressions of `length`, and plain ratios.

A ratio says of what: the full square length^2, or the causal half of it.

Source: NSA arXiv:2502.11089; MoBA arXiv:2502.13189; HyperAttention arXiv:2310.05869; GNA arXiv:2504.16922;
FlashAttention arXiv:2205.14135 (what an unfused attention moves).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from sympy import Expr, Integer, Min, Rational

from attnc.cost_models.layers import LENGTH


def nsa_keys(
    *, stride: int = 16, selected: int = 16, block: int = 64, window: int = 512, length: Expr = LENGTH
) -> Expr:
    """Keys that NSA reads for the query at position `length`: compressed ones, selected blocks, a window."""
    return length / stride + Min(length, Integer(selected * block)) + Min(length, Integer(window))


def nsa_mean_keys(
    *, stride: int = 16, selected: int = 16, block: int = 64, window: int = 512, length: Expr = LENGTH
) -> Expr:
    """Keys per query on average over a long causal prompt: half the compressed ones, full blocks and window."""
    return length / (2 * stride) + selected * block + window


def moba_pairs(block: int, top: int, length: Expr = LENGTH) -> Expr:
    """Pairs of MoBA over a long causal prompt: the query's own block to its half, top - 1 whole blocks before it."""
    return length * (Rational(block, 2) + (top - 1) * block)


def kept_of_square(kept: float, length: float) -> float:
    """Share of the full square that stays when a query reads `kept` of `length` keys."""
    return kept / length


def recursive_pairs(length: int, *, base: int, sampled: int) -> float:
    """Pairs of causal HyperAttention: two causal halves, and between them `sampled` keys per query; exact to `base`."""
    if length <= base:
        return length * length / 2
    half = length // 2
    return 2 * recursive_pairs(half, base=base, sampled=sampled) + half * sampled


def box_ratio(space: Sequence[int], window: Sequence[int]) -> float:
    """How many times fewer pairs a neighbourhood of `window` keeps in a box of tokens, out of the full square."""
    return prod(space) / prod(window)


def latent_per_device(rank: int, rope: int, devices: int, split_rope: bool = False) -> float:
    """Latent elements per token on each of `devices` that share the latent (TPLA); the rotary key stays whole."""
    return rank / devices + (rope / devices if split_rope else rope)


def unfused_score_seconds(bandwidth: float, bytes_per_score: float = 8.0) -> float:
    """Seconds per score of an attention that writes and reads its scores in memory."""
    return bytes_per_score / bandwidth


def kept_speedup(attention_share: float, kept: float) -> float:
    """Speed-up when a share `kept` of the tokens stays: attention falls with its square, the rest with it."""
    return 1.0 / (attention_share * kept**2 + (1.0 - attention_share) * kept)

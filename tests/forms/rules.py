"""Rules and inputs that the tests of the masked family share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnc.rule_attention import AttentionRule

# Captured: t0 document ids (B, n), t1 1 where not padded (B, n), f2 per head (Hq), f3 a bias (Hq, L, S).
RULES = {
    "plain": "score=0.25 * s",
    "causal": "score=0.25 * s; keep=j - i <= 0",
    "causal_with_cache": "score=0.25 * s; keep=j - i <= {offset}; empty={empty}",
    "window": "score=0.25 * s; keep=j - i <= 0 and i - j <= 15; empty={empty}",
    "two_sided_window": "score=0.25 * s; keep=abs(i - j) <= 9; empty={empty}",
    "softcap": "score=20.0 * tanh(0.0125 * s); keep=j - i <= 0 and i - j <= 15; empty={empty}",
    "chunk": "score=0.25 * s; keep=i // 16 == j // 16 and j - i <= 0; empty={empty}",
    "prefix": "score=0.25 * s; keep=(j - i <= 0) or (j <= 6)",
    "documents": "score=0.25 * s; keep=t0[b, i] == t0[b, j] and j - i <= 0; empty={empty}",
    "padding": "score=0.25 * s; keep=t1[b, j] == 1; empty={empty}",
    "causal_padding": "score=0.25 * s; keep=t1[b, j] == 1 and j - i <= 0; empty={empty}",
    "dilated": "score=0.25 * s; keep=(i - j) % 4 == 0 and j - i <= 0; empty={empty}",
    "disjunction": "score=0.25 * s; keep=(abs(i - j) <= 3) or (j <= 2) or (i // 8 == 3)",
    "sink": "score=0.25 * s; keep=j - i <= 0 and i - j <= 15; empty={empty}; sink=f2[h]",
    "causal_padding_sink": "score=0.25 * s; keep=t1[b, j] == 1 and j - i <= 0; empty={empty}; sink=f2[h]",
    "softcap_sink": "score=20.0 * tanh(0.0125 * s); keep=abs(i - j) <= 9; empty={empty}; sink=f2[h]",
    "bias": "score=0.25 * s + f3[h, i, j]; keep=j - i <= 0 and i - j <= 15; empty={empty}",
    "alibi": "score=0.25 * s + f2[h] * float(j - i); keep=j - i <= 0",
    "per_head": "score=0.25 * s; keep=i - j <= 4 + 8 * h and j - i <= 0; empty={empty}",
    "constant_bias_sink": "score=0.25 * s + 1.5; keep=j - i <= 0 and i - j <= 15; empty={empty}; sink=f2[h]",
    "nothing": "score=0.25 * s; keep=i - j <= -1000; empty={empty}",
}
ALWAYS_KEEPING = tuple(name for name, text in RULES.items() if "{empty}" not in text)


@dataclass(frozen=True)
class Dims:
    """Sizes of one attention."""

    L: int
    S: int
    Hq: int = 2
    H: int = 2
    E: int = 16
    Ev: int = 16
    B: int = 2


DIMS = (
    Dims(1, 1),
    Dims(33, 33, 4, 2),
    Dims(70, 70, 4, 1, 16, 8),
    Dims(200, 200, 2, 2, 8, 16),
    Dims(33, 70, 4, 2),
    Dims(70, 33, 2, 1),
    Dims(1, 70, 4, 2),
)


def rule_of(name: str, dims: Dims, empty: str = "zero") -> AttentionRule:
    return AttentionRule.parse(RULES[name].format(offset=dims.S - dims.L, empty=empty))


def inputs(dims: Dims, dtype: torch.dtype = torch.float64, *, grad: bool = True) -> tuple[list, list]:
    """query, key, value, and the captured tensors of RULES."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_(grad)

    B, n = dims.B, max(dims.L, dims.S)
    qkv = [draw(B, dims.Hq, dims.L, dims.E), draw(B, dims.H, dims.S, dims.E), draw(B, dims.H, dims.S, dims.Ev)]
    documents = (torch.arange(n) // 13).repeat(B, 1)
    present = torch.ones(B, n, dtype=torch.long)
    present[0, :5] = 0
    present[1:, n // 2 :] = 0
    return qkv, [documents, present, draw(dims.Hq), draw(dims.Hq, dims.L, dims.S)]

"""How far two computations of the same function may differ: one rule, derived from the dtype.

    |got - want| <= factor * eps(dtype) * sqrt(terms) * max(1, max|want|)

`terms` is the length of the longest sum behind an element, `factor` the number of rounded steps around it.
"""

from __future__ import annotations

import math

import torch


def tol(dtype: torch.dtype, terms: int = 1024, factor: float = 4.0) -> float:
    """The relative tolerance for results of `dtype` whose elements sum `terms` products."""
    return factor * torch.finfo(dtype).eps * math.sqrt(terms)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """max|got - want| / max(1, max|want|) in float64; infinite where only one of them is not finite.

    Equal infinities and NaN at the same places count as equal.
    """
    if got.shape != want.shape:
        raise AssertionError(f"shapes differ: got {tuple(got.shape)}, want {tuple(want.shape)}")
    if got.numel() == 0:
        return 0.0
    got, want = got.detach().double(), want.detach().double()
    same = (got == want) | (got.isnan() & want.isnan())
    distance = torch.where(same, 0.0, (got - want).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    finite = want[want.isfinite()].abs()
    return distance.max().item() / max(1.0, finite.max().item() if finite.numel() else 0.0)


def assert_close(
    got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype | None = None, terms: int = 1024
) -> None:
    """Fail unless `got` is `want` within the tolerance of `dtype` (the coarser of the two by default)."""
    coarser = dtype or max(got.dtype, want.dtype, key=lambda d: torch.finfo(d).eps)
    found, allowed = error(got, want), tol(coarser, terms)
    assert found <= allowed, f"error {found:.3g}, allowed {allowed:.3g} for {coarser} and {terms} terms"

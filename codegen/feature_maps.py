"""Feature maps of linear attention: what stands in the place of exp(q . k), as phi(q) . phi(k).

Each takes (B, H, L, D) and gives (B, H, L, F). Maps whose product is to be scaled take the square root of the scale
into both sides.

Source: Katharopoulos et al. 2020, arXiv:2006.16236 (elu + 1); Zhang et al. 2024, arXiv:2402.04347 (Hedgehog), and
arXiv:2410.10254 (LoLCATs); Arora et al. 2024, arXiv:2402.18668 (Based, Taylor); Aksenov et al. 2024, arXiv:2402.10644
(ReBased); Choromanski et al. 2021, arXiv:2009.14794 (FAVOR+).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 1e-12  # of learned maps, so that no row sums to zero


def elu1(x: Tensor) -> Tensor:
    """elu(x) + 1."""
    return F.elu(x) + 1


def squares(x: Tensor, scale: float = 1.0) -> Tensor:
    """phi with phi(q) . phi(k) = (scale q . k)^2: products of two channels, each pair once, D (D + 1) / 2 features."""
    left, right = _pairs(x)
    times = torch.where(left == right, x.new_ones(()), x.new_full((), math.sqrt(2.0)))
    return x[..., left] * x[..., right] * (times * scale)


def taylor(x: Tensor, scale: float = 1.0) -> Tensor:
    """phi with phi(q) . phi(k) = 1 + s + s^2 / 2, s = scale q . k: 1 + D + D (D + 1) / 2 features."""
    x = x * math.sqrt(scale)
    return torch.cat([torch.ones_like(x[..., :1]), x, squares(x) * math.sqrt(0.5)], -1)


def _pairs(x: Tensor) -> Tensor:
    width = x.shape[-1]
    return torch.triu_indices(width, width, device=x.device)


def hedgehog(x: Tensor, weight: Tensor, *, kind: str = "softmax", skip: bool = False) -> Tensor:
    """A learned map: z = x W for each head, then both signs of it; weight (H, D, F), 2 F features.

    kind: "softmax" over the features of each sign, or "exp" of z less its largest. skip: x is added to z.
    """
    z = torch.einsum("bhld,hdf->bhlf", x, weight)
    z = z + x if skip else z
    if kind == "softmax":
        parts = [z.softmax(-1), (-z).softmax(-1)]
    else:
        parts = [torch.exp(z - z.amax(-1, keepdim=True)), torch.exp(z.amin(-1, keepdim=True) - z)]
    return torch.cat(parts, -1).clamp(min=LEAST)


def favor(x: Tensor, omega: Tensor, *, is_query: bool) -> Tensor:
    """Positive random features of exp(q . k): exp(omega x - |x|^2 / 2 - max) / sqrt(m); omega (m, D) or (H, m, D).

    The maximum, which the division of an attention takes out again, is a query's own, and one for all keys of a head.
    """
    projected = x @ omega.mT - (x * x).sum(-1, keepdim=True) / 2
    top = projected.detach()
    top = top.amax(-1, keepdim=True) if is_query else top.amax((-1, -2), keepdim=True)
    return torch.exp(projected - top) / math.sqrt(omega.shape[-2])

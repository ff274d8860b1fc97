"""torch's CPU kernel of scaled_dot_product_attention: wrong gradients of rows whose added mask is finfo.min throughout.

Such a row's softmax is uniform, 1/S. The forward gives that; the backward rebuilds the weights as exp(score - lse), and
lse = finfo.min + log S is finfo.min again, so it finds 1. transformers' eager spelling, and attnc's rewrite of it,
have the gradients of the softmax. Prints max|g - g64| / max|g64| for each, g64 from the same model in float64.

    python benchmarks/sdpa_fault.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timing import print_environment, print_table
from torch import Tensor

B, H, L, E = 2, 4, 70, 16
LOW = torch.finfo(torch.float32).min


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * E**-0.5 + mask).softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def main() -> None:
    print_environment()
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(B, H, L, E, generator=generator, requires_grad=True) for _ in range(3)]
    weight = torch.randn(B, H, L, E, generator=generator)
    mask = torch.where(torch.rand(B, 1, L, L, generator=generator) < 0.7, 0.0, LOW)
    mask[1, :, :9] = LOW  # nine rows of padding

    def gradients(call, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in qkv]
        return torch.autograd.grad((call(*leaves, mask.to(dtype)) * weight.to(dtype)).sum(), leaves)

    exact = gradients(eager, torch.float64)
    attnc = torch.compile(eager, backend="attnc", options={"inner": "aot_eager", "force": "dense"})
    rows = []
    for name, call in {"eager": eager, "sdpa": sdpa, "attnc on eager": attnc}.items():
        errors = [float((g - e).abs().max() / e.abs().max()) for g, e in zip(gradients(call), exact, strict=True)]
        rows.append([name, *(f"{error:.1e}" for error in errors)])
    print_table(["spelling", "query", "key", "value"], rows)


if __name__ == "__main__":
    main()

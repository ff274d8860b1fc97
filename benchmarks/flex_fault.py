"""Does Inductor's CPU template for FlexAttention read the right values? Plain torch, no attnc.

With q and k computed and v a slice of a packed projection, torch 2.13.0 gives errors of the size of the values. This is
why attnc does not choose `block_sparse{provider=flex}` on the CPU by itself.
"""

from __future__ import annotations

import torch
from torch.nn.attention.flex_attention import flex_attention

HEADS = 4


def attend(x: torch.Tensor, weight: torch.Tensor, computed: bool) -> torch.Tensor:
    batch, length, width = x.shape
    q, k, v = (t.view(batch, length, HEADS, width // HEADS).transpose(1, 2) for t in (x @ weight).chunk(3, -1))
    return flex_attention(q.sin(), k.cos(), v.tanh() if computed else v)


def main() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 128, 64), torch.randn(64, 192) * 0.2
    for computed in (False, True):
        torch._dynamo.reset()
        with torch.no_grad():
            want = attend(x, weight, computed)
            error = (torch.compile(attend, dynamic=False)(x, weight, computed) - want).abs().max().item()
        print(f"torch {torch.__version__}, v {'computed' if computed else 'a slice'}: error {error:.2g}, "
              f"largest value {want.abs().max().item():.2g}")


if __name__ == "__main__":
    main()

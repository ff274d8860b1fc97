"""Native sparse attention: keys pooled by block, blocks chosen by them, and a window, three attentions under gates.

    out_i = g_cmp softmax over complete blocks c of (q_i . mean_c k) mean_c v
          + g_slc softmax over the keys j <= i of the chosen blocks
          + g_swa softmax over the last `window` keys

Blocks are chosen by the weights of the first branch, summed over the heads of a key head; a row's own is among them.
The choice has no gradient. A row before the end of the first block has nothing in the first branch: 0.

Source: Yuan et al. 2025, "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention",
arXiv:2502.11089, equations 3 to 12, with means as the compression.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.forms.compressed_selection import CompressedSelection
from attnc.operands import Operands
from attnc.ops import ATTENTION
from attnc.rule_attention import AttentionRule


def native_sparse(
    query: Tensor, key: Tensor, value: Tensor, gates: tuple[Tensor, Tensor, Tensor], *,
    block: int = 64, top_k: int = 16, window: int = 512, sinks: int = 0, near: int = 1, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """The three branches under their gates, (B, Hq, L, Ev).

    Shapes: query (B, Hq, L, E), key (B, H, L, E), value (B, H, L, Ev); gates of the pooled, the chosen and the window's
    branch, (B, Hq, L) each, as they multiply. top_k: blocks chosen, a row's own, those of the first `sinks` keys and of
    the last `near` among them.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    chosen, (pooled_form, near_form) = _selection(block, top_k, sinks, near), _exact(query, key, window)
    pooled = [x[:, :, : x.shape[2] // block * block].unflatten(2, (-1, block)).mean(3) for x in (key, value)]
    out = torch.zeros((), dtype=query.dtype, device=query.device)
    branches = (
        (pooled_form, *pooled, f"keep={block} * j - i <= {1 - block}; empty=zero"),
        (chosen.spell(), key, value, "keep=j - i <= 0"),
        (near_form, key, value, f"keep=j - i <= 0 and i - j <= {window - 1}"),
    )
    for gate, (form, k, v, mask) in zip(gates, branches, strict=True):
        if k.shape[2]:
            part, _ = ATTENTION(query, k, v, [], [], f"{form} | score={scale!r} * s; {mask}")
            out = out + gate.unsqueeze(-1) * part
    return out


def _exact(query: Tensor, key: Tensor, window: int) -> tuple[str, str]:
    """The forms that compute the first and the last branch, whose masks are of positions alone."""
    if query.device.type != "cpu":
        return "flash", "flash"
    near = "dense"
    if not all(isinstance(n, int) for n in (*query.shape, *key.shape)):  # lengths are symbols of a graph
        return "dense", near if window >= key.shape[2] else "block_sparse{provider=band}"
    if window < key.shape[2]:
        near = "block_sparse{provider=blocked,block_m=64,block_n=64}"
    return "block_sparse{provider=blocked,block_m=1024,block_n=64}", near


def selected_blocks(
    query: Tensor, key: Tensor, *, block: int = 64, top_k: int = 16, sinks: int = 0, near: int = 1,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """The blocks that `native_sparse` chooses, (B, H, L, n) int64, -1 for none."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rule = AttentionRule.parse(f"score={scale!r} * s; keep=j - i <= 0")
    with torch.no_grad():
        return _selection(block, top_k, sinks, near).choose(Operands(query, key, key, [], [], rule))


def _selection(block: int, top_k: int, sinks: int, near: int) -> CompressedSelection:
    return CompressedSelection(block=block, top_k=top_k, sinks=sinks, window=near)

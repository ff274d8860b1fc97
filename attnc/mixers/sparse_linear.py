"""Sparse-linear attention: the strongest blocks of keys by softmax, those between by linear attention, the rest not.

    out_i = softmax over the keys of the critical blocks of row i's tile  +  o_i proj
    o_i = phi(q_i) sum_{c marginal} phi(K_c)^T V_c / (phi(q_i) . sum_{c marginal} sum_{j in c} phi(k_j)),  phi = softmax

A tile of rows ranks the blocks by softmax_c(scale mean q . mean_c k): the first `critical` percent of them, one at
least, are critical, the last `negligible` percent are left out, the others are marginal. No mask. The ranking has no
gradient; a tile without marginal blocks has 0 for o.

Source: Zhang et al. 2025, "SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention",
arXiv:2509.24006, section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attnc.codegen.selectors_blocks import mean_shares
from attnc.forms.block_scores import BlockScores
from attnc.forms.selected import marked
from attnc.operands import Operands
from attnc.ops import ATTENTION
from attnc.rule_attention import AttentionRule


def sparse_linear(
    query: Tensor, key: Tensor, value: Tensor, proj: Tensor, *,
    rows: int = 64, block: int = 64, critical: int = 5, negligible: int = 10, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """out (B, Hq, L, Ev).

    Shapes: query (B, Hq, L, E), key (B, H, S, E), value (B, H, S, Ev), proj (Ev, Ev) or (Hq, Ev, Ev). rows, block: of a
    tile and of a block of keys.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    blocks = -(-key.shape[2] // block)
    strong = BlockScores(rows=rows, block=block, top_k=max(1, blocks * critical // 100), sinks=0, window=0)
    rule = AttentionRule.parse(f"score={scale!r} * s")
    out, _ = ATTENTION(query, key, value, [], [], f"{strong.spell()} | {rule.spell()}")
    with torch.no_grad():
        marginal = _marginal(Operands(query, key, value, [], [], rule), strong, blocks * negligible // 100, scale)
    return out + _linear(query, key, value, marginal, rows, block) @ proj


def _marginal(given: Operands, strong: BlockScores, last: int, scale: float) -> Tensor:
    """Blocks that are neither critical nor among the `last` ones, (B, Hq, tiles, blocks)."""
    query, key = given.query, given.key
    blocks = -(-key.shape[2] // strong.block)
    end = torch.full((1, 1, -(-query.shape[2] // strong.rows)), key.shape[2] - 1, device=key.device)
    share = mean_shares(query, key, end, strong.rows, strong.block, scale)
    critical = marked(strong.choose(given), blocks)
    weak = marked(share.masked_fill(critical, 2.0).topk(last, -1, largest=False).indices, blocks)
    return ~critical & ~weak


def _linear(query: Tensor, key: Tensor, value: Tensor, marginal: Tensor, rows: int, block: int) -> Tensor:
    """Linear attention to the marginal blocks of each tile, (B, Hq, L, Ev)."""
    (L, H), spare = (query.shape[2], key.shape[1]), -key.shape[2] % block
    phi_q, phi_k = query.softmax(-1), F.pad(key.softmax(-1), (0, 0, 0, spare))
    counted = F.pad(torch.cat([value, torch.ones_like(value[..., :1])], -1), (0, 0, 0, spare))
    states = phi_k.unflatten(2, (-1, block)).mT @ counted.unflatten(2, (-1, block))  # (B, H, blocks, E, Ev + 1)
    kept = marginal.unflatten(1, (H, -1)).flatten(2, 3).to(states.dtype)
    sums = (kept @ states.flatten(3)).unflatten(2, (-1, marginal.shape[2])).flatten(1, 2)
    sums = sums.unflatten(-1, states.shape[3:])  # (B, Hq, tiles, E, Ev + 1)
    found = F.pad(phi_q, (0, 0, 0, -L % rows)).unflatten(2, (-1, rows)) @ sums
    total = found[..., -1:]
    out = torch.where(total > 0, found[..., :-1] / torch.where(total > 0, total, 1.0), 0.0)
    return out.flatten(2, 3)[:, :, :L]

"""Forms that add one key for each block of keys: its mean, which stands for the block where its keys are not attended.

    K' = [K, 0 .., mean_0 K, mean_1 K, ..]   the same of V;   behind the keys, filled up to whole tiles

The gradient of a mean is shared among the keys of its block. Blocks cross whatever a mask cuts apart, and a score of
positions says nothing of a mean: only a causal mask, or none, and scores of the product alone are taken.

Source: Guo et al. 2021, "LongT5", arXiv:2112.07916, section 3.2 (global tokens from blocks, beside the local ones); Zhu
et al. 2021, "H-Transformer-1D", arXiv:2107.11906 (means of blocks).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from attnc.codegen.selectors_blocks import wide
from attnc.expr import TRUE
from attnc.expr_text import spell
from attnc.forms.selected import Selected, is_prefix
from attnc.operands import Operands
from attnc.region import AttentionRegion


@dataclass(frozen=True)
class Pooled:
    """owner: (S,) block of each key, `len(count)` for none; count: (n,) keys of each block; end: where means begin."""

    owner: Tensor
    count: Tensor
    end: int

    @property
    def last(self) -> Tensor:
        """Position of the last key of each block; blocks lie one behind the other from the first key on."""
        return self.count.cumsum(0) - 1

    def means(self, x: Tensor) -> Tensor:
        """(B, H, S, E) -> (B, H, n, E), float32 or float64."""
        n, x = len(self.count), wide(x)
        sums = x.new_zeros(*x.shape[:2], n + 1, x.shape[3]).index_add(2, self.owner, x)
        return sums[:, :, :n] / self.count.to(x.dtype).unsqueeze(-1)

    def extended(self, given: Operands) -> Operands:
        """Keys and values, zeros up to `end`, then the means."""
        spare = self.end - given.key.shape[2]
        key, value = (
            torch.cat([F.pad(t, (0, 0, 0, spare)), self.means(t).to(t.dtype)], 2) for t in (given.key, given.value)
        )
        return given._replace(key=key, value=value)

    def folded(self, gradient: Tensor) -> Tensor:
        """The gradient of the keys, from that of what `extended` makes of them."""
        shared = gradient[:, :, self.end :] / self.count.to(gradient.dtype).unsqueeze(-1)
        shared = F.pad(shared, (0, 0, 0, 1))  # of the keys in no block
        return gradient[:, :, : len(self.owner)] + shared.index_select(2, self.owner)


class PooledKeys(Selected):
    """A form that attends to means of blocks beside keys. No dataclass: each form says which knobs it has."""

    @abstractmethod
    def pooled(self, S: int, device: torch.device) -> Pooled:
        """The blocks of S keys."""

    def folded(self, gradient: Tensor, given: Tensor) -> Tensor:
        return self.pooled(given.shape[2], given.device).folded(gradient)

    def unfit(self, region: AttentionRegion) -> str | None:
        keep, score = region.rule.keep, region.rule.score
        if keep != TRUE and not is_prefix(keep):
            return f"{self.name} pools blocks that a causal mask or none keeps, found {spell(keep)}; use block_scores."
        if score.names() - {"s"} or score.has("load") or score.has("size"):
            return f"{self.name} scores the product alone, found {spell(score)}; use block_scores."
        return super().unfit(region)

"""Hierarchical attention, one level: keys near a query are exact, a farther block of keys shares one pooled logit.

    s_ij = q_i . k_j                      where |a - c| <= near,   a = i // block, c = j // block
    s_ij = mean(q of block a) . mean(k of block c)                 elsewhere
    o_i  = sum_{j kept} exp(score(s_ij) - lse_i) v_j

A far block thus weighs in with the mean of its values times the number of its keys. Work on scores is
O(L * near * block + (L / block)^2), merged by the log-sum-exp of the two parts. Means run over whole blocks: under a
causal mask row i depends on the later queries of its own block.

Source: HSA, systems.md A26, one level of its tree of scales (block-tied softmax, one logit from pooled q and k).
Exact:  for block = 1, and where no block is farther than `near`. An approximation by name elsewhere: taken only where
`allow` names it. Inference, CPU, causal and full masks, scores of the product alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from attnc.cost_models.cost import Cost, Work
from attnc.cost_models.device import Device
from attnc.expr import TRUE
from attnc.expr_text import parse, spell
from attnc.forms.base import AttentionForm, Form, knob
from attnc.forms.masked import scaled_rows
from attnc.operands import Operands
from attnc.reading import as_tensor, read
from attnc.region import ITEM_BYTES, AttentionRegion
from attnc.rule_attention import AttentionRule

CAUSAL = parse("j <= i")
# Passes over the near scores, as over those of a composed attention.
PASSES = 6


@dataclass(frozen=True)
class Hierarchical(AttentionForm):
    """Exact near blocks, pooled far ones. block: positions pooled; near: blocks on each side that stay exact."""

    name: ClassVar[str] = "hierarchical"
    approximates: ClassVar[bool] = True
    block: int = knob(64, 16, 32, 128, role="semantic", unit="positions")
    near: int = knob(1, 2, 4, role="semantic", unit="blocks")

    def refuse(self, region: AttentionRegion) -> str | None:
        if region.kind != "attention":
            return f"hierarchical computes attention, found a region of kind {region.kind}; leave it as written."
        if region.device != "cpu":
            return f"hierarchical is lowered for the CPU only, found a region on {region.device}; use another form."
        if region.training:
            return "hierarchical is for inference, found a region in training; use torch.no_grad()."
        rule, shape = region.rule, region.shape
        if rule.keep not in (TRUE, CAUSAL):
            return (
                f"hierarchical pools whole blocks under a causal mask or none, found the mask {spell(rule.keep)}; use "
                "block_sparse."
            )
        if shape.L != shape.S or not shape.is_static:
            return (
                f"hierarchical needs as many queries as keys, known at compile time, found {shape.text('L')} and "
                f"{shape.text('S')}; use dense, or mark the lengths with dynamic=False."
            )
        if rule.score.names() - {"s"} or rule.score.has("load") or rule.score.has("size") or rule.sink is not None:
            return (
                f"hierarchical scores the product alone, found {spell(rule.score)}"
                f"{' and a sink' if rule.sink is not None else ''}; use dense."
            )
        if rule.dropout:
            return f"hierarchical keeps no random stream, found dropout {rule.dropout:g} active; use model.eval()."
        return None

    def is_exact(self, region: AttentionRegion) -> bool:
        few = -(-region.shape.S // self.block) <= self.near + 1
        return (self.block == 1 or few) and self.refuse(region) is None

    def cost(self, region: AttentionRegion, device: Device) -> Cost:
        s, item = region.shape, ITEM_BYTES.get(region.dtype, 4)
        blocks = -(-s.L // self.block)
        sides = self.near + 1 if region.rule.keep == CAUSAL else 2 * self.near + 1
        scores = float(s.B * s.Hq) * (blocks * self.block * sides * self.block + blocks**2)
        copied = 2.0 * s.B * s.H * blocks * sides * self.block * (s.E + s.Ev) * item
        moved = region.bytes + copied + PASSES * scores * max(item, 4)
        return Cost((Work("composed", 2.0 * scores * (s.E + s.Ev), scores, moved, 16),))

    def cpu(self, given: Operands) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value, _, _, rule = given
        dtype, length = query.dtype, query.shape[2]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        q, k, v = (self._blocks(x.to(wide)) for x in (query, key, value))
        q = q.unflatten(1, (key.shape[1], -1))  # (B, H, group, blocks, block, E)
        near, lse_near = self._near(q, k, v, length, rule)
        far, lse_far = self._far(q, k, v, length, rule)
        lse = torch.logaddexp(lse_near, lse_far)
        out = near * (lse_near - lse).exp().unsqueeze(-1) + far * (lse_far - lse).exp().unsqueeze(-1)
        out, lse = out.flatten(3, 4).flatten(1, 2), lse.flatten(3, 4).flatten(1, 2)
        return out[:, :, :length].to(dtype), lse[:, :, :length].detach()

    def _blocks(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, L, E) -> (B, H, blocks, block, E), the last block filled up with zeros."""
        return F.pad(x, (0, 0, 0, -x.shape[2] % self.block)).unflatten(2, (-1, self.block))

    def _near(self, q, k, v, length: int, rule: AttentionRule) -> tuple[torch.Tensor, torch.Tensor]:
        """out (B, H, group, blocks, block, Ev) and lse over the keys of the near blocks."""
        blocks, after = k.shape[2], 0 if rule.keep == CAUSAL else self.near
        sides = self.near + 1 + after

        def windows(x: torch.Tensor) -> torch.Tensor:  # (B, H, 1, blocks, sides * block, E)
            around = F.pad(x, (0, 0, 0, 0, self.near, after))
            return torch.cat([around[:, :, n : n + blocks] for n in range(sides)], 3).unsqueeze(2)

        score = _scored(rule, q @ windows(k).mT)
        first = torch.arange(blocks, device=k.device).view(-1, 1, 1) * self.block
        i = first + torch.arange(self.block, device=k.device).view(-1, 1)
        j = first - self.near * self.block + torch.arange(sides * self.block, device=k.device)
        keep = (j >= 0) & (j < length) & ((j <= i) if rule.keep == CAUSAL else True)
        score = score.masked_fill(~keep, -torch.inf)
        return score.softmax(-1) @ windows(v), score.logsumexp(-1)

    def _far(self, q, k, v, length: int, rule: AttentionRule) -> tuple[torch.Tensor, torch.Tensor]:
        """out (B, H, group, blocks, 1, Ev) and lse over the far blocks; 0 and -inf where there is none."""
        blocks = k.shape[2]
        place = torch.arange(blocks, device=k.device)
        count = (length - place * self.block).clamp(max=self.block).to(k.dtype)
        q, k, v = (x.sum(-2) / count.unsqueeze(-1) for x in (q, k, v))
        score = _scored(rule, q @ k.unsqueeze(2).mT) + count.log()
        apart = place.unsqueeze(-1) - place
        far = apart > self.near if rule.keep == CAUSAL else apart.abs() > self.near
        lse = score.masked_fill(~far, -torch.inf).logsumexp(-1, keepdim=True)
        weights = torch.where(far, (score - torch.where(lse > -torch.inf, lse, 0.0)).exp(), 0.0)
        return (weights @ v.unsqueeze(2)).unsqueeze(-2), lse

    def reference(self, given: Operands) -> tuple[torch.Tensor, torch.Tensor]:
        """The formula in float64, every pair in memory."""
        query, key, value, _, _, rule = scaled_rows(given.double())
        key, value = key.repeat_interleave(given.group, 1), value.repeat_interleave(given.group, 1)
        i = torch.arange(key.shape[2], device=key.device)
        same = (i.unsqueeze(-1) // self.block == i // self.block).to(key.dtype)
        pool = same / same.sum(-1, keepdim=True)  # each position's mean over its block
        far = (i.unsqueeze(-1) // self.block - i // self.block).abs() > self.near
        score = _scored(rule, torch.where(far, (pool @ query) @ (pool @ key).mT, query @ key.mT))
        if rule.keep == CAUSAL:
            score = score.masked_fill(i > i.unsqueeze(-1), -torch.inf)
        return score.softmax(-1) @ value, score.logsumexp(-1)

    def space(self, region: AttentionRegion, device: Device) -> tuple[Form, ...]:
        return () if self.refuse(region) else (self,)  # both knobs change results: attnc.budget searches them


def _scored(rule: AttentionRule, raw: torch.Tensor) -> torch.Tensor:
    return as_tensor(read(rule.score, {}, (), (), score=raw), raw).expand(raw.shape)

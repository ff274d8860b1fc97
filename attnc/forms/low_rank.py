"""Low-rank attention: scores from queries and keys in the `rank` leading directions of the keys.

    score reads s_ij = (q_i U)(k_j U)^T,   U = the eigenvectors of K^T K (E, E) with the largest `rank` eigenvalues

One U (E, rank) for each batch entry and key head, found anew in every run from all its keys, those that a mask drops
included: under a causal mask row i depends on later keys through U. The rest is the rule as it stands, dense.

Source: DR-RL, systems.md A29: its static subset, one rank for all segments; Eckart, Young 1936 (the best projection).
Exact:  for rank >= E. An approximation by name elsewhere: taken only where `allow` names it. Inference, CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from attnc.cost_models.cost import Cost, Work
from attnc.cost_models.device import Device
from attnc.forms.base import AttentionForm, Form, knob
from attnc.forms.dense import Dense
from attnc.forms.masked import reference
from attnc.operands import Operands
from attnc.region import ITEM_BYTES, AttentionRegion

EIGEN = 10  # FLOP of a symmetric eigensolver over E^3; assumed, not measured


@dataclass(frozen=True)
class LowRank(AttentionForm):
    """Dense attention between projected queries and keys. rank: directions kept of E."""

    name: ClassVar[str] = "low_rank"
    approximates: ClassVar[bool] = True
    rank: int = knob(64, 8, 16, 24, 32, 48, 96, 128, role="semantic", unit="directions")

    def refuse(self, region: AttentionRegion) -> str | None:
        if region.kind != "attention":
            return f"low_rank computes attention, found a region of kind {region.kind}; leave it as written."
        if region.device != "cpu":
            return f"low_rank is lowered for the CPU only, found a region on {region.device}; use another form there."
        if region.training:
            return (
                "low_rank has no backward (eigenvectors with equal eigenvalues have no gradient), found a region in "
                "training; use torch.no_grad()."
            )
        return Dense().refuse(region)

    def is_exact(self, region: AttentionRegion) -> bool:
        return self.rank >= region.shape.E and self.refuse(region) is None

    def cost(self, region: AttentionRegion, device: Device) -> Cost:
        s = region.shape
        if self.rank >= s.E:
            return Dense().cost(region, device)
        narrow = replace(region, shape=replace(s, E=self.rank))
        heads, item = s.B * s.H, ITEM_BYTES.get(region.dtype, 4)
        rows = s.group * s.L + s.S
        flops = 2.0 * heads * s.E * (s.S * s.E + rows * self.rank) + EIGEN * heads * s.E**3
        moved = heads * item * (rows * (s.E + self.rank) + s.S * s.E)
        return Cost((Work("composed", flops, 0.0, moved, 4),)) + Dense().cost(narrow, device)

    def cpu(self, given: Operands) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, *_ = given
        if self.rank < key.shape[-1]:
            leading = leading_directions(key, self.rank).to(key.dtype)
            B, Hq, L, E = query.shape
            rows = query.reshape(B, key.shape[1], -1, E)
            given = given._replace(query=(rows @ leading).view(B, Hq, L, self.rank), key=key @ leading)
        return Dense().cpu(given)

    def reference(self, given: Operands) -> tuple[torch.Tensor, torch.Tensor]:
        """The formula in float64, U from a singular value decomposition of the keys."""
        given = given.double()
        right = torch.linalg.svd(given.key, full_matrices=True).Vh[..., : self.rank, :]
        return reference(given._replace(key=given.key @ right.mT @ right))

    def space(self, region: AttentionRegion, device: Device) -> tuple[Form, ...]:
        return () if self.refuse(region) else (self,)  # the rank changes results: attnc.budget searches it


def leading_directions(key: torch.Tensor, rank: int) -> torch.Tensor:
    """Eigenvectors of K^T K with the largest `rank` eigenvalues: (B, H, S, E) -> (B, H, E, rank), float32 or float64.

    Keys that are not finite count as 0 here: the solver raises on them, and their scores are not finite anyway.
    """
    key = key if key.dtype == torch.float64 else key.float()
    gram = torch.nan_to_num(key.mT @ key, 0.0, 0.0, 0.0)
    return torch.linalg.eigh(gram).eigenvectors[..., -rank:]

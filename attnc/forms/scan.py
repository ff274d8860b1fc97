"""Recurrences element by element: a scan over the tokens of a block, the state from one block to the next.

    s_t = d_t s_{t-1} + w_t k_t v_t for each element of the state,   o_t = sum_k q_t s_t

Shapes: q, k (B, Hk, L, K) or none; v (B, H, L, V); S (B, H, K, V). In plain torch on every device: blocks of the square
root of a segment side by side, then from block to block, segments of bounded memory one after the other.

Source: Gu and Dao 2023, arXiv:2312.00752, section 3.3; Blelloch 1990 (prefix sums); systems.md, template T9.
Exact:  always, but for rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

from attnc.cost_models.cost import Cost, Work
from attnc.cost_models.device import Device, Gpu
from attnc.cost_models.estimate import Estimate
from attnc.cost_models.token_model import token_estimate, token_seconds
from attnc.forms.base import Form
from attnc.forms.recurrent import RecurrentForm, is_elementwise, token_work
from attnc.region import ITEM_BYTES, Region
from attnc.rule_recurrence import RecurrenceRule, RecurrenceShape


@dataclass(frozen=True)
class Scan(RecurrentForm):
    """A scan over blocks of tokens."""

    name: ClassVar[str] = "scan"

    def refuse(self, region: Region) -> str | None:
        why = self.unfit(region)
        if why is not None:
            return why
        rule, shape = region.rule, region.shape
        assert isinstance(rule, RecurrenceRule) and isinstance(shape, RecurrenceShape)
        if not is_elementwise(rule, shape):
            return "scan goes element by element, found products of matrices in a chunk; use chunked."
        return None

    def cost(self, region: Region, device: Device) -> Cost:
        rule, s = region.rule, region.shape
        assert isinstance(rule, RecurrenceRule) and isinstance(s, RecurrenceShape)
        elements = float(s.B * s.H * s.L * s.K * s.V)
        times = 3.5 if region.training else 1.0
        moved = times * (rule.elements(s) * ITEM_BYTES.get(region.dtype, 4) + 6.0 * 4 * elements)
        return Cost((Work("composed", 4.0 * elements, times * elements, moved, 4 * isqrt(max(1, s.L))),))

    def gpu_seconds(self, region: Region, gpu: Gpu) -> float:
        return token_seconds(token_work(region, 2 * isqrt(max(1, region.shape.L))), gpu)

    def gpu_estimate(self, region: Region, gpu: Gpu) -> Estimate:
        return token_estimate(token_work(region, 2 * isqrt(max(1, region.shape.L))), gpu)

    def space(self, region: Region, device: Device) -> tuple[Form, ...]:
        return () if self.refuse(region) is not None or self.untargeted(device) is not None else (self,)

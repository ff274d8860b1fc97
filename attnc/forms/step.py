"""Recurrences token by token: the state is read once, updated by each token, and written once.

    S <- D_t S + b_t (a_t^T S) + w_t k_t v_t^T,   o_t = q_t^T S

Shapes: q, k (B, Hk, L, K); v (B, H, L, V); S (B, H, K, V). On GPUs one kernel whose blocks keep columns of the state in
registers; on CPUs the chunked path with a chunk of one token.

Source: Yang et al. 2024, arXiv:2406.06484, equation 4; systems.md, template T10.
Exact:  always, but for rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnc.codegen import cpu_recurrence, gpu_step
from attnc.codegen.cpu_recurrence import Given
from attnc.codegen.gpu_step import StepKnobs
from attnc.cost_models.cost import Cost, Work
from attnc.cost_models.device import Device, Gpu
from attnc.cost_models.estimate import Estimate
from attnc.cost_models.token_model import token_estimate, token_seconds
from attnc.forms.base import Form, knob
from attnc.forms.recurrent import STEPS, RecurrentForm, token_work
from attnc.region import ITEM_BYTES, Region
from attnc.rule_recurrence import RecurrenceRule, RecurrenceShape


@dataclass(frozen=True)
class Step(RecurrentForm):
    """One token after the other; on GPUs blocks that keep `block_v` columns of the state."""

    name: ClassVar[str] = "step"
    block_v: int = knob(32, 8, 16, 64, unit="columns of the state")
    warps: int = knob(4, 1, 2, 8, unit="warps")

    def refuse(self, region: Region) -> str | None:
        why = self.unfit(region)
        if why is not None:
            return why
        if region.training:
            return "step has no backward, found a recurrence that trains; use chunked or scan."
        s = region.shape
        assert isinstance(s, RecurrenceShape)
        if s.L > STEPS or "L" in s.symbols:
            return f"step takes at most {STEPS} tokens, found {s.text('L')}; use chunked or scan."
        return None

    def cost(self, region: Region, device: Device) -> Cost:
        rule, s = region.rule, region.shape
        assert isinstance(rule, RecurrenceRule) and isinstance(s, RecurrenceShape)
        elements = float(s.B * s.H * s.L * s.K * s.V)
        moved = float(rule.elements(s) * ITEM_BYTES.get(region.dtype, 4))
        return Cost((Work("composed", 6.0 * elements, elements, moved, 6 * s.L),))

    def gpu_seconds(self, region: Region, gpu: Gpu) -> float:
        assert isinstance(region.shape, RecurrenceShape)
        return token_seconds(token_work(region, region.shape.L), gpu)

    def gpu_estimate(self, region: Region, gpu: Gpu) -> Estimate:
        assert isinstance(region.shape, RecurrenceShape)
        return token_estimate(token_work(region, region.shape.L), gpu)

    def run(self, given: Given, rule: RecurrenceRule, *, store: str | None = None) -> tuple[Tensor, Tensor]:
        if given.value.device.type == "cpu":
            return cpu_recurrence.recurrence(given, rule)
        return self.launch(given, rule, store=store)

    def launch(self, given: Given, rule: RecurrenceRule, *, store: str | None = None) -> tuple[Tensor, Tensor]:
        """The kernel: on a GPU, or under Triton's interpreter."""
        kernel = gpu_step.kernel_of(given.value.device.type, store)
        return gpu_step.step(kernel, given, rule, StepKnobs(self.block_v, self.warps))

    def space(self, region: Region, device: Device) -> tuple[Form, ...]:
        if self.refuse(region) is not None or self.untargeted(device) is not None:
            return ()
        if not isinstance(device, Gpu):
            return (self,)
        s = region.shape
        assert isinstance(s, RecurrenceShape)
        wanted = next((n for n in (64, 32, 16, 8) if s.B * s.H * -(-s.V // n) >= 2 * device.sms), 8)
        return (Step(wanted, 4 if s.K * wanted >= 4096 else 1),)

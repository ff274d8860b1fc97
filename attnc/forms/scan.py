"""Recurrences element by element: a scan over the tokens of a block, the state from one block to the next.

    s_t = d_t s_{t-1} + w_t k_t v_t for each element of the state,   o_t = sum_k q_t s_t

Shapes: q, k (B, Hk, L, K) or none; v (B, H, L, V); S (B, H, K, V). On GPUs one kernel, and one for the gradients, whose
programs keep the states of `block_h` channels in registers; on CPUs plain torch: blocks of the square root of a segment
side by side, then from block to block, segments of bounded memory one after the other.

Source: Gu and Dao 2023, arXiv:2312.00752, section 3.3; Blelloch 1990 (prefix sums); systems.md, template T9.
Exact:  always, but for rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import isqrt
from typing import ClassVar

from torch import Tensor

from attnc.codegen import cpu_recurrence, gpu_scan
from attnc.codegen.cpu_recurrence import Given
from attnc.codegen.gpu_scan import ScanKnobs
from attnc.cost_models.cost import Cost, Work
from attnc.cost_models.device import Device, Gpu
from attnc.cost_models.estimate import Estimate
from attnc.cost_models.token_model import ScanWork, scan_estimate, scan_seconds
from attnc.forms.base import Form, knob
from attnc.forms.recurrent import RecurrentForm, is_elementwise, token_work
from attnc.region import ITEM_BYTES, Region
from attnc.rule_recurrence import RecurrenceRule, RecurrenceShape

QUICK = tuple(product((16, 32, 8), (32, 128, 64, 16), (4, 1, 2)))


@dataclass(frozen=True)
class Scan(RecurrentForm):
    """A scan over blocks of tokens; on GPUs tiles of `block_t` tokens and `block_h` channels."""

    name: ClassVar[str] = "scan"
    block_t: int = knob(16, 8, 32, 64, unit="tokens")
    block_h: int = knob(32, 8, 16, 64, 128, unit="channels")
    warps: int = knob(4, 1, 2, 8, unit="warps")

    def refuse(self, region: Region) -> str | None:
        why = self.unfit(region)
        if why is not None:
            return why
        rule, shape = region.rule, region.shape
        assert isinstance(rule, RecurrenceRule) and isinstance(shape, RecurrenceShape)
        if not is_elementwise(rule, shape):
            return "scan goes element by element, found products of matrices in a chunk; use chunked."
        return gpu_scan.refuse(rule, shape.K) if region.device == "cuda" else None

    def cost(self, region: Region, device: Device) -> Cost:
        rule, s = region.rule, region.shape
        assert isinstance(rule, RecurrenceRule) and isinstance(s, RecurrenceShape)
        elements = float(s.B * s.H * s.L * s.K * s.V)
        times = 3.5 if region.training else 1.0
        moved = times * (rule.elements(s) * ITEM_BYTES.get(region.dtype, 4) + 6.0 * 4 * elements)
        return Cost((Work("composed", 4.0 * elements, times * elements, moved, 4 * isqrt(max(1, s.L))),))

    def gpu_seconds(self, region: Region, gpu: Gpu) -> float:
        return scan_seconds(self.work(region), gpu)

    def gpu_estimate(self, region: Region, gpu: Gpu) -> Estimate:
        return scan_estimate(self.work(region), gpu)

    def work(self, region: Region) -> ScanWork:
        """The region as the cost model takes it."""
        rule, s = region.rule, region.shape
        assert isinstance(rule, RecurrenceRule) and isinstance(s, RecurrenceShape)
        sizes = gpu_scan.sizes_of(s.H, s.Hk, s.K, s.V + (rule.normaliser != "none"), self.schedule, rule.decay)
        apart = not gpu_scan.is_plain(rule)
        return ScanWork(token_work(region, s.L), sizes["BLOCK_T"], sizes["BLOCK_H"], self.warps, apart)

    @property
    def schedule(self) -> ScanKnobs:
        """The knobs as the launcher takes them."""
        return ScanKnobs(self.block_t, self.block_h, self.warps)

    def run(self, given: Given, rule: RecurrenceRule, *, store: str | None = None) -> tuple[Tensor, Tensor]:
        if given.value.device.type == "cpu":
            return cpu_recurrence.recurrence(given, rule)
        return self.launch(given, rule, store=store)

    def launch(self, given: Given, rule: RecurrenceRule, *, store: str | None = None) -> tuple[Tensor, Tensor]:
        """The kernel: on a GPU, or under Triton's interpreter."""
        kernels = gpu_scan.kernels_of(given.value.device.type, store)
        return gpu_scan.scan(kernels, given, rule, self.schedule)

    def gradients(
        self,
        given: Given,
        needs: list[bool],
        grads: tuple[Tensor, Tensor],
        rule: RecurrenceRule,
        *,
        store: str | None = None,
    ) -> list[Tensor]:
        if given.value.device.type == "cpu":
            return cpu_recurrence.gradients(given, needs, *grads, rule)
        kernels = gpu_scan.kernels_of(given.value.device.type, store)
        return gpu_scan.gradients(kernels, given, needs, grads, rule, self.schedule)

    def space(self, region: Region, device: Device) -> tuple[Form, ...]:
        if self.refuse(region) is not None or self.untargeted(device) is not None:
            return ()
        if not isinstance(device, Gpu):
            return (self,)
        forms = [Scan(*values) for values in QUICK]
        fitting = [f for f in forms if f.fits(region)]
        return (min(fitting or forms, key=lambda f: f.gpu_seconds(region, device)),)

    def fits(self, region: Region) -> bool:
        """Whether a thread holds whole tokens in registers: 64 elements forward, 32 backward, as compiled."""
        scan = self.work(region)
        K = scan.work.K
        elements = scan.block_t * scan.block_h * K
        narrow = elements <= 32 * 32 * gpu_scan.backward_warps(K, self.schedule)
        along = scan.block_h * K >= 32 * self.warps
        return along and elements <= 64 * 32 * self.warps and (narrow or not region.training)

"""The recurrent family: linear attention, state spaces and delta rules, as settings of one algebra.

    x_t = a_t^T S_{t-1}                                 with two low-rank vectors a, b only
    S_t = D_t S_{t-1} + b_t x_t + w_t k_t v_t^T         the state, (K, V) for each head, float32
    o_t = scale * q_t^T S_t                             or, read before the update, q_t^T (S_{t-1} + diag(u) k_t v_t^T)

The delta rule replaces v_t by v_t - (D_t S_{t-1})^T k_t. A document that starts resets the state. The settings are the
fields of `RecurrenceRule`; which published system is which setting stands in `attnc.forms.systems`.

How it is computed follows from the decay alone, and so a form is named after the order of its sums, not after a system:

    chunked   decays by head, token or channel: products of matrices inside a chunk, the state from chunk to chunk
    scan      a decay for every element of the state, or a state of one element: no product of matrices exists
    step      a few tokens: the state is read and written once, and that is all there is to do

Source: Yang et al. 2024, arXiv:2406.06484 and arXiv:2412.06464; Dao and Gu 2024, arXiv:2405.21060; Yang et al. 2023,
arXiv:2312.06635.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

from attnc.codegen import cpu_recurrence
from attnc.codegen.cpu_recurrence import Given
from attnc.cost_models.cost import Cost, Work
from attnc.cost_models.device import Device, Gpu
from attnc.cost_models.token_model import TokenWork
from attnc.forms.base import Form
from attnc.region import ITEM_BYTES, Region
from attnc.rule_recurrence import RecurrenceRule, RecurrenceShape

DTYPES = ("bfloat16", "float16", "float32")  # what kernels take; the CPU takes float64 too
STEPS = 16  # tokens up to which a state that is read and written once per token is no loss


@dataclass(frozen=True)
class RecurrentForm(Form):
    """One way to compute a linear recurrence; all are exact."""

    kind: ClassVar[str] = "recurrence"

    def launches(self, region: Region) -> bool:
        return region.device != "cpu"

    def is_exact(self, region: Region) -> bool:
        return self.refuse(region) is None

    def run(self, given: Given, rule: RecurrenceRule, *, store: str | None = None) -> tuple[Tensor, Tensor]:
        """out (B, H, L, V) and the last state (B, H, K, V + n), on whatever device the operands are.

        store: where kernels are kept, None for the user's own.
        """
        return cpu_recurrence.recurrence(given, rule)

    def gradients(
        self,
        given: Given,
        needs: list[bool],
        grads: tuple[Tensor, Tensor],
        rule: RecurrenceRule,
        *,
        store: str | None = None,
    ) -> list[Tensor]:
        """Gradients of the operands that `needs` names, from those of `run`'s results; autograd must be on."""
        return cpu_recurrence.gradients(given, needs, *grads, rule)

    def spell(self) -> str:
        """One line; knobs at their default are left out."""
        shown = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name}{{{','.join(shown)}}}" if shown else self.name

    def untargeted(self, device: Device) -> str | None:
        if isinstance(device, Gpu) and device.target is None:
            return f"{self.name} needs a target of Triton's, {device.name} has none: {device.no_target}."
        return None

    def unfit(self, region: Region) -> str | None:
        """Why no recurrent form computes `region`."""
        if not isinstance(region.rule, RecurrenceRule):
            return f"{self.name} computes recurrences, found a region of kind {region.kind}; leave it as written."
        if region.rule.memory == "taps":
            return f"{self.name} keeps a state, found a short convolution without one; leave it as written."
        if region.device == "cuda" and region.dtype not in DTYPES:
            return f"{self.name} takes {', '.join(DTYPES)} on GPUs, found {region.dtype}; convert it first."
        if region.device == "cuda" and region.rule.state != "float32":
            return f"{self.name} keeps a state of float32 on GPUs, found {region.rule.state}; convert it first."
        return None


def is_elementwise(rule: RecurrenceRule, shape: RecurrenceShape) -> bool:
    """Whether no matrix product computes the recurrence: a decay for each element, or a state of one row."""
    return rule.decay == "state" or rule.factors or (shape.K == 1 and not (rule.delta or rule.low_rank))


def token_work(region: Region, tokens: int) -> TokenWork:
    """The region as the cost model of tokens takes it; tokens: those of a block that follow each other."""
    rule, s = region.rule, region.shape
    assert isinstance(rule, RecurrenceRule) and isinstance(s, RecurrenceShape)
    exps = {"none": 0, "head": 1, "token": 1, "channel": s.K, "state": s.K}[rule.decay] + 2 * (rule.gate == "exp")
    states = 8.0 * s.B * s.H * s.K * (s.V + rule.columns)
    moved = float(rule.elements(s) * ITEM_BYTES.get(region.dtype, 4))
    return TokenWork(s.B, s.H, s.L, s.K, s.V, moved, states, exps, tokens, region.training)


def cost_in_chunks(region: Region, chunk: int) -> Cost:
    """Cost on a CPU of chunks of `chunk` tokens: products, decays of pairs, and calls for each chunk that follow."""
    rule, s = region.rule, region.shape
    assert isinstance(rule, RecurrenceRule) and isinstance(s, RecurrenceShape)
    tokens, item = s.B * s.H * s.L, ITEM_BYTES.get(region.dtype, 4)
    fixes = rule.delta + 2 * rule.low_rank
    flops = tokens * (4.0 * s.K * s.V + 2 * chunk * (s.K + s.V) + fixes * (2 * s.K * s.V + chunk * (3 * s.K + s.V)))
    pairs = tokens * chunk * (1 + fixes) * (s.K / 2 if rule.decay == "channel" else 1)
    moved = float(rule.elements(s) * item) + 2.0 * tokens / chunk * s.K * s.V * 4
    launches = -(-s.L // chunk) * (4 + 2 * fixes)
    works = [Work("composed", flops, pairs, moved, launches)]
    if region.training:
        works.append(Work("composed", 3 * flops, 2 * pairs, 3 * moved, 3 * launches))
    return Cost(tuple(works))

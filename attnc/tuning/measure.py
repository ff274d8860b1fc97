"""A setting of Flash on the device that is here: first whether its numbers are right, then how long it takes.

Source: the region's own reference (`attnc.forms.masked`) decides what is right, at a size that it can afford.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from attnc.codegen.load import triton
from attnc.cost_models.device import Device, Gpu, answers_to, device_named
from attnc.errors import UsageError
from attnc.forms import spell_attention
from attnc.forms.base import Form
from attnc.forms.flash_decode import FlashDecode
from attnc.forms.generated import kept_in
from attnc.forms.masked import reference, settle_empty
from attnc.operands import Operands
from attnc.region import AttentionRegion
from attnc.tuning.bench import Clock, DeviceClock, measured
from attnc.tuning.problem import Outcome

# Scores up to which the reference, which keeps them all, is run: 1 GiB of float32 and a few copies.
AFFORDABLE = 1 << 26
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}


@dataclass(frozen=True)
class Bench:
    """Runs settings of one kernel of a region on the current device, which must be `gpu`; `store` keeps the kernels."""

    region: AttentionRegion
    gpu: Gpu
    part: str
    store: str | None = None

    def run(self, form: Form) -> Outcome:
        """Seconds of the forward, or of the whole backward for its kernels; a failure where results are wrong."""
        check_here(self.gpu)
        try:
            return checked(form, self._error(form), self.region.dtype) or measured(self._call(form), self._clock)
        except triton().runtime.errors.OutOfResources as exc:  # this setting's fault, as nothing else is
            return Outcome(failure=f"{form.spell()}: {str(exc).splitlines()[0][:200]}")

    @cached_property
    def _clock(self) -> Clock:
        return DeviceClock()

    @cached_property
    def _inputs(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """query, key, value laid out as projections leave them, and captured tensors."""
        return inputs_of(self.region, torch.device("cuda"))

    def _spelled(self, form: Form) -> str:
        return spell_attention(kept_in(form.spell(), self.store), self.region.rule.core)

    def _call(self, form: Form):
        qkv, captured = self._inputs
        sizes, spelling = list(self.region.sizes), self._spelled(form)
        if self.part in ("forward", "decode"):
            run = torch.ops.attnc.flash_decode if isinstance(form, FlashDecode) else torch.ops.attnc.flash
            return lambda: run(*qkv, captured, sizes, spelling)
        out, lse = torch.ops.attnc.flash(*qkv, captured, sizes, spelling)
        grad, needs = torch.randn_like(out), [t.is_floating_point() for t in captured]
        return lambda: torch.ops.attnc.flash_backward(grad, *qkv, out, lse, captured, sizes, needs, spelling)

    def _error(self, form: Form) -> float:
        """Largest difference from the reference, over the largest value; few heads where scores are many."""
        s, rule = self.region.shape, self.region.rule.core
        fewer = s.B * s.Hq * s.L * s.S > AFFORDABLE
        shape = replace(s, L=min(s.L, 1024), S=min(s.S, 1024)) if fewer and not self.region.captured else s
        if fewer and shape is s:
            return 0.0  # checked at its small sizes by translation validation
        region = replace(self.region, shape=shape)
        (query, key, value), captured = inputs_of(region, torch.device("cuda"))
        leaves = [t.requires_grad_(not region.widened) for t in (query, key, value)]
        run = torch.ops.attnc.flash_decode if isinstance(form, FlashDecode) else torch.ops.attnc.flash
        out, lse = run(query, key, value, captured, list(region.sizes), self._spelled(form))
        if rule.sink is None:
            out = settle_empty(out, lse > -torch.inf, Operands(query, key, value, captured, list(region.sizes), rule))
        wide = q, k, v = [t.detach().float().requires_grad_() for t in leaves]
        want, _ = reference(Operands(q, k, v, captured, list(region.sizes), rule))
        pairs = [(out, want)]
        if self.part in ("dq", "dkv"):
            grad = torch.randn_like(want)
            got = torch.autograd.grad(out, leaves, grad.to(out.dtype))
            pairs = list(zip(got, torch.autograd.grad(want, wide, grad), strict=True))
        return max(float((a.float() - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


def checked(form: Form, off: float, dtype: str) -> Outcome | None:
    """The failure of a setting whose results are `off`, a share of the largest value, where that is too much."""
    if off <= TOLERANCE[dtype]:
        return None
    return Outcome(failure=f"{form.spell()}: off by {off:.1e} of the largest value from the reference.")


def is_here(device: Device) -> bool:
    """Whether `device` is torch's current GPU, or this CPU."""
    if not isinstance(device, Gpu):
        return device == device_named("cpu")
    if not torch.cuda.is_available():
        return False
    return answers_to(device, torch.cuda.get_device_name(), torch.cuda.get_device_capability())


def check_here(device: Device) -> None:
    """Raises: UsageError where `device` is neither the current GPU nor this CPU: then nothing can be measured."""
    if not is_here(device):
        raise UsageError(
            f"measure on {device.name}: found no such {device.kind.upper()} here. Use fidelity 'compile', which needs "
            "none, or run it there."
        )


def captured_types(region: AttentionRegion) -> list[tuple[torch.dtype, list[int]]]:
    """Type and sizes of each captured tensor, from the facts of the region."""
    found = []
    for text in region.captured:
        match = re.fullmatch(r"(\w+)\[(.*)\]", text)
        assert match is not None, text
        found.append((getattr(torch, match[1]), [int(size) for size in match[2].split(",") if size.strip()]))
    return found


def inputs_of(region: AttentionRegion, device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random query, key and value, (B, L, heads, E) in memory, and captured tensors: ids in order, flags mostly set."""
    s, generator = region.shape, torch.Generator(device).manual_seed(0)

    def drawn(length: int, heads: int, width: int, kind: str) -> torch.Tensor:
        x = torch.randn(s.B, length, heads, width, generator=generator, device=device)
        return x.to(getattr(torch, kind)).transpose(1, 2)

    kinds = region.types
    query, key = drawn(s.L, s.Hq, s.E, kinds[0]), drawn(s.S, s.H, s.E, kinds[1])
    qkv = [query, key, key[..., : s.Ev] if region.value_in_key else drawn(s.S, s.H, s.Ev, kinds[2])]
    captured = []
    for kind, sizes in captured_types(region):
        if kind.is_floating_point:
            captured.append(torch.randn(sizes, generator=generator, device=device).to(kind))
        elif kind == torch.bool:
            captured.append(torch.rand(sizes, generator=generator, device=device) < 0.9)
        else:  # ids: four equal runs along the last dimension
            length = sizes[-1] if sizes else 1
            ids = torch.arange(length, device=device) * 4 // max(length, 1)
            captured.append(ids.to(kind).expand(sizes).contiguous())
    return qkv, captured

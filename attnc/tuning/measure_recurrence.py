"""A setting of a recurrence on the device that is here: first whether its numbers are right, then how long it takes.

Source: the CPU core in float64, token after token, decides what is right (`attnc.codegen.cpu_recurrence`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from attnc.codegen import cpu_recurrence
from attnc.codegen.cpu_recurrence import Given
from attnc.codegen.load import triton
from attnc.cost_models.device import Device, Gpu
from attnc.forms.base import Form
from attnc.forms.generated import BAR, kept_in
from attnc.op_recurrence import RECURRENCE
from attnc.region import Region
from attnc.rule_recurrence import RecurrenceRule, RecurrenceShape
from attnc.tuning.bench import Clock, DeviceClock, WallClock, measured
from attnc.tuning.measure import check_here, checked
from attnc.tuning.problem import Outcome

CHECKED = (1, 4, 160)  # batch, heads of keys and tokens of what is compared, at most: a ragged end of every chunk


@dataclass(frozen=True)
class RecurrenceBench:
    """Runs settings of a recurrence through the operator, forward, and backward where it trains."""

    region: Region
    on: Device
    store: str | None = None  # where kernels are kept; None: the user's own

    def run(self, form: Form) -> Outcome:
        """Seconds of the recurrence; a failure where results are wrong. Raises: UsageError where `on` is not here."""
        check_here(self.on)
        if not isinstance(self.on, Gpu):
            return self._run(form)
        try:
            return self._run(form)
        except triton().runtime.errors.OutOfResources as exc:  # this setting's fault, as nothing else is
            return Outcome(failure=f"{form.spell()}: {str(exc).splitlines()[0][:200]}")

    def _run(self, form: Form) -> Outcome:
        return checked(form, self.error(form), self.region.dtype) or measured(self._call(form), self._clock)

    @property
    def _kind(self) -> str:
        return "cuda" if isinstance(self.on, Gpu) else "cpu"

    @cached_property
    def _clock(self) -> Clock:
        return DeviceClock() if isinstance(self.on, Gpu) else WallClock()

    @cached_property
    def _given(self) -> Given:
        return operands_of(self.region, self._kind)

    def _call(self, form: Form) -> Callable[[], object]:
        given, spelling = self._given, self._spelled(form)
        if not self.region.training:
            return lambda: _applied(given, spelling)
        given = _learning(given)
        grad = torch.randn_like(given.value)
        return lambda: _gradients(given, spelling, grad)

    def _spelled(self, form: Form) -> str:
        return f"{kept_in(form.spell(), self.store)}{BAR}{self.region.rule.spell()}"

    def error(self, form: Form) -> float:
        """Largest difference from the CPU core in float64, over the largest value; of few heads and tokens."""
        rule, s = self.region.rule, self.region.shape
        assert isinstance(rule, RecurrenceRule) and isinstance(s, RecurrenceShape)
        B, heads, tokens = CHECKED
        keys = min(s.Hk, heads)
        few = replace(s, B=min(s.B, B), H=keys * s.group if s.Hk else min(s.H, heads), Hk=keys, L=min(s.L, tokens))
        given = operands_of(replace(self.region, shape=few), self._kind)
        wide = Given._make(t if t is None or not t.is_floating_point() else t.cpu().double() for t in given)
        wide = wide._replace(documents=None if given.documents is None else given.documents.cpu())
        exact = replace(rule, state="float64", out="value", chunk=1)
        pairs = list(zip(_applied(given, self._spelled(form)), cpu_recurrence.recurrence(wide, exact, 1), strict=True))
        if self.region.training:
            grad = torch.randn_like(wide.value)
            got = _gradients(_learning(given), self._spelled(form), grad.to(given.value))
            want = _gradients(_learning(wide), f"chunked{{chunk_size=1}} | {exact.spell()}", grad)
            pairs += zip(got, want, strict=True)
        return max(_off(a, b) for a, b in pairs)


def _off(got: Tensor, want: Tensor) -> float:
    return float((got.cpu().double() - want).abs().max() / want.abs().max().clamp(min=1e-30))


def _applied(given: Given, spelling: str) -> tuple[Tensor, Tensor]:
    return RECURRENCE(*given[:8], spelling, *given[8:])


def _learning(given: Given) -> Given:
    """The operands as leaves that gradients are asked of."""
    return Given._make(t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in given)


def _gradients(given: Given, spelling: str, grad: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        out, _ = _applied(given, spelling)
    learned = [t for t in given if t is not None and t.requires_grad]
    return torch.autograd.grad(out, learned, grad.to(out.dtype))


def operands_of(region: Region, kind: str) -> Given:
    """Random operands of a recurrence on a type of device, laid out as projections leave them; decays as models have.

    Documents are four runs of equal length.
    """
    rule, s = region.rule, region.shape
    assert isinstance(rule, RecurrenceRule) and isinstance(s, RecurrenceShape)
    generator, dtype = torch.Generator(kind).manual_seed(0), getattr(torch, region.dtype)
    acc = cpu_recurrence.DTYPES[rule.state]

    def drawn(heads: int, width: int) -> Tensor:
        x = torch.randn(s.B, s.L, heads, width, generator=generator, device=kind)
        return x.to(dtype).transpose(1, 2)

    def uniform(*sizes: int, low: float = 0.0) -> Tensor:
        return (torch.rand(sizes, generator=generator, device=kind) * (1 - low) + low).to(acc)

    query = drawn(s.Hk, s.K) if s.Hk else None
    key = drawn(s.Hk, s.K) / s.K**0.5 if s.Hk else None
    if rule.normaliser == "sum" and query is not None and key is not None:  # what is divided by stays away from zero
        query, key = query.abs(), key.abs()
    of_tokens = (s.B, s.H, s.L)
    sizes = {"head": (s.H,), "token": of_tokens, "channel": (*of_tokens, s.K), "state": of_tokens}.get(rule.decay)
    decay = None if sizes is None else uniform(*sizes, low=0.5)
    if decay is not None and not rule.factors and rule.decay != "state":
        decay = decay.log()
    bonus = rule.read == "before"
    initial = torch.randn(s.B, s.H, s.K, s.V + rule.columns, generator=generator, device=kind).to(acc)
    a, b = (drawn(s.Hk, s.K) / s.K if rule.low_rank else None for _ in "ab")
    runs = torch.arange(s.L, device=kind) * 4 // max(s.L, 1)
    return Given(
        query,
        key,
        drawn(s.H, s.V),
        decay,
        -uniform(s.H, s.K, low=0.1) if rule.decay == "state" else None,
        uniform(*of_tokens) if rule.gate != "none" else None,
        uniform(*((s.H,) if rule.gate == "exp" else (s.H, s.K))) if bonus else None,
        initial if rule.state_in else None,
        a,
        b,
        runs.expand(s.B, s.L).contiguous() if rule.packed else None,
    )

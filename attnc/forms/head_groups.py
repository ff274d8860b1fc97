"""Head groups: runs of heads, each by a form of its own.

    o_h = attention of head h by the form of its run

A run is key heads with their query heads, in the order of the heads; what a rule looks up by head it finds there. Any
form of attention without weights of its own may stand in a run, `dense` for heads that keep every key, as retrieval
heads beside streaming ones.

Source: Xiao et al. 2024, "DuoAttention", arXiv:2410.10819, section 2.3; Jiang et al. 2024, "MInference 1.0",
arXiv:2407.02490, section 3.2 (a pattern for each head).
Exact:  where the forms of all runs are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from attnc.cost_models.cost import Cost, Work
from attnc.cost_models.device import Device, Gpu
from attnc.errors import UsageError
from attnc.expr import Expr, H, add, const
from attnc.forms.base import AttentionForm, Form, knob
from attnc.forms.listed import Listed
from attnc.operands import Operands
from attnc.predicate import rebuild
from attnc.region import ITEM_BYTES, AttentionRegion
from attnc.rule_attention import AttentionRule

ENTRY = r"[1-9]\d{0,3}\*\w+(\([^(){},&]*\))?"


class Run(NamedTuple):
    """Key heads `first` .. `first + heads` - 1 by `form`."""

    form: AttentionForm
    first: int
    heads: int


@dataclass(frozen=True)
class HeadGroups(AttentionForm):
    """of: parts of the heads and their forms, "1*dense&3*sinks_window(sinks=4;window=512)": a quarter and the rest.

    What reads a form's spelling is set by `attnc.forms`, which knows all of them.
    """

    name: ClassVar[str] = "head_groups"
    approximates: ClassVar[bool] = True
    read: ClassVar[Callable[[str], Form]]
    of: str = knob(
        "1*dense", role="semantic", unit="parts of the heads, each with a form", pattern=f"{ENTRY}(&{ENTRY}){{0,127}}"
    )

    def __post_init__(self) -> None:
        for part, form in self.parts:
            if not isinstance(form, AttentionForm) or isinstance(form, HeadGroups | Listed) or _is_supplied(form):
                raise UsageError(
                    f"knob of={self.of!r:.200} of form head_groups: found {form.name} for {part} parts, allowed are "
                    "forms of attention for all heads of a run. Use dense there."
                )

    @property
    def parts(self) -> list[tuple[int, Form]]:
        """How many parts of the heads each form serves."""
        found = []
        for entry in self.of.split("&"):
            count, _, text = entry.partition("*")
            name, _, knobs = text.partition("(")
            found.append((int(count), type(self).read(f"{name}{{{knobs.rstrip(')').replace(';', ',')}}}")))
        return found

    def runs(self, heads: int) -> Iterator[Run]:
        """The runs of so many key heads, which the parts divide."""
        parts = self.parts
        each, first = heads // sum(part for part, _ in parts), 0
        for part, form in parts:
            assert isinstance(form, AttentionForm)
            yield Run(form, first, part * each)
            first += part * each

    def refuse(self, region: AttentionRegion) -> str | None:
        if region.kind != self.kind:
            return f"head_groups computes attention, found a region of kind {region.kind}; leave it as written."
        total, heads = sum(part for part, _ in self.parts), region.shape.H
        if heads % total:
            return f"head_groups divides key heads into {total} parts, found {heads} key heads; use a divisor."
        if region.weights or region.value_in_key:
            return "head_groups takes heads apart, found keys or weights that all of them share; use another form."
        return next((why for run, own in self._regions(region) if (why := run.form.refuse(own)) is not None), None)

    def _regions(self, region: AttentionRegion) -> Iterator[tuple[Run, AttentionRegion]]:
        s = region.shape
        for run in self.runs(s.H):
            shape = replace(s, Hq=run.heads * s.group, H=run.heads)
            yield run, replace(region, shape=shape, rule=shifted(region.rule, run.first * s.group), choice=None)

    def is_exact(self, region: AttentionRegion) -> bool:
        return self.refuse(region) is None and all(run.form.is_exact(own) for run, own in self._regions(region))

    def untargeted(self, device: Device) -> str | None:
        return next((why for _, form in self.parts if (why := form.untargeted(device)) is not None), None)

    def misfit(self, region: AttentionRegion, device: Device) -> str | None:
        found = (run.form.misfit(own, device) for run, own in self._regions(region))
        return next((why for why in found if why is not None), None)

    def launches(self, region: AttentionRegion) -> bool:
        return any(run.form.launches(own) for run, own in self._regions(region))

    def cost(self, region: AttentionRegion, device: Device) -> Cost:
        s, item = region.shape, ITEM_BYTES.get(region.dtype, 4)
        joined = Cost((Work("memory", bytes=2.0 * s.B * s.Hq * s.L * s.Ev * item, launches=2),))
        return sum((run.form.cost(own, device) for run, own in self._regions(region)), joined)

    def gpu_seconds(self, region: AttentionRegion, gpu: Gpu) -> float:
        return sum(run.form.gpu_seconds(own, gpu) for run, own in self._regions(region))

    def space(self, region: AttentionRegion, device: Device) -> tuple[Form, ...]:
        return () if self.refuse(region) or self.misfit(region, device) else (self,)

    def cpu(self, given: Operands) -> tuple[Tensor, Tensor]:
        return _joined(run.form.cpu(own) for run, own in self._taken(given))

    def gpu(self, given: Operands) -> tuple[Tensor, Tensor]:
        return _joined(run.form.gpu(own) for run, own in self._taken(given))

    def _taken(self, given: Operands) -> Iterator[tuple[Run, Operands]]:
        """The operands of each run."""
        group = given.group
        for run in self.runs(given.key.shape[1]):
            query = given.query.narrow(1, run.first * group, run.heads * group)
            key, value = (t.narrow(1, run.first, run.heads) for t in (given.key, given.value))
            rule = shifted(given.rule, run.first * group)
            yield run, given._replace(query=query, key=key, value=value, rule=rule)


def _is_supplied(form: AttentionForm) -> bool:
    """Whether a form takes tensors of its own."""
    try:
        return bool(form.tensors(1, {}))
    except KeyError:  # one that the user supplies
        return True


def _joined(parts: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    out, lse = zip(*parts, strict=True)
    return torch.cat(out, 1), torch.cat(lse, 1)


def shifted(rule: AttentionRule, by: int) -> AttentionRule:
    """The rule of heads that are counted from `by` on."""
    if not by:
        return rule
    place = add(H, const(by))

    def moved(e: Expr) -> Expr:
        return rebuild(e, lambda x: place if x == H else None)

    sink, row, gain = (None if e is None else moved(e) for e in (rule.sink, rule.row, rule.gain))
    return replace(rule, score=moved(rule.score), keep=moved(rule.keep), sink=sink, row=row, gain=gain)

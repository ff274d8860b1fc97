"""Runs of a model in which approximations stand for regions: as written, with every region exact, with what is taken.

Source: DESIGN.md, sections 1 and 7 (errors measured on the user's data, region by region and end to end).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from attnc.batches import Batch, copied
from attnc.errors import UsageError
from attnc.graphs import Named
from attnc.observe import name_of, observed
from attnc.options import Options
from attnc.passes.choose import GAIN, approximations
from attnc.probes import CHUNK, Session, Unit, relative
from attnc.region import AttentionRegion


class Output(NamedTuple):
    """What a run gave: its floating-point tensors, and the logits among them, (..., classes)."""

    tensors: list[torch.Tensor]
    logits: torch.Tensor | None

    def off(self, exact: Output) -> float:
        """The error against `exact`, of the worst tensor."""
        return relative(self.tensors, exact.tensors)

    def divergence(self, exact: Output) -> float | None:
        """KL(exact || this) of the softmax of the logits in nats, the mean over rows; None where there are none."""
        if self.logits is None or exact.logits is None or self.logits.shape != exact.logits.shape:
            return None
        p, q = (t.detach().flatten(0, -2) for t in (exact.logits, self.logits))
        rows, total = max(1, CHUNK // p.shape[-1]), 0.0
        for a, b in zip(p.split(rows), q.split(rows), strict=True):
            a, b = a.double().log_softmax(-1), b.double().log_softmax(-1)
            total += float(torch.where(a > -torch.inf, a.exp() * (a - b), 0.0).sum())
        found = max(0.0, total / p.shape[0])
        return found if math.isfinite(found) else None


@dataclass
class Measuring:
    """Runs of a model under a session. asked: what they are for, a verb and the model's name."""

    session: Session
    run: Callable[..., Any]
    asked: str

    @property
    def units(self) -> list[Unit]:
        """Each unit once."""
        return list({id(unit): unit for unit in self.session.units.values()}.values())

    def judged(self, batch: Batch, number: int) -> Output:
        """A run with every region exact, in which probes judge all settings; counted in the units."""
        for unit in self.units:
            unit.taken = None
            unit.seen.clear()
        self.session.judging = number
        try:
            found = self._called(batch, number)
        finally:
            self.session.judging = None
        for unit in self.units:
            unit.settle()
        return found

    def written(self, batch: Batch, number: int) -> Output:
        """A run of the model as it is written."""
        self.session.written = True
        try:
            return self._called(batch, number)
        finally:
            self.session.written = False

    def taken(self, batch: Batch, number: int) -> Output:
        """A run with what the units have taken."""
        return self._called(batch, number)

    def _called(self, batch: Batch, number: int) -> Output:
        args, kwargs = copied(batch)
        out = self.run(args, kwargs, f"{self.asked} on batch {number} of data")
        tensors = [x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        if not tensors:
            raise UsageError(
                f"{self.asked} with approximations: found {type(out).__name__} without floating-point tensors as its "
                "output, so no error of it can be measured. Take the part of the model that returns tensors."
            )
        named = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
        logits = named if isinstance(named, torch.Tensor) and named.is_floating_point() else tensors[0]
        return Output(tensors, logits if logits.dim() > 1 and logits.numel() else None)


@contextlib.contextmanager
def measuring(
    model: Callable[..., Any], named: Sequence[Named], units: Mapping[str, Unit], options: Options, verb: str
) -> Iterator[Measuring]:
    """Runs of `model` with probes for `units`, which are by the names of its regions."""
    by_identity: dict[str, Unit] = {}
    for name, identity, region in named:
        if name in units:  # the key tells apart what two frames have at one place
            by_identity[f"{identity} {region.key}"] = by_identity[identity] = units[name]
    session = Session(by_identity, replace(options, allow=(), plan=None))
    with contextlib.closing(session), observed(model, session.read) as run:
        yield Measuring(session, run, f"{verb} {name_of(model)}")


def units_of(named: Sequence[Named], options: Options, *, paying: bool) -> dict[str, Unit]:
    """A unit for each name, with the settings of `options.allow` that apply to all its regions, fastest first.

    paying: only settings that are predicted to pay.
    """
    units: dict[str, Unit] = {}
    for name, _, region in named:
        choice = region.choice
        exact = None if choice is None else choice.predicted_s or choice.written_s
        if not isinstance(region, AttentionRegion) or choice is None or exact is None:
            continue  # nothing may replace it, or the options force what does
        offers, refused = approximations(region, options)
        settings = {form: seconds for seconds, form in offers if math.isfinite(seconds)}
        for seconds, form in offers if paying else ():
            if seconds > GAIN * exact:
                settings.pop(form, None)
                against = f"{seconds * 1e3:.3g} ms against {exact * 1e3:.3g} ms {choice.name}"
                refused[form.spell()] = f"not predicted to pay ({against})"
        unit = units.setdefault(name, Unit(settings, refused, region.key, exact))
        unit.settings = {form: seconds for form, seconds in unit.settings.items() if form in settings}
        unit.refused |= refused
        unit.count += 1
    return units


def check_measurable(model: Any, options: Options, verb: str) -> None:
    """Raises: UsageError where a model cannot be run to measure errors, or the options force a form."""
    asked = f"{verb} with {', '.join(options.allow)}"
    if isinstance(model, torch.export.ExportedProgram):
        raise UsageError(
            f"{asked}: found a torch.export.ExportedProgram, which is read without running, allowed is a model to "
            "measure errors of. Pass the module that was exported."
        )
    if options.force is not None:
        raise UsageError(
            f"{asked}: found force={options.force!r}, allowed is none: the settings are searched. Leave force out."
        )

"""Approximations inside an error budget: their settings measured on the user's data, by region and end to end.

The model runs on each batch through `attnc.observe`, as `explain` runs it, with a probe of `attnc.probes` for each
region that an approximation may replace. The first pass over the data measures every setting; each region then takes
the one of least predicted time within the budget. Further passes run the model with all of these together: its output
is to be within the same budget of the output as written, in every tensor of it; until that holds, the region that is
furthest off takes its next setting of less error, at last the exact form.

Source: DESIGN.md, sections 1 and 7 (semantic knobs move only inside the error budget, verified end to end).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from attnc.errors import UsageError, did_you_mean
from attnc.forms import Form
from attnc.observe import name_of, observed
from attnc.options import Options
from attnc.passes.choose import GAIN, approximations, target_device
from attnc.probes import Session, Unit, relative
from attnc.region import AttentionRegion, Choice, Region

Batch = tuple[tuple[Any, ...], dict[str, Any]]
ALLOWED = "a tensor, a tuple of arguments, or a dict of keyword arguments"


# What is asked.


def checked_limit(max_error: object) -> float:
    """The budget. Raises: UsageError where it is no number in (0, 1]."""
    if isinstance(max_error, bool) or not isinstance(max_error, int | float) or not 0 < max_error <= 1:
        raise UsageError(
            f"autotune max_error={max_error!r:.80}: found {type(max_error).__name__}, allowed is a number above 0 and "
            "at most 1: the norm of the error over that of the output. Use max_error=0.02."
        )
    return float(max_error)


def batches_of(data: object) -> list[Batch]:
    """The inputs that `data` holds, as arguments and keywords. Raises: UsageError where it holds none or others."""
    if isinstance(data, torch.Tensor | Mapping | str | bytes) or not isinstance(data, Iterable):
        raise UsageError(
            f"autotune data: found {type(data).__name__}, allowed is an iterable of inputs, each {ALLOWED}. "
            "Use data=[x] for one input."
        )
    found = [_batch(number, item) for number, item in enumerate(data)]
    if not found:
        raise UsageError(
            "autotune data: found no inputs in it, at least one is needed. A generator that was read before is empty: "
            "make it anew, or leave data out for the inputs themselves."
        )
    return found


def _batch(number: int, item: object) -> Batch:
    if isinstance(item, torch.Tensor):
        return (item,), {}
    if isinstance(item, tuple | list):
        return tuple(item), {}
    if isinstance(item, Mapping) and all(isinstance(name, str) for name in item):
        return (), dict(item)
    raise UsageError(f"autotune data: found {type(item).__name__} as input {number}, allowed is {ALLOWED}. Convert it.")


# What is measured.


def within(
    model: Callable[..., Any],
    named: Sequence[tuple[str, str, Region]],
    batches: Sequence[Batch],
    options: Options,
    limit: float,
) -> list[Choice | None]:
    """The choices of regions, approximations among them where `options.allow` names them and `limit` holds.

    named: (name in the plan, identity of the region in every run of the model, region with its exact choice).
    Raises: UsageError for a batch that the model does not run on, an output without floating-point tensors, or weights
    that are supplied for a region that is not there.
    """
    _check_places([region for _, _, region in named], options)
    units: dict[str, Unit] = {}
    for name, _, region in named:
        _enter(units, name, region, options)
    by_identity: dict[str, Unit] = {}
    for name, identity, region in named:
        if name in units:  # the key tells apart what two frames have at one place
            by_identity[f"{identity} {region.key}"] = by_identity[identity] = units[name]
    off = None
    if any(unit.settings for unit in units.values()):
        session = Session(by_identity, replace(options, allow=(), plan=None))
        with contextlib.closing(session), observed(model, session.read) as run:
            off = _settle(Measuring(session, run, batches, name_of(model)), limit)
    return [_choice(units.get(name), region, options, limit, off) for name, _, region in named]


def _check_places(regions: Sequence[Region], options: Options) -> None:
    """Raises: UsageError where the options supply weights for what is no region."""
    there = [region for region in regions if isinstance(region, AttentionRegion)]
    known = {name for region in there for name in (region.path, region.key) if name} if options.weights else set()
    for place in options.weights:
        if place not in known:
            paths = list(dict.fromkeys(region.path or region.key for region in there))
            raise UsageError(
                f"option weights[{place!r}]: found no attention of this path or key; the model has "
                f"{', '.join(paths[:8]) or 'none'}." + (did_you_mean(place, paths) or " See attnc.explain.")
            )


def _enter(units: dict[str, Unit], name: str, region: Region, options: Options) -> None:
    """Add the region's settings to the unit of its name: those that pay for each of its regions."""
    choice = region.choice
    if not isinstance(region, AttentionRegion) or choice is None or (choice.predicted_s or choice.written_s) is None:
        return  # nothing may replace it, or the options force what does
    offers, refused = approximations(region, options)
    exact = choice.predicted_s or choice.written_s or math.inf
    settings = {form: seconds for seconds, form in offers if seconds <= GAIN * exact}
    for seconds, form in offers:
        if form not in settings:
            against = f"{seconds * 1e3:.3g} ms against {exact * 1e3:.3g} ms {choice.name}"
            refused[form.spell()] = f"not predicted to pay ({against})"
    unit = units.setdefault(name, Unit(settings, refused))
    unit.settings = {form: seconds for form, seconds in unit.settings.items() if form in settings}
    unit.refused |= refused


@dataclass
class Measuring:
    """Runs of a model under a session, on batches in an order that tries those first that failed before."""

    session: Session
    run: Callable[..., Any]
    batches: Sequence[Batch]
    name: str

    def __post_init__(self) -> None:
        self.order = list(range(len(self.batches)))

    def judge(self) -> None:
        """One pass over the data in which probes measure."""
        for number in self.order:
            self.session.judging = number
            self._call(number)
        self.session.judging = None

    def end_to_end(self, limit: float) -> float:
        """The worst error of the output with what is taken; ends with the first batch that is beyond `limit`."""
        worst = 0.0
        for number in list(self.order):
            self.session.written = True
            exact = self._call(number)
            self.session.written = False
            worst = max(worst, relative(self._call(number), exact))
            if worst > limit:
                self.order.remove(number)
                self.order.insert(0, number)
                break
        return worst

    def _call(self, number: int) -> list[torch.Tensor]:
        args, kwargs = _copied(self.batches[number])
        out = self.run(args, kwargs, f"autotune {self.name} on batch {number} of data")
        tensors = [x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        if not tensors:
            raise UsageError(
                f"autotune {self.name} with allow: found {type(out).__name__} without floating-point tensors as its "
                "output, so no error of it can be measured. Tune the part of the model that returns tensors."
            )
        return tensors


def _copied(batch: Batch) -> Batch:
    """A batch of its own: caches among the inputs are filled, and tensors may be changed in place."""
    leaves = [x for x in pytree.tree_leaves(batch) if isinstance(x, torch.Tensor)]
    known = {id(x): x.detach().clone().requires_grad_(x.requires_grad) for x in leaves}
    return copy.deepcopy(batch, known)


def _settle(measuring: Measuring, limit: float) -> float | None:
    """Take the fastest settings that hold in each region, then together; returns the error of the output."""
    units = list({id(unit): unit for unit in measuring.session.units.values()}.values())
    measuring.judge()
    for unit in units:
        unit.taken = unit.exacter(limit)
    while taken := [unit for unit in units if unit.taken is not None]:
        off = measuring.end_to_end(limit)
        if off <= limit:
            return off
        furthest = max(taken, key=lambda unit: unit.errors[unit.taken])  # type: ignore[index]
        form = furthest.taken
        assert form is not None
        furthest.taken = furthest.exacter(limit)
        furthest.failed[form] = (
            f"{furthest.measured(form)} is within {limit:g}, but with it the model's output is off by {off:.2g}, "
            f"allowed is {limit:g}"
        )
    return None


# What is chosen.


def _choice(unit: Unit | None, region: Region, options: Options, limit: float, off: float | None) -> Choice | None:
    """The region's choice with what its unit has found."""
    choice = region.choice
    if choice is None or unit is None:
        return choice
    refused = {**choice.refused, **unit.refused}
    for form in unit.settings:
        if form != unit.taken and (why := _beyond(unit, form, limit)) is not None:
            refused[form.spell()] = why
    fit = {f.spell(): s for f, s in unit.settings.items() if f in unit.errors and f.spell() not in refused}
    offers = dict(sorted({**choice.offers, **fit}.items(), key=lambda offer: offer[1]))
    if unit.taken is None:
        reason = "; ".join([choice.reason, *_nearest(unit, limit)])
        return replace(choice, reason=reason, refused=refused, offers=offers)
    form, seconds = unit.taken, unit.settings[unit.taken]
    faster = "" if choice.written_s is None else f"predicted {choice.written_s / seconds:.1f}x faster than as written; "
    reason = (
        f"{faster}{form.name} is an approximation by name, {unit.measured(form)}, allowed is {limit:g}; the model's "
        f"output is off by {off or 0.0:.2g}"
    )
    found = form.estimate(region, target_device(options.device, region.device))
    return replace(
        choice,
        form=form.spell(),
        reason=reason,
        predicted_s=seconds,
        refused=refused,
        offers=offers,
        error=unit.errors[form],
        low_s=found.low,
        high_s=found.high,
    )


def _beyond(unit: Unit, form: Form, limit: float) -> str | None:
    """Why a setting that pays may not be taken; None where it may."""
    if form in unit.failed:
        return unit.failed[form]
    if form not in unit.errors:
        return "no batch of the data reached the region, so its error is not known"
    if unit.errors[form] > limit:
        return f"{unit.measured(form)}, allowed is {limit:g}"
    return None


def _nearest(unit: Unit, limit: float) -> list[str]:
    """For a region that stays exact: its most exact setting that pays, and why it is not taken."""
    if not unit.settings:
        return [f"{name}: {why}".rstrip(".") for name, why in list(unit.refused.items())[:1]]
    form = min(unit.settings, key=lambda f: unit.errors.get(f, math.inf))
    return [f"{form.spell()}: {_beyond(unit, form, limit)}".rstrip(".")]

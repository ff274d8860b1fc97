"""Approximations inside an error budget: searched on a calibration, chosen and verified by the model's own output.

Each setting is measured in each region on the batches that calibrate (`attnc.tuning.calibrate`, or a file of it). The
estimated error of the model's output with one setting in one region is that of a run with it alone, else the region's
error times what the output was off by for such errors elsewhere. Regions of one key share their candidates, and each is
placed by itself (`attnc.tuning.front`); what is tried runs end to end on the same batches. The fastest assignment whose
output stays within the budget there is run on the batches held out, the last third, and taken if it is within the
budget on each of them; else the next one is, at last the exact one. A single batch serves for both.

Source: DESIGN.md, sections 1 and 7 (semantic knobs move only inside the error budget, verified end to end).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from attnc.batches import Batch, digest_of
from attnc.calibration import Calibration
from attnc.errors import UsageError, did_you_mean
from attnc.forms import Form
from attnc.graphs import Named
from attnc.measuring import Measuring, Output, measuring, units_of
from attnc.observe import name_of
from attnc.options import Options
from attnc.passes.choose import pays_from, target_device
from attnc.plan import Point, Verified
from attnc.probes import Unit
from attnc.region import AttentionRegion, Choice, Region
from attnc.tuning.calibrate import attach, begun, count
from attnc.tuning.front import REACH, FrontSearch, Tried
from attnc.tuning.placement import Assignment, undominated

PAIRS = 24  # runs per batch with one region replaced, where no calibration is given
KEPT_BYTES = 1 << 28  # of exact outputs, kept for the next assignment


# What is asked.


def checked_limit(max_error: object) -> float:
    """The budget. Raises: UsageError where it is no number in (0, 1]."""
    if isinstance(max_error, bool) or not isinstance(max_error, int | float) or not 0 < max_error <= 1:
        raise UsageError(
            f"autotune max_error={max_error!r:.80}: found {type(max_error).__name__}, allowed is a number above 0 and "
            "at most 1: the norm of the error over that of the output. Use max_error=0.02."
        )
    return float(max_error)


def held_out(count: int) -> range:
    """The numbers of the batches that verify: the last third, at least one."""
    return range(count - max(1, count // 3), count)


# What is found.


@dataclass
class Budgeted:
    """What a search within a budget found; choices in the order of the regions."""

    choices: list[Choice | None]
    front: tuple[Point, ...] = ()
    verified: Verified | None = None


def within(
    model: Callable[..., Any],
    named: Sequence[Named],
    batches: Sequence[Batch],
    options: Options,
    limit: float,
    calibration: Calibration | None = None,
    seed: int = 0,
) -> Budgeted:
    """The choices of regions, approximations among them where `options.allow` names them and `limit` holds.

    named: the regions, each with its exact choice. calibration: errors that are known; None: those of `batches`.
    seed: of the search.
    Raises: UsageError for a batch that the model does not run on, an output without floating-point tensors, weights
    that are supplied for a region that is not there, or a calibration of another model.
    """
    _check_places([region for _, _, region in named], options)
    units = units_of(named, options, paying=True)
    search = None
    if any(unit.settings for unit in units.values()):
        if calibration is not None:
            _check_same(calibration, named, units)
        with measuring(model, named, units, options, "autotune") as runs:
            search = Budget(runs, named, units, batches, limit, seed)
            search.calibrate(calibration or begun(name_of(model), named, options, PAIRS, units), calibration is None)
            search.settle()
    choices = [_choice(units.get(name), region, options, search) for name, _, region in named]
    return Budgeted(choices, search.points, search.verified) if search is not None else Budgeted(choices)


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


def _check_same(calibration: Calibration, named: Sequence[Named], units: Mapping[str, Unit]) -> None:
    """Raises: UsageError where a calibration holds none of the regions."""
    here = {(name, identity) for name, identity, _ in named if name in units}
    there = {(name, region.identity) for name, region in calibration.regions.items()}
    if not here & there:
        raise UsageError(
            f"autotune calibration of {calibration.model}: found the regions "
            f"{', '.join(repr(name) for name, _ in sorted(there)[:6]) or 'none'}, allowed are those of this model, "
            f"{', '.join(repr(name) for name, _ in sorted(here)[:6])}, of the same widths and type. Calibrate it."
        )


@dataclass
class Budget:
    """A search for the fastest choices within `limit`. named: with the regions' exact choices."""

    runs: Measuring
    named: Sequence[Named]
    units: Mapping[str, Unit]
    batches: Sequence[Batch]
    limit: float
    seed: int = 0
    verified: Verified | None = None
    taken: Tried | None = None
    rejected: dict[Assignment, float] = field(default_factory=dict)  # by batches held out: the error there

    def __post_init__(self) -> None:
        self.held = held_out(len(self.batches))
        self.used = range(self.held.start) or self.held  # a single batch calibrates and verifies
        self.exact: dict[int, Output] = {}

    def calibrate(self, calibration: Calibration, anew: bool) -> None:
        """Measure all settings on the batches that are not held out, or take them from a calibration."""
        attach(calibration, self.units)
        for number in self.used if anew else ():
            count(calibration, self.runs, self.units, self.batches[number], number)
        counted = set(calibration.digests)
        self.fresh = all(digest_of(self.batches[number]) not in counted for number in self.held)
        self.calibrated = calibration.batches
        self.gains = self._gains()
        self.options = self._options()
        menus = [
            [(unit.exact_s * unit.count, 0.0)]
            + [(unit.settings[form] * unit.count, self.estimate(unit, form)) for form in self.options[name]]
            for name, unit in self.units.items()
        ]
        forms = dict.fromkeys(form for found in self.options.values() for form in found)
        uniform = [
            tuple(found.index(form) + 1 if form in found else 0 for found in self.options.values()) for form in forms
        ]
        self.search = FrontSearch(
            menus, lambda chosen: self.errors(chosen, self.used), self._constant(), uniform, self.seed
        )

    def settle(self) -> None:
        """Search, then take what verifies."""
        self.verified = self.taken = None
        for found in self.search.search(self.limit):
            if found.chosen == self.search.exact:
                break
            errors = self.errors(found.chosen, self.held)
            if max(errors) <= self.limit:
                self.taken = found
                self.verified = Verified(self.limit, max(errors), tuple(self.held), self.fresh, self.calibrated)
                break
            self.rejected[found.chosen] = max(errors)
        self._take(self.taken.chosen if self.taken is not None else self.search.exact)

    def errors(self, chosen: Assignment, numbers: Sequence[int]) -> list[float]:
        """Errors of the model's output with an assignment, one for each batch."""
        found = []
        for number in numbers:
            exact = self.exact.get(number)
            if exact is None:
                exact = self.runs.written(self.batches[number], number)
                size = sum(t.nbytes for kept in (*self.exact.values(), exact) for t in kept.tensors)
                if size <= KEPT_BYTES:
                    self.exact[number] = exact
            self._take(chosen)
            found.append(self.runs.taken(self.batches[number], number).off(exact))
        return found

    @property
    def points(self) -> tuple[Point, ...]:
        """The front that was found."""
        found = self.search.front() if self.search.tried else []
        return tuple(Point(t.seconds, t.error, self._spelled(t.chosen)) for t in found if math.isfinite(t.error))

    def _spelled(self, chosen: Assignment) -> dict[str, str]:
        forms = zip(self.units, chosen, strict=True)
        return {name: self.options[name][at - 1].spell() for name, at in forms if at}

    def _take(self, chosen: Assignment) -> None:
        for (name, unit), at in zip(self.units.items(), chosen, strict=True):
            unit.taken = self.options[name][at - 1] if at else None

    def _constant(self) -> float:
        """Predicted seconds of attentions that nothing may replace."""
        kept = [r.choice for name, _, r in self.named if isinstance(r, AttentionRegion) and name not in self.units]
        return math.fsum(c.predicted_s or c.written_s or 0.0 for c in kept if c is not None)

    # What the search chooses from.

    def known(self, unit: Unit) -> list[Form]:
        """Settings of a unit whose error is known, and that may be taken."""
        return [f for f in unit.settings if f not in unit.failed and unit.measured[f].batches]

    def estimate(self, unit: Unit, form: Form) -> float:
        """The error of the model's output with one setting in one region."""
        found = unit.measured[form]
        return found.output if found.runs else found.error * self.gains[id(unit)]

    def _gains(self) -> dict[int, float]:
        """By unit, what the model's output is off by for an error of the region; else that of all units, else 1."""
        ratios = {
            id(unit): [
                m.output / m.error for m in map(unit.measured.__getitem__, self.known(unit)) if m.runs and m.error > 0
            ]
            for unit in self.units.values()
        }
        every = [ratio for found in ratios.values() for ratio in found]
        usual = statistics.median(every) if every else 1.0
        return {unit: statistics.median(found) if found else usual for unit, found in ratios.items()}

    def _options(self) -> dict[str, list[Form]]:
        """By unit the settings to choose from: in time and error undominated in some unit of the same key."""
        worth: dict[str, dict[Form, None]] = {}
        for unit in self.units.values():
            forms = [f for f in self.known(unit) if self.estimate(unit, f) <= REACH * self.limit]
            best = undominated([(unit.settings[f], self.estimate(unit, f)) for f in forms])
            worth.setdefault(unit.key, {}).update(dict.fromkeys(forms[at] for at in best))
        return {name: [f for f in worth[unit.key] if f in self.known(unit)] for name, unit in self.units.items()}

    # What is told.

    def beyond(self, name: str, form: Form) -> str | None:
        """Why a setting that pays may not be taken; None where it may."""
        unit = self.units[name]
        if form in unit.failed:
            return unit.failed[form]
        if not unit.measured[form].batches:
            return "no batch of the data reached the region, so its error is not known"
        off = self.estimate(unit, form)
        how = "is" if unit.measured[form].runs else "is estimated to be"
        if form in self.options[name]:
            place = list(self.units).index(name)
            at = self.options[name].index(form) + 1
            run = [t for t in self.search.tried.values() if t.chosen[place] == at]
            least = min((max(t.bound, self.rejected.get(t.chosen, 0.0)) for t in run), default=off)
            off, how = least if run else off, "is" if run else how
        if off <= self.limit:
            return None
        return f"{unit.says(form)}, but with it the model's output {how} off by {off:.2g}, allowed is {self.limit:g}"


# What is chosen.


def _choice(unit: Unit | None, region: Region, options: Options, search: Budget | None) -> Choice | None:
    """The region's choice with what its unit has found."""
    choice = region.choice
    if choice is None or unit is None:
        return choice
    name = "" if search is None else next(n for n, u in search.units.items() if u is unit)
    beyond = {} if search is None else {f: search.beyond(name, f) for f in unit.settings if f != unit.taken}
    refused = {**choice.refused, **unit.refused, **{f.spell(): why for f, why in beyond.items() if why}}
    fit = {f.spell(): s for f, s in unit.settings.items() if f.spell() not in refused}
    offers = dict(sorted({**choice.offers, **fit}.items(), key=lambda offer: offer[1]))
    if unit.taken is None or search is None or search.verified is None:
        reason = "; ".join([choice.reason, *_nearest(unit, beyond)])
        return replace(choice, reason=reason, refused=refused, offers=offers)
    assert isinstance(region, AttentionRegion)
    form, seconds, found = unit.taken, unit.settings[unit.taken], unit.measured[unit.taken]
    faster = "" if choice.written_s is None else f"predicted {choice.written_s / seconds:.1f}x faster than as written; "
    reason = f"{faster}{form.name} is an approximation by name, {unit.says(form)}; {told(search.verified)}"
    bare, device = replace(region, path="", node="", choice=None), target_device(options.device, region.device)
    interval = form.estimate(bare, device)
    return replace(
        choice,
        form=form.spell(),
        reason=reason,
        predicted_s=seconds,
        refused=refused,
        offers=offers,
        error=found.error,
        low_s=interval.low,
        high_s=interval.high,
        row_error=found.row,
        mass=found.mass,
        kept=found.kept,
        pays_from=pays_from(form, bare, device),
    )


def told(verified: Verified) -> str:
    """What was verified, in words."""
    numbers = ", ".join(map(str, verified.batches[:8])) + (", ..." if len(verified.batches) > 8 else "")
    which = f"batch{'es' if len(verified.batches) != 1 else ''} {numbers}"
    seen = "held out" if verified.fresh else "which the calibration has counted too"
    return (
        f"the model's output is off by {verified.error:.2g} on {which}, {seen}, allowed is {verified.max_error:g}, "
        f"a margin of {verified.margin:.2g}"
    )


def _nearest(unit: Unit, beyond: Mapping[Form, str | None]) -> list[str]:
    """For a region that stays exact: its most exact setting that pays, and why it is not taken."""
    if not unit.settings:
        return [f"{name}: {why}".rstrip(".") for name, why in list(unit.refused.items())[:1]]
    measured = [f for f in unit.settings if f in unit.measured and unit.measured[f].batches]
    form = min(measured or unit.settings, key=lambda f: unit.measured[f].error if measured else 0.0)
    why = beyond.get(form) or f"{unit.says(form)}; the budget is used where it saves more"
    return [f"{form.spell()}: {why}".rstrip(".")]

"""Calibration: a user's batches go by once, and every candidate setting is measured in every region on each of them.

One run per batch judges all settings where they stand, on the inputs that the exact model gives each region; a bounded
number of further runs replaces one region alone, round robin over (region, setting) pairs, so that each pair is seen as
data goes on. Of a batch stay its digest and what it adds to sums and worst cases.

Source: DESIGN.md, sections 1 and 7 (an error budget measured on the user's data).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from attnc.batches import Batch, digest_of, stream_of
from attnc.calibration import Calibration, Measured, RegionErrors, resumed
from attnc.errors import UsageError
from attnc.graphs import Named, graphs_of, named_regions
from attnc.measuring import Measuring, check_measurable, measuring, units_of
from attnc.observe import as_written, name_of
from attnc.options import Options
from attnc.passes.choose import checked_forms, target_device
from attnc.probes import Unit
from attnc.region import Region

PAIRS = 8  # runs of the model per batch with one region replaced


def calibrate(
    model: Any,
    data: Iterable[Any],
    *,
    forms: Iterable[str],
    device: str | None = None,
    file: str | os.PathLike[str] | None = None,
    batches: int | None = None,
    pairs: int = PAIRS,
    options: Options | Mapping[str, object] | None = None,
    on_progress: Callable[[Calibration], None] | None = None,
) -> Calibration:
    """Measure approximations on `data`, region by region, for `autotune(calibration=...)` to choose from.

    model:   an nn.Module or a function, run without gradients on each batch.
    data:    inputs of the model, each a tensor, a tuple of arguments or a dict of keywords; a generator is read once,
             and no more than one batch is held.
    forms:   approximations by name, all their settings, or with knobs, "block_mixture{block=512,top_k=4}".
    device:  as "h100", what settings fit and their predicted seconds are for; None: the one the model is on.
    file:    where the calibration is kept, written after each batch. One that is there goes on: batches that it has
             counted are drawn from `data` and skipped.
    batches: how many to count at most, with those of the file; leave some for `autotune` to verify on.
    pairs:   runs of the model per batch with one setting in one region, for the error of its output.
    on_progress: called after each batch.

    Raises: UsageError for forms, data or a model that cannot be measured, and for a file that was begun otherwise;
    ArtifactError for a file that holds no calibration.
    """
    chosen = _checked(options, forms, device, batches, pairs)
    check_measurable(model, chosen, "calibrate")
    written, stream = as_written(model, "calibrate"), stream_of(data, "calibrate")
    before = None if file is None or not Path(file).exists() else Calibration.load(file)
    batch: Batch | None = next(stream)
    assert batch is not None
    with torch.no_grad():
        graphs = graphs_of(written, *batch, replace(chosen, allow=()), "calibrate")
        named = named_regions([(place, report.regions) for place, report in graphs])
        units = units_of(named, chosen, paying=False)
        asked = begun(name_of(written), named, chosen, pairs, units)
        _check_some(asked, [region for _, _, region in named], chosen)
        found = asked if before is None else resumed(before, asked, str(file))
        attach(found, units)
        with measuring(written, named, units, chosen, "calibrate") as runs:
            number = 0
            while batch is not None and (batches is None or number < batches):
                count(found, runs, units, batch, number)
                if file is not None:
                    found.save(file)
                if on_progress is not None:
                    on_progress(found)
                number, batch = number + 1, None  # the next one is made without this one in memory
                batch = next(stream, None)
    return found


def _checked(
    options: Options | Mapping[str, object] | None,
    forms: Iterable[str],
    device: str | None,
    batches: object,
    pairs: int,
) -> Options:
    """The options with the forms allowed. Raises: UsageError."""
    chosen = options if isinstance(options, Options) else Options.from_torch(options)
    given = Options(allow=forms).allow  # type: ignore[arg-type]  # checked there
    if not given:
        raise UsageError("calibrate forms: found none, at least one is needed. Use forms=['block_mixture'].")
    chosen = replace(chosen, allow=tuple(dict.fromkeys(given)), device=chosen.device if device is None else device)
    checked_forms(chosen)
    for what, value, low in (("batches", batches, 1), ("pairs", pairs, 0)):
        if value is not None and (type(value) is not int or not low <= value < 1 << 31):
            raise UsageError(
                f"calibrate {what}={value!r:.80}: allowed is a whole number from {low} to 2^31. Leave {what} out."
            )
    return chosen


def _check_some(asked: Calibration, regions: list[Region], options: Options) -> None:
    if any(region.settings for region in asked.regions.values()):
        return
    why = [why for region in asked.regions.values() for why in region.refused.values()]
    why += [region.choice.reason for region in regions if region.choice is not None]
    raise UsageError(
        f"calibrate {asked.model}: found no region that one of {', '.join(options.allow)} applies to"
        f"{': ' + why[0].rstrip('.') if why else ''}. See attnc.explain, and name other forms."
    )


def begun(model: str, named: Sequence[Named], options: Options, pairs: int, units: Mapping[str, Unit]) -> Calibration:
    """A calibration that has counted nothing."""
    device = target_device(options.device, named[0].region.device if named else "cpu").name
    identities = {name: identity for name, identity, _ in named}
    regions = {
        name: RegionErrors(
            unit.key,
            identities[name],
            unit.exact_s,
            {form.spell(): Measured(seconds) for form, seconds in unit.settings.items()},
            refused={form: _one_line(why) for form, why in unit.refused.items()},
        )
        for name, unit in units.items()
    }
    return Calibration(model, device, pairs, regions)


def attach(found: Calibration, units: Mapping[str, Unit]) -> None:
    """Let units count into a calibration, settings that it does not know refused."""
    for name, unit in units.items():
        region = found.regions.get(name)
        known = {} if region is None else region.settings
        for form in [form for form in unit.settings if form.spell() not in known]:
            del unit.settings[form]
            unit.refused[form.spell()] = "the calibration has not measured it here; calibrate with this form."
        unit.measured = {form: known[form.spell()] for form in unit.settings}
        failed = {} if region is None else region.failed
        unit.failed = {form: failed[form.spell()] for form in unit.settings if form.spell() in failed}


def count(found: Calibration, runs: Measuring, units: Mapping[str, Unit], batch: Batch, number: int) -> None:
    """Count batch `number`, or skip it where it has been counted. Raises: UsageError where that was another one."""
    digest = digest_of(batch)
    if number < found.batches:
        if digest != found.digests[number]:
            raise UsageError(
                f"calibrate data: found another batch {number} than the one that the file has counted; allowed are the "
                "same batches in the same order. Give the same data, or name another file."
            )
        return
    exact = runs.judged(batch, number)
    for name, form in _turn(units, found.pairs, number):
        unit = units[name]
        if form in unit.failed:
            continue
        unit.taken = form
        out = runs.taken(batch, number)
        unit.taken = None
        off = out.off(exact)
        if math.isfinite(off):
            unit.measured[form].add_run(off, out.divergence(exact))
        else:
            unit.failed[form] = f"with it alone the model's output is off by {off:g}"
    for name, unit in units.items():
        found.regions[name].failed = {form.spell(): _one_line(why) for form, why in unit.failed.items()}
    found.digests.append(digest)


def _turn(units: Mapping[str, Unit], pairs: int, number: int) -> list[tuple[str, Any]]:
    """The (region, setting) pairs that batch `number` runs: fast settings first, regions in turn."""
    ranked = [(rank, name, form) for name, unit in units.items() for rank, form in enumerate(unit.settings)]
    order = [(name, form) for _, name, form in sorted(ranked, key=lambda pair: pair[0])]
    size = min(pairs, len(order))
    return [order[(number * pairs + at) % len(order)] for at in range(size)]


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text) or "(no reason)"

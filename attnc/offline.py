"""Looking at a model without changing how it runs: `explain`, and `autotune` for what is found.

A module or function is run once through torch.compile with a private backend that reads each graph and runs it as it
is; an exported program is read without running. Other compiled functions, their caches, the random streams and the
model's buffers are as before. A cache that is passed among the inputs is filled, as by any call of the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from attnc.batches import Batch, batches_of
from attnc.budget import checked_limit, within
from attnc.calibration import Calibration
from attnc.cost_models.device import device_named
from attnc.errors import UsageError
from attnc.graphs import graphs_of, named_regions
from attnc.measuring import check_measurable
from attnc.observe import as_written, name_of
from attnc.options import Options
from attnc.passes.choose import checked_forms, choose
from attnc.passes.choose_recurrence import choose_recurrence
from attnc.plan import Plan
from attnc.region import AttentionRegion, Region
from attnc.report import Report
from attnc.tuned import records_in
from attnc.tuning.problems import dearest, problems_in
from attnc.tuning.search import Settings
from attnc.tuning.tune import tune


def explain(
    model: Any,
    *args: Any,
    device: str | None = None,
    options: Options | Mapping[str, object] | None = None,
    **kwargs: Any,
) -> Report:
    """What attnc finds in `model` on these inputs, what it would choose, and why; nothing is rewritten.

    model:   an nn.Module or a function, compiled or not, run once on `args` and `kwargs` under the caller's grad mode,
             or a torch.export.ExportedProgram, read as it was exported (`args` and `kwargs` are not needed).
    device:  the device that choices are made for, as "h100"; it need not be present. None: the one the model is on.
    options: as for torch.compile(backend="attnc").

    Lengths are those of the inputs; a dimension marked with torch._dynamo.mark_dynamic stays symbolic. A model that
    is built under `torch.device("meta")`, and its inputs, take no memory and nothing is run: name a device then.
    Raises: UsageError if the model cannot be called like this or an option or device does not exist.
    """
    chosen = _options(options)
    if device is not None:
        chosen = replace(chosen, device=str(device))
    checked_forms(chosen)
    graphs = graphs_of(model, args, kwargs, chosen)
    merged = Report.merge(_placed(report, place) for place, report in graphs)
    on = next((region.device for region in merged.regions), "cpu")
    asked = None if chosen.device is None else device_named(chosen.device).name
    report = replace(merged, model=_name(model), device=asked or on)
    if graphs:
        return report
    nothing = (
        f"Dynamo made no graph of {_name(model)}: nothing in it runs on tensors, or compiling is switched off "
        "(TORCH_COMPILE_DISABLE, torch.compiler.disable, a stance). Switch it on, or pass the part of the model that "
        "computes."
    )
    return replace(report, problems=(nothing,))


def autotune(
    model: Any,
    *args: Any,
    device: str,
    trials: int | None = 200,
    seconds: float | None = None,
    fidelity: str | None = None,
    seed: int = 0,
    workers: int = 1,
    allow: Iterable[str] = (),
    max_error: float = 0.02,
    data: Iterable[Any] | None = None,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    options: Options | Mapping[str, object] | None = None,
    **kwargs: Any,
) -> Plan:
    """Search the kernels of `model` for `device`, keep the records, and return the plan that follows from them.

    model, args, kwargs, options: as for `explain`. device: as "h100"; it need not be here. For "cpu" the chunks of
              recurrences are searched, and the rest of the plan follows from the forms alone.
    trials, seconds: the budget of each kernel, and of all of them; what earlier runs found counts. trials=0 searches
              nothing: the plan follows from the records there are.
    fidelity: "predict" (closed form), "compile" (ahead of time) or "measure" (on the device); None: measured where the
              device is here, compiled elsewhere.
    allow:    approximations by name, with those of the options. Their settings are searched in two objectives,
              predicted time and error on `data`; the plan keeps the front, and takes of it the fastest with which the
              model's output is within `max_error`, also on the last third of `data`, which is used for nothing else.
              The compiled model takes them where its own `allow` names them too.
    max_error: the most that the model's output may be off: the norm of the error over that of the output, above 0 and
              at most 1; see `attnc.budget`.
    data:     inputs of the model, each a tensor, a tuple of arguments or a dict of keywords; they should have the
              lengths and the contents of use, and all are kept. None: `args` and `kwargs`. The model is run on them
              only where some region has an approximation to measure.
    calibration: what `calibrate` has measured, or its file; settings that it does not hold are left out. None: all that
              pay are measured on the first two thirds of `data`.
    Raises: UsageError as `explain` does, for a wrong budget, data that the model fails on and a calibration of another
    model; ArtifactError for a file that holds no calibration.
    """
    chosen = _with_allowed(replace(_options(options), device=device), allow)
    limit, batches = checked_limit(max_error), [(args, kwargs)] if data is None else batches_of(data)
    if chosen.allow:
        check_measurable(model, chosen, "autotune")
    elif data is not None or calibration is not None:
        what = "data" if data is not None else "calibration"
        raise UsageError(f"autotune {what}: found no approximation in allow to measure. Name one, or leave {what} out.")
    known = calibration if isinstance(calibration, Calibration | None) else Calibration.load(calibration)
    exact = replace(chosen, allow=())
    graphs = [(place, report.regions) for place, report in graphs_of(model, args, kwargs, exact, "autotune")]
    if trials != 0:
        problems = problems_in([region for _, regions in graphs for region in regions], [device], chosen.store)
        how, folder = fidelity or dearest([device]), Path(chosen.store) / "studies"
        asked = Settings(trials, seconds, how, seed=seed, workers=workers, folder=folder)
        if problems:
            tune(problems, asked, records=records_in(chosen.store))
    return plan_of(model, graphs, batches, chosen, limit, known, seed)


def plan_of(
    model: Any,
    graphs: Sequence[tuple[str, Sequence[Region]]],
    batches: Sequence[Batch],
    options: Options,
    limit: float,
    calibration: Calibration | None = None,
    seed: int = 0,
) -> Plan:
    """The plan that follows from the records there are, with the approximations of `options.allow` within `limit`.

    graphs: the place in the model and the regions of each graph; the plan names them by the paths the backend sees.
    """
    exact, device = replace(options, allow=()), device_named(options.device or "cpu").name
    named = named_regions([(place, [_chosen_anew(r, exact) for r in regions]) for place, regions in graphs])
    if not options.allow:
        return Plan({name: region.choice for name, _, region in named if region.choice is not None}, device)
    found = within(as_written(model), named, batches, options, limit, calibration, seed)
    made = zip(named, found.choices, strict=True)
    return Plan({n.name: choice for n, choice in made if choice is not None}, device, found.front, found.verified)


def _chosen_anew(region: Region, options: Options) -> Region:
    """`region` with the choice that follows from the records there are by now, where it has one to make."""
    if region.choice is None or not region.choice.offers:
        return region
    if isinstance(region, AttentionRegion):
        return choose(region, options)
    return choose_recurrence(region, options) if region.kind == "recurrence" else region


def _with_allowed(options: Options, allow: Iterable[str]) -> Options:
    """`options` with the names of `allow` added. Raises: UsageError for a name that is no approximation's."""
    names = (*options.allow, *Options(allow=allow).allow)  # type: ignore[arg-type]  # checked there
    chosen = replace(options, allow=tuple(dict.fromkeys(names)))
    checked_forms(chosen)
    return chosen


def _options(options: Options | Mapping[str, object] | None) -> Options:
    return options if isinstance(options, Options) else Options.from_torch(options)


def _name(model: Any) -> str:
    exported = isinstance(model, torch.export.ExportedProgram)
    return type(model).__name__ if exported else name_of(as_written(model))


def _placed(report: Report, place: str) -> Report:
    """`report` with paths that start at the model."""
    regions = [replace(r, path=_joined(place, r.path)) for r in report.regions]
    unmatched = [replace(u, path=_joined(place, u.path)) for u in report.unmatched]
    return replace(report, regions=tuple(regions), unmatched=tuple(unmatched))


def _joined(place: str, path: str) -> str:
    return ".".join(part for part in (place, path) if part)

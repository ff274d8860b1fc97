"""`attnc tune package.module:factory --device h100`: fast kernel settings, for devices that need not be here."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from attnc.batches import stream_of
from attnc.budget import checked_limit, told
from attnc.calibration import Calibration
from attnc.commands.target import (
    DATA_HELP,
    INPUT_HELP,
    TARGET_HELP,
    Call,
    StoreOption,
    input_specs,
    load_call,
    load_data,
    options_in,
)
from attnc.errors import UsageError
from attnc.forms import parse_form
from attnc.offline import autotune, explain
from attnc.options import Options
from attnc.plan import Plan
from attnc.records import TIMES, Record, Records
from attnc.region import form_name
from attnc.tuning import search
from attnc.tuning.durations import parse_duration, spell_duration
from attnc.tuning.problem import FIDELITIES, Problem
from attnc.tuning.problems import RegionProblem, dearest, problems_in
from attnc.tuning.samplers import DEFAULT, SAMPLERS
from attnc.tuning.tune import tune

ProblemsOf = Callable[[Call, Sequence[str], Options], Sequence[Problem]]

STORAGE_HELP = (
    "Where trials are kept: a file, a folder, an Optuna URL as sqlite:///trials.db, or memory. By default a journal "
    "per search in the store."
)
FIDELITY_HELP = (
    f"How times are found: {', '.join(FIDELITIES)}. By default measured where all devices are here, else compiled."
)
ALLOW_HELP = "Approximations to consider, as low_rank; measured on --data, taken within --max-error. Makes a plan."
ERROR_HELP = "The most that an approximation may be off: the error's norm over the output's, above 0, at most 1."
CALIBRATION_HELP = "What attnc calibrate has measured; without it, all settings that pay are measured on --data."
JSON_HELP = "Print the records as JSON; with --allow, --data, --calibration or --plan an object of records and plan."


def command(problems_of: ProblemsOf) -> Callable[..., None]:
    """The function behind `attnc tune`.

    problems_of: what there is to tune in a call of a model, on devices by name, with options.
    """

    def run(
        target: Annotated[str, typer.Argument(help=TARGET_HELP)],
        device: Annotated[str, typer.Option(help="Devices to tune for, as h100 or a100,h200,mi300x.")],
        inputs: Annotated[list[str] | None, typer.Option("--input", help=INPUT_HELP)] = None,
        length: Annotated[int | None, typer.Option(help="The value of L in --input.", min=1)] = None,
        trials: Annotated[int, typer.Option(help="Settings to try per region and device, with earlier runs'.")] = 200,
        time: Annotated[str | None, typer.Option("--time", help="Time for all, as 90s or 10m.")] = None,
        fidelity: Annotated[str | None, typer.Option(help=FIDELITY_HELP)] = None,
        sampler: Annotated[str, typer.Option(help=f"What picks settings: {', '.join(SAMPLERS)}.")] = DEFAULT,
        seed: Annotated[int, typer.Option(help="The same seed gives the same trials.")] = 0,
        workers: Annotated[int, typer.Option(help="Processes that compile side by side.")] = 1,
        storage: Annotated[str | None, typer.Option(help=STORAGE_HELP)] = None,
        store: StoreOption = None,
        train: Annotated[bool, typer.Option("--train", help="Training mode with gradients.")] = False,
        allow: Annotated[list[str] | None, typer.Option(help=ALLOW_HELP)] = None,
        max_error: Annotated[float, typer.Option(help=ERROR_HELP)] = 0.02,
        data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
        calibration: Annotated[Path | None, typer.Option(help=CALIBRATION_HELP)] = None,
        plan: Annotated[Path | None, typer.Option(help="Write the plan for the device to this file, as JSON.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
    ) -> None:
        """Find fast settings of a model's kernels for devices that need not be here, and keep them as records."""
        options, names = options_in(store), listed(device)
        kept = Path(options.store)
        fidelity = fidelity or dearest(names)
        asked = search.Settings(
            trials=trials,
            seconds=None if time is None else parse_duration(time),
            fidelity=fidelity,
            sampler=sampler,
            seed=seed,
            workers=workers,
            storage=storage,
            folder=kept / "studies",
        )
        asks = bool(allow or data or calibration or plan)
        approximate = _approximations(names, allow or [], max_error, data, calibration) if asks else None
        with contextlib.redirect_stdout(sys.stderr):  # standard output belongs to the result
            call, approximate = _given(_call(target, inputs or [], length, train), approximate)
            problems = problems_of(call, names, options)
            records = _tuned(problems, asked, Records(kept / "records"))
            made = None if approximate is None else _plan(call, names[0], train, approximate, options)
        if plan is not None and made is not None:
            _write(plan, made)
        if as_json:
            typer.echo(_json(records, made))
        else:
            typer.echo("\n\n".join([_text(problems, records, fidelity, kept / "records"), *_told(made, plan)]))
        if any(record.best is None for record in records):
            raise typer.Exit(1)

    return run


def model_problems(call: Call, devices: Sequence[str], options: Options) -> Sequence[Problem]:
    """What there is to tune in a call of a model."""
    with torch.set_grad_enabled(getattr(call.model, "training", False)):  # as --train says
        report = explain(call.model, *call.args, device=devices[0], options=options, **call.kwargs)
    return problems_in(report.regions, devices, options.store)


run = command(model_problems)


def listed(text: str, option: str = "--device", example: str = "a100,h200") -> list[str]:
    """The names in "a100,h200", each once. Raises: UsageError where there is none."""
    names = [word.strip() for word in re.split(r",(?![^{}]*\})", text)]  # a comma between knobs is part of a name
    if not all(names):
        raise UsageError(f"{option} {text!r}: found an empty name; allowed are names with commas. Write {example}.")
    return list(dict.fromkeys(names))


def _call(target: str, inputs: list[str], length: int | None, train: bool) -> Call:
    specs = input_specs(inputs, [] if length is None else [length])
    torch.manual_seed(0)
    call = load_call(target)
    if isinstance(call.model, torch.nn.Module):
        call.model.train(train)
    return replace(call, kwargs={**call.kwargs, **{spec.name: spec.draw(length) for spec in specs}})


@dataclass(frozen=True)
class Approximations:
    """What the options --allow, --max-error, --data and --calibration say; data: what --data names, once loaded."""

    allow: tuple[str, ...]
    max_error: float
    data: Any
    calibration: Calibration | None


def _approximations(
    devices: Sequence[str], allow: list[str], max_error: float, data: str | None, calibration: Path | None
) -> Approximations:
    """The options that make a plan. Raises: UsageError, ArtifactError."""
    if len(devices) > 1:
        raise UsageError(
            f"--device {','.join(devices)}: found {len(devices)} devices, a plan is made for one. Name one."
        )
    names = [name for text in allow for name in listed(text, "--allow", "low_rank,hierarchical")]
    known = None if calibration is None else Calibration.load(calibration)
    return Approximations(tuple(names), checked_limit(max_error), data, known)


def _given(call: Call, asked: Approximations | None) -> tuple[Call, Approximations | None]:
    """The call, with the first of the data as its inputs where it has none, and `asked` with its data loaded."""
    if asked is None or asked.data is None:
        return call, asked
    data = load_data(asked.data)
    data = list(data) if isinstance(data, Iterator) else data  # read again below
    if not call.args and not call.kwargs and isinstance(call.model, torch.nn.Module):
        args, kwargs = next(stream_of(data, "tune"))
        call = replace(call, args=args, kwargs=kwargs)
    return call, replace(asked, data=data)


def _plan(call: Call, device: str, train: bool, given: Approximations, options: Options) -> Plan:
    """The plan that follows from the records."""
    asked: dict[str, Any] = {"allow": given.allow, "max_error": given.max_error, "calibration": given.calibration}
    if given.data is not None:
        asked["data"] = given.data
    with torch.set_grad_enabled(train):
        return autotune(call.model, *call.args, device=device, trials=0, options=options, **asked, **call.kwargs)


def _write(file: Path, plan: Plan) -> None:
    try:
        file.write_text(plan.to_json() + "\n", encoding="utf-8")
    except OSError as exc:
        raise UsageError(f"--plan {file}: it cannot be written ({exc.strerror}). Name a file that can.") from exc


def _told(plan: Plan | None, file: Path | None) -> list[str]:
    """The plan in words."""
    if plan is None:
        return []
    lines = [f"plan for {plan.device}:"]
    for where, choice in plan.choices.items():
        lines.append(f"  {where or 'the model'}: {choice.form}\n    {choice.reason}")
    if plan.verified is not None:
        lines.append(f"together: {told(plan.verified)}")
    if len(plan.front) > 1:
        lines.append("front of predicted time and error of the output:")
        for point in plan.front:
            forms = Counter(form_name(form) for form in point.choices.values())
            named = ", ".join(f"{name} x{count}" for name, count in forms.items()) or "exact"
            lines.append(f"  {spell_seconds(point.seconds)}, {point.error:.3g}: {named}")
    return ["\n".join([*lines, *([] if file is None else [f"written to {file}"])])]


def _tuned(problems: Sequence[Problem], asked: search.Settings, records: Records) -> list[Record]:
    with shown(Console(stderr=True)) as on_progress:
        try:
            return tune(problems, asked, records=records, on_progress=on_progress)
        except KeyboardInterrupt:
            stopped = True
    if stopped:
        typer.echo("attnc: stopped; finished trials are kept, and the same command goes on from there.", err=True)
    raise typer.Exit(130)


@contextlib.contextmanager
def shown(console: Console) -> Iterator[Callable[[search.Progress], None]]:
    """A bar per problem on `console`: trials, the best so far beside the default, time left."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.completed}/{task.total}"))
    told = TextColumn("{task.fields[best]}"), TimeElapsedColumn(), TextColumn("{task.fields[left]}")
    with Progress(*columns, *told, console=console, redirect_stdout=False, redirect_stderr=False) as bars:
        tasks: dict[tuple[int, int], TaskID] = {}

        def on_progress(step: search.Progress) -> None:
            if step.place not in tasks:
                title = f"{step.place[0]}/{step.place[1]} {step.problem.device} {step.problem.key[:40]}"
                tasks[step.place] = bars.add_task(title, total=step.total, best="", left="")
            bars.update(
                tasks[step.place],
                completed=step.trials,
                total=step.total,
                best=f"best {spell_seconds(step.best_s)}, default {spell_seconds(step.default_s)}",
                left=f"{spell_duration(step.left_s)} left",
            )

        yield on_progress


def spell_seconds(seconds: float | None) -> str:
    """A kernel's time with three digits, in a unit that fits."""
    if seconds is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _text(problems: Sequence[Problem], records: Sequence[Record], fidelity: str, folder: Path) -> str:
    if not records:
        return "Nothing to tune: the model has no region that a kernel of attnc computes."
    table = Table(
        "region", "device", "default", "tuned", "faster", "tried", "failed", "setting", box=None, pad_edge=False
    )
    for record, problem in dict(zip(records, problems, strict=True)).items():
        tried = [t for t in record.timings.values() if t.failure or t.at(fidelity) is not None]
        times = [_seconds(record, name) for name in (record.default, record.best)]
        faster = f"{times[0] / times[1]:.2f}x" if times[0] and times[1] else "-"
        failed = sum(t.failure is not None for t in tried)
        shown = spell_seconds(times[0]), _with_interval(problem, record, times[1])
        row = (record.key.region, record.key.device, *shown, faster, str(len(tried)), str(failed))
        table.add_row(*row, record.best or "none: every setting failed")
    console = Console(width=200, color_system=None)
    with console.capture() as text:
        console.print(table)
    lines = "\n".join(line.rstrip() for line in text.get().splitlines())
    count = len({id(p) for p in problems})
    return f"{lines}\n\n{count} regions, {len(set(records))} tuned by fidelity {fidelity}; records in {folder}."


def _with_interval(problem: Problem, record: Record, seconds: float | None) -> str:
    """The time of the best setting, with the interval of its repetitions or of such predictions."""
    if seconds is None or record.best is None:
        return spell_seconds(seconds)
    timing = record.timings[record.best]
    if timing.measured_s == seconds:
        return str(timing.spread)
    if isinstance(problem, RegionProblem):
        return str(problem.estimate(parse_form(record.best), seconds, compiled=timing.compiled_s == seconds))
    return spell_seconds(seconds)


def _seconds(record: Record, name: str | None) -> float | None:
    """Seconds at the dearest fidelity that both the default and the best have."""
    both = [record.timings.get(n) for n in (record.default, record.best or record.default)]
    for fidelity in reversed(TIMES):
        if all(t is not None and t.at(fidelity) is not None for t in both):
            return None if name is None else record.timings[name].at(fidelity)
    timing = record.timings.get(name or "")
    return None if timing is None else next((s for f in reversed(TIMES) if (s := timing.at(f)) is not None), None)


def _json(records: Sequence[Record], plan: Plan | None) -> str:
    found: list[Any] = [json.loads(record.to_json()) for record in dict.fromkeys(records)]
    return json.dumps(found if plan is None else {"records": found, "plan": json.loads(plan.to_json())}, indent=1)

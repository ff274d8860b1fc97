"""`attnc calibrate package.module:factory --data package.module:batches`: errors of approximations on a user's data."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from attnc.calibration import Calibration, Measured
from attnc.commands.target import DATA_HELP, DEVICE_HELP, TARGET_HELP, StoreOption, load_call, load_data, options_in
from attnc.commands.tune import listed, spell_seconds
from attnc.tuning.calibrate import PAIRS, calibrate
from attnc.tuning.placement import undominated

FORMS_HELP = "Approximations, as low_rank or block_mixture{block=512,top_k=4}; with commas, may be repeated."
OUT_HELP = "The file to write; one that is there goes on where it ended."
BATCHES_HELP = "How many batches to count at most, with those of the file; leave some for attnc tune to verify on."
PAIRS_HELP = "Runs of the model per batch with one setting in one region, for the error of its output."
JSON_HELP = "Print what the file holds."


def run(
    target: Annotated[str, typer.Argument(help=TARGET_HELP)],
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    forms: Annotated[list[str], typer.Option(help=FORMS_HELP)],
    out: Annotated[Path, typer.Option(help=OUT_HELP)],
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    batches: Annotated[int | None, typer.Option(help=BATCHES_HELP, min=1)] = None,
    pairs: Annotated[int, typer.Option(help=PAIRS_HELP, min=0)] = PAIRS,
    store: StoreOption = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Measure approximations region by region on your data, for tune --calibration to choose from."""
    names = [name for text in forms for name in listed(text, "--forms", "low_rank,hierarchical")]
    with contextlib.redirect_stdout(sys.stderr):  # standard output belongs to the result
        torch.manual_seed(0)
        call, inputs = load_call(target), load_data(data)
        if isinstance(call.model, torch.nn.Module):
            call.model.eval()
        total = len(inputs) if isinstance(inputs, Sized) else None
        total = batches if total is None or (batches is not None and batches < total) else total
        asked = {"forms": names, "device": device, "file": out, "batches": batches, "pairs": pairs}
        found = None
        with _shown(Console(stderr=True), total) as on_progress, contextlib.suppress(KeyboardInterrupt):
            found = calibrate(call.model, inputs, **asked, options=options_in(store), on_progress=on_progress)  # type: ignore[arg-type]
    if found is None:
        typer.echo("attnc: stopped; whole batches are kept, and the same command goes on from there.", err=True)
        raise typer.Exit(130)
    typer.echo(found.to_json() if as_json else _text(found, out))


@contextlib.contextmanager
def _shown(console: Console, total: int | None) -> Iterator[Callable[[Calibration], None]]:
    """A bar of batches on `console`."""
    columns = TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[count]}")
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, redirect_stdout=False,
        redirect_stderr=False,
    ) as bars:  # fmt: skip
        task = bars.add_task("batches", total=total, count="")
        done = 0

        def on_progress(found: Calibration) -> None:
            nonlocal done
            done += 1
            of = "" if total is None else f"/{total}"
            bars.update(task, completed=done, count=f"{done}{of}, {found.batches} counted")

        yield on_progress


def _text(found: Calibration, out: Path) -> str:
    """A row for each setting that no other of its region beats in time and error."""
    headings = "region", "setting", "time", "error", "worst row", "mass", "kept", "output", "KL"
    table = Table(*headings, box=None, pad_edge=False)
    for heading in range(2, len(headings)):
        table.columns[heading].justify = "right"
    left = 0
    for name, region in found.regions.items():
        known = [(s, m) for s, m in region.settings.items() if m.batches and s not in region.failed]
        best = undominated([(m.seconds, m.error) for _, m in known])
        left += len(region.settings) - len(best)
        table.add_row(name or "the model", "as it is", spell_seconds(region.exact_s), *["-"] * 6)
        for at in best:
            table.add_row("", known[at][0], *_cells(known[at][1]))
    console = Console(width=200, color_system=None)
    with console.capture() as text:
        console.print(table)
    lines = "\n".join(line.rstrip() for line in text.get().splitlines())
    return (
        f"{lines}\n\n{found.batches} batches, times for {found.device}; {left} settings that are slower and off by "
        f"more, or fail, are not shown. Written to {out}."
    )


def _cells(found: Measured) -> list[str]:
    shares = found.error, found.row, found.mass, found.kept, found.output if found.runs else None, found.kl
    return [spell_seconds(found.seconds), *("-" if share is None else f"{share:.2g}" for share in shares)]

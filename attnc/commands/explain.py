"""`attnc explain package.module:factory`: what is in a model, what it costs, what attnc would choose and why."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from typing import Annotated

import torch
import typer

from attnc.commands.target import (
    DEVICE_HELP,
    INPUT_HELP,
    TARGET_HELP,
    Call,
    InputSpec,
    StoreOption,
    input_specs,
    load_call,
    options_in,
)
from attnc.offline import explain
from attnc.options import Options
from attnc.report import Report


def run(
    target: Annotated[str, typer.Argument(help=TARGET_HELP)],
    inputs: Annotated[list[str] | None, typer.Option("--input", help=INPUT_HELP)] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="A value for L in --input. Repeated: one report for each.", min=1)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; an array where --length is repeated.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Training mode with gradients, not eval without.")] = False,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    store: StoreOption = None,
) -> None:
    """Show the attention of a model: what is there, what it costs, what attnc would choose and why."""
    lengths: list[int | None] = [*length] if length else [None]
    # Standard output belongs to the report, whatever the model prints.
    with contextlib.redirect_stdout(sys.stderr):
        options = replace(options_in(store), device=device)
        specs = input_specs(inputs or [], length or [])
        torch.manual_seed(0)
        call = load_call(target)
        reports = [_explain_call(call, specs, at, train, options) for at in lengths]
    if as_json:
        texts = [report.to_json() for report in reports]
        typer.echo(texts[0] if len(texts) == 1 else "[\n" + ",\n".join(texts) + "\n]")
        return
    for at, report in zip(lengths, reports, strict=True):
        typer.echo(str(report) if len(reports) == 1 else f"L={at}: {report}\n")


def _explain_call(call: Call, specs: list[InputSpec], length: int | None, train: bool, options: Options) -> Report:
    drawn = {spec.name: spec.draw(length) for spec in specs}
    if isinstance(call.model, torch.nn.Module):
        call.model.train(train)
    with torch.set_grad_enabled(train):
        return explain(call.model, *call.args, options=options, **{**call.kwargs, **drawn})

"""The command line: `attnc explain package.module:factory` and its sisters, one file each in `attnc.commands`.

A mistake of the user ends in one sentence on stderr and exit code 2; `--debug` shows the traceback instead.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Annotated, Any, get_type_hints

import torch
import typer

from attnc import __version__, offline
from attnc.commands import devices, estimate, explain, forms, kernels, tune
from attnc.commands.target import Call
from attnc.errors import AttncError
from attnc.tuning.flash import flash_problems
from attnc.tuning.problem import Problem


def _problems(call: Call, devices: Sequence[str]) -> Sequence[Problem]:
    with torch.set_grad_enabled(getattr(call.model, "training", False)):  # as --train says
        report = offline.explain(call.model, *call.args, device=devices[0], **call.kwargs)
    return flash_problems(report.regions, devices)


COMMANDS: dict[str, Callable[..., None]] = {
    "estimate": estimate.run,
    "explain": explain.run,
    "forms": forms.run,
    "devices": devices.run,
    "kernels": kernels.run,
    "tune": tune.command(_problems),
}
DEBUG = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

app = typer.Typer(
    name="attnc",
    help="Recognise attention by meaning and rewrite it exactly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line and exit."""
    app(prog_name="attnc")


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"attnc {__version__}")
        raise typer.Exit


@app.callback()
def _attnc(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _in_sentences(run: Callable[..., None]) -> Callable[..., None]:
    """`run` with `--debug`; without it, what attnc raises on purpose is a sentence on stderr and exit code 2."""

    @functools.wraps(run)
    def command(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        if not debug:  # torch logs what goes wrong while it traces, with a traceback; the sentence says it
            logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
        try:
            run(*args, **kwargs)
        except AttncError as exc:
            if debug:
                raise
            typer.echo(f"attnc: {' '.join(str(exc).split())}", err=True)
            raise typer.Exit(2) from exc

    hints = {**get_type_hints(run, include_extras=True), "debug": DEBUG}
    own = [p.replace(annotation=hints[name]) for name, p in inspect.signature(run).parameters.items()]
    asked = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=DEBUG)
    command.__signature__ = inspect.Signature([*own, asked])  # type: ignore[attr-defined]
    command.__annotations__ = hints
    del command.__wrapped__  # typer reads the hints of this function, not of `run`
    return command


for _name, _run in COMMANDS.items():
    app.command(_name)(_in_sentences(_run))

"""The command line: `attnc explain package.module:factory` and its sisters, one file each in `attnc.commands`.

A command's module is imported when the command runs: help and the table of devices need no torch. A mistake of the
user ends in one sentence on stderr and exit code 2; `--debug` shows the traceback instead.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

from attnc import __version__
from attnc.commands.loading import command as command_named
from attnc.errors import AttncError

# Name and first line of each command: `run` of the file of that name.
COMMANDS = {
    "estimate": (
        "Count parameters, memory and FLOP of a model from its config, and predict the time of a step on a device."
    ),
    "explain": "Show the attention of a model: what is there, what it costs, what attnc would choose and why.",
    "forms": "List the forms: what each computes, its knobs (default first), and when it is exact.",
    "devices": "Show the devices attnc knows, or compare some: peaks, roofs, limits, and where the figures come from.",
    "kernels": "List, show or clear the kernels that attnc has rendered.",
    "calibrate": "Measure approximations region by region on your data, for tune --calibration to choose from.",
    "tune": "Find fast settings of a model's kernels for devices that need not be here, and keep them as records.",
}
DEBUG = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
PLAIN: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}


class Commands(TyperGroup):
    """Commands that stand in the help by their line in COMMANDS, and are loaded when one is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, found, rest = super().resolve_command(ctx, args)
        return name, found and _loaded(str(name)), rest


app = typer.Typer(
    cls=Commands,
    name="attnc",
    help="Recognise attention by meaning and rewrite it exactly.",
    no_args_is_help=True,
    **PLAIN,
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


def _loaded(name: str) -> Any:
    alone = typer.Typer(**PLAIN)
    alone.command(name)(_in_sentences(command_named(name)))
    return typer.main.get_command(alone)


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


def _not_loaded() -> None:
    raise AssertionError("a command is loaded before it runs")


for _name, _line in COMMANDS.items():
    app.command(_name, help=_line)(_not_loaded)

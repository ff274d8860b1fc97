"""The command line: `attnc explain package.module:factory`.

A mistake of the user ends in one sentence on stderr and exit code 2; `--debug` shows the traceback instead.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from attnc import __version__
from attnc.errors import AttncError, UsageError, did_you_mean
from attnc.offline import explain
from attnc.report import Report

app = typer.Typer(
    name="attnc",
    help="Recognise attention by meaning and rewrite it exactly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DTYPES = ("float32", "float64", "bfloat16", "float16", "int64", "int32", "bool")
IDS_BELOW = 100  # random integers, unless --input says otherwise

INPUT = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<shape>(?:\d+|L)(?:x(?:\d+|L))*):(?P<dtype>\w+)(?:<(?P<below>\d+))?")

TARGET_HELP = (
    "package.module:factory; called without arguments it returns a model, or (model, args), (model, kwargs) or "
    "(model, args, kwargs)."
)
INPUT_HELP = (
    f"A random input NAME=SHAPE:DTYPE, as input_ids=1x128:int64. Integers are below {IDS_BELOW}, or below N with "
    "'DTYPE<N'. L in a shape stands for --length. May be repeated."
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


@app.command("explain")
def _explain(
    target: Annotated[str, typer.Argument(help=TARGET_HELP)],
    inputs: Annotated[list[str] | None, typer.Option("--input", help=INPUT_HELP)] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="A value for L in --input. Repeated: one report for each.", min=1)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; an array where --length is repeated.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Training mode with gradients, not eval without.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Show the attention of a model: what is there, what it costs, what attnc would choose and why."""
    lengths: list[int | None] = [*length] if length else [None]
    with _sentences(debug):
        # Standard output belongs to the report, whatever the model prints.
        with contextlib.redirect_stdout(sys.stderr):
            specs = _input_specs(inputs or [], length or [])
            torch.manual_seed(0)
            call = _load(target)
            reports = [_explain_call(call, specs, at, train) for at in lengths]
        if as_json:
            texts = [report.to_json() for report in reports]
            typer.echo(texts[0] if len(texts) == 1 else "[\n" + ",\n".join(texts) + "\n]")
            return
        for at, report in zip(lengths, reports, strict=True):
            typer.echo(str(report) if len(reports) == 1 else f"L={at}: {report}\n")


@contextlib.contextmanager
def _sentences(debug: bool) -> Iterator[None]:
    """What attnc raises on purpose as a sentence on stderr and exit code 2."""
    if not debug:  # torch logs what goes wrong while it traces, with a traceback; the sentence says it
        logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    try:
        yield
    except AttncError as exc:
        if debug:
            raise
        typer.echo(f"attnc: {' '.join(str(exc).split())}", err=True)
        raise typer.Exit(2) from exc


# Inputs.


@dataclass(frozen=True)
class InputSpec:
    """One `--input`: a name, a shape in which "L" stands for the length, a dtype, and a bound for integers."""

    name: str
    shape: tuple[str, ...]
    dtype: str
    below: int

    def draw(self, length: int | None) -> torch.Tensor:
        shape = [length or 0 if size == "L" else int(size) for size in self.shape]
        dtype = getattr(torch, self.dtype)
        if dtype == torch.bool:
            return torch.rand(shape) < 0.5
        if dtype.is_floating_point:
            return torch.randn(shape).to(dtype)
        return torch.randint(self.below, shape, dtype=dtype)


def _input_specs(texts: list[str], lengths: list[int]) -> list[InputSpec]:
    specs = [_input_spec(text) for text in texts]
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--input {name}=...: given {names.count(name)} times, allowed is once. Leave one out.")
    symbolic = [spec.name for spec in specs if "L" in spec.shape]
    if symbolic and not lengths:
        raise UsageError(f"--input {symbolic[0]}=...: found L in the shape, but no length. Add --length 4096.")
    if lengths and not symbolic:
        raise UsageError(
            f"--length {lengths[0]}: found no L in the shape of an --input, so nothing has that length. "
            "Write for instance --input input_ids=1xL:int64."
        )
    return specs


def _input_spec(text: str) -> InputSpec:
    match = INPUT.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"--input {text}: found no input of the form NAME=SHAPE:DTYPE. Write for instance "
            "input_ids=1x128:int64, x=2x64x512:float32 or 'input_ids=1xL:int64<32000'."
        )
    dtype, below = match["dtype"], match["below"]
    if dtype not in DTYPES:
        raise UsageError(
            f"--input {text}: found dtype {dtype!r}, allowed are {', '.join(DTYPES)}."
            + (did_you_mean(dtype, DTYPES) or " Use float32, or int64 for ids.")
        )
    if below is not None and (not dtype.startswith("int") or int(below) < 1):
        raise UsageError(
            f"--input {text}: found the bound {below} for {dtype}; allowed is a bound of at least 1 for int64 and "
            f"int32. Write {match['name']}={match['shape']}:int64<{IDS_BELOW}."
        )
    return InputSpec(match["name"], tuple(match["shape"].split("x")), dtype, int(below or IDS_BELOW))


# The model.


@dataclass(frozen=True)
class Call:
    """A model and what it is called with."""

    model: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def _explain_call(call: Call, specs: list[InputSpec], length: int | None, train: bool) -> Report:
    drawn = {spec.name: spec.draw(length) for spec in specs}
    if isinstance(call.model, torch.nn.Module):
        call.model.train(train)
    with torch.set_grad_enabled(train):
        return explain(call.model, *call.args, **{**call.kwargs, **drawn})


def _load(target: str) -> Call:
    """Import the factory that `target` names and call it."""
    module_name, colon, path = target.partition(":")
    if not (module_name and colon and path):
        raise UsageError(
            f"explain {target}: found no name of the form package.module:factory. Write for instance "
            "mymodels.llama:build, where build() returns the model."
        )
    value = _attribute(_module(module_name, target), path, target)
    if isinstance(value, torch.nn.Module):
        return _call_of(value, target)
    if not callable(value):
        raise UsageError(
            f"explain {target}: found {type(value).__name__}, allowed is a function that returns the model. "
            f"Write a function around {path}."
        )
    return _call_of(_made(value, f"explain {target}: calling {path}()"), target)


def _module(name: str, target: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return _made(lambda: importlib.import_module(name), f"explain {target}: importing {name}")


def _made(make: Callable[[], Any], doing: str) -> Any:
    try:
        return make()
    except Exception as exc:
        said = " ".join(str(exc).split()) or "(no message)"
        raise UsageError(
            f"{doing} raised {type(exc).__name__}: {said.rstrip('.')}. Correct it, or add --debug to see where."
        ) from exc


def _attribute(module: Any, path: str, target: str) -> Any:
    value = module
    for name in path.split("."):
        if not hasattr(value, name):
            where = module.__name__ if value is module else path.partition("." + name)[0]
            known = [n for n in dir(value) if not n.startswith("_")]
            raise UsageError(
                f"explain {target}: found no {name!r} in {where}, which has {', '.join(known[:8]) or 'no public name'}"
                f"{', ...' if len(known) > 8 else ''}.{did_you_mean(name, known) or ' Name one of them.'}"
            )
        value = getattr(value, name)
    return value


def _call_of(made: Any, target: str) -> Call:
    """What a factory returned: a model, or a tuple of it and its arguments."""
    model, *rest = made if isinstance(made, tuple) and made else (made,)
    if callable(model) or isinstance(model, torch.export.ExportedProgram):
        args = tuple(rest.pop(0)) if rest and isinstance(rest[0], (tuple, list)) else ()
        kwargs = dict(rest.pop(0)) if rest and isinstance(rest[0], Mapping) else {}
        if not rest:
            return Call(model, args, kwargs)
    found = f"({', '.join(type(part).__name__ for part in made)})" if isinstance(made, tuple) else type(made).__name__
    raise UsageError(
        f"explain {target}: it returned {found}; allowed are a model, (model, args), (model, kwargs) and "
        "(model, args, kwargs), with args a tuple and kwargs a dict. Return one of them."
    )

"""What a command works on: a model from `package.module:factory`, and random inputs from `--input`."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from attnc.errors import UsageError, did_you_mean
from attnc.options import Options

DTYPES = ("float32", "float64", "bfloat16", "float16", "int64", "int32", "bool")
IDS_BELOW = 100  # random integers, unless --input says otherwise

INPUT = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<shape>(?:\d+|L)(?:x(?:\d+|L))*):(?P<dtype>\w+)(?:<(?P<below>\d+))?")

TARGET_HELP = (
    "package.module:factory; called without arguments it returns a model, or (model, args), (model, kwargs) or "
    "(model, args, kwargs)."
)
DATA_HELP = (
    "package.module:batches, an iterable of inputs of the model or a function that returns one; each a tensor, a tuple "
    "of arguments or a dict of keywords. Without it the model's own inputs."
)
DEVICE_HELP = (
    "The device to choose for, as h100, or of a file of your own, my_gpu.toml or my_gpu.toml:mine; it need not be "
    "here. `attnc devices`."
)
INPUT_HELP = (
    f"A random input NAME=SHAPE:DTYPE, as input_ids=1x128:int64. Integers are below {IDS_BELOW}, or below N with "
    "'DTYPE<N'. L in a shape stands for --length. May be repeated."
)
STORE_HELP = "The folder where verdicts, records and kernels are kept; by default the user's own."
StoreOption = Annotated[Path | None, typer.Option("--store", help=STORE_HELP)]


def options_in(store: Path | None) -> Options:
    """The default options with the store that the command line names."""
    return Options() if store is None else Options(store=str(store))


@dataclass(frozen=True)
class Call:
    """A model and what it is called with."""

    model: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


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


def input_specs(texts: list[str], lengths: list[int]) -> list[InputSpec]:
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


def load_call(target: str) -> Call:
    """Import the factory that `target` names and call it."""
    asked = f"model {target}"
    value = _named(target, asked, "factory", "mymodels.llama:build, where build() returns the model")
    if isinstance(value, torch.nn.Module):
        return _call_of(value, target)
    if not callable(value):
        raise UsageError(
            f"{asked}: found {type(value).__name__}, allowed is a function that returns the model. "
            f"Write a function around {target.partition(':')[2]}."
        )
    return _call_of(_made(value, f"{asked}: calling {target.partition(':')[2]}()"), target)


def load_data(target: str) -> Any:
    """Import the inputs that `target` names, or the function that returns them."""
    asked = f"--data {target}"
    value = _named(target, asked, "batches", "mydata.text:batches, where batches() returns an iterable of inputs")
    return _made(value, f"{asked}: calling {target.partition(':')[2]}()") if inspect.isroutine(value) else value


def _named(target: str, asked: str, name: str, example: str) -> Any:
    """What package.module:name stands for."""
    module_name, colon, path = target.partition(":")
    if not (module_name and colon and path):
        raise UsageError(f"{asked}: found no name of the form package.module:{name}. Write for instance {example}.")
    return _attribute(_module(module_name, asked), path, asked)


def _module(name: str, asked: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return _made(lambda: importlib.import_module(name), f"{asked}: importing {name}")


def _made(make: Callable[[], Any], doing: str) -> Any:
    try:
        return make()
    except Exception as exc:
        said = " ".join(str(exc).split()) or "(no message)"
        raise UsageError(
            f"{doing} raised {type(exc).__name__}: {said.rstrip('.')}. Correct it, or add --debug to see where."
        ) from exc


def _attribute(module: Any, path: str, asked: str) -> Any:
    value = module
    for name in path.split("."):
        if not hasattr(value, name):
            where = module.__name__ if value is module else path.partition("." + name)[0]
            known = [n for n in dir(value) if not n.startswith("_")]
            raise UsageError(
                f"{asked}: found no {name!r} in {where}, which has {', '.join(known[:8]) or 'no public name'}"
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
        f"model {target}: it returned {found}; allowed are a model, (model, args), (model, kwargs) and "
        "(model, args, kwargs), with args a tuple and kwargs a dict. Return one of them."
    )

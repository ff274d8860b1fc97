"""`attnc kernels`: the rendered Triton files in the user's store, listed, shown and cleared."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from attnc.codegen.load import Filed, clear, kernel_folder, listing, show
from attnc.commands.target import StoreOption, options_in
from attnc.errors import UsageError, did_you_mean

ACTIONS = ("list", "show", "clear")


def run(
    action: Annotated[str, typer.Argument(help="list, show HASH or clear.")] = "list",
    name: Annotated[str | None, typer.Argument(metavar="HASH", help="With show: the hash, or how it begins.")] = None,
    store: StoreOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="With list: print JSON.")] = False,
) -> None:
    """List, show or clear the kernels that attnc has rendered."""
    if action not in ACTIONS:
        raise UsageError(
            f"kernels {action}: no such action; allowed are {', '.join(ACTIONS)}."
            + (did_you_mean(action, ACTIONS) or " Use `attnc kernels list`.")
        )
    if (action == "show") != (name is not None):
        found = "no hash" if name is None else f"the hash {name!r}"
        raise UsageError(f"kernels {action}: found {found}; only show takes one. Use `attnc kernels show HASH`.")
    if as_json and action != "list":
        raise UsageError(f"kernels {action} --json: only list prints JSON. Leave --json out.")
    folder = kernel_folder(options_in(store).store)
    if name is not None:
        typer.echo(show(name, folder), nl=False)
    elif action == "clear":
        files, size = clear(folder)
        typer.echo(f"removed {files} files, {_size(size)}, from {folder}")
    elif as_json:
        typer.echo(json.dumps([asdict(file) for file in listing(folder)], indent=2))
    else:
        typer.echo(_table(listing(folder), folder))


def _table(files: list[Filed], folder: Path) -> str:
    if not files:
        return f"no kernels in {folder}"
    total = f"{len(files)} in {folder}, {_size(sum(file.bytes for file in files))}"
    return "\n".join([*map(_row, files), total])


def _row(file: Filed) -> str:
    written = datetime.fromtimestamp(file.written_s)
    return f"{file.hash[:12]}  {_size(file.bytes):>8}  {written:%Y-%m-%d %H:%M}  {file.title}"


def _size(count: int) -> str:
    return f"{count} B" if count < 10_000 else f"{count / 1000:.0f} kB"

"""`attnc devices --measure`: the figures of this CPU, measured, as a device file or JSON."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from attnc.commands.devices import to_json
from attnc.cost_models.cpu_probe import device_text, measure_cpu
from attnc.errors import UsageError


def run(as_json: bool, write: Path | None) -> None:
    """Measure this CPU, print it, and keep it in the new file `write`."""
    cpu = measure_cpu()
    text = device_text(cpu)
    if write is not None:
        try:
            with write.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError as exc:
            raise UsageError(f"devices --write {write}: found a file there, which is kept. Name another one.") from exc
        except (OSError, ValueError) as exc:
            raise UsageError(f"devices --write {write}: cannot be written ({exc}). Name another file.") from exc
    typer.echo(json.dumps(to_json(cpu), indent=2) if as_json else text, nl=as_json)

"""Commands by name: the module of a command is imported when the command runs, so that no other waits for it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module


def command(name: str) -> Callable[..., None]:
    """The function `run` of `attnc.commands.<name>`."""
    run: Callable[..., None] = import_module(f"attnc.commands.{name}").run
    return run

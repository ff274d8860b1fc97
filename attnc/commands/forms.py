"""`attnc forms`: the ways attnc can compute a region, their knobs, and where they come from."""

from __future__ import annotations

import inspect
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from attnc.forms import FORMS, Form, form_named


def run(
    name: Annotated[str | None, typer.Argument(metavar="[FORM]", help="Show this form only, with its formula.")] = None,
) -> None:
    """List the forms: what each computes, its knobs (default first), and when it is exact."""
    if name is not None:
        typer.echo(_page(form_named(name)))
        return
    table = Table("form", "what it is", "knobs")
    for form in FORMS:
        knobs = [f"{k} ({knob.role}): {', '.join(map(str, knob.choices))}" for k, knob in form().knobs().items()]
        table.add_row(form.name, _told(form).partition("\n")[0], "\n".join(knobs) or "none")
    Console().print(table)


def _told(form: type[Form]) -> str:
    return inspect.getdoc(sys.modules[form.__module__]) or ""


def _page(form: type[Form]) -> str:
    """The form's own file says it best: formula, source, when it is exact; then the default spelling."""
    return f"{form().spell()}\n\n{_told(form)}"

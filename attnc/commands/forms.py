"""`attnc forms`: the ways attnc can compute a region, their knobs, systems that they are, and systems that none is."""

from __future__ import annotations

import inspect
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from attnc.forms import FORMS, Form, form_named
from attnc.forms.sparse_systems import REFUSED, systems_of


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
    refused = Table("sparse system", "why no form is it")
    for system in REFUSED:
        refused.add_row(system.name, system.why)
    Console().print(refused)


def _told(form: type[Form]) -> str:
    return inspect.getdoc(sys.modules[form.__module__]) or ""


def _page(form: type[Form]) -> str:
    """The default spelling; then the form's own file: formula, source, when it is exact; then systems as settings."""
    systems = [f"{s.name}: {s.spelling}{f' ({s.around})' if s.around else ''}" for s in systems_of(form.name)]
    return "\n\n".join([form().spell(), _told(form), *(["\n".join(systems)] if systems else [])])

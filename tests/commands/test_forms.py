"""`attnc forms` names every form and its knobs, and knows its nearest name."""

from __future__ import annotations

from typer.testing import CliRunner

from attnc.cli import app
from attnc.forms import FORMS
from attnc.forms.sparse_systems import REFUSED, systems_of

WIDE = {"COLUMNS": "200", "TERM": "dumb"}


def test_every_form_and_knob_is_listed() -> None:
    shown = CliRunner().invoke(app, ["forms"], env=WIDE)
    assert shown.exit_code == 0
    for form in FORMS:
        assert form.name in shown.stdout
        assert all(name in shown.stdout for name in form().knobs())


def test_one_form_is_shown_with_its_source() -> None:
    for form in FORMS:
        shown = CliRunner().invoke(app, ["forms", form.name], env=WIDE)
        assert form().spell() in shown.stdout and "Source:" in shown.stdout
        assert all(system.spelling in shown.stdout for system in systems_of(form.name))


def test_systems_that_no_form_is_are_listed_with_the_reason() -> None:
    shown = " ".join(CliRunner().invoke(app, ["forms"], env=WIDE).stdout.split())
    assert all(system.name in shown and system.why in shown for system in REFUSED)


def test_an_unknown_form_is_a_sentence() -> None:
    shown = CliRunner().invoke(app, ["forms", "densse"], env=WIDE)
    assert shown.exit_code == 2 and "Did you mean 'dense'" in " ".join(shown.stderr.split())

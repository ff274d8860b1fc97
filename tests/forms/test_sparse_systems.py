"""The table of sparse systems: every spelling parses, is an approximation by name, and stands for one row."""

from __future__ import annotations

import pytest

from attnc.forms import parse_form
from attnc.forms.sparse_systems import SPARSE_SYSTEMS, SparseSystem

FIDELITIES = ("drop-in", "calibration", "training")


@pytest.mark.parametrize("system", SPARSE_SYSTEMS, ids=lambda system: system.name)
def test_a_system_is_a_setting_of_a_form_by_name(system: SparseSystem) -> None:
    form = parse_form(system.spelling)
    assert form.approximates and parse_form(form.spell()) == form
    assert system.fidelity in FIDELITIES and system.source


def test_names_are_given_once() -> None:
    names = [system.name for system in SPARSE_SYSTEMS]
    assert len(set(names)) == len(names)

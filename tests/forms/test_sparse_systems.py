"""The table of sparse systems: each is a setting of a form, a function or refused; no row of the catalogue is left."""

from __future__ import annotations

import importlib

import pytest

from attnc.forms import parse_form
from attnc.forms.sparse_systems import REFUSED, SPARSE_SYSTEMS, SparseSystem, systems_of

FIDELITIES = ("drop-in", "calibration", "training")


@pytest.mark.parametrize("system", SPARSE_SYSTEMS, ids=lambda system: system.name)
def test_a_system_is_a_setting_of_a_form_by_name_or_a_function(system: SparseSystem) -> None:
    assert system.fidelity in FIDELITIES and system.source
    assert bool(system.spelling) != bool(system.mixer)
    if system.mixer:
        module, _, name = system.mixer.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))
        return
    form = parse_form(system.spelling)
    assert form.approximates and parse_form(form.spell()) == form
    assert system in systems_of(form.name)


def test_names_are_given_once() -> None:
    names = [system.name for system in (*SPARSE_SYSTEMS, *REFUSED)]
    assert len(set(names)) == len(names)


def test_every_row_of_the_catalogue_is_computed_or_refused_with_a_reason() -> None:
    rows = {f"B{n}" for n in range(1, 19)} | {f"C{n}" for n in range(1, 41)}
    computed, refused = ({s.row for s in table if s.row} for table in (SPARSE_SYSTEMS, REFUSED))
    assert computed | refused == rows and not computed & refused
    assert all(len(system.why) > 40 for system in REFUSED)

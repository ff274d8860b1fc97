"""A space as a tree offers what is valid and nothing else, under names whose choices never change."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from attnc.forms.base import knob
from attnc.tuning.tree import Branch, form_of, params_of, tree_of, walk
from tests.tuning.landscapes import CASES, CHIPS, Landscape, Tiles, Toy


@dataclass(frozen=True)
class Plain(Toy):
    name: ClassVar[str] = "plain"
    block_m: int = knob(64, 128)


SPACE = Landscape(CASES[1], CHIPS[2]).space()


def names_below(tree: object, found: dict[str, tuple]) -> dict[str, tuple]:
    if isinstance(tree, Branch):
        assert found.setdefault(tree.name, tree.choices) == tree.choices
        for below in tree.below.values():
            names_below(below, found)
    return found


def test_one_name_has_one_set_of_choices() -> None:
    names = names_below(tree_of(SPACE), {})
    assert len(names) > 6, "knobs are conditional: some have several names"
    assert all(len(choices) > 1 for choices in names.values()), "a knob without a choice is not asked for"


def test_every_walk_ends_at_a_valid_setting_and_every_setting_is_reached() -> None:
    tree, rng = tree_of(SPACE), random.Random(0)
    assert {walk(tree, lambda name, choices: rng.choice(choices)) for _ in range(300)} <= set(SPACE)
    for form in SPACE:
        params = params_of(tree, form)
        assert form_of(tree, {name: value for name, (value, _) in params.items()}) == form


def test_parameters_of_another_space_name_no_setting() -> None:
    tree = tree_of(SPACE)
    params = {name: value for name, (value, _) in params_of(tree, SPACE[0]).items()}
    missing = dict(list(params.items())[1:])
    assert form_of(tree, missing) is None and form_of(tree, params | {next(iter(params)): 7}) is None


def test_two_forms_are_told_apart_before_their_knobs() -> None:
    tree = tree_of([Plain(64), Plain(128), Tiles(64), Tiles(32)])
    assert isinstance(tree, Branch) and tree.choices == ("plain", "tiles")
    params = params_of(tree, Plain(128))
    assert {name: value for name, (value, _) in params.items()} == {
        "form:plain/tiles": "plain",
        "plain.block_m:64/128": 128,
    }


def test_a_space_of_one_has_no_parameter() -> None:
    assert tree_of([Plain()]) == Plain() and params_of(Plain(), Plain()) == {}

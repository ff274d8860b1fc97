"""A space of settings as a tree, knob by knob: what a knob may be depends on the knobs chosen before it.

A parameter's name carries its condition, `block_n:16/32/64` where those three are left: the same name always has the
same choices, as Optuna asks, and what was learned under one prefix serves every prefix that leaves the same choices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnc.forms.base import Form

Value = str | int | float | bool


@dataclass(frozen=True)
class Branch:
    """The choices of one knob after a prefix; `name` is its parameter."""

    name: str
    below: Mapping[Value, Branch | Form]

    @property
    def choices(self) -> tuple[Value, ...]:
        return tuple(self.below)


def tree_of(settings: Sequence[Form]) -> Branch | Form:
    """The tree of `settings`; knobs in the order of their form, those with one choice left out."""
    rows = [(form, [("form", form.name), *((k, getattr(form, k)) for k in form.knobs())]) for form in settings]
    return _grown(rows, 0)


def _grown(rows: list[tuple[Form, list[tuple[str, Value]]]], depth: int) -> Branch | Form:
    if len(rows) == 1:
        return rows[0][0]
    groups: dict[Value, list[tuple[Form, list[tuple[str, Value]]]]] = {}
    for row in rows:
        groups.setdefault(row[1][depth][1], []).append(row)
    if len(groups) == 1:
        return _grown(rows, depth + 1)
    # Forms may have knobs of one name that mean different things: below the choice of a form its name goes along.
    knob = rows[0][1][depth][0]
    owner = "" if depth == 0 else f"{rows[0][0].name}."
    choices = sorted(groups, key=lambda v: (isinstance(v, str), v))
    name = f"{owner}{knob}:{'/'.join(map(str, choices))}"
    return Branch(name, {value: _grown(groups[value], depth + 1) for value in choices})


def walk(tree: Branch | Form, choose: Callable[[str, tuple[Value, ...]], Any]) -> Form:
    """The setting reached by asking `choose(name, choices)` at every branch."""
    while isinstance(tree, Branch):
        tree = tree.below[choose(tree.name, tree.choices)]
    return tree


def form_of(tree: Branch | Form, params: Mapping[str, Any]) -> Form | None:
    """The setting that `params` name; None where a parameter is missing or has another value."""
    while isinstance(tree, Branch):
        below = tree.below.get(params[tree.name]) if tree.name in params else None
        if below is None:
            return None
        tree = below
    return tree


def params_of(tree: Branch | Form, form: Form) -> dict[str, tuple[Value, tuple[Value, ...]]]:
    """The parameters that name `form`, which is in the tree: value and choices of each."""
    found: dict[str, tuple[Value, tuple[Value, ...]]] = {}
    while isinstance(tree, Branch):
        owner, _, knob = tree.name.partition(":")[0].rpartition(".")
        value = getattr(form, knob) if owner else form.name
        found[tree.name] = (value, tree.choices)
        tree = tree.below[value]
    return found

"""The forms attnc knows: one line each, in the order they are offered."""

from __future__ import annotations

import re

from attnc.errors import UsageError, did_you_mean
from attnc.forms.base import Form
from attnc.forms.block_sparse import BlockSparse
from attnc.forms.dense import Dense
from attnc.forms.flash import Flash
from attnc.forms.flash_decode import FlashDecode

FORMS: tuple[type[Form], ...] = (Dense, BlockSparse, Flash, FlashDecode)


def form_named(name: str) -> type[Form]:
    """The form called `name`. Raises: UsageError, naming the nearest known one."""
    known = {form.name: form for form in FORMS}
    if name not in known:
        raise UsageError(
            f"form {name!r}: no such form; known are {', '.join(known)}."
            + (did_you_mean(name, known) or " See `attnc forms`.")
        )
    return known[name]


def parse_form(spelling: str) -> Form:
    """The form that `spelling` names, as in `block_sparse{provider=flex,block_m=128}`.

    Raises: UsageError for an unknown form or knob, or a text that is no spelling.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(?:\{([^{}]*)\})?\s*", spelling)
    if match is None:
        raise UsageError(
            f"parse the form {spelling!r}: found no `name{{knob=value,...}}`. Write a form as in "
            "'block_sparse{provider=flex,block_m=128}'."
        )
    return form_named(match[1]).parse(match[2] or "")

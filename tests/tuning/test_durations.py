"""Durations read as people write them."""

from __future__ import annotations

import pytest

from attnc.errors import UsageError
from attnc.tuning.durations import parse_duration, spell_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("1h30m", 5400), ("45", 45), ("1.5s", 1.5), (" 2 H ", 7200), ("1d", 86400)],
)
def test_a_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds
    assert parse_duration(spell_duration(round(seconds))) == round(seconds)


@pytest.mark.parametrize("text", ["", "0", "0s", "m", "10x", "-5m", "30m1h", "1e9", "nan", "99d", "1" * 500, "١m"])
def test_what_is_none_is_a_sentence(text: str) -> None:
    with pytest.raises(UsageError, match="Write for instance"):
        parse_duration(text)


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0s"), (59.6, "1m"), (3725, "1h2m"), (90061, "1d1h")])
def test_a_duration_is_spelled_in_two_units(seconds: float, text: str) -> None:
    assert spell_duration(seconds) == text

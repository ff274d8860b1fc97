"""Durations as people write them: 90s, 10m, 1h30m."""

from __future__ import annotations

import re

from attnc.errors import UsageError

UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
WRITTEN = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", re.ASCII)
LONGEST = 30 * 86400


def parse_duration(text: str) -> float:
    """Seconds of a duration such as "90s", "10m", "1h30m" or "45" (seconds).

    Raises: UsageError for anything else, for none at all and for more than 30 days.
    """
    match = WRITTEN.fullmatch(text.strip().lower().replace(" ", ""))
    parts = match.groups() if match and len(text) <= 40 else ()
    seconds = sum(float(part) * unit for part, unit in zip(parts, UNITS.values(), strict=bool(parts)) if part)
    if not 0 < seconds <= LONGEST:
        raise UsageError(
            f"duration {text[:40]!r}: found no time above 0 s and up to 30 days; allowed are numbers with d, h, m and "
            "s, largest first. Write for instance 90s, 10m or 1h30m."
        )
    return seconds


def spell_duration(seconds: float) -> str:
    """The duration in its two largest units; `parse_duration` reads it back."""
    left = max(0, round(seconds))
    words = []
    for unit, size in UNITS.items():
        count, left = divmod(left, size)
        if count:
            words.append(f"{count}{unit}")
    return "".join(words[:2]) or "0s"

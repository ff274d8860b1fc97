"""JSON files read strictly: each name once, finite numbers, every value checked; a failure says where, and what may be.

Source: RFC 8259, sections 4 (names within an object should be unique) and 6 (no infinity, no NaN).
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from attnc.errors import ArtifactError

MOST_BYTES = 64 << 20


class StrictReader:
    """Checks of values from a file; each failure names the file and the place in it, and what to do: `again`."""

    def __init__(self, where: str, again: str) -> None:
        self.where, self.again = where, again

    def fail(self, found: str, allowed: str) -> NoReturn:
        raise ArtifactError(f"read {self.where}: found {found[:200]}; allowed is {allowed}. {self.again}")

    def table(self, value: object, place: str) -> dict[str, Any]:
        if type(value) is not dict:
            self.fail(f"{type(value).__name__} as {place}", "an object")
        return value

    def keys(self, value: dict[str, Any], place: str, known: tuple[str, ...], needed: tuple[str, ...]) -> None:
        odd = [k for k in value if k not in known] + [f"no {k}" for k in needed if k not in value]
        if odd:
            self.fail(f"{odd[0]!r} in {place}", ", ".join(known))

    def text(self, value: object, place: str, pattern: re.Pattern[str] | None = None, most: int = 4096) -> str:
        if type(value) is not str or not 0 < len(value) <= most or not value.isprintable():
            self.fail(f"{value!r:.80} as {place}", f"a printable text of 1 to {most} characters")
        if pattern is not None and not pattern.fullmatch(value):
            self.fail(f"{value!r:.80} as {place}", f"a text like {pattern.pattern}")
        return value

    def number(self, value: object, place: str, low: float, high: float) -> float:
        if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
            self.fail(f"{value!r:.80} as {place}", f"a number from {low:g} to {high:g}")
        return float(value)  # type: ignore[arg-type]

    def count(self, value: object, place: str) -> int:
        if type(value) is not int or not 0 <= value < 1 << 63:
            self.fail(f"{value!r:.80} as {place}", "a whole number from 0 to 2^63")
        return value

    def read(self, text: str | bytes) -> dict[str, Any]:
        """The object that `text` holds."""

        def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            found = dict(pairs)
            if len(found) < len(pairs):
                self.fail("a name given twice in one object", "each name once")
            return found

        def constant(word: str) -> NoReturn:
            self.fail(word, "finite numbers")

        if len(text) > MOST_BYTES:
            self.fail(f"{len(text)} bytes", f"at most {MOST_BYTES}")
        try:
            decoded = text if isinstance(text, str) else text.decode("utf-8")
            found = json.loads(decoded, object_pairs_hook=once, parse_constant=constant)
        except (ValueError, RecursionError) as exc:
            self.fail(f"no JSON ({' '.join(str(exc).split())})", "a JSON object in UTF-8")
        return self.table(found, "the whole")

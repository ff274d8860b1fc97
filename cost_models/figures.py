"""Figures read from TOML tables, strictly: what is allowed stands at the field, and anything else is a sentence."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from attnc.errors import UsageError, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

Read = TypeVar("Read")
MAX_FILE_BYTES = 1 << 20
MAX_TEXT = 400


@dataclass(frozen=True)
class Figures(Mapping[str, float]):
    """A few named figures: a mapping that is frozen, hashable and picklable."""

    pairs: tuple[tuple[str, float], ...] = ()

    def __getitem__(self, name: str) -> float:
        for key, value in self.pairs:
            if key == name:
                return value
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (key for key, _ in self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        return f"Figures({dict(self.pairs)})"


@dataclass(frozen=True)
class Allowed:
    """What a field may hold. kind: "integer", "number", "text", "texts", "figures" or "sources".

    low, high: the range of a number, in `unit`. names: of a text, or the keys of figures. pattern: of a text.
    """

    kind: str
    low: float = 0.0
    high: float = 0.0
    unit: str = ""
    names: tuple[str, ...] = ()
    pattern: str = ""

    def __str__(self) -> str:
        span = f"{self.low:g} to {self.high:g} {self.unit}".strip()
        keys = ", ".join(self.names)
        return {
            "integer": f"a whole number from {span}",
            "number": f"a number from {span}",
            "text": f"one of {keys}" if keys else f"a text of 1 to {MAX_TEXT} characters{self._form}",
            "texts": f"a list of texts of 1 to {MAX_TEXT} characters{self._form}",
            "figures": f"a table of {keys}, each a number from {span}",
            "sources": f"a table of {keys}, each a text of 1 to {MAX_TEXT} characters",
        }[self.kind]

    @property
    def _form(self) -> str:
        return f" of the form {self.pattern}" if self.pattern else ""


def figure(
    kind: str,
    low: float = 0.0,
    high: float = 0.0,
    unit: str = "",
    *,
    names: tuple[str, ...] = (),
    pattern: str = "",
    **default: Any,
) -> Any:
    """A field of a dataclass that `read_table` fills; `default=` makes it optional."""
    return field(metadata={"allowed": Allowed(kind, low, high, unit, names, pattern)}, **default)


def figure_fields(cls: type) -> dict[str, Field]:
    """The fields of `cls` that a table may hold, by name."""
    return {f.name: f for f in fields(cls) if "allowed" in f.metadata}


def read_toml(path: Path) -> dict[str, object]:
    """The top of the TOML file at `path`. Raises: UsageError where it cannot be read or is no TOML."""
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise FileNotFoundError("no such file")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise UsageError(
                f"{path}: found over {MAX_FILE_BYTES} bytes; a file of figures has fewer. Name another file."
            )
        return tomllib.loads(data.decode("utf-8"))
    except UsageError:
        raise
    except (OSError, ValueError, RecursionError) as exc:  # ValueError: no TOML, no UTF-8, a number too long to read
        said = " ".join(str(exc).split()).rstrip(".") or type(exc).__name__
        raise UsageError(f"{path}: found no TOML that can be read ({said[:200]}). Correct the file.") from exc


def read_table(cls: type[Read], table: object, where: str, **given: Any) -> Read:
    """The `cls` of a table: every key known, every value in its range. given: fields that come from elsewhere.

    Raises: UsageError that names `where`, the key, what was found and what is allowed.
    """
    known = figure_fields(cls)
    values = dict(given)
    for key, value in as_table(table, where).items():
        if key not in known or key in given:
            names = [name for name in known if name not in given]
            raise UsageError(
                f"{where}: found the key {key[:MAX_TEXT]!r}; allowed are {', '.join(names)}."
                + (did_you_mean(key, names) or " Leave it out.")
            )
        values[key] = read_value(value, known[key].metadata["allowed"], f"{where}: {key}")
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise UsageError(f"{where}: found no {name}. Add {name}, {f.metadata['allowed']}.")
    return cls(**values)


def as_table(value: object, where: str) -> Mapping[str, object]:
    """`value` if it is a table. Raises: UsageError."""
    if not isinstance(value, Mapping):
        raise UsageError(f"{where}: found {_shown(value)}, allowed is a table. Write [section] and key = value lines.")
    return value


def read_value(value: object, allowed: Allowed, where: str) -> object:
    """`value` as its field holds it. Raises: UsageError."""
    if allowed.kind in ("integer", "number"):
        return _number(value, allowed, where)
    if allowed.kind == "text":
        return _text(value, allowed, where)
    if allowed.kind == "texts":
        if not isinstance(value, list):
            raise _wrong(value, allowed, where)
        return tuple(_text(part, allowed, where) for part in value)
    table = value if isinstance(value, Mapping) else None
    if table is None:
        raise _wrong(value, allowed, where)
    for key in table:
        if key not in allowed.names:
            raise UsageError(
                f"{where}: found the key {key[:MAX_TEXT]!r}; allowed are {', '.join(allowed.names)}."
                + (did_you_mean(key, allowed.names) or " Leave it out.")
            )
    if allowed.kind == "sources":
        return tuple((key, _text(part, Allowed("text"), f"{where}.{key}")) for key, part in table.items())
    return Figures(tuple((key, float(_number(part, allowed, f"{where}.{key}"))) for key, part in table.items()))


def _number(value: object, allowed: Allowed, where: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or (allowed.kind == "integer" and not isinstance(value, int)):
        raise _wrong(value, allowed, where)
    assert isinstance(value, int | float)
    if not allowed.low <= value <= allowed.high:  # refuses NaN too
        raise _wrong(value, allowed, where)
    return value if allowed.kind == "integer" else float(value)


def _text(value: object, allowed: Allowed, where: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT or not value.isprintable():
        raise _wrong(value, allowed, where)
    if (allowed.names and value not in allowed.names) or (
        allowed.pattern and re.fullmatch(allowed.pattern, value) is None
    ):
        raise _wrong(value, allowed, where)
    return value


def _wrong(value: object, allowed: Allowed, where: str) -> UsageError:
    near = did_you_mean(value, allowed.names) if isinstance(value, str) else ""
    return UsageError(f"{where}: found {_shown(value)}, allowed is {allowed}.{near or ' Correct it.'}")


def _shown(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return "a whole number of over 30 digits"
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."

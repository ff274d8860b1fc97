"""A plan: one choice per region, as a value and as JSON.

Source: shared vocabulary of DESIGN.md, section 2 (choice, plan), and section 7 (the front); JSON because a plan is read
and compared by people.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

from attnc.errors import ArtifactError, UsageError
from attnc.forms import parse_form
from attnc.region import AS_WRITTEN, Choice

VERSION = 1


@dataclass(frozen=True)
class Point:
    """A point of the front of time and error.

    seconds: predicted for the attentions of the model. error: of the model's output, measured, the worst of the
    batches. choices: spelling of the approximation of each region that has one.
    """

    seconds: float
    error: float
    choices: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Verified:
    """What was measured of the model's output with the choices of a plan.

    error: the worst of the batches numbered in `batches`, counted from 0, which is at most `max_error`. fresh: whether
    none of these was used to choose. calibrated: how many batches were.
    """

    max_error: float
    error: float
    batches: tuple[int, ...]
    fresh: bool
    calibrated: int

    @property
    def margin(self) -> float:
        """What is left of the budget."""
        return self.max_error - self.error


@dataclass(frozen=True)
class Plan:
    """Choices by region path (or key); `device` names what they were made for.

    front: what was found to be undominated in time and error while approximations were searched, slowest first; the
    first is exact. verified: None where nothing is approximated.
    """

    choices: Mapping[str, Choice] = field(default_factory=dict, hash=False)
    device: str = "cpu"
    front: tuple[Point, ...] = ()
    verified: Verified | None = None

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` reads it back."""
        found = asdict(self)
        found = {name: found[name] for name in ("device", "choices", "front", "verified") if found[name] is not None}
        if not self.front:
            del found["front"]
        return json.dumps({"attnc_plan": VERSION, **found}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `text` holds. Raises: ArtifactError if it holds none, or one of another version."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise ArtifactError(
                f"read a plan: the text is not JSON ({exc!s:.200}). Write plans with Plan.to_json()."
            ) from exc
        if not isinstance(data, dict) or data.get("attnc_plan") != VERSION:
            found = data.get("attnc_plan") if isinstance(data, dict) else type(data).__name__
            raise ArtifactError(f"read a plan: found version {found!r:.80}, allowed is {VERSION}. Make the plan again.")
        choices, device = data.get("choices"), data.get("device")
        if not isinstance(choices, dict) or not isinstance(device, str):
            raise ArtifactError(
                f"read a plan: found choices of type {type(choices).__name__} for a device {device!r:.80}, allowed are "
                "an object and a name. Make the plan again."
            )
        return cls(
            {path: _choice(path, given) for path, given in choices.items()},
            device,
            _front(data.get("front", [])),
            _verified(data.get("verified")),
        )


def _front(given: object) -> tuple[Point, ...]:
    parts = {
        "seconds": _is_seconds,
        "error": lambda value: value is not None and _is_error_or_none(value),
        "choices": lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
    }
    if isinstance(given, list) and all(_has(point, parts) for point in given):
        return tuple(Point(**point) for point in given)
    raise _odd("front", given, "a list of objects of seconds, error and choices")


def _verified(given: object) -> Verified | None:
    parts = {
        "max_error": _is_seconds,
        "error": lambda value: value is not None and _is_error_or_none(value),
        "batches": lambda value: isinstance(value, list) and all(map(_is_count, value)),
        "fresh": lambda value: isinstance(value, bool),
        "calibrated": _is_count,
    }
    if given is None:
        return None
    if not isinstance(given, dict) or not _has(given, parts):
        raise _odd("verified", given, f"an object of {', '.join(parts)}")
    return Verified(**{**given, "batches": tuple(given["batches"])})


def _has(given: object, parts: Mapping[str, Callable[[object], bool]]) -> bool:
    return isinstance(given, dict) and given.keys() == parts.keys() and all(parts[n](v) for n, v in given.items())


def _odd(part: str, found: object, allowed: str) -> ArtifactError:
    return ArtifactError(f"read a plan: found {found!r:.200} as {part}, allowed is {allowed}. Make the plan again.")


def _choice(path: str, given: object) -> Choice:
    if not isinstance(given, dict) or not {"form", "reason"} <= set(given) <= set(ALLOWED):
        found = sorted(given) if isinstance(given, dict) else given
        raise _wrong(path, found, f"the fields {', '.join(ALLOWED)}")
    for name, value in given.items():
        if not ALLOWED[name](value):
            raise _wrong(path, f"{name}={value!r}", "texts, seconds above 0, and an error of at least 0")
    low, high = given.get("low_s"), given.get("high_s")
    if (low is None) != (high is None) or (low is not None and low > high):
        raise _wrong(path, f"low_s={low!r} and high_s={high!r}", "both or none, low_s <= high_s")
    try:
        if given["form"] != AS_WRITTEN:
            parse_form(given["form"])
    except UsageError as exc:
        raise _wrong(path, given["form"], f"a form of this version ({exc})") from exc
    return Choice(**given)


def _is_seconds(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf  # type: ignore[operator]


def _is_seconds_or_none(value: object) -> bool:
    return value is None or _is_seconds(value)


def _is_error_or_none(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf)


def _is_share_or_none(value: object) -> bool:
    return value is None or (_is_error_or_none(value) and value <= 1)  # type: ignore[operator]


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _wrong(path: str, found: object, allowed: str) -> ArtifactError:
    return ArtifactError(
        f"read a plan: the choice for {path!r:.80} has {found!s:.200}, allowed are {allowed}. Make the plan again."
    )


# What each field of a choice may be in a file.
ALLOWED: dict[str, Callable[[object], bool]] = {
    "form": _is_text,
    "reason": _is_text,
    "predicted_s": _is_seconds_or_none,
    "written_s": _is_seconds_or_none,
    "refused": lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
    "offers": lambda value: isinstance(value, dict) and all(map(_is_seconds, value.values())),
    "error": _is_error_or_none,
    "low_s": _is_seconds_or_none,
    "high_s": _is_seconds_or_none,
    "row_error": _is_error_or_none,
    "mass": _is_share_or_none,
    "kept": _is_share_or_none,
    "pays_from": lambda value: value is None or _is_count(value),
}

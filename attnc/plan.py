"""A plan: one choice per region, as a value and as JSON.

Source: shared vocabulary of DESIGN.md, section 2 (choice, plan); JSON because a plan is read and compared by people.
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
class Plan:
    """Choices by region path (or key); `device` names what they were made for."""

    choices: Mapping[str, Choice] = field(default_factory=dict, hash=False)
    device: str = "cpu"

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` reads it back."""
        choices = {path: asdict(choice) for path, choice in self.choices.items()}
        return json.dumps({"attnc_plan": VERSION, "device": self.device, "choices": choices}, indent=2)

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
        return cls({path: _choice(path, given) for path, given in choices.items()}, device)


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
}

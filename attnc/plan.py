"""A plan: one choice per region, as a value and as JSON.

Source: shared vocabulary of DESIGN.md, section 2 (choice, plan); JSON because a plan is read and compared by people.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

from attnc.errors import ArtifactError
from attnc.region import Choice

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
        except json.JSONDecodeError as exc:
            raise ArtifactError(f"read a plan: the text is not JSON ({exc}). Write plans with Plan.to_json().") from exc
        if not isinstance(data, dict) or data.get("attnc_plan") != VERSION:
            found = data.get("attnc_plan") if isinstance(data, dict) else type(data).__name__
            raise ArtifactError(f"read a plan: found version {found!r}, allowed is {VERSION}. Make the plan again.")
        known = {f.name for f in fields(Choice)}
        choices = {}
        for path, given in data.get("choices", {}).items():
            if not isinstance(given, dict) or not {"form", "reason"} <= set(given) <= known:
                raise ArtifactError(
                    f"read a plan: the choice for {path!r} has {sorted(given) if isinstance(given, dict) else given}, "
                    f"allowed are {', '.join(sorted(known))}. Make the plan again."
                )
            choices[path] = Choice(**given)
        return cls(choices, data.get("device", "cpu"))

"""What a rule and a shape are, for every kind of region: facts without sizes, and sizes without facts.

A rule says what is computed and is free of shapes; it spells as one line and parses back. FLOP and elements moved are
functions of both.
"""

from __future__ import annotations

import ast
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from attnc.errors import UsageError, did_you_mean

Spelled = TypeVar("Spelled", bound="Rule")


@dataclass(frozen=True)
class Shape:
    """Sizes of one region; a symbolic size carries its hint, and its name in `symbols`."""

    symbols: Mapping[str, str] = field(default_factory=dict, hash=False, kw_only=True)

    @property
    def is_static(self) -> bool:
        return not self.symbols

    def text(self, name: str) -> str:
        """The size as reports show it: `512`, or `s0=512` where it is symbolic."""
        value = str(getattr(self, name))
        return f"{self.symbols[name]}={value}" if name in self.symbols else value

    def sizes(self) -> dict[str, int]:
        """The sizes by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "symbols"}


@dataclass(frozen=True)
class Rule(ABC):
    """What a region computes. Fields are str, int, float, bool, None or tuples of them, or spelled by the subclass."""

    kind: ClassVar[str]

    @abstractmethod
    def flops(self, shape: Any) -> int:
        """FLOP of the products, forward, a multiply and an add each counted."""

    @abstractmethod
    def elements(self, shape: Any) -> int:
        """Elements read and written once: inputs, weights and outputs."""

    @abstractmethod
    def summary(self, shape: Any) -> list[str]:
        """What a row of the report says, in parts: what it is, sizes, peculiarities."""

    def facts(self) -> dict[str, object]:
        """The facts by name, as `explain` exports them."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def spell(self) -> str:
        """One line, defaults left out; `parse` reads it back."""
        given = ((f, getattr(self, f.name)) for f in fields(self))
        return "; ".join(f"{f.name}={value!r}" for f, value in given if f.default is MISSING or value != f.default)

    @classmethod
    def parse(cls: type[Spelled], text: str) -> Spelled:
        """The rule that `text` spells. Raises: UsageError if it is not one."""
        known = {f.name for f in fields(cls)}
        given: dict[str, Any] = {}
        for part in filter(None, text.split("; ")):
            name, _, value = part.partition("=")
            if name not in known:
                raise UsageError(
                    f"parse the {cls.kind} rule {text!r}: found {name!r}, allowed are {', '.join(sorted(known))}."
                    + (did_you_mean(name, known) or " Spell rules with Rule.spell().")
                )
            try:
                given[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as exc:
                raise UsageError(
                    f"parse the {cls.kind} rule {text!r}: found {name}={value}, allowed is a literal. "
                    "Spell rules with Rule.spell()."
                ) from exc
        return cls(**given)

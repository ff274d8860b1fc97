"""What attnc raises, and how a message is put together.

A message has three parts: what was asked; what was found against what is allowed, with units; what to do.
A refusal to rewrite is a returned sentence and a failed match is a value: neither is an exception.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class AttncError(Exception):
    """Base of everything attnc raises on purpose."""


class UsageError(AttncError, ValueError):
    """The caller asked for something that does not exist, has the wrong type or lies out of range."""


class CaptureError(AttncError):
    """A graph could not be retraced to ATen or read."""


class LoweringError(AttncError):
    """A chosen form could not be turned into code for the device."""


class ArtifactError(AttncError):
    """A plan, record or exported file could not be written, read, or belongs to another version."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Name the known word nearest to `name` as a closing sentence, or nothing where none is near."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""

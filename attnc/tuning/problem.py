"""What there is to search: the settings of a form for one region on one device, and what trying one of them gives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from attnc.forms.base import Form

# How the time of a setting is found, cheapest first.
FIDELITIES = ("predict", "compile", "measure")


@dataclass(frozen=True)
class Outcome:
    """What trying a setting gave: seconds, or the sentence of its failure.

    error: relative spread of `seconds` where they were measured.
    """

    seconds: float | None = None
    failure: str | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.failure is None):
            raise ValueError(f"an outcome has either seconds or a failure, found {self.seconds!r} and {self.failure!r}")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ValueError(f"an outcome takes finite seconds above 0, found {self.seconds!r}")


class Problem(Protocol):
    """One region on one device. A problem that is tuned with several workers can be pickled."""

    @property
    def key(self) -> str:
        """The region's key: what is computed, in which sizes."""

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def kernel(self) -> str:
        """Hash of the kernel's source, before its knobs are set."""

    @property
    def shape(self) -> Mapping[str, int]:
        """The sizes that times are for."""

    def space(self) -> Sequence[Form]:
        """All valid settings, the default first."""

    def predict(self, form: Form) -> float:
        """Seconds by closed form; microseconds to call."""

    def compile(self, form: Form) -> Outcome:
        """Seconds refined by what an ahead-of-time compile shows; about a second to call."""

    def measure(self, form: Form) -> Outcome:
        """Seconds on the device, which is present; a failure where results are wrong."""

"""A predicted time with its interval: the type that every cost model gives, and bounds as they are kept in files.

    Estimate(1.23e-3, 0.98e-3, 1.55e-3)   "1.23 ms (0.98 to 1.55)"

An interval holds about 80% of what was measured of calls predicted in the same way.

Source: Lei et al. 2018, arXiv:1604.04173 (intervals from the errors of data left out of the fit).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


@dataclass(frozen=True)
class Estimate:
    """Seconds of one call, and the interval that holds about 80% of the measured ones."""

    seconds: float
    low: float
    high: float

    def __add__(self, other: Estimate) -> Estimate:
        """One after the other, as if all errors had one sign."""
        return Estimate(self.seconds + other.seconds, self.low + other.low, self.high + other.high)

    def __mul__(self, times: float) -> Estimate:
        return Estimate(self.seconds * times, self.low * times, self.high * times)

    def __str__(self) -> str:
        unit, scale = next(((u, s) for u, s in UNITS if self.seconds >= s), UNITS[-1])
        if self.seconds == inf:
            return "no time"
        low, mid, high = (f"{value / scale:.3g}" for value in (self.low, self.seconds, self.high))
        return f"{mid} {unit}" if low == high else f"{mid} {unit} ({low} to {high})"


@dataclass(frozen=True)
class Bounds:
    """Bounds on measured over predicted time, by regime: low[i], high[i] where edges[i - 1] <= share < edges[i].

    share: of the predicted time that is a launch, or what else its model says that does not depend on the size.
    """

    edges: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, stored: Mapping) -> Bounds:
        """The bounds of a table with the three names above."""
        return cls(tuple(stored["edges"]), tuple(stored["low"]), tuple(stored["high"]))

    def around(self, seconds: float, share: float = 0.0) -> Estimate:
        """`seconds` with its interval."""
        at = bisect_right(self.edges, share)
        return Estimate(seconds, seconds * self.low[at], seconds * self.high[at])


# Of a plain roofline on a GPU, which nobody fitted. Assumed, not measured.
PLAIN = Bounds((), (0.6,), (2.0,))

"""What a computation costs, as figures that add up.

Source: Williams, Waterman, Patterson 2009, "Roofline", doi:10.1145/1498765.1498785 (FLOP and bytes; exponentials and
launches beside them).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Work done by one engine: a kernel family with an efficiency of its own, see `cpu.toml`.

    flops: of matrix products. exps: exponentials and other element work on scores, in elements.
    bytes: moved from and to memory. launches: calls.
    """

    engine: str
    flops: float = 0.0
    exps: float = 0.0
    bytes: float = 0.0
    launches: int = 1


@dataclass(frozen=True)
class Cost:
    """A sum of works, one after the other."""

    works: tuple[Work, ...] = ()

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.works + other.works)

    @property
    def flops(self) -> float:
        return sum(w.flops for w in self.works)

    @property
    def exps(self) -> float:
        return sum(w.exps for w in self.works)

    @property
    def bytes(self) -> float:
        return sum(w.bytes for w in self.works)

    @property
    def launches(self) -> int:
        return sum(w.launches for w in self.works)

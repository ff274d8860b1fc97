"""The front of time and error: assignments of options to regions, tried end to end where that may change the choice.

Errors of regions are estimated to add up, or to do so in their squares, as where they point different ways. That is the
cheap fidelity: the fronts of both (`placement`), and of one setting everywhere, are bisected for what is the fastest
within the limit. Then NSGA-II asks for others, from those as its first generation, and only what is faster than the
best within it, and near it by the estimate that fits better, is run; the rest is told as estimated. NSGA-II because
options of a region are choices without a shape that a density of each could learn from a few dozen runs, and because
crossing two assignments that hold mixes their layers, which is what placement searches.

Source: Deb et al. 2002, "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II", IEEE TEC 6(2).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product

import optuna
from optuna.distributions import BaseDistribution, IntDistribution

from attnc.tuning.placement import Assignment, Option, additive_front, totals, undominated
from attnc.tuning.storage import quiet

CHECKS = 24  # assignments run at most
POWERS = (1, 2)  # of errors that add up
REACH = 8.0  # an estimate may exceed the limit by so much
NEAR = 1.5  # one that what was run has corrected, by so much
ASKED = 160  # assignments asked for at most
POPULATION = 16

Menus = Sequence[Sequence[Option]]


@dataclass(frozen=True)
class Tried:
    """An assignment that was run. errors: of the model's output, one per batch."""

    chosen: Assignment
    seconds: float
    errors: tuple[float, ...]

    @property
    def error(self) -> float:
        """The worst of the batches."""
        return max(self.errors, default=0.0)

    @property
    def bound(self) -> float:
        """The worst of the batches and their standard deviation: what other batches of the same sort are held to."""
        spread = statistics.stdev(self.errors) if len(self.errors) > 1 and math.isfinite(self.error) else 0.0
        return self.error + spread


@dataclass
class FrontSearch:
    """A search, from `search`. What it has tried stays, for other limits too.

    menus: (seconds, estimated error of the model's output) of the options of each region, the exact one first.
    run: the errors of the model's output with an assignment. constant: seconds beside the regions.
    uniform: one setting wherever it may be taken, an assignment for each: what is found is not worse than these.
    """

    menus: Menus
    run: Callable[[Assignment], Sequence[float]]
    constant: float = 0.0
    uniform: Sequence[Assignment] = ()
    seed: int = 0
    checks: int = CHECKS
    tried: dict[Assignment, Tried] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.exact: Assignment = (0,) * len(self.menus)
        self.tried[self.exact] = Tried(self.exact, self._seconds(self.exact), (0.0,))

    def search(self, limit: float) -> list[Tried]:
        """Try assignments for `limit`; returns those within it, the fastest first, the exact one the last at most."""
        before = len(self.tried)
        counts = [len(menu) for menu in self.menus]
        if math.prod(counts) <= self.checks:
            for chosen in product(*map(range, counts)):
                self._try(chosen)
        else:
            for power in POWERS:
                raised = [_raised(menu, power) for menu in self.menus]
                self._bisect(additive_front(raised, (REACH * limit) ** power), limit)
            alike = [self.exact, *self.uniform]
            best = undominated([(self._seconds(chosen), self._sum(chosen, 1)) for chosen in alike])
            self._bisect([alike[at] for at in best], limit)
            self._cross(limit, before + self.checks)
        held = [t for t in self.tried.values() if t.bound <= limit]
        return sorted(held, key=lambda t: (t.seconds, t.error))

    def front(self) -> list[Tried]:
        """Of all that was tried what nothing else beats in time and error, the slowest first."""
        tried = list(self.tried.values())
        return [tried[at] for at in undominated([(t.seconds, t.error) for t in tried])]

    def _seconds(self, chosen: Assignment) -> float:
        return self.constant + totals(self.menus, chosen)[0]

    def _try(self, chosen: Assignment) -> Tried:
        if chosen not in self.tried:
            self.tried[chosen] = Tried(chosen, self._seconds(chosen), tuple(self.run(chosen)))
        return self.tried[chosen]

    def _bisect(self, curve: Sequence[Assignment], limit: float) -> None:
        """Try assignments, slow and exact ones first, where what holds ends."""
        low, high = 0, len(curve) - 1
        if high <= 0 or self._try(curve[high]).bound <= limit:
            return
        while high - low > 1:
            middle = (low + high) // 2
            if self._try(curve[middle]).bound <= limit:
                low = middle
            else:
                high = middle

    def _cross(self, limit: float, most: int) -> None:
        """Let NSGA-II propose what the additive front does not see."""
        names: dict[str, BaseDistribution] = {
            f"region {n}": IntDistribution(0, len(menu) - 1) for n, menu in enumerate(self.menus) if len(menu) > 1
        }
        with quiet():
            sampler = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=self.seed)
            study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
            for chosen in list(self.tried):
                study.enqueue_trial({name: chosen[int(name.split()[1])] for name in names})
            for _ in range(ASKED):
                if len(self.tried) >= most:
                    break
                trial = study.ask(names)
                given = [trial.params.get(f"region {n}", 0) for n in range(len(self.menus))]
                study.tell(trial, self._values(tuple(given), limit))

    def _values(self, chosen: Assignment, limit: float) -> Option:
        """Seconds and error of an assignment, run where it may be the choice, else as estimated."""
        seconds, error = self._seconds(chosen), self._estimate(chosen)
        best = min(t.seconds for t in self.tried.values() if t.bound <= limit)
        if chosen in self.tried or (seconds < best and error <= NEAR * limit):
            error = self._try(chosen).error
        return seconds, min(error, 1e9)

    def _estimate(self, chosen: Assignment) -> float:
        """The error by the power that fits what was run better, times what such an estimate was off by."""
        fits = []
        for power in POWERS:
            pairs = [(t.error, self._sum(t.chosen, power)) for t in self.tried.values()]
            ratios = [math.log(found / sum_) for found, sum_ in pairs if sum_ > 0 and 0 < found < math.inf]
            middle = statistics.median(ratios) if ratios else 0.0
            spread = statistics.pstdev(ratios) if ratios else 0.0
            fits.append((spread, power, math.exp(middle)))
        _, power, factor = min(fits)
        return self._sum(chosen, power) * factor

    def _sum(self, chosen: Assignment, power: int) -> float:
        taken = (menu[at][1] for menu, at in zip(self.menus, chosen, strict=True))
        return math.fsum(error**power for error in taken) ** (1 / power)


def _raised(menu: Sequence[Option], power: int) -> list[Option]:
    return [(seconds, error**power) for seconds, error in menu]

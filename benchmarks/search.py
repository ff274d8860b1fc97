"""How much of a space must be tried until a setting within 2% of the best is found?

12 attentions on 6 GPUs (`tests/tuning/landscapes.py`: tiles with occupancy cliffs, 128 to 10,440 valid settings), each
sampler at two fidelities: the closed form alone, and the compile with the closed form below it, whose registers differ
from what the closed form guesses. A space that is not solved within a tenth of its settings counts as missed. Writes
results/cpu/search.json.

    python benchmarks/search.py [--samplers gp,tpe,random] [--fidelities predict,compile] [--seeds 1] [--every 1]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from timing import print_environment, write_result

from attnc.tuning.samplers import SAMPLERS
from attnc.tuning.search import Progress, Search, Settings
from tests.tuning.landscapes import CASES, CHIPS, Landscape

WITHIN, SHARE, FEWEST = 1.02, 0.1, 300


class Reached(Exception):
    """The search has what it was after."""


@dataclass
class Until:
    """Ends a search once its best is below `limit_s`."""

    limit_s: float
    trials: int = 0

    def __call__(self, step: Progress) -> None:
        self.trials = step.trials
        if step.best_s is not None and step.best_s <= self.limit_s:
            raise Reached


def best_seconds(problem: Landscape, fidelity: str) -> float:
    if fidelity == "predict":
        return min(problem.predict(form) for form in problem.space())
    return min(problem.compile(form).seconds or float("inf") for form in problem.space())


def row(problem: Landscape, fidelity: str, sampler: str, seed: int) -> dict[str, object]:
    """Trials until within 2% of the best; None where a tenth of the space did not suffice."""
    size, best = len(problem.space()), best_seconds(problem, fidelity)
    until = Until(WITHIN * best)
    settings = Settings(
        trials=max(1, int(size * SHARE)), fidelity=fidelity, sampler=sampler, seed=seed, storage="memory"
    )
    began = time.perf_counter()
    try:
        Search(problem, settings, on_progress=until).run()
        reached = None
    except Reached:
        reached = until.trials
    return {
        "case": str(problem.case), "device": problem.device, "fidelity": fidelity, "sampler": sampler, "seed": seed,
        "settings": size, "trials": reached, "share": None if reached is None else reached / size,
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def print_table(rows: list[dict[str, object]]) -> None:
    groups = defaultdict(list)
    for found in rows:
        groups[found["fidelity"], found["sampler"]].append(found)
    print(
        f"{'fidelity':10}{'sampler':12}{'solved':>10}{'of >= 300':>12}{'median':>9}{'90th':>9}{'worst':>9}  missed count as 10%"
    )
    for (fidelity, sampler), group in groups.items():
        large = [r for r in group if r["settings"] >= FEWEST]
        shares = sorted(SHARE if r["share"] is None else r["share"] for r in group)
        solved = [f"{sum(r['trials'] is not None for r in part)}/{len(part)}" for part in (group, large)]
        figures = (statistics.median(shares), shares[int(0.9 * (len(shares) - 1))], shares[-1])
        print(
            f"{fidelity:10}{sampler:12}{solved[0]:>10}{solved[1]:>12}" + "".join(f"{100 * f:>8.2f}%" for f in figures)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samplers", default=",".join(SAMPLERS))
    parser.add_argument("--fidelities", default="predict,compile")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--every", type=int, default=1, help="take every n-th landscape only, and write nothing")
    args = parser.parse_args()
    before = print_environment()
    problems = [Landscape(case, chip) for case in CASES for chip in CHIPS][:: args.every]
    rows = [
        row(problem, fidelity, sampler, seed)
        for fidelity in args.fidelities.split(",")
        for sampler in args.samplers.split(",")
        for seed in range(args.seeds)
        for problem in problems
    ]
    print_table(rows)
    if args.every == 1:
        write_result("search", before, vars(args), rows)


if __name__ == "__main__":
    main()

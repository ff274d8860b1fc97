"""How much of a space must be tried until a setting within 2% of the best is found?

12 attentions on 6 GPUs (`tests/tuning/landscapes.py`: tiles with occupancy cliffs, 128 to 10,440 valid settings), each
sampler at two fidelities: the closed form alone, and the compile with the closed form below it, whose registers differ
from what the closed form guesses. A search ends at a tenth of the settings, or at 200; what it has not solved by then
counts as missed. Writes results/cpu/search.json.

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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from timing import print_environment, print_table, write_result

from attnc.tuning.samplers import SAMPLERS
from attnc.tuning.search import Progress, Search, Settings
from tests.tuning.landscapes import CASES, CHIPS, Landscape

WITHIN, SHARE, MOST = 1.02, 0.1, 200
FEWEST = 300  # settings of a space that the goal speaks of


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


def row(problem: Landscape, fidelity: str, sampler: str, seed: int) -> dict[str, Any]:
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


def summary(rows: list[dict[str, Any]]) -> list[list[object]]:
    """A line per fidelity and sampler; what was missed counts as a tenth of the space."""
    groups = defaultdict(list)
    for found in rows:
        groups[found["fidelity"], found["sampler"]].append(found)
    lines: list[list[object]] = []
    for names, group in groups.items():
        large = [r for r in group if r["settings"] >= FEWEST]
        shares = sorted(SHARE if r["share"] is None else r["share"] for r in group)
        solved = [f"{sum(r['trials'] is not None for r in part)}/{len(part)}" for part in (group, large)]
        figures = (statistics.median(shares), shares[int(0.9 * (len(shares) - 1))], shares[-1])
        lines.append([*names, *solved, *(f"{100 * f:.2f}%" for f in figures)])
    return lines


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
    print_table(("fidelity", "sampler", "solved", f"of >= {FEWEST}", "median", "90th", "worst"), summary(rows))
    if args.every == 1:
        write_result("search", before, vars(args), rows)


if __name__ == "__main__":
    main()

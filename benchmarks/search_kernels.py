"""How close does tuning come to the best setting of a real kernel's space, and after how many evaluations?

12 attentions on 6 GPUs, the spaces of attnc's own Triton kernels (`attnc.tuning.flash`), none of the GPUs present. Each
search may try a tenth of the space, at most 200 settings; its best is held against the exhaustive best of the same
fidelity, with random search beside it. By closed form for all; by ahead-of-time compile for the spaces of 300 to 530
settings counted by --compile, the smallest first (thousands of compiles: about half an hour on 2 cores, kept in the
store). Writes results/cpu/search_kernels.json.

    python benchmarks/search_kernels.py [--compile 6] [--workers 2] [--seed 0]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

from timing import print_environment, print_table, write_result

from attnc.codegen.compile_stats import compile_many
from attnc.region import AttentionRegion
from attnc.rule_attention import AttentionRule, AttentionShape
from attnc.tuning.flash import FlashProblem
from attnc.tuning.problems import problems_in
from attnc.tuning.samplers import DEFAULT
from attnc.tuning.search import Search, Settings

DEVICES = ("a100", "h100", "b200", "l40s", "rtx5090", "mi300x")
FULL, CAUSAL = "score=0.088 * s", "score=0.088 * s; keep=j - i <= 0"
WINDOW = CAUSAL + " and i - j <= 1023"
SOFTCAP = "score=50.0 * tanh(0.00177 * s); keep=j - i <= 0"
DOCUMENTS = CAUSAL + " and t0[b, i] - t0[b, j] == 0"
# name: rule, (B, Hq, H, L, S, E, Ev), captured tensors
ATTENTIONS = {
    "full, d 128": (FULL, (4, 32, 32, 2048, 2048, 128, 128), ()),
    "full, d 64": (FULL, (16, 12, 12, 512, 512, 64, 64), ()),
    "vision, d 80": (FULL, (8, 16, 16, 1024, 1024, 80, 80), ()),
    "causal, d 128, groups of 4": (CAUSAL, (4, 32, 8, 8192, 8192, 128, 128), ()),
    "causal, d 64": (CAUSAL, (4, 32, 32, 4096, 4096, 64, 64), ()),
    "causal, d 256": (CAUSAL, (2, 16, 8, 4096, 4096, 256, 256), ()),
    "causal, 192 / 128": (CAUSAL, (1, 16, 16, 4096, 4096, 192, 128), ()),
    "window 1024, d 128": (WINDOW, (1, 32, 8, 32768, 32768, 128, 128), ()),
    "softcap, d 128": (SOFTCAP, (2, 16, 8, 4096, 4096, 128, 128), ()),
    "documents, d 64": (DOCUMENTS, (4, 32, 8, 4096, 4096, 64, 64), ("int64[4, 4096]",)),
    "decode 8k, d 128": (FULL, (16, 32, 8, 1, 8192, 128, 128), ()),
    "decode 64k, one key head": (FULL, (1, 64, 1, 1, 65536, 128, 128), ()),
}
WITHIN, SHARE, MOST, FEWEST, LARGEST = 1.02, 0.1, 200, 300, 530


def problems() -> list[tuple[str, FlashProblem]]:
    found = []
    for name, (rule, sizes, captured) in ATTENTIONS.items():
        region = AttentionRegion(
            path=name, node="", rule=AttentionRule.parse(rule), shape=AttentionShape(*sizes), dtype="bfloat16",
            device="cuda", written="sdpa", captured=captured,
        )  # fmt: skip
        found += [(name, problem) for problem in problems_in([region], DEVICES)]
    return found


def times(problem: FlashProblem, fidelity: str, workers: int) -> dict[str, float]:
    """Seconds of every setting that works, by spelling."""
    space = problem.space()
    if fidelity == "compile":  # fills the store, two at a time; what follows reads it
        assert problem.gpu.target is not None
        compile_many([job for form in space for job in problem.jobs(form, problem.gpu.target)], workers=workers)
    found = {}
    for form in space:
        seconds = problem.predict(form) if fidelity == "predict" else problem.compile(form).seconds
        if seconds is not None:
            found[form.spell()] = seconds
    return found


def row(name: str, problem: FlashProblem, fidelity: str, seed: int, workers: int) -> dict[str, Any]:
    """Best of each sampler over the exhaustive best, and what the default is worth."""
    began = time.perf_counter()
    known = times(problem, fidelity, workers)
    exhaustive_s, best, size = time.perf_counter() - began, min(known.values()), len(problem.space())
    budget = max(1, min(MOST, int(size * SHARE)))
    result: dict[str, Any] = {
        "attention": name, "device": problem.device, "fidelity": fidelity,
        "settings": size, "failed": size - len(known),
        "budget": budget, "best_s": best, "default": known.get(problem.space()[0].spell(), float("inf")) / best,
        "exhaustive_s": exhaustive_s,
    }  # fmt: skip
    for sampler in (DEFAULT, "random"):
        began = time.perf_counter()
        asked = Settings(trials=budget, fidelity=fidelity, sampler=sampler, seed=seed, storage="memory")
        timings = Search(problem, asked).run().timings
        held = [t.at(fidelity) for t in timings.values()]
        result[sampler] = min(s for s in held if s is not None) / best
        result[f"{sampler}_s"] = time.perf_counter() - began
    return result


def summary(rows: Sequence[dict[str, Any]]) -> list[list[object]]:
    lines: list[list[object]] = []
    for fidelity in ("predict", "compile"):
        held = [r for r in rows if r["fidelity"] == fidelity and r["settings"] >= FEWEST]
        for sampler in (DEFAULT, "random") if held else ():
            ratios = [r[sampler] for r in held]
            solved = sum(ratio <= WITHIN for ratio in ratios)
            lines.append([
                fidelity, sampler, len(held), f"{solved / len(held):.0%}", f"{statistics.median(ratios):.3f}",
                f"{max(ratios):.3f}", f"{statistics.median(r['default'] for r in held):.3f}",
                f"{max(r[f'{sampler}_s'] for r in held):.0f}",
            ])  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    before = print_environment()
    every = problems()
    rows = [row(name, problem, "predict", args.seed, args.workers) for name, problem in every]
    small = [(n, p) for n, p in every if FEWEST <= len(p.space()) <= LARGEST]
    small.sort(key=lambda found: (str(found[1].gpu.target).startswith("hip"), len(found[1].space())))  # hip: 4 s each
    for name, problem in small[: args.compile]:
        rows.append(row(name, problem, "compile", args.seed, args.workers))
        print(rows[-1], flush=True)
        write_result("search_kernels", before, vars(args), rows)
    head = ["fidelity", "sampler", "spaces", "within 2%", "median", "worst", "default", "longest s"]
    print_table(head, summary(rows))
    write_result("search_kernels", before, vars(args), rows)


if __name__ == "__main__":
    main()

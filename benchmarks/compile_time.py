"""What does attnc add to the time a compile takes, cold and with warm caches?

Each compile happens in a process of its own: cold with empty caches (Inductor's and attnc's store), warm in a second
process on the same caches. Seconds of a compile are those of the first call less those of a later one; loading torch
and the model is not counted. Dense llama: Inductor beside attnc on the same spelling. Windowed mistral and gemma2:
Inductor on hand-written FlexAttention beside attnc on sdpa and eager. Writes results/cpu/compile_time.json.

    python benchmarks/compile_time.py [--only mistral] [--length N] [--rounds 3]
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timing import in_fresh_process, print_environment, print_table, write_result
from variants import Ready, Variant, arguments, failure_of, number, say

import attnc

# Question: the variant whose compile time is the measure, and those held against it.
CASES = {
    "llama": (Variant("llama", "sdpa", "inductor"), [Variant("llama", "sdpa", "attnc")]),
    "llama_eager": (Variant("llama", "eager", "inductor"), [Variant("llama", "eager", "attnc")]),
    "mistral": (
        Variant("mistral", "flex_attention", "inductor", 4096),
        [Variant("mistral", "sdpa", "attnc", 4096), Variant("mistral", "eager", "attnc", 4096)],
    ),
    "gemma2": (Variant("gemma2", "flex_attention", "inductor"), [Variant("gemma2", "eager", "attnc")]),
}


def compile_once(variant: Variant, threads: int) -> dict[str, Any]:
    """Compile `variant` in this process, which has compiled nothing yet."""
    torch.set_num_threads(threads)
    Ready(replace(variant.reference, length=16)).run()  # libraries wake up on a short run of the uncompiled model
    ready = Ready(variant)
    start = time.perf_counter()
    ready.run()
    first = time.perf_counter() - start
    later = []
    for _ in range(2):
        start = time.perf_counter()
        ready.run()
        later.append(time.perf_counter() - start)
    report = attnc.last_report(ready.compiled) if variant.compiler == "attnc" else None
    return {
        "compile_s": first - min(later),
        "first_call_s": first,
        "later_call_s": min(later),
        "caches": cache_counters(),
        "passes": dict(report.timings) if report else {},
        "forms": ready.forms(),
    }


def cache_counters() -> dict[str, int]:
    """Hits, misses and bypasses of Inductor's and AOTAutograd's graph caches in this process."""
    counters = torch._dynamo.utils.counters
    return {
        name: count
        for group in ("inductor", "aot_autograd")
        for name, count in counters[group].items()
        if "cache" in name and name.rsplit("_", 1)[-1] in ("hit", "miss", "bypass")
    }


def cold_and_warm(variant: Variant, threads: int) -> dict[str, dict[str, Any]]:
    """Two processes, one after the other, on caches that were empty."""
    with tempfile.TemporaryDirectory(prefix="attnc_compile_time_", ignore_cleanup_errors=True) as caches:
        places = {"TORCHINDUCTOR_CACHE_DIR": str(Path(caches) / "inductor"), "ATTNC_STORE": str(Path(caches) / "attnc")}
        found = {}
        for state in ("cold", "warm"):
            say(f"{variant.architecture} at {variant.size}: {variant.name}, {state}")
            found[state] = in_fresh_process(compile_once, variant, threads, environment=places)
        return found


def measure(case: str, rounds: int, threads: int, changes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each variant and state; variants take turns, and a ratio is of medians."""
    yardstick, others = CASES[case]
    variants = [replace(v, **changes) for v in (yardstick, *others)]
    taken: dict[Variant, list[dict[str, dict[str, Any]]]] = {v: [] for v in variants}
    failures: dict[Variant, str] = {}
    for _ in range(rounds):
        for v in variants:
            if v in failures:
                continue
            try:
                taken[v].append(cold_and_warm(v, threads))
            except Exception as exc:  # noqa: BLE001  # the other variants still count; the traceback is shown
                traceback.print_exc()
                failures[v] = failure_of(exc)
    rows = []
    for state in ("cold", "warm"):
        measured = median(taken[variants[0]], state)
        for v in variants:
            seconds = median(taken[v], state)
            last = taken[v][-1][state] if taken[v] else {}
            rows.append(
                {
                    "case": case,
                    "variant": v.name,
                    "tokens": v.size,
                    "state": state,
                    "compile_s": None if math.isnan(seconds) else seconds,
                    "all_s": [run[state]["compile_s"] for run in taken[v]],
                    "ratio": None if math.isnan(seconds / measured) else seconds / measured,
                    "added_s": None if math.isnan(seconds - measured) else seconds - measured,
                    **{name: last.get(name, {}) for name in ("caches", "passes", "forms")},
                    "failure": failures.get(v, ""),
                }
            )
    return rows


def median(runs: Sequence[Mapping[str, Mapping[str, Any]]], state: str) -> float:
    return statistics.median(run[state]["compile_s"] for run in runs) if runs else math.nan


def print_cases(rows: Sequence[Mapping[str, Any]]) -> None:
    table = []
    for r in rows:
        figures = [number(math.nan if r[k] is None else r[k], ".2f") for k in ("compile_s", "ratio", "added_s")]
        own = number(sum(r["passes"].values()) or math.nan, ".2f")
        caches = ", ".join(f"{name} {count}" for name, count in r["caches"].items()) or "-"
        table.append([r["case"], r["state"], r["variant"], *figures, own, r["failure"] or caches])
    print_table(["case", "state", "variant", "compile s", "ratio", "added s", "attnc's own s", "graph caches"], table)
    for r in rows:
        if r["passes"]:
            passes = ", ".join(f"{name} {seconds:.3f}" for name, seconds in r["passes"].items())
            print(f"attnc's seconds by pass, {r['case']} {r['variant']} {r['state']}: {passes}")


def main() -> None:
    args = arguments(__doc__ or "", rounds=3, names=list(CASES)).parse_args()
    torch.set_num_threads(args.threads)
    before = print_environment()
    changes = {key: getattr(args, key) for key in ("length", "layers", "window") if getattr(args, key) is not None}
    rows = []
    for case in args.only:
        found = measure(case, args.rounds, args.threads, changes)
        print_cases(found)
        rows += found
        if not args.dry:
            write_result("compile_time", before, vars(args), rows)


if __name__ == "__main__":
    main()

"""Which chunk size is fastest for a recurrence: measured on this CPU, predicted for GPUs, beside measured GPU kernels?

    python benchmarks/recurrence_tuning.py cpu         ms of each chunk size, and what the default loses to the best
    python benchmarks/recurrence_tuning.py gpus        us of each chunk size with its best tiles by closed form; for the
                                                       best of all also by what the compiler makes of its kernels
    python benchmarks/recurrence_tuning.py measured    the same for the shapes of shared/measurements, H100: gated and
                                                       Kimi delta rule, chunked prefill (stage scan); `alike`: kernels
                                                       of flash-linear-attention, `fastest`: of any library

Whole: `python benchmarks/recurrence_tuning.py all --measured-folder ../shared/measurements`, on an idle machine (about
ten minutes, half of it compiles, which are kept in the store). Mixers are those of `attnc.tuning.measure_recurrence`,
forward, batch 1; float32 on the CPU, bf16 on GPUs. Times on the CPU are the median of repeated runs, checked against
the core in float64 first. Writes results/cpu/recurrence_tuning.json, each part under its name.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timing import RESULTS, ROOT, print_environment, print_table, write_result

from attnc.cost_models.device import device_named
from attnc.forms.chunked import Chunked
from attnc.forms.recurrent import STEPS
from attnc.region import Region
from attnc.rule_recurrence import RecurrenceRule, RecurrenceShape
from attnc.tuning.recurrence import RecurrenceProblem, recurrence_problem

DELTA = RecurrenceRule(decay="token", delta=True, gate="write", qk_norm=1e-6, scale=128**-0.5, chunk=64)
# name: rule, heads of values, heads of keys, K, V
MIXERS = {
    "gated_delta": (DELTA, 16, 16, 128, 128),
    "kda": (replace(DELTA, decay="channel"), 16, 16, 128, 128),
    "mamba2": (RecurrenceRule(decay="token", gate="write", chunk=256), 24, 1, 128, 64),
    "gla": (RecurrenceRule(decay="channel", chunk=64), 4, 4, 128, 256),
    "lightning": (RecurrenceRule(decay="head", chunk=256), 16, 16, 128, 128),
}
ALIKE = {"chunk_gated_delta_rule": "gated_delta", "chunk_kda": "kda"}  # kernels in Triton, of the same three parts
GPUS = ("h100", "h200", "a100", "mi300x")
CPU_LENGTHS, GPU_LENGTHS = (1024, 4096), (2048, 8192, 32768)


def region(name: str, length: int, dtype: str, batch: int = 1, heads: tuple[int, int] | None = None) -> Region:
    rule, H, Hk, K, V = MIXERS[name]
    H, Hk = heads or (H, Hk)
    return Region(name, "", rule, RecurrenceShape(batch, H, length, K, V, Hk), dtype, "cpu")


def problem(where: Region, device: str) -> RecurrenceProblem:
    found = recurrence_problem(where, device_named(device))
    assert found is not None, (where.path, device)
    return found


# The parts.


def cpu(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name in args.only:
        for length in args.lengths or CPU_LENGTHS:
            p = problem(region(name, length, "float32"), "cpu")
            found = {form.chunk_size: p.measure(form) for form in p.space() if isinstance(form, Chunked)}
            ms = {size: math.nan if o.seconds is None else 1e3 * o.seconds for size, o in sorted(found.items())}
            default, best = p.start.chunk_size, min(ms, key=lambda size: ms[size])
            rows.append({
                "mixer": name, "length": length, "ms": ms, "spread": {n: o.error for n, o in sorted(found.items())},
                "default": default, "best": best, "loss": ms[default] / ms[best] - 1,
                "failures": [o.failure for o in found.values() if o.failure],
            })  # fmt: skip
            _print("ms", rows[-1:])
    return rows


def gpus(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for device in args.devices:
        for name in args.only:
            rows += [
                _predicted(region(name, length, "bfloat16"), device, args) for length in args.lengths or GPU_LENGTHS
            ]
            _print("us", rows[-len(args.lengths or GPU_LENGTHS) :])
    return rows


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    import pandas as pd

    table = pd.read_parquet(args.measured_folder / "gdn.parquet")
    table = table[(table.gpu == "h100") & (table.stage == "scan") & (table.seq > STEPS)]  # fewer tokens go step by step
    alike = table[table.kernel.isin(ALIKE)]
    rows = []
    for call in alike.iloc[:: max(1, len(alike) // args.calls)].itertuples():
        name = ALIKE[str(call.kernel)]
        if name not in args.only:
            continue
        where = region(name, int(call.seq), "bfloat16", int(call.batch), (int(call.v_heads), int(call.k_heads)))
        same = table.variant == call.variant
        for column in ("seq", "batch", "v_heads", "k_heads"):
            same &= table[column] == getattr(call, column)
        row = _predicted(where, "h100", args)
        rows.append({**row, "alike_us": float(call.latency_us), "fastest_us": float(table[same].latency_us.min())})
    _print("us", rows)
    ratios = sorted(row["closed_us"] / row["alike_us"] for row in rows)
    if ratios:
        middle = ratios[len(ratios) // 2]
        print(f"closed form over kernels in Triton: median {middle:.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}")
    return rows


def _predicted(where: Region, device: str, args: argparse.Namespace) -> dict[str, Any]:
    """Best tiles of each chunk size by closed form; the best of all compiled, with what the kernels need."""
    p = problem(where, device)
    us: dict[int, float] = {}
    best, least = p.start, math.inf
    for form in p.space():
        assert isinstance(form, Chunked)
        seconds = p.predict(form)
        us[form.chunk_size] = min(us.get(form.chunk_size, math.inf), 1e6 * seconds)
        if seconds < least:
            best, least = form, seconds
    outcome = p.compile(best) if args.compile else None
    return {
        "device": device, "mixer": where.path, "length": where.shape.L, "batch": where.shape.B,
        "heads": [where.shape.H, where.shape.Hk], "us": dict(sorted(us.items())), "settings": len(p.space()),
        "default": p.start.spell(), "default_us": 1e6 * p.predict(p.start), "best": best.spell(),
        "closed_us": 1e6 * least,
        "compiled_us": None if outcome is None or outcome.seconds is None else 1e6 * outcome.seconds,
        "failure": None if outcome is None else outcome.failure,
    }  # fmt: skip


def _print(unit: str, rows: list[dict[str, Any]]) -> None:
    sizes = sorted({size for row in rows for size in row[unit]})
    rest = [key for key in ("closed_us", "compiled_us", "alike_us", "fastest_us", "loss") if rows and key in rows[0]]
    cells = [
        [row.get("device", "cpu"), row["mixer"], row["length"], row.get("batch", 1)]
        + [_digits(row[unit].get(size)) for size in sizes]
        + [row["best"], *(_digits(row[key]) for key in rest)]
        for row in rows
    ]
    print_table(["device", "mixer", "length", "batch", *(f"{n}, {unit}" for n in sizes), "best", *rest], cells)


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


PARTS = {"cpu": cpu, "gpus": gpus, "measured": measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--only", nargs="+", default=list(MIXERS), choices=MIXERS)
    parser.add_argument("--devices", nargs="+", default=GPUS)
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--calls", type=int, default=40, help="measured calls to compare with, evenly from the table")
    parser.add_argument("--measured-folder", type=Path, default=ROOT.parent / "shared" / "measurements")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    before = print_environment()
    made = {name: PARTS[name](args) for name in (PARTS if args.part == "all" else [args.part])}
    if args.dry:
        return
    path = RESULTS / "cpu" / "recurrence_tuning.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}
    parts = {name: {"environment": before, "rows": rows} for name, rows in made.items()}
    write_result("recurrence_tuning", before, vars(args), {**kept, **parts})


if __name__ == "__main__":
    main()

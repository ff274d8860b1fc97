"""Which chunk size is fastest for a recurrence: measured on this CPU, predicted for GPUs, beside measured GPU kernels?

    python benchmarks/recurrence_tuning.py cpu         ms of each chunk size, and what the default loses to the best
    python benchmarks/recurrence_tuning.py gpus        us of each chunk size with its best tiles by closed form; for the
                                                       best of all also by what the compiler makes of its kernels
    python benchmarks/recurrence_tuning.py predicted   us of forward, and with backward, of seven mixers on GPUs that
                                                       are not here, batch 4, 16 heads, from compiled kernels; one
                                                       setting for all lengths, the best by closed form at 8,192 tokens
    python benchmarks/recurrence_tuning.py measured    the same for the shapes of shared/measurements, H100: gated and
                                                       Kimi delta rule, chunked prefill (stage scan); `alike`: kernels
                                                       of flash-linear-attention, `fastest`: of any library

Whole: `python benchmarks/recurrence_tuning.py all --measured-folder ../shared/measurements`, on an idle machine (about
ten minutes, half of it compiles, which are kept in the store). Mixers are those of `attnc.tuning.measure_recurrence`,
forward, batch 1; float32 on the CPU, bf16 on GPUs. Times on the CPU are the median of repeated runs, checked against
the core in float64 first. Writes results/cpu/recurrence_tuning.json, each part under its name; `predicted` and the
chunk sizes of `gpus` as results/predicted/recurrence.json and .txt.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from timing import RESULTS, ROOT, print_environment, print_table, write_part

from attnc.cost_models.device import device_named
from attnc.forms.base import Form
from attnc.forms.chunked import Chunked
from attnc.forms.recurrent import STEPS
from attnc.region import Region
from attnc.rule_recurrence import RecurrenceRule, RecurrenceShape
from attnc.tuning.problem import Outcome
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
BATCH, HEADS, STATES = 4, 16, 128  # of `predicted`; rows of the state of Mamba-2
SYSTEMS = {
    "linear": RecurrenceRule(scale=128**-0.5),
    "lightning": MIXERS["lightning"][0],
    "gla": MIXERS["gla"][0],
    "delta_net": replace(DELTA, decay="none"),
    "gated_delta": DELTA,
    "kda": MIXERS["kda"][0],
    "mamba2": MIXERS["mamba2"][0],
}
WIDTHS, CHOSEN_AT = (64, 128), 8192
ALIKE = {"chunk_gated_delta_rule": "gated_delta", "chunk_kda": "kda"}  # kernels in Triton, of the same three parts
GPUS = ("h100", "h200", "a100", "mi300x")
CPU_LENGTHS, GPU_LENGTHS, PREDICTED = (1024, 4096), (2048, 8192, 32768), (2048, 4096, 8192, 16384, 32768)


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


def predicted(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Kept after each device: there are hundreds of kernels to compile, which the store keeps too."""
    rows, known = [], _measured_by_fla(args.measured_folder)
    for device in args.devices:
        own = []
        for name in SYSTEMS:
            for width in WIDTHS:
                own += _times(name, width, device, known, args)
                _print_times(own[-len(PREDICTED) :])
        if not args.dry:
            keep_predicted({"predicted": {"environment": print_environment(), "rows": own}})
        rows += own
    return rows


def system(name: str, width: int, length: int, training: bool) -> Region:
    K, keys = (STATES, 1) if name == "mamba2" else (width, HEADS)
    shape = RecurrenceShape(BATCH, HEADS, length, K, width, keys)
    return Region(name, "", SYSTEMS[name], shape, "bfloat16", "cuda", training=training)


@cache
def _setting(name: str, width: int, target: str | None) -> Form:
    """Best with its backward by closed form, on the first device of a target."""
    device = next(d for d in GPUS if device_named(d).target == target)
    at = problem(system(name, width, CHOSEN_AT, True), device)
    return min(at.space(), key=at.predict)


def _times(
    name: str, width: int, device: str, known: dict[tuple[str, int, str, int], float], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of one mixer on one device, by length."""
    best, rows = _setting(name, width, device_named(device).target), []
    for length in PREDICTED:
        row = {"device": device, "mixer": name, "width": width, "length": length, "setting": best.spell()}
        row["compiled"] = args.compile
        for column, training in (("forward", False), ("both", True)):
            p = problem(system(name, width, length, training), device)
            outcome = p.compile(best) if args.compile else Outcome(p.predict(best))
            held = p.estimate(best, outcome.seconds, compiled=args.compile) if outcome.seconds else None
            row |= {
                f"{column}_us": outcome.seconds and 1e6 * outcome.seconds,
                f"{column}_closed_us": 1e6 * p.predict(best),
                f"{column}_interval_us": held and [1e6 * held.low, 1e6 * held.high],
                f"{column}_failure": outcome.failure,
            }
        rows.append(row | {"fla_us": known.get((name, width, device, length))})
    return rows


def _measured_by_fla(folder: Path) -> dict[tuple[str, int, str, int], float]:
    """Forward of flash-linear-attention's kernels at the very same sizes, us; the table has them for the H100 alone."""
    if not (folder / "gdn.parquet").exists():
        return {}
    import pandas as pd

    table = pd.read_parquet(folder / "gdn.parquet")
    table = table[(table.stage == "scan") & table.kernel.isin(ALIKE) & (table.batch == BATCH)]
    table = table[(table.v_heads == HEADS) & (table.k_heads == HEADS) & (table.head_k_dim == table.head_v_dim)]
    return {
        (ALIKE[str(r.kernel)], int(r.head_v_dim), str(r.gpu), int(r.seq)): float(r.latency_us)
        for r in table.itertuples()
    }


def _print_times(rows: Sequence[dict[str, Any]]) -> None:
    cells = [
        [r["device"], r["mixer"], r["width"], r["length"], _digits(r["forward_us"]), _digits(r["both_us"])]
        + [_digits(r["fla_us"]), r["setting"], "compiled" if r.get("compiled", True) else "closed form"]
        for r in rows
    ]
    heads = ["device", "mixer", "width", "length", "forward us", "with backward us", "fla forward us, measured"]
    print_table([*heads, "setting", "from"], cells)


def keep_predicted(parts: dict[str, Any]) -> None:
    """results/predicted/recurrence.json and .txt; parts, and in them devices, that this run did not make stay."""
    folder = RESULTS / "predicted"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recurrence.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, part in parts.items():
        made = {row["device"] for row in part["rows"]}
        before = [row for row in kept.get(name, {}).get("rows", ()) if row["device"] not in made]
        kept[name] = {**part, "rows": before + part["rows"]}
    path.write_text(json.dumps(kept, indent=1, default=str) + "\n", encoding="utf-8")
    shown: dict[str, Callable[[list[dict[str, Any]]], None]] = {
        "predicted": _print_times,
        "gpus": lambda rows: _print("us", [{**r, "us": {int(n): t for n, t in r["us"].items()}} for r in rows]),
    }
    with redirect_stdout(text := io.StringIO()):
        for name in (n for n in shown if n in kept):
            print(f"{name}: {TITLES[name]}")
            shown[name](kept[name]["rows"])
            print()
    path.with_suffix(".txt").write_text(text.getvalue(), encoding="utf-8")
    print(f"written: {path} and .txt")


TITLES = {
    "predicted": f"batch {BATCH}, {HEADS} heads, bf16, state width x width (Mamba-2: {STATES} x width, one head of\n"
    "keys). From compiled kernels where it says so, nothing measured; fla: shared/measurements/gdn.parquet, the\n"
    "Triton kernels of flash-linear-attention in sglang on an H100, where the sizes are the same.",
    "gpus": "us of each chunk size with its best tiles by closed form, batch 1, forward, sizes as in `MIXERS`; the\n"
    "best of all also from its compiled kernels.",
}


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


PARTS = {"cpu": cpu, "gpus": gpus, "predicted": predicted, "measured": measured}


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
    if "gpus" in made:
        keep_predicted({"gpus": {"environment": before, "rows": made["gpus"]}})
    if parts := {name: rows for name, rows in made.items() if name not in TITLES}:
        write_part("recurrence_tuning", before, vars(args), parts)


if __name__ == "__main__":
    main()

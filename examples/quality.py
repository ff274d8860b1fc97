"""What approximations of attention cost in quality and save in time, on the trained model of bytes.

    python examples/quality.py [table]     loss, recall, needle, error and time of five families at four budgets
    python examples/quality.py predicted   predicted times of one layer of a large model on GPUs that are not here
    python examples/quality.py budgets     ten random error budgets: does each hold on other texts, what does it save?
    python examples/quality.py all         the three

Rows of the first are the exact model and the same weights with one setting in every layer, without any training for it:
a row may keep a half to a sixteenth of the CONTEXT keys. Prints tables in Markdown, and keeps them as
benchmarks/results/cpu/quality.json and benchmarks/results/predicted/quality.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from byte_model import CONTEXT, WEIGHTS, new_model, trained_model
from quality_budgets import BUDGETS, PART, budgets
from quality_runs import (
    BLOCK,
    DECODED,
    DEVICES,
    FAMILIES,
    HEADS,
    KEY_HEADS,
    LENGTHS,
    SHARES,
    WIDTH,
    Decoding,
    Prompt,
    check_taken,
    compiled,
    judge,
    layer_errors,
    predictions,
    times,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from timing import print_environment, write_part

SMALL_BLOCK = 32  # of CONTEXT keys
PHASES = {"prefill": "prompt", "decode": "decoded bytes"}
Row = dict[str, Any]


def loaded(path: Path) -> torch.nn.Module:
    """The weights that are shipped, or those of a checkpoint of the training."""
    if path.suffix == ".safetensors":
        return trained_model(path)
    model = new_model()
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    return model.eval()


# The parts.


def table(model: torch.nn.Module, args: argparse.Namespace) -> list[Row]:
    rows = []
    for phase in PHASES:
        asked: dict[str, tuple[str, int]] = {}
        for family in FAMILIES:
            if family.phase == phase:
                asked |= {family.spelling(CONTEXT // share, SMALL_BLOCK): (family.title, share) for share in SHARES}
        runs, found = {}, {}
        for spelling in (None, *asked):
            run = compiled(model, spelling)
            runs[spelling or "dense"] = Prompt(run) if phase == "prefill" else Decoding(run, model)
            found[spelling or "dense"] = judge(runs[spelling or "dense"], args.count, args.rows)
            if spelling is not None:
                check_taken(run, spelling)
            print(f"judged: {spelling or 'dense'}, {phase}", file=sys.stderr, flush=True)
        errors = layer_errors(model, list(asked), phase, args.texts)
        seconds = times(runs, args.rounds)
        for spelling, judged in found.items():
            family, share = asked.get(spelling, ("dense", 1))
            row = {"family": family, "share": share, "phase": phase, "spelling": spelling}
            row |= judged.summary(found["dense"]) | errors.get(spelling, {"error": 0.0, "mass": 1.0, "kept": 1.0})
            row |= {"ms": 1e3 * seconds[spelling].best, "ratio": seconds[spelling].best / seconds["dense"].best}
            rows.append(row)
        _print_quality([row for row in rows if row["phase"] == phase])
    return rows


def predicted(args: argparse.Namespace) -> list[Row]:
    rows = []
    for device in DEVICES:
        for length in LENGTHS:
            for phase in PHASES:
                rows += predictions(device, length, phase)
        print(f"predicted: {device}", file=sys.stderr, flush=True)
    _print_predicted(rows)
    return rows


# What is shown.


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 2) -> None:
    """A table; all columns but the first `left` to the right."""
    print("| " + " | ".join(headings) + " |")
    print("|" + "|".join("---" if at < left else "---:" for at in range(len(headings))) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def _print_quality(rows: Sequence[Row]) -> None:
    headings = ["form", "keys of a row", "kept pairs", "mass", "layer error", "loss, nats/byte", "increase"]
    headings += ["recall", "needle", "CPU ms", "of dense"]
    for phase, what in PHASES.items():
        here = [row for row in rows if row["phase"] == phase]
        if not here:
            continue
        counts = f"{here[0]['texts']} texts, {here[0]['recalls']} values, {here[0]['needles']} numbers"
        print(f"\n{what[0].upper()}{what[1:]}: {CONTEXT if phase == 'prefill' else DECODED} of each text; {counts}.\n")
        markdown(headings, [_quality_cells(row) for row in here])


def _quality_cells(row: Row) -> list[str]:
    is_dense = row["family"] == "dense"
    return [
        row["family"],
        f"{CONTEXT}" if is_dense else f"{CONTEXT // row['share']} (1/{row['share']})",
        f"{row['kept']:.0%}",
        f"{row['mass']:.1%}",
        "-" if is_dense else f"{row['error']:.3f}",
        f"{row['loss']:.3f}",
        "-" if is_dense else f"{row['increase']:+.3f} ± {row['spread']:.3f}",
        f"{row['recall']:.1%}",
        f"{row['needle']:.1%}",
        f"{row['ms']:.1f}",
        f"{row['ratio']:.2f}",
    ]


def _print_predicted(rows: Sequence[Row]) -> None:
    print(
        f"\nPredicted ms of one layer's attention, in brackets the part of dense: {HEADS} query heads on {KEY_HEADS} "
        f"key heads of {WIDTH}, bf16, batch 1, blocks of {BLOCK} ({BLOCK // 2} for NSA, pages of 16), closed form.\n"
    )
    named: dict[tuple[str, str, int], dict[tuple[str, int], Row]] = {}
    for row in rows:
        named.setdefault((row["phase"], row["family"], row["keys"]), {})[row["device"], row["length"]] = row
    places = [(device, length) for device in DEVICES for length in LENGTHS]
    shown = []
    for phase in PHASES:
        for (of, family, keys), cells in named.items():
            if of == phase:
                label = f"{family}, {PHASES[phase]}" if family == "dense" else family
                shown.append([label, str(keys or "all"), *(_time(cells[at]) for at in places)])
    markdown(["form", "keys of a row", *(f"{device} {length >> 10}k" for device, length in places)], shown)


def _time(row: Row) -> str:
    if row["seconds"] is None:
        return "-"
    ms = f"{1e3 * row['seconds']:.3g}"
    return ms if row["family"] == "dense" else f"{ms} ({row['ratio']:.2f})"


def _print_budgets(rows: Sequence[Row]) -> None:
    print(f"\n{len(rows)} random budgets of the logits' relative error; times are predicted, over dense.\n")
    said = {True: "yes", False: "no"}
    cells = [
        [row["device"], f"{row['budget']:.4f}", f"{row['error']:.4f}", said[row["holds"]]]
        + [f"{row['ratio']:.2f}", f"{row['single']:.2f}", said[row["pays"]]]
        for row in rows
    ]
    headings = ["device", "budget", "error on other texts", "holds", "time", "of the best single setting"]
    markdown([*headings, f"below {PART} where that is"], cells, 1)
    held, paid = (sum(row[what] for row in rows) for what in ("holds", "pays"))
    print(f"\nheld: {held} of {len(rows)}; below {PART} of dense where a single setting is: {paid} of {len(rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="table", choices=["table", "predicted", "budgets", "all"])
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="or a checkpoint of train_byte_model.py")
    parser.add_argument("--count", type=int, default=4, help="batches of each task to judge on")
    parser.add_argument("--rows", type=int, default=8, help="texts of a batch")
    parser.add_argument("--texts", type=int, default=2, help="texts by which layers are judged")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budgets", type=int, default=BUDGETS)
    parser.add_argument("--devices", nargs="+", default=["h100", "cpu"], help="that budgets are searched for")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = 256  # each setting is a compile of its own
    before, start = print_environment(), time.perf_counter()
    parts = ["table", "predicted", "budgets"] if args.part == "all" else [args.part]
    model = None if parts == ["predicted"] else loaded(args.weights)
    for part in parts:
        if part == "predicted" or model is None:
            rows = predicted(args)
        elif part == "table":
            rows = table(model, args)
        else:
            rows = budgets(model, args.devices, args.budgets)
            _print_budgets(rows)
        print(f"\n{part}: {time.perf_counter() - start:.0f} s since the start", file=sys.stderr, flush=True)
        if not args.dry:
            settings = {name: str(value) for name, value in vars(args).items()}
            write_part("quality", before, settings, {part: rows}, "predicted" if part == "predicted" else "cpu")


if __name__ == "__main__":
    main()

"""Refits every latency model on shared/measurements and writes cost_models/latency/coefficients.json.

    python benchmarks/fit_latency.py [--only gemm moe] [--dry]

For each model: scipy's bounded least squares on log(predicted / measured) with a near-absolute loss, at most 1200 rows
a part, parts weighing the same, coefficients held near their expected value where the rows do not say (see
fitting.py); no random choice but fixed seeds. Prints, and writes to results/latency_fit.json, per kind: mean absolute
percentage error and fold error of every part when it is left out, the peak roofline beside it, of a random 30% of the
shapes left out, and coverage and median width (high over low) of the intervals. The intervals are the shortest that
hold 77 to 85% of the errors, by the fixed share of the latency: of parts left out, for GPUs whose class of matrix
instruction was not fitted; of shapes left out, for the others.
"By the others' intervals" judges a part by intervals that have not seen it. Needs the extra "fit"; about two minutes on
one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from calibration import inside, interval, rounded_bounds
from fitting import MEASURED, Rows, evaluate, fit, left_out_parts, left_out_shapes, rows_by_model

COEFFICIENTS = Path(__file__).resolve().parents[1] / "cost_models" / "latency" / "coefficients.json"
RESULT = Path(__file__).resolve().parent / "results" / "latency_fit.json"


def errors(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    off = np.log(predicted / measured)
    return {
        "mape": float(np.mean(np.abs(predicted / measured - 1))),
        "fold": float(np.exp(np.mean(np.abs(off)))),
        "bias": float(np.median(off)),
        "rows": len(off),
    }


def covered(frame: pd.DataFrame, rows: Rows) -> dict[str, dict[str, list[float]]]:
    """Intervals for classes of matrix instruction that were fitted and for others, and columns that judge them."""
    share, part = frame.share.to_numpy(), frame.part.to_numpy(str)
    folds = np.log(left_out_shapes(rows, 0.2, 5) / rows.seconds)
    off = folds if frame.parts.isna().all() else np.log(frame.parts.to_numpy() / rows.seconds)
    found = {"seen": interval(folds, share), "unseen": interval(off, share)}
    frame["inside_seen"], frame["width_seen"] = inside(found["seen"], folds, share)
    frame["inside"], frame["width"] = inside(found["unseen"], off, share)
    frame["inside_others"] = np.nan
    names = np.unique(part)
    for name in names if len(names) > 1 else ():
        at, rest = part == name, part != name
        judged, _ = inside(interval(off[rest], share[rest]), off[at], share[at])
        frame.loc[at, "inside_others"] = judged.astype(float)
    return {key: rounded_bounds(bounds) for key, bounds in found.items()}


def study(rows: Rows) -> tuple[dict, pd.DataFrame]:
    """One model: what is stored of it, and a frame of errors by row."""
    fitted = fit(rows, np.ones(len(rows.seconds), bool))
    shapes, parts = left_out_shapes(rows), left_out_parts(rows)
    frame = pd.DataFrame({"part": rows.part, "measured": rows.seconds, "parts": parts, "shapes": shapes})
    frame["roofline"] = evaluate(rows, fitted, "roofline")
    frame["share"] = evaluate(rows, fitted, "fixed") / evaluate(rows, fitted)
    known = np.isfinite(shapes)
    left_out = {
        str(p): errors(parts[rows.part == p], rows.seconds[rows.part == p])
        for p in np.unique(rows.part)
        if np.isfinite(parts).all()
    }
    stored = {
        "coefficients": {
            c.name: {"value": rounded(fitted[c.name]), "unit": c.unit, "meaning": c.meaning}
            for c in rows.model.coefficients
        },
        "classes": [str(arch) for arch in np.unique(rows.arch)],
        "error": {
            "parts left out": rounded(left_out),
            "shapes left out": rounded(errors(shapes[known], rows.seconds[known])),
        },
        "interval": covered(frame, rows),
    }
    return stored, frame


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return value if isinstance(value, int) else float(f"{value:.5g}")


def table(kind: str, frame: pd.DataFrame) -> dict:
    """The figures of one kind, over all its models."""
    found: dict = {"parts": {}}
    for part, here in frame.groupby("part"):
        if here.parts.notna().all():
            found["parts"][part] = {
                **errors(here.parts.to_numpy(), here.measured.to_numpy()),
                "roofline_mape": errors(here.roofline.to_numpy(), here.measured.to_numpy())["mape"],
                "roofline_fold": errors(here.roofline.to_numpy(), here.measured.to_numpy())["fold"],
                "coverage": float(here.inside.mean()),
                "coverage_by_others": float(here.inside_others.mean()),
            }
    shapes = frame[frame.shapes.notna()]
    found["shapes"] = {p: errors(g.shapes.to_numpy(), g.measured.to_numpy()) for p, g in shapes.groupby("part")}
    found["coverage"], found["width"] = float(frame.inside.mean()), float(frame.width.median())
    found["coverage_seen"], found["width_seen"] = float(frame.inside_seen.mean()), float(frame.width_seen.median())
    print(
        f"{kind}: intervals cover {found['coverage']:.2f} of parts left out (median width {found['width']:.2f}),"
        f" {found['coverage_seen']:.2f} of shapes left out ({found['width_seen']:.2f})"
    )
    for part, e in found["parts"].items():
        print(
            f"  without {part:11s} MAPE {e['mape']:.3f} fold {e['fold']:.3f} bias {e['bias']:+.2f}"
            f" | roofline {e['roofline_mape']:.2f} {e['roofline_fold']:.1f}"
            f" | covered {e['coverage']:.2f}, by the others' intervals {e['coverage_by_others']:.2f}"
        )
    print("  without shapes      " + " ".join(f"{p} {e['mape']:.3f}" for p, e in found["shapes"].items()))
    return found


def mean(results: dict[str, dict], group: str, key: str) -> float:
    """Over kinds and parts, as score.py takes it."""
    return float(np.mean([e[key] for found in results.values() for e in found[group].values()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=None, help="kinds; the others keep their coefficients")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    args = parser.parse_args()
    sheets = json.loads((MEASURED / "gpus.json").read_text())
    kinds = [f.stem for f in sorted(MEASURED.glob("*.parquet")) if args.only is None or f.stem in args.only]
    models: dict = json.loads(COEFFICIENTS.read_text())["models"] if COEFFICIENTS.exists() else {}
    results: dict[str, dict] = {}
    for kind in kinds:
        rows = rows_by_model({kind: pd.read_parquet(MEASURED / f"{kind}.parquet")}, sheets)
        frames = []
        for name, each in rows.items():
            models[name], frame = study(each)
            frames.append(frame)
        results[kind] = table(kind, pd.concat(frames))
    if any(found["parts"] for found in results.values()):
        print(
            f"mean, parts left out: MAPE {mean(results, 'parts', 'mape'):.3f} fold {mean(results, 'parts', 'fold'):.3f}"
            f" (roofline {mean(results, 'parts', 'roofline_mape'):.2f} {mean(results, 'parts', 'roofline_fold'):.1f});"
            f" shapes left out: MAPE {mean(results, 'shapes', 'mape'):.3f}"
        )
    if not args.dry:
        note = "Written by benchmarks/fit_latency.py from shared/measurements (aiconfigurator 095f58a5, Apache-2.0)."
        COEFFICIENTS.write_text(json.dumps({"note": note, "models": dict(sorted(models.items()))}, indent=1) + "\n")
        if args.only is None:
            RESULT.write_text(json.dumps(rounded(results), indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Refits every latency model on shared/measurements and writes cost_models/latency/coefficients.json.

    python benchmarks/fit_latency.py [--only gemm moe] [--dry]

For each model: scipy's bounded least squares on log(predicted / measured) with a near-absolute loss, at most 1200 rows
a part, parts weighing the same, coefficients held near their expected value where the rows do not say (see
fitting.py); no random choice but fixed seeds. Prints, and writes to results/latency_fit.json, per kind: mean absolute
percentage error and fold error of every part when it is left out, the peak roofline beside it, of a random 30% of the
shapes left out, and coverage and median width (high over low) of the intervals. The intervals are the shortest that
hold 82% of the errors of parts left out, by the fixed share of the latency; the coverage printed is of each part by
intervals of the other parts. Needs the extra "fit"; about two minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
from fitting import MEASURED, Fitted, Rows, evaluate, fit, left_out_parts, left_out_shapes, rows_by_model

COEFFICIENTS = Path(__file__).resolve().parents[1] / "cost_models" / "latency" / "coefficients.json"
RESULT = Path(__file__).resolve().parent / "results" / "latency_fit.json"
HELD = 0.82
REGIMES = (0.2, 0.5, 0.8)
FEWEST = 60  # rows of one regime


def errors(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    off = np.log(predicted / measured)
    return {
        "mape": float(np.mean(np.abs(predicted / measured - 1))),
        "fold": float(np.exp(np.mean(np.abs(off)))),
        "bias": float(np.median(off)),
        "rows": len(off),
    }


def shortest(off: np.ndarray, held: float = HELD) -> tuple[float, float]:
    """The shortest interval that holds the share `held` of the values."""
    ordered = np.sort(off)
    inside = min(len(ordered) - 1, math.ceil(held * len(ordered)))
    widths = ordered[inside:] - ordered[: len(ordered) - inside]
    i = int(np.argmin(widths))
    return float(ordered[i]), float(ordered[i + inside])


def weighted(off: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Errors with every part counting the same: rows of small parts repeated."""
    counts = {p: int(np.sum(part == p)) for p in np.unique(part)}
    most = max(counts.values())
    return np.concatenate([np.repeat(off[part == p], max(1, round(most / n))) for p, n in counts.items()])


def interval(off: np.ndarray, share: np.ndarray, part: np.ndarray) -> dict[str, list[float]]:
    """Bounds on measured / predicted, by regime: the fixed share of the latency, cut where rows are enough."""
    edges: list[float] = []
    for edge in REGIMES:
        last = edges[-1] if edges else 0.0
        if np.sum((share >= last) & (share < edge)) >= FEWEST and np.sum(share >= edge) >= FEWEST:
            edges.append(edge)
    regime = np.digitize(share, edges)
    low, high = [], []
    for i in range(len(edges) + 1):
        here = regime == i
        a, b = shortest(weighted(-off[here], part[here]))
        low.append(min(math.exp(a), 0.98))
        high.append(max(math.exp(b), 1.02))
    return {"edges": edges, "low": low, "high": high}


def inside(bounds: dict[str, list[float]], off: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each measured value lies in its interval, and the interval's width."""
    regime = np.digitize(share, bounds["edges"])
    low, high = np.array(bounds["low"])[regime], np.array(bounds["high"])[regime]
    ratio = np.exp(-off)
    return (ratio >= low) & (ratio <= high), high / low


def study(rows: Rows) -> tuple[dict, Fitted, pd.DataFrame]:
    """One model: what is stored of it, its coefficients, and a frame of errors by row."""
    fitted = fit(rows, np.ones(len(rows.seconds), bool))
    shapes, parts = left_out_shapes(rows), left_out_parts(rows)
    out = parts if np.isfinite(parts).any() else left_out_shapes(rows, 0.2, 5)
    frame = pd.DataFrame({"part": rows.part, "measured": rows.seconds, "parts": parts, "shapes": shapes})
    frame["roofline"] = evaluate(rows, fitted, "roofline")
    frame["off"] = np.log(out / rows.seconds)
    frame["share"] = evaluate(rows, fitted, "fixed") / evaluate(rows, fitted)
    off, share, part = frame.off.to_numpy(), frame.share.to_numpy(), frame.part.to_numpy(str)
    bounds = interval(off, share, part)
    names = np.unique(part)
    frame["inside"], frame["width"] = inside(bounds, off, share)
    frame["inside_others"] = np.nan
    for name in names if len(names) > 1 else ():
        at, rest = part == name, part != name
        frame.loc[at, "inside_others"] = inside(interval(off[rest], share[rest], part[rest]), off[at], share[at])[
            0
        ].astype(float)
    stored = {
        "coefficients": {
            c.name: {"value": rounded(fitted[c.name]), "unit": c.unit, "meaning": c.meaning}
            for c in rows.model.coefficients
        },
        "error": {
            "parts left out": {n: rounded(errors(parts[part == n], rows.seconds[part == n])) for n in names}
            if np.isfinite(parts).any()
            else {},
            "shapes left out": rounded(errors(shapes[np.isfinite(shapes)], rows.seconds[np.isfinite(shapes)])),
        },
        "interval": {key: [round(v, 4) for v in values] for key, values in bounds.items()},
    }
    return stored, fitted, frame


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
    print(f"{kind}: interval coverage {found['coverage']:.2f}, median width {found['width']:.2f}")
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
            models[name], _, frame = study(each)
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

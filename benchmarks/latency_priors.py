"""How much does the latency model owe to the expected values of its coefficients?

A fit that leaves a part out keeps what the other parts do not show (a kernel for wgmma, say) at its expected value, and
those were written with all parts known. Here they are multiplied by random factors, exp(normal * shake), and parts are
left out again. Prints the mean absolute percentage error, and writes results/latency_priors.json. Two minutes; needs
the extra "fit".

    python benchmarks/latency_priors.py [--dry]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from fitting import MEASURED, Rows, left_out_parts, rows_by_model

RESULT = Path(__file__).resolve().parent / "results" / "latency_priors.json"
SHAKES = ((0.0, 0), (0.25, 1), (0.25, 2), (0.25, 3), (0.5, 4), (0.5, 5))  # spread of the factors, seed


def shaken(rows: Rows, shake: float, random: np.random.Generator) -> Rows:
    moved = tuple(
        replace(c, start=float(np.clip(c.start * np.exp(random.normal(0, shake)), c.low * 1.01, c.high * 0.99)))
        for c in rows.model.coefficients
    )
    return replace(rows, model=replace(rows.model, coefficients=moved))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    args = parser.parse_args()
    sheets = json.loads((MEASURED / "gpus.json").read_text())
    kinds = [f.stem for f in sorted(MEASURED.glob("*.parquet")) if f.stem != "dsa"]  # dsa: one part only
    tables = {kind: pd.read_parquet(MEASURED / f"{kind}.parquet") for kind in kinds}
    models = {kind: rows_by_model({kind: table}, sheets) for kind, table in tables.items()}
    found = []
    for shake, seed in SHAKES:
        random = np.random.default_rng(seed)
        mape: dict[str, float] = {}
        for kind, each in models.items():
            off = [
                pd.DataFrame({"part": r.part, "off": np.abs(left_out_parts(shaken(r, shake, random)) / r.seconds - 1)})
                for r in each.values()
            ]
            mape |= {f"{kind} {part}": v for part, v in pd.concat(off).groupby("part").off.mean().items()}
        found.append({"shake": shake, "seed": seed, "mape": round(float(np.mean(list(mape.values()))), 4)})
        print(f"expected values off by {shake:.0%} (seed {seed}): MAPE of parts left out {found[-1]['mape']:.3f}")
    if not args.dry:
        RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Does the latency model take the right side where one way to compute a layer overtakes another?

Pairs of measured rows at equal shapes: attention against a gated delta layer (convolution and scan) of as many heads,
against a window, against sparse attention (logits, top-k, attention; H100 alone has it); a dense gated feed-forward
(two products of the gemm table) against experts of equal active or total width. Both sides are predicted by fits that
have not seen the part (sparse attention, on one part, by fits that have not seen a fifth of the shapes). Prints the
share on the right side, outside a band of 10% around even, and of those within 2x; and the time lost by wrong choices,
mean over pairs of chosen / best - 1. Writes results/latency_crossovers.json. Needs the extra "fit".

    python benchmarks/crossovers.py [--dry]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from fitting import MEASURED, left_out_parts, left_out_shapes, rows_by_model

RESULT = Path(__file__).resolve().parent / "results" / "latency_crossovers.json"
BAND = 1.1
GOALS = {"right": 0.97, "right_within_2x": 0.90, "slowdown": 0.008}
LAYER = ["gpu", "batch", "seq_q", "q_heads"]
SHAPE = [*LAYER, "kv_heads", "head_dim", "dtype"]


def predicted_rows(kind: str, sheets: dict) -> pd.DataFrame:
    """The rows of a kind with `measured` and `predicted` seconds."""
    frames = []
    for name, rows in rows_by_model({kind: pd.read_parquet(MEASURED / f"{kind}.parquet")}, sheets).items():
        parts = left_out_parts(rows)
        predicted = parts if np.isfinite(parts).any() else left_out_shapes(rows, 0.2, 5)
        frames.append(rows.frame.assign(model=name, measured=rows.seconds, predicted=predicted))
    return pd.concat(frames, ignore_index=True)


def joined(one: pd.DataFrame, other: pd.DataFrame, on: list[str]) -> pd.DataFrame:
    """Pairs of rows with equal `on`: measured and predicted of both."""
    columns = [*on, "measured", "predicted"]
    pairs = one[columns].merge(other[columns], on=on, suffixes=("_a", "_b"))
    return pairs[["gpu", "measured_a", "measured_b", "predicted_a", "predicted_b"]]


def summed(frames: list[pd.DataFrame], on: list[str]) -> pd.DataFrame:
    """A layer of several calls: their seconds added where all of them were measured."""
    total = frames[0][[*on, "measured", "predicted"]]
    for frame in frames[1:]:
        total = total.merge(frame[[*on, "measured", "predicted"]], on=on, suffixes=("", "_more"))
        for column in ("measured", "predicted"):
            total[column] += total.pop(f"{column}_more")
    return total


def against_delta(prefill: pd.DataFrame, gdn: pd.DataFrame) -> pd.DataFrame:
    on = ["gpu", "batch", "seq", "k_heads", "v_heads"]
    layer = summed([gdn[gdn.model == "gdn.scan"], gdn[gdn.model == "gdn.conv"]], on)
    layer = layer.rename(columns={"seq": "seq_q", "v_heads": "q_heads"})
    dense = prefill[(prefill.window == 0) & (prefill.head_dim == 128) & (prefill.dtype == "bf16")]
    return joined(dense, layer, LAYER)


def against_window(table: pd.DataFrame) -> pd.DataFrame:
    """A window that holds all keys is the dense computation: nothing to decide."""
    narrow = (table.window > 0) & (table.window < table.seq_kv)
    return joined(table[table.window == 0], table[narrow], [*SHAPE, "seq_kv"])


def against_sparse(mla: pd.DataFrame, dsa: pd.DataFrame) -> pd.DataFrame:
    on = ["gpu", "batch", "seq_q"]
    here = dsa[(dsa.prefix == 0) & dsa.score_mode.isin(["none", "top_last"])]
    stage = {s: here[here.stage == s] for s in ("index_logits", "topk", "sparse_attn")}
    short = [frame[frame.seq_q <= 2048] for s, frame in stage.items() if s != "topk"]
    sparse = pd.concat([summed(list(stage.values()), on), summed(short, on)])
    return joined(mla[mla.q_heads == 64], sparse.drop_duplicates(on), on)


def against_experts(gemm: pd.DataFrame, moe: pd.DataFrame) -> pd.DataFrame:
    """Gate and up in one product of twice the width, then down."""
    plain = gemm[gemm.dtype == "bf16"][["gpu", "m", "n", "k", "measured", "predicted"]]
    down = plain.rename(columns={"m": "tokens", "n": "d_model", "k": "width"})
    up = plain.rename(columns={"m": "tokens", "k": "d_model"}).assign(width=plain.n // 2)
    dense = summed([down, up], ["gpu", "tokens", "d_model", "width"])
    here = moe[(moe.dtype == "bf16") & (moe.gated == 1)]
    active, total = here.assign(width=here.d_ff * here.topk), here.assign(width=here.d_ff * here.experts)
    return joined(dense, pd.concat([active, total]), ["gpu", "tokens", "d_model", "width"])


def judged(pairs: pd.DataFrame) -> dict[str, float]:
    measured = (pairs.measured_a / pairs.measured_b).to_numpy()
    right = (measured > 1) == (pairs.predicted_a > pairs.predicted_b).to_numpy()
    far = np.maximum(measured, 1 / measured)
    outside, close = far > BAND, (far > BAND) & (far < 2)
    return {
        "pairs": len(pairs),
        "outside": int(outside.sum()),
        "right": float(right[outside].mean()) if outside.any() else float("nan"),
        "within_2x": int(close.sum()),
        "right_within_2x": float(right[close].mean()) if close.any() else float("nan"),
        "slowdown": float(np.where(right, 0.0, far - 1).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    args = parser.parse_args()
    sheets = json.loads((MEASURED / "gpus.json").read_text())
    kinds = ("attn_prefill", "attn_decode", "mla_prefill", "gdn", "dsa", "gemm", "moe")
    rows = {kind: predicted_rows(kind, sheets) for kind in kinds}
    pairs = {
        "dense or gated delta": against_delta(rows["attn_prefill"], rows["gdn"]),
        "dense or window, prompt": against_window(rows["attn_prefill"]),
        "dense or window, decode": against_window(rows["attn_decode"]),
        "dense or sparse": against_sparse(rows["mla_prefill"], rows["dsa"]),
        "dense feed-forward or experts": against_experts(rows["gemm"], rows["moe"]),
    }
    found = {name: judged(each) for name, each in pairs.items() if len(each)}
    found["all"] = judged(pd.concat(pairs.values()))
    for name, each in found.items():
        print(
            f"{name:30s} {each['pairs']:6d} pairs, {each['outside']:6d} outside 10%: right {each['right']:.3f};"
            f" {each['within_2x']:5d} within 2x: right {each['right_within_2x']:.3f}; lost {each['slowdown']:.2%}"
        )
    print(f"goals: right {GOALS['right']}, within 2x {GOALS['right_within_2x']}, lost {GOALS['slowdown']:.1%}")
    if not args.dry:
        RESULT.write_text(
            json.dumps({k: {n: round(x, 5) for n, x in v.items()} for k, v in found.items()}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()

"""How long does one latency prediction take?

Per kind: milliseconds of the first call in a process (the formula is lambdified) and microseconds of later ones, the
dictionary of the shape read each time; the best of 7 rounds of 500 calls, over shapes of growing size. Goal: 50
microseconds. Prints a table and writes results/<cpu>/latency_speed.json. Needs no extra.

    python benchmarks/latency_speed.py [--dry]
"""

from __future__ import annotations

import argparse
import json
import time

from timing import RESULTS

from attnc.cost_models.device import device_named
from attnc.cost_models.latency import KINDS, predict

ATTENTION = {"dtype": "bf16", "q_heads": 32, "kv_heads": 8, "head_dim": 128, "window": 0}
LATENT = {"dtype": "bf16", "q_heads": 16}
DELTA = {"variant": "gdn", "phase": "prefill", "stage": "scan", "k_heads": 8, "v_heads": 16, "d_conv": 4}
SPARSE = {"stage": "topk", "score_mode": "flat", "q_heads": 64, "index_heads": 32, "index_dim": 128, "topk": 2048}
EXPERTS = {"d_model": 4096, "d_ff": 1536, "experts": 128, "topk": 8}
BASE: dict[str, dict] = {
    "attn_prefill": {**ATTENTION, "batch": 4},
    "attn_decode": {**ATTENTION, "batch": 16, "seq_q": 1},
    "attn_encoder": {**ATTENTION, "batch": 4},
    "mla_prefill": {**LATENT, "batch": 4, "head_dim_qk": 192, "head_dim_v": 128},
    "mla_decode": {**LATENT, "batch": 16, "head_dim_qk": 576, "head_dim_v": 512},
    "gdn": {**DELTA, "dtype": "bf16", "batch": 4, "head_k_dim": 128, "head_v_dim": 128},
    "dsa": {**SPARSE, "dtype": "fp32", "batch": 4, "prefix": 8192, "head_dim_qk": 576, "head_dim_v": 512},
    "gemm": {"dtype": "bf16", "n": 4096, "k": 4096},
    "moe": {**EXPERTS, "dtype": "fp8_block", "gated": 1, "routing": "power_law_1.2"},
}
LENGTH = {"gemm": "m", "moe": "tokens", "gdn": "seq", "attn_decode": "seq_kv", "mla_decode": "seq_kv"}
ROUNDS, CALLS = 7, 500


def measured(kind: str) -> dict[str, float]:
    device = device_named("h200")
    shapes = [{**BASE[kind], LENGTH.get(kind, "seq_q"): 16 + 13 * i} for i in range(CALLS)]
    start = time.perf_counter()
    predict(kind, device, shapes[0])
    first = time.perf_counter() - start
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for shape in shapes:
            predict(kind, device, shape)
        rounds.append((time.perf_counter() - start) / CALLS)
    return {"first_ms": first * 1e3, "us": min(rounds) * 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    args = parser.parse_args()
    found = {kind: measured(kind) for kind in KINDS}
    for kind, each in found.items():
        print(f"{kind:14s} first {each['first_ms']:5.0f} ms, then {each['us']:5.1f} us")
    if not args.dry:
        text = json.dumps({k: {n: round(x, 2) for n, x in v.items()} for k, v in found.items()}, indent=1)
        (RESULTS / "cpu" / "latency_speed.json").write_text(text + "\n")


if __name__ == "__main__":
    main()

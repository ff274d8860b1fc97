"""How long does one prediction take, and how long picking the knobs of a kernel that nobody tuned?

Per kind of call, of the tile model ("flash"), of a count of a whole model ("decode_flops") and of the default knobs of
a region ("default forward", "default training"; goal 5 ms): milliseconds of the first call in a process, where the
formula is lambdified, and microseconds of later ones, the dictionary of the shape read each time; the best of 25
rounds over shapes of growing size, in CPU time, so that a loaded machine tells nearly the same. Goal: 50 microseconds.
Prints a table and writes results/cpu/latency_speed.json.

    python benchmarks/latency_speed.py [--dry]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

from timing import RESULTS

from attnc.cost_models.device import device_named, gpu_named
from attnc.cost_models.latency import KINDS, predict
from attnc.cost_models.model_card import model_card
from attnc.cost_models.tile_model import Band, FlashTiles, FlashWork, flash_seconds
from attnc.forms.flash import default_for
from attnc.region import AttentionRegion
from attnc.rule_attention import AttentionRule, AttentionShape

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
ROUNDS, CALLS = 25, 100


def measured(kind: str) -> dict[str, float]:
    device = device_named("h200")
    shapes = [{**BASE[kind], LENGTH.get(kind, "seq_q"): 16 + 13 * i} for i in range(CALLS)]
    start = time.process_time()
    predict(kind, device, shapes[0])
    first = time.process_time() - start
    rounds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for shape in shapes:
            predict(kind, device, shape)
        rounds.append((time.process_time() - start) / CALLS)
    return {"first_ms": first * 1e3, "us": min(rounds) * 1e6}


def timed(run: Callable[[int], object]) -> dict[str, float]:
    """The same of any other function of a length."""
    start = time.process_time()
    run(1000)
    first = time.process_time() - start
    rounds = []
    for n in range(ROUNDS):
        start = time.process_time()
        for i in range(CALLS):
            run(1024 + 128 * (CALLS * n + i))
        rounds.append((time.process_time() - start) / CALLS)
    return {"first_ms": first * 1e3, "us": min(rounds) * 1e6}


def others() -> dict[str, Callable[[int], object]]:
    gpu, tiles = gpu_named("h200"), FlashTiles(128, 64, 8, 3)
    card = model_card({"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
                       "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256})  # fmt: skip
    rule = AttentionRule.parse("score=0.088 * s; keep=j - i <= 0 and i - j <= 1023")

    def default(length: int, training: bool) -> object:
        shape = AttentionShape(4, 32, 8, length, length, 128, 128)
        region = AttentionRegion("", "", rule, shape, "bfloat16", "cuda", training=training)
        return default_for(region, gpu)

    return {
        "flash": lambda n: flash_seconds(FlashWork(4, 32, 8, n, n, 128, 128, band=Band.causal(n, n)), tiles, gpu),
        "decode_flops": card.decode_flops,
        "default forward": lambda n: default(n, False),
        "default training": lambda n: default(n, True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    args = parser.parse_args()
    found = {kind: measured(kind) for kind in KINDS} | {name: timed(run) for name, run in others().items()}
    for kind, each in found.items():
        print(f"{kind:16s} first {each['first_ms']:5.0f} ms, then {each['us']:5.1f} us")
    if not args.dry:
        text = json.dumps({k: {n: round(x, 2) for n, x in v.items()} for k, v in found.items()}, indent=1)
        (RESULTS / "cpu" / "latency_speed.json").write_text(text + "\n")


if __name__ == "__main__":
    main()

"""The main job in two or three minutes: two real architectures, what attnc finds in them, their speed and error.

A Mistral-architecture model with a window of 512 at 4096 tokens, and a Gemma-2-like one, with softcap and written
out in matrix products, at 2048; both small, with random weights. Each is compiled by Inductor and by attnc.

    python examples/quickstart.py [--layers 4] [--scale 1.0]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch

import attnc

try:
    import transformers
except ImportError:
    sys.exit('This example builds its models with transformers, which is not installed: pip install "attnc[models]"')

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1536,
    "initializer_range": 0.05,
    "pad_token_id": None,
    "use_cache": False,
}
# Title, transformers model type, spelling of its attention, tokens, further fields of its configuration.
MODELS = (
    ("Mistral, window 512", "mistral", "sdpa", 4096, {"sliding_window": 512}),
    ("Gemma 2, window 512 and softcap", "gemma2", "eager", 2048, {"sliding_window": 512, "query_pre_attn_scalar": 64}),
)
ROUNDS = 3
START = time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START:5.1f} s] {text}", flush=True)


def build(kind: str, spelling: str, layers: int, fields: dict[str, object]) -> torch.nn.Module:
    config = transformers.AutoConfig.for_model(kind, num_hidden_layers=layers, **SIZES, **fields)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=spelling).eval()


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def show(title: str, kind: str, spelling: str, length: int, layers: int, fields: dict[str, object]) -> None:
    """Explain one model, compile it twice, print seconds, ratio and error."""
    print(f"\n== {title}: {layers} layers, {length} tokens, attention spelled {spelling!r}\n")
    model = build(kind, spelling, layers, fields)
    ids = torch.randint(3, 1000, (1, length))
    say("looking at the model")
    print(attnc.explain(model, ids))

    say("running it without a compiler")
    wanted = model(ids).logits
    compiled = {}
    for backend in ("inductor", "attnc"):
        say(f"compiling with {backend} ...")
        compiled[backend] = torch.compile(model, backend=backend)
        took = seconds(lambda run=compiled[backend]: run(ids))
        say(f"... done, the first call took {took:.1f} s")

    say(f"timing, best of {ROUNDS} runs in turn")
    times = {backend: [] for backend in compiled}
    for _ in range(ROUNDS):
        for backend, run in compiled.items():
            times[backend].append(seconds(lambda run=run: run(ids)))
    best = {backend: min(taken) for backend, taken in times.items()}
    print(f"\n{'':<10} {'seconds':>8} {'x Inductor':>11} {'error against eager':>20}")
    for backend, run in compiled.items():
        error = ((run(ids).logits - wanted).abs().max() / wanted.abs().max()).item()
        print(f"{backend:<10} {best[backend]:>8.3f} {best['inductor'] / best[backend]:>11.2f} {error:>20.1e}")
    print(f"forms: {attnc.last_report(compiled['attnc']).counts()['forms']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--scale", type=float, default=1.0, help="of the lengths; 0.05 is a quick look")
    args = parser.parse_args()
    say(f"attnc {attnc.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, CPU, float32")
    with torch.no_grad():
        for title, kind, spelling, length, fields in MODELS:
            show(title, kind, spelling, max(int(length * args.scale), 16), args.layers, fields)
    print()
    say("done")


if __name__ == "__main__":
    main()

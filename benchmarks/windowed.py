"""Is a model with windows faster than with Inductor, and as fast as with FlexAttention written by hand?

Forward pass, float32, batch 1: Inductor and attnc on the sdpa and eager spellings, Inductor on hand-written
FlexAttention; mistral at 8192 tokens, the others at 4096. Writes results/cpu/windowed.json.

    python benchmarks/windowed.py [--only mistral gemma2] [--length N] [--rounds 5] [--memory]
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from architectures import ARCHITECTURES, WINDOWED
from timing import print_environment, write_result
from variants import Variant, arguments, compare, content, print_rows


def variants(name: str, length: int | None, layers: int, window: int | None) -> Iterator[Variant]:
    for spelling in ARCHITECTURES[name].spellings:
        for compiler in ("inductor", "attnc") if spelling != "flex_attention" else ("inductor",):
            yield Variant(name, spelling, compiler, length, layers, window)


def main() -> None:
    parser = arguments(__doc__ or "", rounds=5, names=WINDOWED)
    parser.add_argument("--memory", action="store_true", help="peak memory too, each variant in its own process")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    before = print_environment()
    rows = []
    for name in args.only:
        found = compare(list(variants(name, args.length, args.layers, args.window)), args.rounds, args.memory)
        print_rows(found, args.memory)
        rows += found
        if not args.dry:
            write_result("windowed", before, vars(args), content(rows))
    print()
    print_rows(rows, args.memory)


if __name__ == "__main__":
    main()

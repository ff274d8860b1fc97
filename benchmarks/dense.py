"""Is a dense causal model faster than with Inductor, however its attention is spelled?

Forward pass, float32, batch 1, 4096 tokens, Inductor beside attnc: the eager spelling; the sdpa spelling without a
cache, which carries a boolean mask; the sdpa spelling with one, where `is_causal` stands in the graph already.
Writes results/cpu/dense.json.

    python benchmarks/dense.py [--only llama] [--length N] [--rounds 7] [--memory]
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from architectures import DENSE
from timing import print_environment, write_result
from variants import Variant, arguments, compare, content, print_rows

WRITTEN = (("eager", False), ("sdpa", False), ("sdpa", True))  # spelling, use_cache


def variants(name: str, length: int | None, layers: int) -> Iterator[Variant]:
    for spelling, use_cache in WRITTEN:
        for compiler in ("inductor", "attnc"):
            yield Variant(name, spelling, compiler, length, layers, use_cache=use_cache)


def main() -> None:
    parser = arguments(__doc__ or "", rounds=7, names=DENSE)
    parser.add_argument("--memory", action="store_true", help="peak memory too, each variant in its own process")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    before = print_environment()
    rows = []
    for name in args.only:
        found = compare(list(variants(name, args.length, args.layers)), args.rounds, args.memory)
        print_rows(found, args.memory)
        rows += found
        if not args.dry:
            write_result("dense", before, vars(args), content(rows))
    print()
    print_rows(rows, args.memory)


if __name__ == "__main__":
    main()

"""Is a model with linear mixers faster than as transformers runs it, uncompiled and with Inductor?

Forward pass, float32, batch 1, 4096 tokens. Inductor compiles the torch code of the mixers, whose loops over chunks
Dynamo unrolls: leave it out where that takes too long. Writes results/cpu/mixed.json.

    python benchmarks/mixed.py [--only qwen3_next] [--compilers none attnc] [--length N] [--rounds 3]
"""

from __future__ import annotations

import torch
from architectures import ARCHITECTURES, MIXED
from timing import print_environment, write_result
from variants import COMPILERS, Variant, arguments, compare, content, print_rows


def main() -> None:
    parser = arguments(__doc__ or "", rounds=3, names=MIXED)
    parser.add_argument("--compilers", nargs="+", choices=COMPILERS, default=list(COMPILERS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    before = print_environment()
    rows = []
    for name in args.only:
        spelling = ARCHITECTURES[name].spellings[0]
        found = compare([Variant(name, spelling, c, args.length, args.layers) for c in args.compilers], args.rounds)
        print_rows(found)
        rows += found
        if not args.dry:
            write_result("mixed", before, vars(args), content(rows))


if __name__ == "__main__":
    main()

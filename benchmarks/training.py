"""Is a training step of a windowed model faster than with Inductor, in no more memory?

Forward and backward of the next token's cross-entropy, float32, batch 1, mistral at 4096 tokens: Inductor and attnc
on the sdpa and eager spellings. The error is that of the gradients: the worst max|a-b| / max|b| over the parameters.
Memory is the peak of one warmed-up step above what was resident before, in a process of its own.
Writes results/cpu/training.json.

    python benchmarks/training.py [--only mistral] [--spellings sdpa] [--length N] [--rounds 5] [--no-memory]
"""

from __future__ import annotations

import torch
from architectures import ARCHITECTURES
from timing import print_environment, write_result
from variants import Variant, arguments, compare, content, print_rows

CAUSAL = [name for name, architecture in ARCHITECTURES.items() if architecture.task == "AutoModelForCausalLM"]


def main() -> None:
    parser = arguments(__doc__ or "", rounds=5, names=CAUSAL)
    parser.set_defaults(only=["mistral"], length=4096)
    parser.add_argument("--spellings", nargs="+", choices=("sdpa", "eager"), default=["sdpa", "eager"])
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    before = print_environment()
    rows = []
    for name in args.only:
        spellings = [s for s in args.spellings if s in ARCHITECTURES[name].spellings]
        asked = [
            Variant(name, spelling, compiler, args.length, args.layers, args.window, training=True)
            for spelling in spellings
            for compiler in ("inductor", "attnc")
        ]
        found = compare(asked, args.rounds, args.memory)
        print_rows(found, args.memory)
        rows += found
        if not args.dry:
            write_result("training", before, vars(args), content(rows))


if __name__ == "__main__":
    main()

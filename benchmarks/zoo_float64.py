"""Whose rounding is it? Gradients of one model of the zoo: attnc and eager in float32, each against eager in float64.

A gradient that is nearly zero has no digits in float32, so attnc and eager may differ there by more than 1e-4 although
neither is wrong. Errors are max|a - b| over the gradient's largest value, at least 1e-3 of the largest of all.

    python benchmarks/zoo_float64.py qwen4_exp_text [--attn sdpa] [--mask pad] [--rows 5]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import zoo
from timing import print_environment, print_table
from torch import Tensor, nn
from zoo_judges import in_float64

FLOOR = 1e-3


def gradients(model: nn.Module, call: Callable[..., Any], inputs: Mapping[str, Any], outputs: Callable) -> dict:
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    sum(t.double().square().mean() for t in outputs(call(**inputs)) if t.requires_grad).backward()
    return {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--attn", choices=zoo.CHOICES["attn"], default="eager")
    parser.add_argument("--mask", choices=zoo.CHOICES["mask"], default="none")
    parser.add_argument("--rows", type=int, default=5)
    parser.add_argument("--zoo", type=Path, default=zoo.ZOO)
    args = parser.parse_args()
    zoo.harness(args.zoo)
    zoo_build = zoo.loaded()[0]
    if args.model not in zoo_build.catalog():
        sys.exit(f"zoo_float64.py: found {args.model}; allowed are the model types of the zoo's catalogue.")
    print_environment()
    built = zoo_build.build(
        zoo_build.catalog()[args.model], attn=args.attn, mask=args.mask, train=True
    )
    model, inputs = built.model, built.inputs
    wide_inputs = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}

    def own(wide: nn.Module) -> dict[str, Tensor]:
        return gradients(wide, wide, wide_inputs, zoo_build.outputs)

    eager = gradients(model, model, inputs, zoo_build.outputs)
    compiled = torch.compile(model, backend="attnc", options={"inner": "aot_eager"}, dynamic=False)
    ours = gradients(model, compiled, inputs, zoo_build.outputs)
    exact = dict(zip(eager, in_float64(model, lambda wide: ([], list(own(wide).values())))[1], strict=True))
    largest = max(g.abs().max() for g in exact.values())
    rows = []
    for name, want in exact.items():
        scale = max(want.abs().max(), FLOOR * largest)
        pairs = ((ours[name], eager[name]), (ours[name], want), (eager[name], want))
        rows.append([*(float((a - b).abs().max() / scale) for a, b in pairs), float(want.abs().max() / largest), name])
    rows.sort(reverse=True)
    shown = [[*(f"{x:.1e}" for x in row[:4]), row[4]] for row in rows[: args.rows]]
    print_table(["attnc - eager", "attnc - float64", "eager - float64", "of the largest", "gradient of"], shown)


if __name__ == "__main__":
    main()

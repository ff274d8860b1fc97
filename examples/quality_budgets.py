"""Random error budgets on the model of bytes: does each hold on other texts, and what is saved?

For each budget `attnc.autotune` chooses a setting for each layer, on two batches, and verifies on a third. Here the
compiled model runs under that plan beside the exact one, on batches of which autotune saw none, and the error of the
logits is measured anew: the norm of the difference over that of the exact logits, the worst of the batches.

A budget allows a saving where one setting in all layers that is predicted below 0.8 of the exact time holds it, on all
of these batches; then the plan must be below 0.8 as well.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from byte_model import CONTEXT, TASKS, batch
from quality_runs import compiled, knobs_of
from torch import Tensor

import attnc

BUDGETS, LEAST, MOST = 10, 0.01, 0.5  # drawn evenly in their logarithm
PART = 0.8
ALLOW = (
    *(f"sinks_window{{sinks=4,window={window}}}" for window in (28, 60, 124, 252, 508)),
    *(f"block_mixture{{block=32,top_k={top_k}}}" for top_k in (2, 4, 8)),
    *(f"block_scores{{rows=32,block=32,top_k={top_k}}}" for top_k in (4, 8)),
    *(f"compressed_selection{{block=16,top_k={top_k},window=16}}" for top_k in (4, 16)),
)


def mixed(seed: int) -> Tensor:
    """Held-out texts, (3, CONTEXT): one of each task."""
    rng = random.Random(f"mixed {seed}")
    return torch.cat([batch(task, rng, 1, CONTEXT, True)[0] for task in TASKS])


@torch.no_grad()
def off(run: Any, texts: list[tuple[Tensor, Tensor]]) -> float:
    """The error of the logits, the worst of the batches; texts: each with its exact logits."""
    return max(((run(ids).logits - exact).norm() / exact.norm()).item() for ids, exact in texts)


def budgets(model: torch.nn.Module, devices: list[str], count: int) -> list[dict[str, Any]]:
    """A row for each device and budget."""
    data = [mixed(seed) for seed in range(3)]
    with torch.no_grad():
        seen, others = ([(ids, model(ids).logits) for ids in part] for part in (data, [mixed(100), mixed(101)]))
    alone = {spelling: off(compiled(model, spelling), [*seen, *others]) for spelling in ALLOW}
    rows = []
    for device in devices:
        options = {"inner": "eager"}
        with torch.no_grad():
            known = attnc.calibrate(model, data[:2], forms=ALLOW, device=device, options=options)
            single = {s: ratio(dict.fromkeys(known.regions, s), known) for s in ALLOW}
            rng = random.Random("budgets")
            for _ in range(count):
                budget = LEAST * (MOST / LEAST) ** rng.random()
                plan = attnc.autotune(
                    model, data[0], device=device, allow=ALLOW, max_error=budget, data=data, calibration=known,
                    trials=0, options=options,
                )  # fmt: skip
                rows.append(_judged(model, plan, device, budget, others, known))
                within = [single[s] for s in ALLOW if alone[s] <= budget]
                rows[-1]["single"] = min(within, default=1.0)
                rows[-1]["pays"] = rows[-1]["ratio"] < PART or rows[-1]["single"] >= PART
                print(f"budget {budget:.4f} on {device}: {rows[-1]}", file=sys.stderr, flush=True)
    return rows


def ratio(taken: Mapping[str, str], known: attnc.Calibration) -> float:
    """Predicted time of all attentions over that of the exact ones; taken: settings by region, others being exact."""
    found = 0.0
    for name, region in known.regions.items():
        times = [m.seconds for s, m in region.settings.items() if knobs_of(taken.get(name, "")) <= knobs_of(s)]
        found += region.exact_s if name not in taken else min(times, default=math.inf)  # spelled with all their knobs
    return found / sum(region.exact_s for region in known.regions.values())


def _judged(
    model: torch.nn.Module,
    plan: attnc.Plan,
    device: str,
    budget: float,
    texts: list[tuple[Tensor, Tensor]],
    known: attnc.Calibration,
) -> dict[str, Any]:
    """What a plan gives on texts of which autotune saw none."""
    options = {"inner": "eager", "plan": plan, "allow": ALLOW, "device": device}
    error = off(torch.compile(model, backend="attnc", options=options, dynamic=False), texts)
    taken = {place: choice.form for place, choice in plan.choices.items() if choice.error is not None}
    return {
        "device": device,
        "budget": budget,
        "error": error,
        "holds": error <= budget,
        "ratio": ratio(taken, known),
        "taken": taken,
        "verified": None if plan.verified is None else plan.verified.error,
        "front": len(plan.front),
    }

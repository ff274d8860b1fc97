"""How well does the closed cost model rank the ways to run an attention on this CPU?

Measures each form and the written spellings at several lengths, prints predicted beside measured time and the error
against the float64 reference at the shortest length, and writes results/cpu/cost_fit.json. Under three minutes. Last
stands the interval of measured over predicted times for cost_models/cpu.toml: the narrowest around 1 that holds 82%.

    python benchmarks/cost_fit.py [--threads 2] [--lengths 512 1024 4096 8192] [--again]

--again: the interval of the rows that are kept, without measuring.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from calibration import around_one
from torch.nn import functional as F

from attnc import ops
from attnc.cost_models.device import device_named
from attnc.cost_models.roofline import seconds, written_cost
from attnc.forms import BlockSparse, Dense
from attnc.forms.masked import reference
from attnc.operands import Operands
from attnc.region import AttentionRegion
from attnc.rule_attention import AttentionRule, AttentionShape

B, Hq, H, E = 1, 8, 2, 64
RULES = {
    "causal": "score=0.125 * s; keep=j - i <= 0",
    "window 512": "score=0.125 * s; keep=j - i <= 0 and i - j <= 511",
    "softcap 512": "score=50.0 * tanh(0.0025 * s); keep=j - i <= 0 and i - j <= 511",
}
RESULT = Path(__file__).parent / "results" / "cpu" / "cost_fit.json"
HELD = 0.82  # of the measured times, by the interval
Run = Callable[[], torch.Tensor]


def region(rule: str, L: int, written: str) -> AttentionRegion:
    return AttentionRegion(
        "attention",
        "",
        "",
        AttentionRule.parse(RULES[rule]),
        AttentionShape(B, Hq, H, L, L, E, E),
        "float32",
        "cpu",
        written=written,
    )


def inputs(L: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, L, heads, E).transpose(1, 2) for heads in (Hq, H, H)]


def kept(rule: str, L: int) -> torch.Tensor:
    distance = torch.arange(L)[:, None] - torch.arange(L)
    return (distance >= 0) & (distance < (L if rule == "causal" else 512))


def as_sdpa(rule: str, L: int) -> Run:
    query, key, value = inputs(L)

    def run() -> torch.Tensor:
        k, v = (t.repeat_interleave(Hq // H, 1) for t in (key, value))
        return F.scaled_dot_product_attention(query, k, v, attn_mask=kept(rule, L))

    return run


def as_composed(rule: str, L: int) -> Run:
    query, key, value = inputs(L)

    @torch.compile
    def written(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (t.repeat_interleave(Hq // H, 1) for t in (k, v))
        scores = q @ k.mT * 0.125
        scores = 50.0 * torch.tanh(scores / 50.0) if rule.startswith("softcap") else scores
        return scores.masked_fill(~kept(rule, L), -torch.inf).softmax(-1) @ v

    return lambda: written(query, key, value)


def as_form(rule: str, L: int, form: str, dynamic: bool | None = None) -> Run:
    qkv = inputs(L)
    spelling = ops.spell_attention(form, AttentionRule.parse(RULES[rule]))
    compiled = torch.compile(lambda q, k, v: torch.ops.attnc.attention(q, k, v, [], [], spelling)[0], dynamic=dynamic)
    return lambda: compiled(*qkv)


def ways(rule: str, L: int, threads: int) -> Iterator[tuple[str, float, Run]]:
    """Name, predicted seconds and a run of each way to compute `rule` at length L."""
    device = device_named("cpu", threads)
    if not rule.startswith("softcap"):
        sdpa = region(rule, L, "sdpa")
        yield "written: sdpa, mask", seconds(written_cost(sdpa, device), device), as_sdpa(rule, L)
    if L <= 2048:
        composed = region(rule, L, "composed")
        yield "written: composed", seconds(written_cost(composed, device), device), as_composed(rule, L)
    here = region(rule, L, "sdpa")
    forms = [Dense()] if not rule.startswith("softcap") or L <= 2048 else []
    for provider in ("blocked", "flex"):
        forms += BlockSparse(provider).space(here, device)[:1]
    for form in forms:
        if rule == "causal" and "flex" in form.spell() and L > 4096:
            continue
        yield form.spell(), seconds(form.cost(here, device), device), as_form(rule, L, form.spell())


def timed(run: Run, budget_s: float = 1.5) -> float:
    """Least of the runs that fit into the budget, after one to warm up."""
    run()
    best, start = float("inf"), time.perf_counter()
    while True:
        before = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - before)
        if now - start > budget_s:
            return best


def fit_interval(rows: list[dict]) -> dict[str, object]:
    """The interval of all rows, the share it holds, and what intervals of the other rules and lengths hold of each."""

    def ratios(kept: Callable[[dict], bool]) -> list[float]:
        return [row["measured_s"] / row["predicted_s"] for row in rows if kept(row)]

    def held(low: float, high: float, values: list[float]) -> float:
        return round(sum(low <= value <= high for value in values) / len(values), 3)

    every = ratios(lambda row: True)
    low, high = around_one(every, HELD)
    told: dict[str, object] = {"low": round(low, 3), "high": round(high, 3), "held": held(low, high, every)}
    for key in ("rule", "L"):
        told[f"held without its {key}"] = {
            str(value): held(
                *around_one(ratios(lambda row, k=key, v=value: row[k] != v), HELD),
                ratios(lambda row, k=key, v=value: row[k] == v),
            )
            for value in dict.fromkeys(row[key] for row in rows)
        }
    return told


def keep(found: dict) -> None:
    found = {**found, "interval": fit_interval(found["rows"])}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1))
    print(f"measured over predicted: {found['interval']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 4096, 8192])
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    if args.again:
        keep(json.loads(RESULT.read_text()))
        return
    torch.set_num_threads(args.threads)
    rows = []
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, float32, {args.threads} threads, "
        f"B={B} Hq={Hq} H={H} E={E}"
    )
    print(f"{'rule':<12} {'L':>5}  {'way':<52} {'predicted':>9} {'measured':>9} {'ratio':>5} {'error':>8}")
    with torch.no_grad():
        for rule in args.rules:
            for L in args.lengths:
                want = None
                if min(args.lengths) == L:
                    want, _ = reference(Operands(*inputs(L), [], [], AttentionRule.parse(RULES[rule])).double())
                for name, predicted, run in ways(rule, L, args.threads):
                    torch.compiler.reset()
                    off = None if want is None else (run() - want).abs().max().item()
                    measured = timed(run)
                    rows.append(
                        {
                            "rule": rule,
                            "L": L,
                            "way": name,
                            "predicted_s": predicted,
                            "measured_s": measured,
                            "error": off,
                        }
                    )
                    shown = "" if off is None else f"{off:.1e}"
                    print(
                        f"{rule:<12} {L:>5}  {name:<52} {predicted * 1e3:>7.1f}ms {measured * 1e3:>7.1f}ms "
                        f"{predicted / measured:>5.2f} {shown:>8}",
                        flush=True,
                    )
    keep({"torch": torch.__version__, "threads": args.threads, "rows": rows})


if __name__ == "__main__":
    main()

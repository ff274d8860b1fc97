"""How fast are sparse attentions on this machine, beside dense causal attention?

    python benchmarks/sparse.py table       ms of each, of dense SDPA and of choosing alone
    python benchmarks/sparse.py growth      run time by length at a fixed budget, and the exponent of a fit

Batch 1, 8 query heads of 64, float32; ours is compiled by Inductor, as in a model. Times are the best of interleaved
rounds. What dense attention computes is not what these compute: their errors depend on the model (attnc.calibrate).
Writes results/cpu/sparse.json.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timing import exponent, interleaved, print_environment, print_table, write_part
from torch import Tensor

from attnc.forms import parse_form
from attnc.forms.selected import Selected
from attnc.mixers.native_sparse import native_sparse, selected_blocks
from attnc.operands import Operands
from attnc.ops import ATTENTION
from attnc.rule_attention import AttentionRule

HEADS, WIDTH = 8, 64
CAUSAL, PLAIN = "score=0.125 * s; keep=j - i <= 0", "score=0.04 * s"
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One system at one length: what runs, what only chooses, what is dense."""

    ours: Run
    dense: Run
    choosing: Callable[[], object] | None = None


def _qkv(length: int, keys: int = HEADS, width: int = WIDTH, rows: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(length)
    shapes = ((HEADS, rows or length), (keys, length), (keys, length))
    query, key, value = (torch.randn(1, *shape, width, generator=made) for shape in shapes)
    return query, key, value


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Run:
    grouped = query.shape[1] > key.shape[1]
    return lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)


def _compiled(spelling: str, q: Tensor, k: Tensor, v: Tensor, *captured: Tensor) -> Run:
    run = torch.compile(lambda *t: ATTENTION(*t[:3], list(t[3:]), [], spelling)[0], dynamic=False)
    return lambda: run(q, k, v, *captured)


def _form(spelling: str) -> Callable[[int], Case]:
    def case(length: int) -> Case:
        q, k, v = _qkv(length)
        form, given = parse_form(spelling), Operands(q, k, v, [], [], AttentionRule.parse(CAUSAL))
        choosing = (lambda: form.choose(given)) if isinstance(form, Selected) else None
        return Case(_compiled(f"{spelling} | {CAUSAL}", q, k, v), _dense(q, k, v), choosing)

    return case


def _native(length: int) -> Case:
    q, k, v = _qkv(length, 1)
    gates = tuple(torch.full((1, HEADS, length), 1 / 3) for _ in range(3))
    run = torch.compile(native_sparse, dynamic=False)
    return Case(lambda: run(q, k, v, gates), _dense(q, k, v), lambda: selected_blocks(q, k))


def _latent(length: int) -> Case:
    """One row of 16 heads over latents of 576, values their first 512, chosen by an indexer of 4 heads of 32."""
    made = torch.Generator().manual_seed(length)
    q = torch.randn(1, 16, 1, 576, generator=made)
    k = torch.randn(1, 1, length, 576, generator=made)
    v = k[..., :512]
    index = [torch.randn(*shape, generator=made) for shape in ((1, 4, 1, 32), (1, length, 32), (1, 1, 4))]
    spelling = "token_top_k{scorer=indexer,top_k=2048}"
    form, given = parse_form(spelling), Operands(q, k, v, index, [], AttentionRule.parse(PLAIN))
    assert isinstance(form, Selected)

    def dense() -> Tensor:  # as models write it; SDPA would repeat the keys 16 times
        return ((q * 0.04) @ k.mT).softmax(-1) @ v

    return Case(_compiled(f"{spelling} | {PLAIN}", q, k, v, *index), dense, lambda: form.choose(given))


# Name, length, how much faster than dense it is to be (issue 6), and the case.
CASES: dict[str, tuple[int, float, Callable[[int], Case]]] = {
    "block mixture, 2 of 512": (16384, 4.0, _form("block_mixture{block=512,top_k=2}")),
    "native sparse, 16 of 64 and 512": (32768, 2.0, _native),
    "sinks 4 and window 512": (32768, 15.0, _form("sinks_window{sinks=4,window=512}")),
    "tokens 2048, latent decode": (32768, 2.0, _latent),
}
GROWTH = (4096, 8192, 16384, 32768, 65536)


def table(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name in args.only:
        length, goal, make = CASES[name]
        case = make(length)
        runs: dict[str, Callable[[], object]] = {"ours": case.ours, "dense": case.dense}
        if case.choosing:
            runs["choosing"] = case.choosing
        with torch.no_grad():
            [run() for run in runs.values()]
            times = interleaved(runs, args.rounds)
        ms = {f"{n}_ms": 1e3 * t.best for n, t in times.items()}
        rows.append({"case": name, "length": length, **ms, "faster": ms["dense_ms"] / ms["ours_ms"], "goal": goal})
        print(rows[-1], flush=True)
    print_table(
        ["case", "tokens", "ms", "choosing", "dense", "faster", "asked"],
        [[r["case"], r["length"], f"{r['ours_ms']:.1f}", f"{r.get('choosing_ms', math.nan):.1f}",
          f"{r['dense_ms']:.1f}", f"{r['faster']:.1f}x", f"{r['goal']:.0f}x"] for r in rows],
    )  # fmt: skip
    return rows


def growth(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name in args.only:
        seconds = []
        for length in GROWTH:
            case = CASES[name][2](length)
            with torch.no_grad():
                case.ours()
                seconds.append(interleaved({"ours": case.ours}, args.rounds)["ours"].best)
        ms = [1e3 * s for s in seconds]
        rows.append({"case": name, "lengths": GROWTH, "ms": ms, "exponent": exponent(GROWTH, seconds)})
    shown = [[r["case"], *(f"{ms:.1f}" for ms in r["ms"]), f"{r['exponent']:.3f}"] for r in rows]
    print_table(["case", *map(str, GROWTH), "exponent"], shown)
    return rows


PARTS = {"table": table, "growth": growth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    before = print_environment()
    rows = PARTS[args.part](args)
    if not args.dry:
        write_part("sparse", before, vars(args), {args.part: rows})


if __name__ == "__main__":
    main()

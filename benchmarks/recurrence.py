"""How fast are the cores of recurrent mixers on this machine, beside the torch code of the models they come from?

    python benchmarks/recurrence.py table        ms, ratio, errors, share of the matmul peak, memory
    python benchmarks/recurrence.py growth       run time from 4k to 64k tokens, and the exponent of a fit
    python benchmarks/recurrence.py crossover    from which length it beats dense causal attention
    python benchmarks/recurrence.py decode       time and memory of one token behind contexts of several lengths
    python benchmarks/recurrence.py chunks       run time by chunk size

Batch 1, float32, without projections. The model's own code is the torch path of transformers. Errors are against the
operator in float64, which the tests compare with a loop over tokens. Times are the best of interleaved rounds. Writes
results/cpu/recurrence.json, each part under its name.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from timing import exponent, in_fresh_process, interleaved, peak_memory, print_environment, print_table, write_part
from torch import Tensor
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from attnc.codegen import cpu_recurrence
from attnc.codegen.cpu_recurrence import Given
from attnc.op_recurrence import RECURRENCE
from attnc.rule_recurrence import RecurrenceRule, RecurrenceShape

HEADS, WIDTH = 8, 64
LENGTHS = (4096, 16384)
GROWTH = (4096, 8192, 16384, 32768, 65536)
BLOCK = 256  # of lightning attention, as MiniMax has it


@dataclass(frozen=True)
class Mixer:
    """A rule, the sizes it is measured at, random operands (B, L, H, ...), and the model's own code on the same."""

    rule: RecurrenceRule
    operands: Callable[[int], dict[str, Tensor]]
    theirs: Callable[[dict[str, Tensor]], Tensor]
    H: int = HEADS
    Hk: int = HEADS
    K: int = WIDTH
    fixed: tuple[str, ...] = ()  # operands that their code makes itself

    def learning(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: t.detach().clone().requires_grad_(t.dim() > 1 and name not in self.fixed) for name, t in x.items()
        }

    def flops(self, length: int) -> int:
        shape = RecurrenceShape(B=1, H=self.H, L=length, K=self.K, V=WIDTH, Hk=self.Hk)
        return self.rule.flops(shape)

    def given(self, x: dict[str, Tensor]) -> Given:
        return Given(**{name: t.transpose(1, 2) if t.dim() > 1 else t for name, t in x.items()})

    def ours(self, x: dict[str, Tensor]) -> Tensor:
        return RECURRENCE(*self.given(x)[:8], self.rule.spell())[0].transpose(1, 2)

    def exact(self, x: dict[str, Tensor]) -> Tensor:
        wide = self.given({name: t.double() for name, t in x.items()})
        return cpu_recurrence.recurrence(wide, replace(self.rule, state="float64"))[0].transpose(1, 2)


def _qkv(length: int, heads: int = HEADS) -> dict[str, Tensor]:
    q, k, v = (torch.randn(1, length, heads, WIDTH) for _ in range(3))
    return {"query": q, "key": k, "value": v}


def _log_decay(*shape: int) -> Tensor:
    """Steps of a softplus, as a model at its start has them."""
    return -F.softplus(torch.randn(shape)) * torch.rand(shape[-1])


def _delta(channel: bool) -> Callable[[int], dict[str, Tensor]]:
    def operands(length: int) -> dict[str, Tensor]:
        decay = _log_decay(1, length, HEADS, WIDTH) if channel else _log_decay(1, length, HEADS)
        return {**_qkv(length), "decay": decay, "beta": torch.rand(1, length, HEADS)}

    return operands


def _their_delta(function: Callable[..., Any]) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda x: function(
        x["query"], x["key"], x["value"], g=x["decay"], beta=x["beta"], use_qk_l2norm_in_kernel=True
    )[0]


def _lightning(length: int) -> dict[str, Tensor]:
    return {**_qkv(length), "decay": -(2.0 ** -torch.arange(1, HEADS + 1))}


def _their_lightning(x: dict[str, Tensor]) -> Tensor:
    """The module's own forward, with what stands around its core taken away."""
    length = x["query"].shape[1]
    mixed = torch.cat([x["query"], x["key"], x["value"]], -1).flatten(2)
    rate = -x["decay"][:, None, None]
    factors = MiniMaxLightningAttention.decay_factors(SimpleNamespace(block_size=BLOCK), rate)
    module = SimpleNamespace(
        head_dim=WIDTH, num_attention_heads=HEADS, block_size=BLOCK, layer_idx=0, slope_rate=rate,
        act_fn=lambda y: y, qkv_proj=lambda _: mixed, norm=lambda y: y, out_proj=lambda y: y,
        output_gate=lambda y: y, **dict(zip(("query_decay", "key_decay", "diagonal_decay"), factors, strict=True)),
    )  # fmt: skip
    hidden = torch.full((1, length, 1), math.inf)  # its sigmoid is one
    return MiniMaxLightningAttention.forward(module, hidden, None, None)[0].unflatten(-1, (HEADS, WIDTH))


STATES, SSM_HEADS = 128, 24  # of Mamba-2 130m


def _mamba2(length: int) -> dict[str, Tensor]:
    steps = F.softplus(torch.randn(1, length, SSM_HEADS) - 2)
    keys = {name: torch.randn(1, length, 1, STATES) for name in ("query", "key")}
    rates = -torch.arange(1, SSM_HEADS + 1.0)
    return {**keys, "value": torch.randn(1, length, SSM_HEADS, WIDTH), "decay": steps * rates, "beta": steps}


def _their_mamba2(x: dict[str, Tensor]) -> Tensor:
    rates = -torch.arange(1, SSM_HEADS + 1.0)
    return mamba2_chunk_scan(x["value"], x["beta"], rates, x["key"], x["query"], 256)


DELTA = RecurrenceRule(delta=True, gate="write", scale=WIDTH**-0.5, qk_norm=1e-6, chunk=64)
MIXERS = {
    "gated_delta": Mixer(replace(DELTA, decay="token"), _delta(False), _their_delta(torch_chunk_gated_delta_rule)),
    "lightning": Mixer(RecurrenceRule(decay="head", chunk=BLOCK), _lightning, _their_lightning),
    "mamba2": Mixer(
        RecurrenceRule(decay="token", gate="write", chunk=256),
        _mamba2,
        _their_mamba2,
        SSM_HEADS,
        1,
        STATES,
        ("decay", "beta"),
    ),
    "kda": Mixer(replace(DELTA, decay="channel"), _delta(True), _their_delta(chunk_kimi_delta_attention)),
}


def _gradients(run: Callable[[dict[str, Tensor]], Tensor], x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    learned = [t for t in x.values() if t.requires_grad]
    out = run(x)
    weights = torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)
    return torch.autograd.grad((out * weights).sum(), learned)


def _off(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def _peak(rounds: int) -> float:
    """GFLOP/s of a product of two matrices of 2048."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = interleaved({"mm": lambda: a @ b}, rounds)["mm"].best
    return 2 * 2048**3 / best / 1e9


# The table.


def table(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name in args.only:
        for length in args.lengths:
            rows.append(_forward_row(name, length, args))
            if args.backward:
                rows.append(_backward_row(name, length, args))
            _print(rows[-2 if args.backward else -1 :])
    print()
    _print(rows)
    return rows


def _forward_row(name: str, length: int, args: argparse.Namespace) -> dict[str, Any]:
    mixer = MIXERS[name]
    torch.manual_seed(0)
    x = mixer.operands(length)
    with torch.no_grad():
        ours, theirs, want = mixer.ours(x), mixer.theirs(x), mixer.exact(x)
        runs = {"ours": lambda: mixer.ours(x), "theirs": lambda: mixer.theirs(x)}
        times, peak = interleaved(runs, args.rounds), _peak(args.rounds)
    best = times["ours"].best
    return {
        "mixer": name, "pass": "forward", "length": length, "ms": 1e3 * best, "their_ms": 1e3 * times["theirs"].best,
        "ratio": times["theirs"].best / best, "error": _off(ours, want), "their_error": _off(theirs, want),
        "gflops": mixer.flops(length) / best / 1e9, "of_peak": mixer.flops(length) / best / 1e9 / peak,
        "extra_mib": in_fresh_process(_memory, name, length, False, args.threads),
    }  # fmt: skip


def _backward_row(name: str, length: int, args: argparse.Namespace) -> dict[str, Any]:
    mixer = MIXERS[name]
    torch.manual_seed(0)
    x = mixer.learning(mixer.operands(length))
    wide = {key: t.detach().double().requires_grad_(t.requires_grad) for key, t in x.items()}
    exact = Mixer.ours
    in_64 = replace(mixer, rule=replace(mixer.rule, state="float64"))
    want = _gradients(lambda y: exact(in_64, y), wide)
    ours, theirs = _gradients(mixer.ours, x), _gradients(mixer.theirs, x)
    runs = {"ours": lambda: _gradients(mixer.ours, x), "theirs": lambda: _gradients(mixer.theirs, x)}
    times = interleaved(runs, max(2, args.rounds // 2))
    best = times["ours"].best
    errors = [max(map(_off, got, want)) for got in (ours, theirs)]
    return {
        "mixer": name, "pass": "both", "length": length, "ms": 1e3 * best, "their_ms": 1e3 * times["theirs"].best,
        "ratio": times["theirs"].best / best, "error": errors[0], "their_error": errors[1], "gflops": math.nan,
        "of_peak": math.nan, "extra_mib": in_fresh_process(_memory, name, length, True, args.threads),
    }  # fmt: skip


def _memory(name: str, length: int, backward: bool, threads: int) -> float:
    """MiB at the peak beyond inputs and results."""
    torch.set_num_threads(threads)
    mixer = MIXERS[name]
    x = mixer.operands(length)
    x = mixer.learning(x) if backward else x

    def run() -> object:
        with torch.set_grad_enabled(backward):
            return _gradients(mixer.ours, x) if backward else mixer.ours(x)

    results = run()
    found = [results] if isinstance(results, Tensor) else list(results)  # type: ignore[call-overload]
    sizes = sum(t.numel() * t.element_size() for t in found)
    sizes += 2 * x["value"].numel() * 4 if backward else 0  # the output and its gradient
    del results, found
    return peak_memory(run)["above_mib"] - sizes / 2**20


def _print(rows: list[dict[str, Any]]) -> None:
    shown = [
        [r["mixer"], r["pass"], r["length"], f"{r['ms']:.1f}", f"{r['their_ms']:.1f}", f"{r['ratio']:.2f}",
         f"{r['error']:.1e}", f"{r['their_error']:.1e}", f"{r['gflops']:.0f}", f"{r['of_peak']:.0%}",
         f"{r['extra_mib']:.0f}"]
        for r in rows
    ]  # fmt: skip
    heads = ["mixer", "pass", "tokens", "ms", "their ms", "ratio", "error", "theirs", "GFLOP/s", "of peak", "extra MiB"]
    print_table(heads, shown)


# The others.


def growth(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name in args.only:
        mixer, seconds = MIXERS[name], []
        for length in GROWTH:
            x = mixer.operands(length)
            with torch.no_grad():
                mixer.ours(x)
                seconds.append(interleaved({"ours": lambda: mixer.ours(x)}, args.rounds)["ours"].best)  # noqa: B023
        ms = [1e3 * s for s in seconds]
        rows.append({"mixer": name, "lengths": GROWTH, "ms": ms, "exponent": exponent(GROWTH, seconds)})
    heads = ["mixer", *map(str, GROWTH), "exponent"]
    print_table(heads, [[r["mixer"], *(f"{ms:.1f}" for ms in r["ms"]), f"{r['exponent']:.3f}"] for r in rows])
    return rows


def crossover(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name in args.only:
        mixer = MIXERS[name]
        if mixer.Hk != mixer.H:
            continue
        for length in (64, 128, 256, 512, 1024, 2048, 4096):
            x = mixer.operands(length)
            q, k, v = (x[key].transpose(1, 2) for key in ("query", "key", "value"))
            runs = {
                "ours": lambda: mixer.ours(x),  # noqa: B023
                "dense": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),  # noqa: B023
            }
            with torch.no_grad():
                [run() for run in runs.values()]
                times = interleaved(runs, 4 * args.rounds)
            rows.append({"mixer": name, "length": length, **{f"{n}_ms": 1e3 * t.best for n, t in times.items()}})
        own = [r for r in rows if r["mixer"] == name]
        slower = [r["length"] for r in own if r["ours_ms"] > r["dense_ms"]]
        first = min((r["length"] for r in own if r["length"] > max(slower, default=0)), default="beyond the last")
        print(f"{name}: faster than dense causal attention from {first} tokens on")
    shown = [[r["mixer"], r["length"], f"{r['ours_ms']:.2f}", f"{r['dense_ms']:.2f}"] for r in rows]
    print_table(["mixer", "tokens", "ms", "dense ms"], shown)
    return rows


def _repeated(run: Callable[[], object], times: int) -> None:
    for _ in range(times):
        run()


def decode(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One token from the state that a context left behind; keys and values of the context are not kept."""
    rows = []
    for name in args.only:
        mixer = MIXERS[name]
        for length in (1024, 16384, 65536):
            spelling = mixer.rule.spell()
            one = mixer.given(mixer.operands(1))
            with torch.no_grad():
                state = RECURRENCE(*mixer.given(mixer.operands(length))[:8], spelling)[1]
                step = partial(RECURRENCE, *one._replace(initial=state)[:8], spelling)
                [step() for _ in range(20)]
                best = interleaved({"step": partial(_repeated, step, 50)}, args.rounds)["step"].best / 50
            kept = state.numel() * state.element_size() / 2**10
            rows.append({"mixer": name, "context": length, "us": 1e6 * best, "state_kib": kept})
    shown = [[r["mixer"], r["context"], f"{r['us']:.0f}", f"{r['state_kib']:.0f}"] for r in rows]
    print_table(["mixer", "context", "us", "state KiB"], shown)
    return rows


def chunks(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name in args.only:
        mixer = MIXERS[name]
        given = mixer.given(mixer.operands(args.lengths[0]))
        runs = {str(c): (lambda c=c: cpu_recurrence.recurrence(given, mixer.rule, c)) for c in (16, 32, 64, 128, 256)}  # noqa: B023
        [run() for run in runs.values()]
        times = interleaved(runs, args.rounds)
        rows.append({"mixer": name, "length": args.lengths[0], "ms": {c: 1e3 * t.best for c, t in times.items()}})
    print_table(["mixer", *rows[0]["ms"]], [[r["mixer"], *(f"{ms:.1f}" for ms in r["ms"].values())] for r in rows])
    return rows


PARTS = {"table": table, "growth": growth, "crossover": crossover, "decode": decode, "chunks": chunks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--only", nargs="+", default=list(MIXERS), choices=MIXERS)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backward", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    before = print_environment()
    rows = PARTS[args.part](args)
    if not args.dry:
        write_part("recurrence", before, vars(args), {args.part: rows})


if __name__ == "__main__":
    main()

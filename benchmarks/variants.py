"""One model, one spelling of attention, one compiler: run it, compare it with others, name what attnc chose.

The error of a variant is against the uncompiled model of the same spelling ("eager" for hand-written FlexAttention).

    python benchmarks/variants.py             prints the variants that the benchmarks run
"""

from __future__ import annotations

import argparse
import inspect
import math
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch
from architectures import ARCHITECTURES, build, tokens
from timing import Timing, in_fresh_process, interleaved, peak_memory, print_table, relative_error

import attnc

COMPILERS = ("none", "inductor", "attnc")
# Variants share code. transformers' FlexAttention breaks the graph in it, and other variants would then be compiled
# again, in pieces; since torch 2.13 a compile can have cache entries of its own.
APART = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
Run = Callable[[], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Variant:
    """One way to run an architecture. length, layers, window: None is the architecture's own."""

    architecture: str
    spelling: str
    compiler: str
    length: int | None = None
    layers: int = 4
    window: int | None = None
    use_cache: bool = False
    training: bool = False

    @property
    def name(self) -> str:
        return f"{self.compiler} on {self.written}"

    @property
    def written(self) -> str:
        return self.spelling + (" with cache" if self.use_cache else "")

    @property
    def size(self) -> int:
        return self.length or ARCHITECTURES[self.architecture].length

    @property
    def reference(self) -> Variant:
        """What its numbers are held against."""
        spelling = "eager" if self.spelling == "flex_attention" else self.spelling
        return replace(self, compiler="none", spelling=spelling)


class Ready:
    """A variant's model, compiled at the first call of `run`."""

    def __init__(self, variant: Variant) -> None:
        v = self.variant = variant
        self.model = build(v.architecture, v.spelling, v.size, v.layers, v.window, v.use_cache)
        self.model.train(v.training)
        self.tokens = tokens(v.size)

    @cached_property
    def compiled(self) -> Callable[..., object]:
        if self.variant.compiler == "none":
            return self.model
        return torch.compile(self.model, backend=self.variant.compiler, **APART)

    def run(self) -> tuple[torch.Tensor, ...]:
        """The logits, or with training the gradients of the next token's cross-entropy."""
        if not self.variant.training:
            with torch.no_grad():
                return (self.compiled(self.tokens).logits,)
        self.model.zero_grad(set_to_none=True)
        self.compiled(self.tokens, labels=self.tokens).loss.backward()
        return tuple(p.grad for p in self.model.parameters() if p.grad is not None)

    def forms(self) -> dict[str, int]:
        """How many regions attnc gave to each form; nothing for another compiler."""
        return dict(attnc.last_report(self.compiled).counts()["forms"]) if self.variant.compiler == "attnc" else {}


@dataclass(frozen=True)
class Row:
    """One line of a comparison. ratio: Inductor's seconds on the same spelling over these; above 1 is faster.

    flex_ratio: these seconds over Inductor's on hand-written FlexAttention. graphs: into how many Dynamo cut the model.
    peak_mib: in a process of its own, above what was resident before the run. failure: what was raised, "" if nothing.
    """

    architecture: str
    variant: str
    length: int
    seconds: float = math.nan
    median_s: float = math.nan
    first_call_s: float = math.nan
    ratio: float = math.nan
    flex_ratio: float = math.nan
    error: float = math.nan
    forms: str = ""
    graphs: int = 0
    peak_mib: float = math.nan
    failure: str = ""


def compare(variants: Sequence[Variant], rounds: int, memory: bool = False) -> list[Row]:
    """Time variants of one architecture side by side in this process; a variant that fails says so in its row."""
    torch.compiler.reset()
    wanted: dict[Variant, tuple[torch.Tensor, ...]] = {}
    ready: dict[Variant, Ready] = {}
    rows: dict[Variant, Row] = {}
    for v in variants:
        say(f"{v.architecture} at {v.size}: {v.name}")
        rows[v] = Row(v.architecture, v.name, v.size)
        try:
            if v.reference not in wanted:
                wanted[v.reference] = detached(Ready(v.reference).run())
            candidate, graphs = Ready(v), graphs_made()
            start = time.perf_counter()
            got = candidate.run()
            rows[v] = replace(
                rows[v],
                first_call_s=time.perf_counter() - start,
                graphs=graphs_made() - graphs,
                error=relative_error(got, wanted[v.reference]),
                forms=", ".join(f"{name} x{count}" for name, count in candidate.forms().items()),
            )
            ready[v] = candidate
        except Exception as exc:  # noqa: BLE001  # the other rows still count; the traceback is shown
            traceback.print_exc()
            rows[v] = replace(rows[v], failure=failure_of(exc))
    say(f"{rounds} rounds of {len(ready)} variants")
    graphs = graphs_made()
    times = interleaved({v.name: candidate.run for v, candidate in ready.items()}, rounds)
    if graphs_made() != graphs:
        say(f"these times are not to be trusted: {graphs_made() - graphs} graphs were compiled while they were taken")
    rows |= {v: timed(rows[v], v, times) for v in ready}
    if memory:
        rows |= {v: replace(rows[v], peak_mib=memory_of(v)["above_mib"]) for v in ready}
    return list(rows.values())


def graphs_made() -> int:
    """How many graphs Dynamo has handed to a compiler in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def detached(tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(t.detach().clone() for t in tensors)


def failure_of(exc: Exception) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()] or [""]
    return f"{type(exc).__name__}: {lines[0]}"[:200]


def timed(row: Row, variant: Variant, times: dict[str, Timing]) -> Row:
    own = times[variant.name]

    def best(of: Variant) -> float:
        return times[of.name].best if of.name in times else math.nan

    inductor = replace(variant, compiler="inductor")
    return replace(
        row,
        seconds=own.best,
        median_s=own.median,
        ratio=best(inductor) / own.best,
        flex_ratio=own.best / best(replace(inductor, spelling="flex_attention")),
    )


def memory_of(variant: Variant) -> dict[str, float]:
    """Resident MiB of one warmed-up run of `variant` in a process of its own."""
    say(f"{variant.architecture} at {variant.size}: memory of {variant.name}")
    return in_fresh_process(_memory, variant, torch.get_num_threads())


def _memory(variant: Variant, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    ready = Ready(variant)
    ready.run()
    ready.model.zero_grad(set_to_none=True)
    return peak_memory(ready.run)


# What every benchmark asks and shows.


def arguments(question: str, rounds: int, names: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=question, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=list(names), metavar="NAME", help=", ".join(names))
    parser.add_argument("--length", type=int, help="tokens; each architecture's own when left out")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--window", type=int, help="each architecture's own when left out")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="keep no result")
    return parser


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def number(value: float, digits: str) -> str:
    return "-" if math.isnan(value) else format(value, digits)


def print_rows(rows: Iterable[Row], memory: bool = False) -> None:
    headings = ["architecture", "tokens", "variant", "best s", "median s", "x Inductor", "/ flex", "error"]
    headings += ["first s", "graphs"]
    table = []
    for r in rows:
        figures = [number(r.seconds, ".3f"), number(r.median_s, ".3f"), number(r.ratio, ".2f")]
        figures += [number(r.flex_ratio, ".2f"), number(r.error, ".1e"), number(r.first_call_s, ".1f"), r.graphs]
        figures += [number(r.peak_mib, ".0f")] if memory else []
        table.append([r.architecture, r.length, r.variant, *figures, r.failure or r.forms or "-"])
    print_table([*headings, *(["peak MiB"] if memory else []), "forms"], table)


def content(rows: Iterable[Row]) -> list[dict[str, object]]:
    """Rows for JSON, null where there is no number."""
    return [
        {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in asdict(row).items()}
        for row in rows
    ]


def main() -> None:
    rows = [[name, ", ".join(a.spellings), ", ".join(COMPILERS)] for name, a in ARCHITECTURES.items()]
    print_table(["architecture", "spellings", "compilers"], rows)


if __name__ == "__main__":
    main()

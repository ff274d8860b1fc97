"""One model of the zoo under one setting: attnc against eager, with Dynamo alone as the control.

A frame that broke is compiled once and may run for every layer, so regions are counted as often as their graph runs in
one call of the model, and not once for each graph. The control says what attnc is held to: whether eager agrees with
itself, whether torch.compile(backend="eager") agrees with eager, and into how many graphs Dynamo cuts the model.

Needs the zoo's own modules on sys.path (`benchmarks/zoo.py` sees to it).
"""

from __future__ import annotations

import importlib
import inspect
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
import zoo_judges as judges
import zoo_table as table
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.utils import counters

import attnc
from attnc.report import Report
from attnc.reports import REPORTS

TOLERANCE = 1e-4  # of each output's largest value, in float32; the zoo's own
GRADIENT_FLOOR = 1e-3  # of the largest gradient: a gradient that is zero up to rounding has no scale of its own
DECODE_STEPS = 3
CACHES = ("past_key_values", "cache_params", "state", "mems")  # names of a cache, as output and as argument
SHORT_REASON = 160

# Controls of earlier records, by key, put here before jobs are forked: they do not depend on attnc.
CONTROLS: dict[str, dict[str, Any]] = {}


@dataclass
class Graph:
    """A graph that Dynamo handed to the compiler; report: attnc's, None for another compiler."""

    report: Report | None
    runs: int = 0


@dataclass
class Watch:
    """While it is entered: every graph that Dynamo has compiled, and how often each one runs.

    laps: runs of each graph in each call of the model, since `restart`.
    """

    graphs: list[Graph] = field(default_factory=list)
    laps: list[list[int]] = field(default_factory=list)

    def __enter__(self) -> Watch:
        self._compile, reports = OutputGraph._call_user_compiler, []
        add = REPORTS.add

        def noted(place: Any, report: Report) -> Report | None:
            reports.append(report)
            return add(place, report)

        def watched(output: OutputGraph, *args: Any) -> Callable[..., Any]:
            reports.clear()
            run = self._compile(output, *args)
            graph = Graph(reports[-1] if reports else None)
            self.graphs.append(graph)

            def counted(*inputs: Any) -> Any:
                graph.runs += 1
                return run(*inputs)

            return counted

        REPORTS.add = noted  # type: ignore[method-assign]
        OutputGraph._call_user_compiler = watched  # type: ignore[method-assign]
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        OutputGraph._call_user_compiler = self._compile  # type: ignore[method-assign]
        del REPORTS.add

    def restart(self) -> None:
        self.laps.clear()
        for graph in self.graphs:
            graph.runs = 0

    def lap(self) -> None:
        """One call of the model is over."""
        self.laps.append([graph.runs for graph in self.graphs])
        for graph in self.graphs:
            graph.runs = 0

    def regions(self) -> list[dict[str, int]]:
        """Regions by kind that ran in each call."""
        return [dict(self._sum(runs)) for runs in self.laps]

    def _sum(self, runs: Sequence[int]) -> Counter[str]:
        total: Counter[str] = Counter()
        for graph, times in zip(self.graphs, runs, strict=False):
            for region in graph.report.regions if graph.report and times else ():
                total[region.kind] += times
        return total


@dataclass(frozen=True)
class Program:
    """What is run of a model: one call, a training step, or a prefill and decode steps on its cache."""

    model: torch.nn.Module
    inputs: Mapping[str, Any]
    training: bool
    cached: bool
    outputs: Callable[[object], list[torch.Tensor]]

    def run(self, fn: Callable[..., Any], after: Callable[[], None] = lambda: None) -> tuple[list, list]:
        """Outputs and gradients; `after` is called after each call of the model. Seeded like the zoo's own check."""
        torch.manual_seed(0)
        if not self.training:
            with torch.no_grad():
                return self._calls(fn, after), []
        self.model.zero_grad(set_to_none=True)
        got = self.outputs(fn(**self.inputs))
        after()
        sum(t.float().square().mean() for t in got if t.requires_grad).backward()  # type: ignore[union-attr]
        # A loop over experts that meets no token leaves no gradient; one product for all experts leaves zeros.
        learned = [p for p in self.model.parameters() if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in learned]
        return [t.detach().clone() for t in got], gradients

    def _calls(self, fn: Callable[..., Any], after: Callable[[], None]) -> list[torch.Tensor]:
        out = fn(**self.inputs)
        after()
        got = [t.clone() for t in self.outputs(out)]
        for step in range(DECODE_STEPS if self.cached else 0):
            name = self.cache_of(out)
            out = fn(**self._next(step), **{name: getattr(out, name)})
            after()
            got += [t.clone() for t in self.outputs(out)]
        return got

    def cache_of(self, out: object) -> str:
        """The name under which the model returns its cache and takes it again. Raises: LookupError."""
        known = inspect.signature(self.model.forward).parameters
        for name in CACHES:
            if name in known and getattr(out, name, None) is not None:
                return name
        raise LookupError("it returns no cache that it takes again")

    def _next(self, step: int) -> dict[str, Any]:
        """Inputs of a decode step: one token; what an encoder reads stays, what only a prefill reads goes."""
        two = "decoder_input_ids" in self.inputs
        tokens, mask = ("decoder_input_ids", "decoder_attention_mask") if two else ("input_ids", "attention_mask")
        before = self.inputs[tokens]
        gen = torch.Generator().manual_seed(step + 5)
        shape = (before.shape[0], 1, *before.shape[2:])
        given = dict(self.inputs) if two else {"use_cache": True}
        given[tokens] = torch.randint(4, 100, shape, generator=gen)
        if mask in self.inputs:
            seen = self.inputs[mask]
            given[mask] = torch.cat([seen, seen.new_ones(seen.shape[0], step + 1)], 1)
        return given


def check(job: Mapping[str, Any], save: Callable[[dict], None]) -> dict[str, Any]:
    """Build the job's model and measure it; `save` keeps what is there in case of a timeout."""
    out: dict[str, Any] = {}
    zoo_build, zoo_capture = (importlib.import_module(name) for name in ("zoo_build", "zoo_capture"))
    start = time.perf_counter()
    try:
        built = zoo_build.build(
            zoo_build.catalog()[job["model"]],
            attn=job["attn"],
            mask=job["mask"],
            train=job["mode"] == "train",
            use_cache=job["cache"],
            experts=job["experts"],
        )
    except Exception as exc:  # noqa: BLE001  # of the library, before anything is compiled
        return out | {"skipped": _not_offered(job, exc)}
    if job["mask"] == "pad" and not any("attention_mask" in name for name in built.inputs):
        return out | {"skipped": "takes no attention mask"}
    out["build_s"] = round(time.perf_counter() - start, 2)
    program = Program(built.model, built.inputs, job["mode"] == "train", job["cache"], zoo_build.outputs)
    compare = _Compare(zoo_capture.compare, zoo_capture.short_reason)
    try:
        want = program.run(program.model)
    except Exception as exc:  # noqa: BLE001  # of the library, before anything is compiled
        what = "no cached decode as this harness writes it" if job["cache"] else "eager itself raises"
        return out | {"skipped": f"{what}: {said(exc)}"}
    out["attnc"] = attempt(program, want, compare, "attnc", {"inner": job["inner"], "force": job["force"]})
    save(out)
    out["control"] = CONTROLS.get(job["key"]) or {
        "eager": compare.errors(want, program.run(program.model), None),
        **attempt(program, want, compare, "eager", None),
    }
    if table.verdict({**job, "status": "ok", "result": out}) != "equal" or table.more_breaks({"result": out}):
        save(out)  # is it attnc, or the compiler that attnc hands the graph to?
        out["inner_alone"] = attempt(program, want, compare, job["inner"], None)
        run = lambda model: replace(program, model=model).run(model)  # noqa: E731
        out["float64"] = compare.errors(want, judges.in_float64(program.model, run), None)
        out["nudged"] = compare.errors(want, judges.nudged(program.model, run), None)
    return out


def _not_offered(job: Mapping[str, Any], exc: Exception) -> str:
    """Why the library has no such model, in few words."""
    if job["attn"] == "sdpa" and "scaled_dot_product_attention" in str(exc):
        return "has no sdpa"
    if job["experts"] is not None and "experts_implementation" in str(exc):
        return "has no choice of experts implementation"
    if job["cache"]:
        return f"does not run with a cache: {said(exc)}"
    return f"eager itself raises: {said(exc)}"


@dataclass(frozen=True)
class _Compare:
    """The zoo's own comparison, and its own short form of the reason for a graph break."""

    compare: Callable[..., dict[str, Any]]
    reason: Callable[[str], str]

    def errors(self, want: tuple[list, list], first: tuple[list, list], second: list | None) -> dict[str, float | None]:
        """Largest relative error of the first run, the second, the gradients; None: other shapes, or not finite."""
        pairs = {"first": self.compare(want[0], first[0])}
        if second is not None:
            pairs["second"] = self.compare(want[0], second)
        if want[1] or first[1]:
            pairs["gradient"] = self.compare(want[1], first[1], floor=GRADIENT_FLOOR)
        return {name: _number(found["rel"]) for name, found in pairs.items()}


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.2e}")


def attempt(
    program: Program, want: tuple[list, list], compare: _Compare, backend: str, options: dict | None
) -> dict[str, Any]:
    """Compile the model, run it twice: graphs, breaks, errors, seconds, for attnc its regions; or what was raised."""
    torch._dynamo.reset()
    counters.clear()
    start = time.perf_counter()
    try:
        with Watch() as watch:
            fn = torch.compile(program.model, backend=backend, dynamic=False, options=options)
            first = program.run(fn)
            seconds = time.perf_counter() - start
            breaks = Counter(compare.reason(r)[:SHORT_REASON] for r in counters["graph_break"].elements())
            made = len(watch.graphs)
            watch.restart()
            start = time.perf_counter()
            second, _ = program.run(fn, watch.lap)
    except Exception as exc:  # noqa: BLE001  # a result like any other: the table names it
        return {"failed": said(exc)}
    found = {
        "errors": compare.errors(want, first, second),
        "graphs": made,
        "made_again": len(watch.graphs) - made,
        "runs": sum(map(sum, watch.laps)),
        "breaks": dict(breaks),
        "compile_s": round(seconds, 2),
        "second_s": round(time.perf_counter() - start, 4),
    }
    return found | (_reported(program, fn, watch) if backend == "attnc" else {})


def _reported(program: Program, fn: Callable[..., Any], watch: Watch) -> dict[str, Any]:
    """What attnc said of the graphs, weighted with how often they ran."""
    merged = attnc.last_report(fn)
    runs = [sum(lap[at] for lap in watch.laps if at < len(lap)) for at in range(len(watch.graphs))]
    regions = watch.regions()
    decoder = set(program.inputs) <= {"input_ids", "attention_mask", "use_cache"}
    # Every call of a text decoder runs all its layers; an encoder or a picture may be read in the first call only.
    least = {kind: min(lap.get(kind, 0) for lap in regions) for kind in {k for lap in regions for k in lap}}
    reports = [(graph.report, times) for graph, times in zip(watch.graphs, runs, strict=True) if graph.report]
    return {
        "regions": least if decoder else regions[0],
        "by_call": regions if program.cached else None,
        "reported_graphs": merged.graphs,
        "rewritten": sum(r.choice is not None and r.choice.rewrites for report, _ in reports for r in report.regions),
        "unmatched": [
            [u.anchor, u.reason, u.node, u.path, times, getattr(u, "kind", "")]
            for report, times in reports
            for u in report.unmatched
        ],
        "problems": list(dict.fromkeys(p for report, _ in reports for p in report.problems)),
        "own_s": {name: round(seconds, 3) for name, seconds in Report.merge(r for r, _ in reports).timings.items()},
    }


def said(exc: BaseException) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()] or [""]
    return f"{type(exc).__name__}: {lines[0]}"[:300]


def wake(inner: str) -> None:
    """Pay one-time costs of Dynamo, attnc and the inner compiler before jobs are forked; autograd stays asleep."""
    importlib.import_module("zoo_build").catalog()

    def small(q: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(8, 8, dtype=torch.bool).tril()
        return ((q @ q.mT) * 0.5).masked_fill(~mask, float("-inf")).softmax(-1) @ (q @ w)

    with torch.no_grad():
        for backend, options in (("eager", None), ("attnc", {"inner": inner})):
            compiled = torch.compile(small, backend=backend, dynamic=False, options=options)
            compiled(torch.randn(1, 2, 8, 4), torch.randn(4, 4))
    torch._dynamo.reset()

"""Looking at a model without changing how it runs: `explain`, and `autotune` for what is found.

A module or function is run once through torch.compile with a private backend that reads each graph and runs it as it
is; an exported program is read without running. Other compiled functions, their caches, the random streams and the
model's buffers are as before. A cache that is passed among the inputs is filled, as by any call of the model.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import re
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import TorchDynamoException, TorchRuntimeError
from torch._dynamo.pgo import get_code_state
from torch._dynamo.symbolic_convert import InstructionTranslator

from attnc.cost_models.device import gpu_named
from attnc.errors import CaptureError, UsageError
from attnc.options import Options
from attnc.passes.choose import checked_forms, choose
from attnc.passes.hooks import table as hooks
from attnc.passes.pipeline import analyse
from attnc.plan import Plan
from attnc.region import AttentionRegion
from attnc.report import Report
from attnc.tuned import records_in
from attnc.tuning.flash import flash_problems
from attnc.tuning.measure import is_here
from attnc.tuning.search import Settings
from attnc.tuning.tune import tune

# Further than any run goes: a limit would make Dynamo run later frames without showing them.
MAX_GRAPHS = 1 << 20

# How Dynamo quotes what an operator raised while it traced.
WHILE_TRACING = re.compile(r"got (\w+)\(['\"](.*?)['\"]\)\s*$", re.MULTILINE)


def explain(
    model: Any,
    *args: Any,
    device: str | None = None,
    options: Options | Mapping[str, object] | None = None,
    **kwargs: Any,
) -> Report:
    """What attnc finds in `model` on these inputs, what it would choose, and why; nothing is rewritten.

    model:   an nn.Module or a function, compiled or not, run once on `args` and `kwargs` under the caller's grad mode,
             or a torch.export.ExportedProgram, read as it was exported (`args` and `kwargs` are not needed).
    device:  the device that choices are made for, as "h100"; it need not be present. None: the one the model is on.
    options: as for torch.compile(backend="attnc").

    Lengths are those of the inputs; a dimension marked with torch._dynamo.mark_dynamic stays symbolic.
    Raises: UsageError if the model cannot be called like this or an option or device does not exist.
    """
    chosen = _options(options)
    if device is not None:
        chosen = replace(chosen, device=str(device))
    checked_forms(chosen)
    if isinstance(model, torch.export.ExportedProgram):
        graphs = [_read(model.graph_module, _exported_inputs(model), chosen)]
        name = type(model).__name__
    else:
        model = _as_written(model)
        name = getattr(model, "__qualname__", type(model).__name__)
        graphs = _graphs_of_run(model, name, chosen, args, kwargs)
    merged = Report.merge(graphs)
    on = next((region.device for region in merged.regions), "cpu")
    report = replace(merged, model=name, device=chosen.device or on)
    if graphs:
        return report
    nothing = (
        f"Dynamo made no graph of {name}: nothing in it runs on tensors, or compiling is switched off "
        "(TORCH_COMPILE_DISABLE, torch.compiler.disable, a stance). Switch it on, or pass the part of the model that "
        "computes."
    )
    return replace(report, problems=(nothing,))


def autotune(
    model: Any,
    *args: Any,
    device: str,
    trials: int | None = 200,
    seconds: float | None = None,
    fidelity: str | None = None,
    seed: int = 0,
    workers: int = 1,
    options: Options | Mapping[str, object] | None = None,
    **kwargs: Any,
) -> Plan:
    """Search the kernels of `model` for `device`, keep the records, and return the plan that follows from them.

    model, args, kwargs, options: as for `explain`. device: as "h100"; it need not be here.
    trials, seconds: the budget of each kernel, and of all of them; what earlier runs found counts.
    fidelity: "predict" (closed form), "compile" (ahead of time) or "measure" (on the device); None: measured where the
              device is here, compiled elsewhere.
    Raises: UsageError as `explain` does, and for a wrong budget.
    """
    chosen = replace(_options(options), device=device)
    report = explain(model, *args, options=chosen, **kwargs)
    folder = Path(chosen.store)
    dearest = fidelity or ("measure" if is_here(gpu_named(device)) else "compile")
    asked = Settings(trials, seconds, dearest, seed=seed, workers=workers, folder=folder / "studies")
    problems = flash_problems(report.regions, [device])
    if problems:
        tune(problems, asked, records=records_in(chosen.store))
    regions = [
        choose(r, chosen) if isinstance(r, AttentionRegion) and r.choice and r.choice.offers else r
        for r in report.regions
    ]
    paths = Counter(r.path for r in regions)
    named = {(r.path if paths[r.path] == 1 else r.key): r.choice for r in regions if r.choice is not None}
    return Plan(named, gpu_named(device).name)


def _options(options: Options | Mapping[str, object] | None) -> Options:
    return options if isinstance(options, Options) else Options.from_torch(options)


def _as_written(model: Any) -> Callable[..., Any]:
    """The model under torch.compile's wrappers."""
    while True:
        if isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, types.FunctionType) and hasattr(model, "_torchdynamo_orig_callable"):
            model = model._torchdynamo_orig_callable
        else:
            break
    if not callable(model) or isinstance(model, type):
        found = f"the class {model.__name__}" if isinstance(model, type) else f"{type(model).__name__} {model!r:.80}"
        raise UsageError(
            f"explain a model: found {found}, allowed are an nn.Module, a function or a torch.export.ExportedProgram. "
            "Pass the model and then its inputs: attnc.explain(model, *inputs)."
        )
    return model


# An exported program.


def _exported_inputs(program: torch.export.ExportedProgram) -> list[Any]:
    return [node.meta.get("val") for node in program.graph_module.graph.nodes if node.op == "placeholder"]


def _read(gm: fx.GraphModule, example_inputs: Any, options: Options) -> Report:
    found = analyse(gm, example_inputs, options)
    return Report(
        tuple(found.regions),
        tuple(found.unmatched),
        tuple(found.problems),
        found.timings,
        notes=tuple(found.notes),
        graphs=1,
    )


# A run.


hooks.install()


@hooks.mine
class _Reader:
    """A backend that reads graphs and runs them as they are.

    Dynamo's cache outlives the run and holds the backend, so `close` lets go of the model.
    """

    def __init__(self, model: Callable[..., Any], options: Options) -> None:
        owner = _module(model)
        self.places = {id(module): place for place, module in owner.named_modules()} if owner else {}
        self.options = options
        self.reports: list[Report] = []
        self.failure: Exception | None = None

    def read(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        try:
            report = _read(gm, example_inputs, self.options)
        except Exception as exc:  # noqa: BLE001  # raised by `close`, without Dynamo's wrapping
            self.failure = self.failure or exc
        else:
            self.reports.append(_placed(report, self._place()))
        return gm.forward

    def _place(self) -> str:
        """Where the module of the frame being compiled is in the model; after a graph break it may be any of them."""
        frame = InstructionTranslator.current_tx()
        first = frame.f_code.co_varnames[:1]
        owner = frame.f_locals.get(*first) if first else None
        return self.places.get(id(owner), "")

    def close(self) -> list[Report]:
        """The reports. Raises: what reading a graph raised."""
        reports, failure = self.reports, self.failure
        self.places, self.reports, self.failure = {}, [], None
        if failure is not None:
            raise failure
        return reports


def _placed(report: Report, place: str) -> Report:
    """`report` with paths that start at the model."""
    regions = [replace(r, path=_joined(place, r.path)) for r in report.regions]
    unmatched = [replace(u, path=_joined(place, u.path)) for u in report.unmatched]
    return replace(report, regions=tuple(regions), unmatched=tuple(unmatched))


def _joined(place: str, path: str) -> str:
    return ".".join(part for part in (place, path) if part)


def _graphs_of_run(
    model: Callable[..., Any], name: str, options: Options, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Report]:
    reader = _Reader(model, options)
    # Since torch 2.13 a compile can have cache entries of its own, which count towards nobody's limit.
    known = inspect.signature(torch.compile).parameters
    apart: dict[str, Any] = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
    compiled = torch.compile(_entry(model), backend=reader.read, dynamic=False, **apart)
    limits = {"recompile_limit": MAX_GRAPHS, "accumulated_recompile_limit": MAX_GRAPHS}
    try:
        with torch._dynamo.config.patch(limits), _lengths_kept(), _random_streams_kept(), _buffers_kept(model):
            compiled(*args, **kwargs)
    except Exception as exc:
        reader.close()
        raise _error_of_run(name, exc) from exc
    return reader.close()


def _module(model: Callable[..., Any]) -> torch.nn.Module | None:
    """The module that `model` is, or is a method of."""
    owner = model.__self__ if isinstance(model, types.MethodType) else model
    return owner if isinstance(owner, torch.nn.Module) else None


def _entry(model: Callable[..., Any]) -> Callable[..., Any]:
    """A function around `model` with code of its own: Dynamo keeps caches by code, so the model's stay untouched."""
    fn: Any = model  # a name that module paths are known to start with
    if isinstance(model, types.MethodType):
        fn, method = model.__self__, model.__func__

        def entry(*args: Any, **kwargs: Any) -> Any:
            return method(fn, *args, **kwargs)
    else:

        def entry(*args: Any, **kwargs: Any) -> Any:
            return fn(*args, **kwargs)

    return types.FunctionType(entry.__code__.replace(), entry.__globals__, "entry", None, entry.__closure__)


def _error_of_run(name: str, exc: Exception) -> Exception:
    """The caller's mistake as a UsageError, Dynamo's own trouble as a CaptureError."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    raised = [type(exc).__name__, lines[0] if lines else "(no message)"]
    inside = WHILE_TRACING.search(str(exc)) if isinstance(exc, TorchRuntimeError) else None
    said = ": ".join(inside.groups() if inside else raised).rstrip(".")
    if isinstance(exc, TorchDynamoException) and not isinstance(exc, TorchRuntimeError):
        return CaptureError(
            f"explain {name}: Dynamo cannot read it and raises {said}. Keep the part it names out of the graph with "
            "torch.compiler.disable, or explain the parts of the model that compile."
        )
    return UsageError(
        f"explain {name} on the given inputs: found that running it raises {said}; allowed are inputs it runs on. "
        f"Call {name} itself with them first."
    )


@contextlib.contextmanager
def _random_streams_kept() -> Iterator[None]:
    """Torch's random streams, Python's and NumPy's go on as if nothing had been drawn."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    numpy = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(numpy_state)


@contextlib.contextmanager
def _buffers_kept(model: Callable[..., Any]) -> Iterator[None]:
    """Buffers a run updates, as batch normalisation does, get their values back."""
    owner = _module(model)
    kept = [
        (module, name, buffer, buffer.clone())
        for module in (owner.modules() if owner else ())
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, name, buffer, values in kept:
            if module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer
            # By value: batch normalisation writes without counting the write in the tensor's version.
            if not buffer.is_meta and not torch.equal(buffer, values):
                with torch.no_grad(), torch.inference_mode(buffer.is_inference()):
                    buffer.copy_(values)


@contextlib.contextmanager
def _lengths_kept() -> Iterator[None]:
    """Lengths seen here make nothing dynamic in a later compile of the same code."""
    seen = get_code_state()
    before = copy.deepcopy(dict(seen))
    try:
        yield
    finally:
        seen.clear()
        seen.update(before)

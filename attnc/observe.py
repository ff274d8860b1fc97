"""Running a model once through torch.compile with a private compiler that sees each graph, and leaving no trace.

Other compiled functions, their caches, the random streams and the model's buffers are as before. A cache that is
passed among the inputs is filled, as by any call of the model.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import TorchDynamoException, TorchRuntimeError
from torch._dynamo.pgo import get_code_state
from torch._dynamo.symbolic_convert import InstructionTranslator

from attnc.errors import CaptureError, UsageError
from attnc.passes.hooks import table as hooks

# Further than any run goes: a limit would make Dynamo run later frames without showing them.
MAX_GRAPHS = 1 << 20

# How Dynamo quotes what an operator raised while it traced.
WHILE_TRACING = re.compile(r"got (\w+)\(['\"](.*?)['\"]\)\s*$", re.MULTILINE)

# (graph, its inputs, place of its frame's module in the model) -> what runs in the graph's stead
Read = Callable[[fx.GraphModule, Sequence[Any], str], Callable[..., Any]]


def as_written(model: Any, verb: str = "explain") -> Callable[..., Any]:
    """The model under torch.compile's wrappers. verb: what is asked of it, as errors put it. Raises: UsageError."""
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
            f"{verb} a model: found {found}, allowed are an nn.Module, a function or a torch.export.ExportedProgram. "
            f"Pass the model and then its inputs: attnc.{verb}(model, *inputs)."
        )
    return model


hooks.install()


@hooks.mine
class Reader:
    """A compiler that hands each graph to `read`; what `read` raises is raised by `check`, without Dynamo's wrapping.

    Dynamo's cache outlives the run and holds the compiler, so `close` lets go of the model.
    """

    def __init__(self, model: Callable[..., Any], read: Read) -> None:
        owner = _module(model)
        self.places = {id(module): place for place, module in owner.named_modules()} if owner else {}
        self.read: Read | None = read
        self.failure: Exception | None = None

    def compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.read is None:
            return gm.forward
        try:
            return self.read(gm, example_inputs, self._place())
        except Exception as exc:  # noqa: BLE001  # raised by `check`
            self.failure = self.failure or exc
            return gm.forward

    def _place(self) -> str:
        """Where the module of the frame being compiled is in the model; after a graph break it may be any of them."""
        frame = InstructionTranslator.current_tx()
        first = frame.f_code.co_varnames[:1]
        owner = frame.f_locals.get(*first) if first else None
        return self.places.get(id(owner), "")

    def check(self) -> None:
        """Raises: what reading a graph raised."""
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        self.places, self.read, self.failure = {}, None, None


@contextlib.contextmanager
def observed(model: Callable[..., Any], read: Read) -> Iterator[Callable[..., Any]]:
    """A function `run(args, kwargs, asked)` that calls `model` with every graph of it compiled by `read`.

    Graphs are compiled once for each shape, their lengths static. asked: what the run is for, as errors put it,
    a verb first: "explain Model on the given inputs".
    """
    reader = Reader(model, read)
    # Since torch 2.13 a compile can have cache entries of its own, which count towards nobody's limit.
    known = inspect.signature(torch.compile).parameters
    apart: dict[str, Any] = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
    compiled = torch.compile(_entry(model), backend=reader.compile, dynamic=False, **apart)
    limits = {"recompile_limit": MAX_GRAPHS, "accumulated_recompile_limit": MAX_GRAPHS}

    def run(args: Sequence[Any], kwargs: Mapping[str, Any], asked: str) -> Any:
        try:
            with torch._dynamo.config.patch(limits), _lengths_kept(), _random_streams_kept(), _buffers_kept(model):
                out = compiled(*args, **kwargs)
        except Exception as exc:
            raise _error_of_run(name_of(model), asked, exc) from exc
        reader.check()
        return out

    try:
        yield run
    finally:
        reader.close()


def name_of(model: Any) -> str:
    return getattr(model, "__qualname__", type(model).__name__)


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


def _error_of_run(name: str, asked: str, exc: Exception) -> Exception:
    """The caller's mistake as a UsageError, Dynamo's own trouble as a CaptureError."""
    verb = asked.partition(" ")[0]
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    raised = [type(exc).__name__, lines[0] if lines else "(no message)"]
    inside = WHILE_TRACING.search(str(exc)) if isinstance(exc, TorchRuntimeError) else None
    said = ": ".join(inside.groups() if inside else raised).rstrip(".")
    if isinstance(exc, TorchDynamoException) and not isinstance(exc, TorchRuntimeError):
        return CaptureError(
            f"{verb} {name}: Dynamo cannot read it and raises {said}. Keep the part it names out of the graph with "
            f"torch.compiler.disable, or {verb} the parts of the model that compile."
        )
    return UsageError(
        f"{asked}: found that running it raises {said}; allowed are inputs it runs on. "
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

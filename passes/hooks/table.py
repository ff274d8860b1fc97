"""The table of hooks, and how they come into a trace: loops that would break or flood the graph become one operator.

Dynamo enters every Python function it traces through one method. While a graph is traced for attnc (the backend, or
`explain`), that method traces a row's substitute in place of the library function that the row names. Modules, classes
and instances of the library stay as they are: eager code and every other compiler see nothing of the table, and a
library that is loaded later needs no second installation.

A call is substituted once original and substitute have agreed on small random arguments of its kind (dtypes, options,
which tensors are given): compared once per process and kind.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.functions import SkipFunctionVariable, UserFunctionVariable
from torch._dynamo.variables.lazy import LazyVariableTracker
from torch._dynamo.variables.lists import BaseListVariable
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable
from torch._guards import TracingContext

from attnc.passes.graph import path_in
from attnc.passes.hooks import experts, samples
from attnc.passes.hooks import linear_library as library
from attnc.passes.hooks import recurrence as mixers
from attnc.passes.hooks import state_space as spaces
from attnc.passes.hooks import state_space_library as mamba
from attnc.passes.hooks.hook import Hook
from attnc.passes.hooks.pair_scan import no_pair, pair_scan, small_scan
from attnc.region import Unmatched

TRANSFORMERS = "transformers*.modeling_*"  # of its models, and of code that comes with a checkpoint


def _home(model: str) -> str:
    return f"transformers.models.{model}.modeling_{model}"


def _library(name: str, substitute: Callable[..., Any], *ways: str) -> list[Hook]:
    """Rows for the functions of flash-linear-attention that compute one mixer in several ways."""
    refuse = library.unfit(substitute)
    return [Hook(f"fla.ops.{name}*", f"{way}_{name}", substitute, library.sample, refuse, by_name=True) for way in ways]


def _mamba(name: str, substitute: Callable[..., Any], module: str = "mamba_ssm.*") -> Hook:
    """The row of a function of mamba_ssm, or of causal_conv1d, which belongs to it."""
    draw, refuse = mamba.sampled(substitute), mamba.refused(substitute)
    return Hook(module, name, substitute, draw, refuse, by_name=True)


# fmt: off
HOOKS: tuple[Hook, ...] = (
    Hook(TRANSFORMERS, "torch_chunk_gated_delta_rule", mixers.gated_delta_rule, samples.delta_rule,
         home=_home("qwen3_next")),
    Hook(TRANSFORMERS, "torch_recurrent_gated_delta_rule", mixers.gated_delta_rule_by_token, samples.delta_rule,
         home=_home("qwen3_next")),
    Hook(TRANSFORMERS, "chunk_kimi_delta_attention", mixers.kimi_delta_attention, samples.delta_rule,
         home=_home("kimi_linear")),
    Hook(TRANSFORMERS, "recurrent_kimi_delta_attention", mixers.kimi_delta_attention_by_token, samples.delta_rule,
         home=_home("kimi_linear")),
    Hook(TRANSFORMERS, "mamba_selective_scan", spaces.selective_scan, samples.selective_scan, home=_home("mamba")),
    Hook(TRANSFORMERS, "mamba_selective_state_update", spaces.selective_state_update, samples.selective_state_update,
         home=_home("mamba")),
    Hook(TRANSFORMERS, "mamba2_chunk_scan", spaces.chunk_scan, samples.chunk_scan, home=_home("mamba2")),
    Hook(TRANSFORMERS, "mamba2_selective_state_update", spaces.chunk_state_update, samples.chunk_state_update,
         refuse=samples.equal_over_heads, home=_home("mamba2")),
    Hook(TRANSFORMERS, "RecurrentGemmaRglru._rnn_scan", mixers.rg_lru_scan, samples.rg_lru,
         home=_home("recurrent_gemma")),
    Hook(TRANSFORMERS, "rwkv_linear_attention_cpu", mixers.rwkv_linear_attention, samples.rwkv, home=_home("rwkv")),
    Hook(TRANSFORMERS, "MiniMaxLightningAttention.forward", mixers.lightning_attention, samples.lightning,
         home=_home("minimax")),
    Hook(TRANSFORMERS, "wrap_chunkwise_arbitrary_sequence_length", mixers.mlstm_of_any_length, samples.mlstm,
         home=_home("xlstm")),
    Hook(TRANSFORMERS, "wrap_chunkwise_pad_zeros", mixers.mlstm_padded, samples.mlstm, home=_home("xlstm")),
    Hook(TRANSFORMERS, "mlstm_chunkwise_native_autograd", mixers.mlstm_in_chunks, samples.mlstm, home=_home("xlstm")),
    Hook(TRANSFORMERS, "mlstm_recurrent_sequence_native", mixers.mlstm_by_token, samples.mlstm, home=_home("xlstm")),
    Hook(TRANSFORMERS, "mlstm_recurrent_step_native", mixers.mlstm_step, samples.mlstm_step, home=_home("xlstm")),
    experts.InterfaceHook(TRANSFORMERS, "*.forward", experts.by_interface, experts.stacked, refuse=experts.unfit),
    Hook(TRANSFORMERS, "DbrxExperts.forward", experts.dbrx, experts.dbrx_sample, refuse=experts.unfit,
         home=_home("dbrx")),
    Hook(TRANSFORMERS, "LongcatFlashExperts.forward", experts.longcat, experts.longcat_sample,
         refuse=experts.unfit, home=_home("longcat_flash")),
    Hook(TRANSFORMERS, "SwitchTransformersExperts.forward", experts.switch, experts.switch_sample,
         refuse=experts.unfit, home=_home("switch_transformers")),
    Hook(TRANSFORMERS, "NllbMoeExperts.forward", experts.nllb, experts.nllb_sample, refuse=experts.drops,
         home=_home("nllb_moe")),
    Hook(TRANSFORMERS, "JetMoeTopKGating.forward", experts.jetmoe_gating, experts.jetmoe_gating_sample,
         home=_home("jetmoe")),
    Hook(TRANSFORMERS, "JetMoeParallelExperts.forward", experts.jetmoe_experts, experts.jetmoe_experts_sample,
         home=_home("jetmoe")),
    Hook("torch._higher_order_ops.associative_scan", "associative_scan", pair_scan, small_scan, no_pair),
    *_library("linear_attn", library.linear, "chunk", "fused_chunk", "fused_recurrent"),
    *_library("simple_gla", library.decayed, "chunk", "fused_chunk", "fused_recurrent", "parallel"),
    *_library("retention", library.retention, "chunk", "fused_chunk", "fused_recurrent", "parallel"),
    *_library("lightning_attn", library.lightning, "chunk", "fused_recurrent"),
    *_library("gla", library.gated, "chunk", "fused_chunk", "fused_recurrent"),
    *_library("gsa", library.slots, "chunk", "fused_recurrent"),
    *_library("delta_rule", library.delta, "chunk", "fused_chunk", "fused_recurrent"),
    *_library("gated_delta_rule", library.delta, "chunk", "fused_recurrent"),
    *_library("kda", library.delta, "chunk", "fused_recurrent"),
    *_library("rwkv6", library.rwkv6, "chunk", "fused_recurrent"),
    *_library("rwkv7", library.rwkv7, "chunk", "fused_recurrent"),
    *_library("hgrn", library.hgrn, "chunk", "fused_recurrent"),
    _mamba("selective_scan_fn", mamba.selective_scan),
    _mamba("mamba_chunk_scan_combined", mamba.chunk_scan),
    _mamba("mamba_split_conv1d_scan_combined", mamba.split_scan),
    _mamba("selective_state_update", mamba.state_update),
    _mamba("causal_conv1d_fn", mamba.convolution, "causal_conv1d*"),
    _mamba("causal_conv1d_update", mamba.convolution_step, "causal_conv1d*"),
)
# fmt: on

Compiler = TypeVar("Compiler")

# The attribute that a compiler carries (or the object whose method it is) if hooks are meant for it.
MARK = "attnc_hooks"
# How torch.compile and others wrap a compiler, by the attribute that holds the wrapped one.
_WRAPPERS = ("_torchdynamo_orig_backend", "compiler_fn", "func", "__wrapped__")
_ENTRANCE = "inline_user_function_return"


@dataclass
class Trace:
    """What hooks did in the trace of one graph.

    hits: substituted calls by row. named: functions of the table whose work another library does. problems: rows that
    disagree with their originals.
    """

    hits: dict[Hook, int] = field(default_factory=dict)
    named: list[Unmatched] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


_TRACES: weakref.WeakKeyDictionary[TracingContext, Trace] = weakref.WeakKeyDictionary()
_VERDICTS: dict[tuple[object, ...], str] = {}


def install() -> None:
    """Put the table before Dynamo's entrance into Python functions; a second call does nothing."""
    entrance = getattr(InstructionTranslatorBase, _ENTRANCE, None)
    if entrance is None or getattr(entrance, MARK, False):
        return

    @functools.wraps(entrance)
    def hooked(tx: Any, fn: Any, args: Sequence[Any], kwargs: dict[str, Any], *rest: Any, **options: Any) -> Any:
        # The table is looked up at every call, so that the module can be reloaded.
        return sys.modules[__name__].enter(entrance, tx, fn, args, kwargs, *rest, **options)

    setattr(hooked, MARK, True)
    setattr(InstructionTranslatorBase, _ENTRANCE, hooked)
    disabled = SkipFunctionVariable.call_function

    @functools.wraps(disabled)
    def hooked_skip(variable: Any, tx: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return sys.modules[__name__].enter_disabled(disabled, variable, tx, args, kwargs)

    SkipFunctionVariable.call_function = hooked_skip  # type: ignore[method-assign, assignment]


def enter(entrance: Callable[..., Any], tx: Any, fn: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
    """Trace the call of `fn`, or of the substitute that the table has for it."""
    function = getattr(fn, "fn", None)  # of functions and of methods, not of those made while tracing
    if not isinstance(function, FunctionType):
        return entrance(tx, fn, args, kwargs, *rest, **options)
    hook = hook_of(function)
    if hook is None or not is_ours(tx.output.compiler_fn):
        return entrance(tx, fn, args, kwargs, *rest, **options)
    trace = _TRACES.setdefault(tx.output.tracing_context, Trace())
    path = path_in(tx.nn_module_stack)
    if function.__code__.co_name != function.__name__:  # a decorator's wrapper: who does the work?
        before = sum(trace.hits.values())  # the other library may have a row too
        result = entrance(tx, fn, args, kwargs, *rest, **options)
        if sum(trace.hits.values()) == before and not _refused(trace, hook):
            trace.named.append(_supplied(hook, function, path))
        return result
    why = _why_not(hook, function, args, kwargs, trace)
    if why:
        trace.named.append(Unmatched(hook.last_name, f"{hook.last_name} is traced as it is: {why}", "", path))
        return entrance(tx, fn, args, kwargs, *rest, **options)
    trace.hits[hook] = trace.hits.get(hook, 0) + 1
    substitute = UserFunctionVariable(cast(FunctionType, hook.substitute))
    if hook.by_name:
        args, kwargs = [], hook.taken(dict(inspect.signature(function).bind(*args, **kwargs).arguments))
    return entrance(tx, substitute, args, kwargs, *rest, **options)


def enter_disabled(entrance: Callable[..., Any], variable: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    """The call of a function that Dynamo is told to leave alone: traced where the table has a substitute for it."""
    function = inspect.unwrap(getattr(variable.value, "_torchdynamo_orig_callable", variable.value))
    hook = hook_of(function) if isinstance(function, FunctionType) else None
    if hook is None or not is_ours(tx.output.compiler_fn):
        return entrance(variable, tx, args, kwargs)

    def leave(tx: Any, fn: Any, args: Any, kwargs: Any) -> Any:
        if getattr(fn, "fn", None) is function:
            return entrance(variable, tx, args, kwargs)
        return fn.call_function(tx, args, kwargs)

    return enter(leave, tx, UserFunctionVariable(function), args, kwargs)


def hook_of(function: FunctionType) -> Hook | None:
    """The row for a function, by where it was defined."""
    return next((h for h in _rows(HOOKS).get(function.__name__, ()) if h.covers(function)), None)


@functools.lru_cache(maxsize=8)
def _rows(table: tuple[Hook, ...]) -> dict[str, list[Hook]]:
    """The rows by the last part of their names."""
    rows: dict[str, list[Hook]] = {}
    for hook in table:
        rows.setdefault(hook.last_name, []).append(hook)
    return rows


def is_ours(compiler: Any) -> bool:
    """Whether a compiler is attnc's, under whatever wraps it; a function that calls attnc's by name counts."""
    for _ in range(16):
        if getattr(compiler, MARK, False) or getattr(getattr(compiler, "__self__", None), MARK, False):
            return True
        if isinstance(compiler, FunctionType) and any(getattr(x, MARK, False) for x in _mentioned(compiler)):
            return True
        compiler = next((x for name in _WRAPPERS if (x := getattr(compiler, name, None)) is not None), None)
        if compiler is None:
            return False
    return False


def _mentioned(function: FunctionType) -> list[Any]:
    """What the code of a function refers to outside of itself."""
    known = function.__globals__
    return _cells(function) + [known[name] for name in function.__code__.co_names if name in known]


def _cells(function: FunctionType) -> list[Any]:
    held = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            held.append(cell.cell_contents)
    return held


# One call.


def _why_not(hook: Hook, function: FunctionType, args: Any, kwargs: Any, trace: Trace) -> str:
    """Why a call is not substituted; "" if it is."""
    try:
        arguments = _arguments(function, args, kwargs)
        why = hook.refuse(arguments)
    except TorchDynamoException:  # a graph break or a restart: Dynamo's own business
        raise
    except Exception as exc:  # noqa: BLE001  # what cannot be read is traced as it is, and the reason is said
        return f"its arguments cannot be read ({type(exc).__name__}: {str(exc).partition(chr(10))[0]})"
    if why:
        return why
    kind = (hook, function.__code__, *(_kind(name, x) for name, x in arguments.items()))
    if kind not in _VERDICTS:
        _VERDICTS[kind] = hook.disagreement(function, arguments)
    if not _VERDICTS[kind]:
        return ""
    where = f"{function.__module__}.{function.__qualname__}"
    trace.problems.append(
        f"trace {where} as one operator: found that its substitute differs from it ({_VERDICTS[kind]}), allowed is "
        "rounding. The function is traced as it is; report the version of its library."
    )
    return f"its substitute differs from it ({_VERDICTS[kind]})"


def _arguments(function: FunctionType, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name, without those that the function only passes on."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    further = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [name for name, p in bound.signature.parameters.items() if p.kind not in further]
    return {name: _value(bound.arguments[name]) for name in named}


def _value(x: Any) -> Any:
    """What a variable of Dynamo's stands for: a constant, a fake tensor, an object; else the variable."""
    if not isinstance(x, VariableTracker):
        return x
    if isinstance(x, LazyVariableTracker):
        x = x.realize()
    if isinstance(x, TensorVariable):
        return x.as_proxy().node.meta["example_value"]
    if isinstance(x, SymNodeVariable):
        return x.sym_num
    if isinstance(x, BaseListVariable):
        return tuple(map(_value, x.items))
    try:
        return x.as_python_constant()
    except NotImplementedError:
        return vars(x).get("value", x)


def _kind(name: str, x: Any) -> tuple[object, ...]:
    if isinstance(x, torch.Tensor):
        return name, x.dtype, x.dim()
    plain = isinstance(x, (str, int, float, bool, type(None), torch.dtype))
    return name, x if plain else type(x)


def _refused(trace: Trace, hook: Hook) -> bool:
    return any(entry.anchor == hook.last_name for entry in trace.named)


def _supplied(hook: Hook, function: FunctionType, path: str) -> Unmatched:
    reason = f"{function.__module__}.{hook.name} is supplied by another library here, and its calls are left to it"
    return Unmatched(hook.last_name, reason, "", path)


def mine(compiler: Compiler) -> Compiler:
    """Mark a compiler, or the class of one, as meant for the table."""
    setattr(compiler, MARK, True)
    return compiler


# What the report says.


def trace_of_compile() -> Trace:
    """What hooks did in the trace of the graph that is being compiled."""
    context = TracingContext.try_get()
    return _TRACES.get(context, Trace()) if context is not None else Trace()


def notes() -> list[str]:
    """A line for each row whose library is loaded and does not have the function, or has another in its place."""
    if not hasattr(InstructionTranslatorBase, _ENTRANCE):
        return [f"hooks: torch {torch.__version__} has no {_ENTRANCE}; loops of libraries are read as they are written"]
    absent = [line for hook in HOOKS if hook.home in sys.modules and (line := _absence(hook))]
    names = _rows(HOOKS).keys()  # that few of the thousands of modules hold, and this is asked at every compile
    held = [item for item in list(sys.modules.items()) if not names.isdisjoint(getattr(item[1], "__dict__", {}).keys())]
    return absent + [line for name, module in held for line in _patches(name, module)]


def _absence(hook: Hook) -> str:
    found: Any = sys.modules[hook.home]
    for name in hook.name.split("."):
        found = vars(found).get(name) if hasattr(found, "__dict__") else None
    library = hook.home.partition(".")[0]
    said = f"hook {hook.name}: {library} {_version(library)} has no such name in {hook.home}; the row is ignored"
    return said if found is None else ""


def _patches(name: str, module: Any) -> list[str]:
    """Functions of the table in `module` whose work is done by what was defined outside of their library."""
    held = getattr(module, "__dict__", {})
    rows = [h for last, rows in _rows(HOOKS).items() if last in held for h in rows if h.names(name, last)]
    known = {h: [f for f in _workers(held[h.name]) if not isinstance(f, FunctionType) or not hook_of(f)] for h in rows}
    made = {h: [str(getattr(f, "__module__", None)) for f in makers] for h, makers in known.items()}
    return [
        f"hook {hook.name}: in {name} it is supplied by {maker}; its calls are left to it"
        for hook, makers in made.items()
        for maker in makers
        if not fnmatchcase(maker, hook.module)
    ]


def _workers(function: Any) -> list[Any]:
    """The function under its decorators, or what a decorator calls in its place."""
    written = inspect.unwrap(function) if callable(function) else function
    if not isinstance(function, FunctionType) or written is function:
        return [written]
    chosen = [x for x in _cells(function) if isinstance(x, FunctionType) and x.__name__ != "<lambda>"]
    return [x for x in chosen if inspect.unwrap(x) is not written] or [written]


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "(unknown version)"

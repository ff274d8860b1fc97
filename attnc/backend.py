"""The torch.compile entry point: analyse the graph, rewrite what pays, hand the result to the inner backend.

A refusal or trouble in one region never crashes a model: the region stays as written and one warning names it.
`options={"strict": True}` raises instead.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import RestartAnalysis
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx

from attnc.cost_models.device import Gpu, device_named
from attnc.errors import AttncError, LoweringError, UsageError
from attnc.options import Options, configure_logging
from attnc.passes import shield
from attnc.passes.apply import apply_choices
from attnc.passes.capture import ambient_autocast_off, device_of
from attnc.passes.choose import checked_forms
from attnc.passes.hooks import table as hooks
from attnc.passes.lengths import guard_choices
from attnc.passes.pipeline import Analysis, analyse
from attnc.region import AS_WRITTEN
from attnc.report import Report
from attnc.reports import REPORTS, Place, place_of

log = logging.getLogger("attnc.backend")

hooks.install()


@hooks.mine
def attnc_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph: `torch.compile(model, backend="attnc", options=..., mode=...)` calls this.

    Raises: UsageError for a wrong option; LoweringError or CaptureError only with `strict`.
    """
    configure_logging()
    chosen = Options.from_torch(options, mode)
    checked_forms(chosen)
    _check_place(chosen, device_of(example_inputs))
    place = place_of(example_inputs)
    analysis, rewritten = _rewritten(gm, example_inputs, chosen)
    _tell(analysis, place, chosen)
    if rewritten is None:
        return inner_compile(gm, example_inputs, chosen)
    try:
        with ambient_autocast_off(device_of(example_inputs)):
            return inner_compile(rewritten, example_inputs, chosen)
    except RestartAnalysis:  # not trouble: Dynamo traces the frame again and comes back
        raise
    except Exception as exc:  # the graph as written may still compile; if not, its own error is raised below
        if chosen.strict:
            raise
        log.debug("inner compile of the rewritten graph failed", exc_info=True)
        _give_up(analysis, f"compile the rewritten graph with {chosen.inner}", exc)
    compiled = inner_compile(gm, example_inputs, chosen)
    _tell(analysis, place, chosen)
    return compiled


def _check_place(options: Options, kind: str) -> None:
    """Raises: UsageError where the options name a GPU and the model runs elsewhere."""
    if options.device is not None and isinstance(device_named(options.device), Gpu) and kind != "cuda":
        raise UsageError(
            f"option device={options.device!r}: found a model on {kind}, allowed is one on a GPU. Move the model "
            f"there, or use attnc.explain or attnc.autotune with device={options.device!r} for a GPU that is not here."
        )


def _rewritten(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> tuple[Analysis, fx.GraphModule | None]:
    """The analysis of `gm` and the graph to compile in its place; None: `gm` itself."""
    analysis = Analysis(None)
    try:
        analysis = analyse(gm, example_inputs, options)
        if options.plan is None and options.force is None:
            guard_choices(analysis)
        return analysis, apply_choices(analysis, gm, options) if analysis.gm is not None else None
    except Exception as exc:  # a fault of attnc's must not stop a model that runs without it
        if options.strict and isinstance(exc, AttncError):
            raise
        if options.strict:
            raise LoweringError(_sentence("analyse the graph", exc)) from exc
        log.debug("analysis failed", exc_info=True)
        _give_up(analysis, "analyse the graph", exc)
        return analysis, None


def _sentence(what: str, exc: Exception) -> str:
    said = str(exc).strip().partition("\n")[0]
    return (
        f"{what}: {type(exc).__name__}: {said}. The graph goes to the inner backend as written; "
        "set ATTNC_LOG=debug for the traceback, and report the model."
    )


def _give_up(analysis: Analysis, what: str, exc: Exception) -> None:
    """Enter in `analysis` that no region was rewritten, and why."""
    sentence = _sentence(what, exc)
    analysis.problems.append(sentence)
    for at, found in enumerate(analysis.found):
        choice = found.region.choice
        if choice is not None and choice.rewrites:
            left = replace(choice, form=AS_WRITTEN, reason=f"left as written: {sentence}", error=None)
            analysis.found[at] = replace(found, region=replace(found.region, choice=left))


def _tell(analysis: Analysis, place: Place, options: Options) -> None:
    """Keep the report; warn of each problem once, recompiles of the same frame included. With `strict`, raise."""
    before = REPORTS.add(place, report_of(analysis))
    for sentence in dict.fromkeys(analysis.problems):
        if options.strict:
            raise LoweringError(sentence)
        if before is None or sentence not in before.problems:
            warnings.warn(f"attnc: {sentence}", stacklevel=3)


def inner_compile(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Hand `gm` to the inner backend with its own settings."""
    if options.inner == "eager":
        return gm.forward
    if options.inner != "inductor":
        return lookup_backend(options.inner)(gm, list(example_inputs))
    patches = dict(list_mode_options(options.mode)) if options.mode else {}
    settings = shield.settings({**patches, **options.inductor})
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=settings)
    return compiled


def report_of(analysis: Analysis) -> Report:
    return Report(
        regions=tuple(analysis.regions),
        unmatched=tuple(analysis.unmatched),
        problems=tuple(analysis.problems),
        notes=tuple(analysis.notes),
        timings=dict(analysis.timings),
        graphs=1,
    )


def last_report(compiled: Any) -> Report:
    """Regions and choices of the latest compile of `compiled`, what torch.compile(..., backend="attnc") returned.

    Raises: UsageError if `compiled` has not been compiled by attnc in this process.
    """
    found = REPORTS.of(compiled)
    if found is None:
        raise UsageError(
            f"last_report of {type(compiled).__name__}: found no compile of it by attnc in this process. Call the "
            "compiled model once first, and pass what torch.compile(model, backend='attnc') returned; under a "
            "torch.func "
            "transform torch.compile runs a model as it is."
        )
    return found

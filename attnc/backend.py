"""The torch.compile entry point: analyse the graph, rewrite what pays, hand the result to the inner backend.

A refusal or trouble in one region never crashes a model: the region stays as written and one warning names it.
`options={"strict": True}` raises instead.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.registry import lookup_backend
from torch._guards import CompileContext
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx

from attnc.errors import LoweringError, UsageError
from attnc.options import Options, configure_logging
from attnc.passes import shield
from attnc.passes.capture import ambient_autocast_off
from attnc.passes.pipeline import Analysis, analyse
from attnc.passes.apply import apply_choices
from attnc.report import Report
from attnc.reports import REPORTS

log = logging.getLogger("attnc.backend")


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
    analysis = analyse(gm, example_inputs, chosen)
    rewritten = apply_choices(analysis, gm, chosen) if analysis.gm is not None else None
    for sentence in analysis.problems:
        if chosen.strict:
            raise LoweringError(sentence)
        warnings.warn(f"attnc: {sentence}", stacklevel=2)
    REPORTS.add(_frame(), example_inputs, report_of(analysis))
    if rewritten is None:
        return inner_compile(gm, example_inputs, chosen)
    device = next((x.device.type for x in example_inputs if isinstance(x, torch.Tensor)), "cpu")
    with ambient_autocast_off(device):
        return inner_compile(rewritten, example_inputs, chosen)


def inner_compile(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Hand `gm` to the inner backend with its own settings."""
    if options.inner == "eager":
        return gm.forward
    if options.inner != "inductor":
        return lookup_backend(options.inner)(gm, example_inputs)
    patches = dict(list_mode_options(options.mode)) if options.mode else {}
    return compile_fx(gm, example_inputs, config_patches=shield.settings({**patches, **options.inductor}))


def report_of(analysis: Analysis) -> Report:
    return Report(
        regions=tuple(analysis.regions),
        unmatched=tuple(analysis.unmatched),
        problems=tuple(analysis.problems),
        timings=dict(analysis.timings),
        graphs=1,
    )


def _frame() -> int:
    """The frame being compiled: a recompile of it replaces its report."""
    current = CompileContext.current_compile_id()
    return -1 if current is None or current.frame_id is None else current.frame_id


def last_report(compiled: Any) -> Report:
    """Regions and choices of the latest compile of `compiled`, what torch.compile(..., backend="attnc") returned.

    Raises: UsageError if `compiled` has not been compiled by attnc in this process.
    """
    found = REPORTS.of(compiled)
    if found is None:
        raise UsageError(
            f"last_report of {type(compiled).__name__}: found no compile of it by attnc in this process. Call the "
            "compiled model once first, and pass what torch.compile(model, backend='attnc') returned."
        )
    return found

"""Carry out the choices of an analysis: check each rewrite once per region key, then rewrite.

Trouble in one region stays there: it is left as written and reported.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, fx

from attnc.forms import parse_form
from attnc.forms.chunked import Chunked
from attnc.forms.generated import kept_in
from attnc.options import Options
from attnc.passes.check import Verdict, check, trial_of
from attnc.passes.pipeline import Analysis, Found, bodies
from attnc.passes.recurrence.check import check_rewriting
from attnc.passes.recurrence.lift import Operator
from attnc.passes.recurrence.rewriting import Rewriting
from attnc.passes.rewrite import rewrite
from attnc.passes.unrolled import checked, take
from attnc.region import AS_WRITTEN, AttentionRegion, Choice, Region
from attnc.rule_recurrence import RecurrenceRule
from attnc.store import Store

log = logging.getLogger("attnc.passes.apply")


def apply_choices(analysis: Analysis, original: fx.GraphModule, options: Options) -> fx.GraphModule | None:
    """The captured graph with its chosen forms in place; None if nothing is rewritten (use the original graph)."""
    assert analysis.gm is not None
    store = Store(options.store)
    changed = bool(analysis.reordered)
    for position, found in enumerate(analysis.found):
        choice = found.region.choice
        if choice is None or not choice.rewrites or found.match is None or found.facts is None:
            continue
        if isinstance(found.match, Operator):
            if not _runs_by_itself(choice.form, found.region):
                found.match.spell(_kept_as_asked(choice.form, found.region, options))
                changed = True
            continue
        if isinstance(found.match, Rewriting) and ("{" in choice.form or found.region.device != "cpu"):
            found.match.spell(_kept_as_asked(choice.form, found.region, options))
        form = _kept_as_asked(choice.form, found.region, options)
        with analysis.timed("check"):
            verdict = (
                _verdict(found, store, form, options)
                if options.check
                else Verdict(True, 0.0, _unmeasured(found.region))
            )
        if not verdict.passed:
            _leave(analysis, position, verdict.reason)
            continue
        if verdict.reason:  # an approximation says how far off it is
            told = replace(choice, reason=f"{choice.reason}; {verdict.reason}")
            analysis.found[position] = replace(found, region=replace(found.region, choice=told))
        with analysis.timed("rewrite"):
            if isinstance(found.match, Rewriting):
                found.match.apply()
            else:
                rewrite(found.facts, found.match, form, weights_of(found.region, options))
            if found.chunks is not None:
                take(found.chunks)
        changed = True
    if not changed:
        return None
    for part in bodies(analysis.gm):
        part.graph.eliminate_dead_code()
        part.graph.lint()
        part.recompile()
    _inherit(analysis.gm, original)
    return analysis.gm


def region_key(region: Region) -> str:
    """Everything a verdict about a region depends on, places and predicted times left out."""
    choice = region.choice
    bare = replace(region, path="", node="", choice=None)
    return f"{bare!r} {dict(region.shape.symbols)} {choice.form if choice else ''}"


def _runs_by_itself(form: str, region: Region) -> bool:
    """Whether the operator without a form runs on CPUs as `form` says: chunks of 64 tokens, or of the rule's fewer."""
    rule = region.rule
    assert isinstance(rule, RecurrenceRule)
    shorter = form == Chunked.name and 1 < rule.chunk < Chunked().chunk_size
    return region.device == "cpu" and "{" not in form and not shorter


def _kept_as_asked(form: str, region: Region, options: Options) -> str:
    """The form's spelling with the store that the options name, where it launches kernels and that is another one."""
    own = options.store == Options().store or not parse_form(form).launches(region)
    return form if own else kept_in(form, options.store)


def weights_of(region: Region, options: Options) -> Mapping[str, Tensor]:
    """What the options supply for `region`."""
    return options.weights_for(region.key, region.path) if options.weights else {}


def _verdict(found: Found, store: Store, form: str, options: Options) -> Verdict:
    """What the check of a region as `form` said, now or earlier; with supplied weights always now."""
    weights = weights_of(found.region, options)
    written_out = found.match if isinstance(found.match, Rewriting) else None
    key = region_key(found.region) + (f" {written_out.signature()}" if written_out is not None else "")
    known = store.get(key) if not weights and found.chunks is None else None
    if known is not None:
        return Verdict(bool(known["passed"]), float(known["error"]), str(known["reason"]))  # type: ignore[arg-type]
    assert found.region.choice is not None and found.match is not None
    if found.chunks is not None and _is_exact(found.region):
        return checked(found.chunks, form, trial_of(store))
    training = found.region.training
    try:
        if written_out is not None:
            verdict = check_rewriting(written_out, training)
        else:
            verdict = check(found.match, "dense" if not _is_exact(found.region) else form, training)
        # The lift holds, by an exact form: how far off is this one?
        if written_out is None and verdict.passed and not _is_exact(found.region):
            verdict = check(found.match, form, training, exact=False, weights=weights)
    except Exception as exc:
        log.debug("check of %s failed", found.region.path, exc_info=True)
        return Verdict(False, 0.0, f"its check raised {type(exc).__name__}: {exc}".splitlines()[0])
    if not weights:
        store.put(key, {"passed": verdict.passed, "error": verdict.error, "reason": verdict.reason})
    return verdict


def _is_exact(region: Region) -> bool:
    assert region.choice is not None
    return not isinstance(region, AttentionRegion) or parse_form(region.choice.form).is_exact(region)


def _unmeasured(region: Region) -> str:
    return "" if _is_exact(region) else "approximate: error not measured, because the options leave the check out"


def _leave(analysis: Analysis, position: int, reason: str) -> None:
    found = analysis.found[position]
    region = found.region
    assert region.choice is not None
    sentence = (
        f"rewrite {region.path or region.node} (node {region.node}) as {region.choice.form}: {reason}. "
        "The region is left as written; report the model if the rewrite should hold."
    )
    analysis.problems.append(sentence)
    refused = {**region.choice.refused, region.choice.name: reason}
    choice = Choice(AS_WRITTEN, f"left as written: {reason}", refused=refused)
    analysis.found[position] = replace(found, region=replace(region, choice=choice))


def _inherit(gm: fx.GraphModule, original: fx.GraphModule) -> None:
    """What inner backends read off Dynamo's own graph: placeholder names, sources and metadata."""
    gm.meta.update(original.meta)
    new_inputs, old_inputs = (g.graph.find_nodes(op="placeholder") for g in (gm, original))
    for new, old in zip(new_inputs, old_inputs, strict=True):
        for key, value in old.meta.items():
            if key != "val":
                new.meta[key] = value
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source

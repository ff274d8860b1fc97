"""The life of a graph: capture, normalize, lift, choose, each timed, trouble confined to the region it is in."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from attnc.codegen.float8 import FLOAT8, name_of, widest_type
from attnc.errors import CaptureError
from attnc.forms.kept_tiles import share_kept
from attnc.operands import Operands
from attnc.options import Options
from attnc.passes.attention.absorb import keep_latent
from attnc.passes.attention.chunks import Counted, Unrolled, in_chunks, overlaps
from attnc.passes.attention.crossing import crosses
from attnc.passes.attention.extent import cut_gradient, inside, leaves_of
from attnc.passes.attention.flex import flex_regions
from attnc.passes.attention.folded import fold_heads
from attnc.passes.attention.lift import Match, anchors, lift
from attnc.passes.attention.repeats import Repeats
from attnc.passes.attention.rules import label
from attnc.passes.attention.shared import own_weights
from attnc.passes.attention.within import finished
from attnc.passes.capture import capture
from attnc.passes.check import trial_of
from attnc.passes.choose import choose, target_device
from attnc.passes.choose_recurrence import choose_recurrence
from attnc.passes.dead import dead_ends
from attnc.passes.ffn.lift import ffns
from attnc.passes.found import Found, missed
from attnc.passes.graph import GraphFacts, NoMatch, hint, module_path, tensor_of
from attnc.passes.hooks import table as hooks
from attnc.passes.moe.lift import moes
from attnc.passes.normalize import normalize
from attnc.passes.recurrence.lift import Operator, recurrences
from attnc.passes.recurrence.rewriting import Rewriting
from attnc.passes.recurrence.rows import stack_rows
from attnc.passes.recurrence.written import rolled
from attnc.passes.rewrite import rule_of, shape_of_match, size_nodes
from attnc.region import AS_WRITTEN, AttentionRegion, Choice, Region, Unmatched
from attnc.store import Store

# The lifts of what is not attention, in this order: what one takes, those after it do not see.
LIFTS: tuple[Callable[[GraphFacts, Collection[fx.Node]], Iterator[Found | Unmatched]], ...] = (
    recurrences,
    rolled,
    moes,
    ffns,
)


@dataclass
class Analysis:
    """What one graph holds: its capture, its regions with choices, what did not fit, and the time of each pass."""

    gm: fx.GraphModule | None
    found: list[Found] = field(default_factory=list)
    unmatched: list[Unmatched] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reordered: list[str] = field(default_factory=list)  # what was rewritten before it was lifted, a sentence each
    timings: dict[str, float] = field(default_factory=dict)
    inputs: dict[fx.Node, torch.Tensor] = field(default_factory=dict)  # tensors that the graph is called with

    @property
    def regions(self) -> list[Region]:
        return [found.region for found in self.found]

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - start


def analyse(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, *, captured: bool = False) -> Analysis:
    """Regions of `gm` and the form chosen for each; `captured`: `gm` is pre-dispatch ATen already.

    A graph that cannot be captured gives an empty analysis with the reason in `problems`.
    """
    hooked = hooks.trace_of_compile()
    analysis = Analysis(None, unmatched=[*hooked.named], problems=[*hooked.problems], notes=hooks.notes())
    analysis.unmatched += dead_ends(gm.graph)
    try:
        with analysis.timed("capture"):
            analysis.gm = gm if captured else capture(gm, example_inputs)
    except CaptureError as exc:
        if options.strict:
            raise
        analysis.problems.append(str(exc))
        analysis.found += [Found(region) for region in flex_regions(gm.graph)]
        return analysis
    for node, value in zip(analysis.gm.graph.find_nodes(op="placeholder"), example_inputs, strict=False):
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) and not value.is_meta:
            analysis.inputs[node] = value
    for part in bodies(analysis.gm):
        _analyse_part(part, analysis, options)
    analysis.inputs.clear()  # an analysis may outlive the call
    analysis.notes += analysis.reordered + _unplaced(analysis, options)
    return analysis


def bodies(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """`gm` and the bodies of its higher-order operators, innermost last."""
    yield gm
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule) and name.startswith("body_"):
            yield from bodies(child)


def _analyse_part(gm: fx.GraphModule, analysis: Analysis, options: Options) -> None:
    with analysis.timed("normalize"):
        normalize(gm)
        stack_rows(gm.graph)
        own_weights(gm.graph)
        _reorder(gm.graph, analysis, options)
        facts = GraphFacts(gm.graph)
    with analysis.timed("lift"):
        analysis.found += [Found(region) for region in flex_regions(gm.graph)]
    before = len(analysis.unmatched)
    taken, facts = _attentions(facts, analysis, options)
    for find in LIFTS:
        with analysis.timed("lift"):
            entries = list(find(facts, taken))
        for entry in entries:
            if isinstance(entry, Unmatched):
                analysis.unmatched.append(entry)
            else:
                taken |= entry.nodes
                analysis.found.append(_chosen(entry, analysis, options))
    names = {node.name for node in taken}  # a router's softmax is no failed attention once its block is known
    analysis.unmatched[before:] = [entry for entry in analysis.unmatched[before:] if entry.anchor not in names]


def _reorder(graph: fx.Graph, analysis: Analysis, options: Options) -> None:
    """Change orders of products where that pays and is checked, before anything is lifted."""
    trial = trial_of(Store(options.store) if options.check else None)
    for orders in (fold_heads(graph, trial), keep_latent(graph, partial(target_device, options.device), trial)):
        analysis.reordered += orders.done
        analysis.notes += orders.left
        analysis.problems += orders.rejected


def _chosen(found: Found, analysis: Analysis, options: Options) -> Found:
    """`found` with a choice, where its lift made none."""
    if not isinstance(found.match, Operator | Rewriting):
        return found
    with analysis.timed("choose"):
        region = choose_recurrence(found.region, options)
    if isinstance(found.match, Rewriting) and found.region.choice is not None and region.choice is not None:
        reason = f"{found.region.choice.reason}; {region.choice.reason}"
        region = replace(region, choice=replace(region.choice, reason=reason))
    return replace(found, region=region)


def _attentions(facts: GraphFacts, analysis: Analysis, options: Options) -> tuple[set[fx.Node], GraphFacts]:
    """Enter the attentions of a graph and their choices; returns the nodes they compute, and the graph's facts.

    What is written over chunks of keys is entered last, as what then stands beside it over all pairs.
    """
    taken: set[fx.Node] = set()
    repeats, failed = Repeats(facts), []  # also what is an attention of chunks at least
    for anchor in anchors(facts.graph):
        with analysis.timed("lift"):
            match = repeats.find(anchor) or _lifted(facts, anchor, repeats)
        if isinstance(match, NoMatch) or overlaps(match.key.source):
            failed.append((anchor, match))
        else:
            taken |= _entered(facts, match, analysis, options)
    with analysis.timed("lift"):
        counted = Counted(facts)
        tried = [(anchor, why, in_chunks(facts, anchor, counted)) for anchor, why in failed]
    if any(isinstance(chunks, Unrolled) for *_, chunks in tried):
        facts = GraphFacts(facts.graph)
        repeats = Repeats(facts)
    for anchor, why, chunks in tried:
        match = why
        if isinstance(chunks, Unrolled):
            with analysis.timed("lift"):
                again = repeats.find(chunks.again) or _lifted(facts, chunks.again, repeats)
            match, chunks = (why, None) if isinstance(why, Match) and isinstance(again, NoMatch) else (again, chunks)
        elif isinstance(chunks, NoMatch) and isinstance(why, NoMatch):
            match = chunks
        if isinstance(match, NoMatch):
            analysis.unmatched.append(missed(anchor, match))
        else:
            taken |= _entered(facts, match, analysis, options, chunks if isinstance(chunks, Unrolled) else None)
    return taken, facts


def _entered(
    facts: GraphFacts, match: Match, analysis: Analysis, options: Options, chunks: Unrolled | None = None
) -> frozenset[fx.Node]:
    """Enter one attention and the choice for it; returns the nodes it computes."""
    with analysis.timed("choose"):
        region = _supplied(_seen(describe(facts, match), match, analysis.inputs), options)
        if chunks is not None:
            region = replace(region, node=chunks.anchor.name, columns=chunks.columns)
        region = choose(region, options) if not match.readers else replace(region, choice=_kept_weights(match))
    leaves = leaves_of(match)
    nodes = frozenset(inside(match, leaves)).difference(leaves)
    nodes |= chunks.nodes if chunks is not None else frozenset()
    analysis.found.append(Found(region, match, facts, nodes, chunks))
    return nodes


def _seen(region: AttentionRegion, match: Match, inputs: Mapping[fx.Node, torch.Tensor]) -> AttentionRegion:
    """`region` with how much its mask keeps on the inputs at hand, where the mask of pairs is one of them."""
    s, captured = region.shape, [inputs.get(node) for node in match.captured]
    here = region.mask == "tensor" and region.device == "cpu" and s.is_static and not region.sizes
    if not here or any(t is None for t in captured):
        return region
    with _disable_current_modes():
        rows, keys = (torch.empty(s.B, *size, 0) for size in ((s.Hq, s.L), (s.H, s.S)))
        given = Operands(rows, keys, keys, [t for t in captured if t is not None], (), region.rule)
        return replace(region, tiles_kept=round(share_kept(given), 2))


def _supplied(region: AttentionRegion, options: Options) -> AttentionRegion:
    """`region` with what the options hold for it."""
    if not options.weights:
        return region
    given = options.weights_for(region.key, region.path)
    return replace(region, weights=tuple((name, tuple(w.shape)) for name, w in sorted(given.items())))


def _unplaced(analysis: Analysis, options: Options) -> list[str]:
    """A sentence for each place that weights are supplied for and that is no attention of this graph."""
    if not options.weights:
        return []
    there = [region for region in analysis.regions if isinstance(region, AttentionRegion)]
    known = {name for region in there for name in (region.path, region.key)}
    has = ", ".join(dict.fromkeys(region.path or region.key for region in there)) or "none"
    lost = [place for place in options.weights if place not in known]
    return [f"weights for {place!r} are of no attention in this graph, which has {has}" for place in lost]


def _lifted(facts: GraphFacts, anchor: fx.Node, repeats: Repeats) -> Match | NoMatch:
    match = lift(facts, anchor)
    if isinstance(match, NoMatch):
        return match
    cut = cut_gradient(facts, match)
    if cut is not None:
        return cut
    match = finished(facts, match)
    repeats.add(match)
    return match


def _kept_weights(match: Match) -> Choice:
    names = ", ".join(sorted(node.name for node in match.readers))
    return Choice(AS_WRITTEN, f"its weights are also read by {names}, so they must be there as written")


def describe(facts: GraphFacts, match: Match) -> AttentionRegion:
    """The facts of a match, without its graph."""
    out = tensor_of(match.out)
    assert out is not None
    sources = [match.query.source, match.key.source, match.value.source]
    dtypes = [tensor_of(s).dtype for s in sources]  # type: ignore[union-attr]
    rule = rule_of(match)
    captured = tuple(
        f"{str(t.dtype).removeprefix('torch.')}[{', '.join(str(hint(s)) for s in t.shape)}]"
        for t in map(tensor_of, match.captured)
        if t is not None
    )
    narrow = any(dtype in FLOAT8 for dtype in dtypes)
    return AttentionRegion(
        path=module_path(match.out) or module_path(match.anchor),
        node=match.anchor.name,
        rule=rule,
        shape=shape_of_match(match),
        dtype=name_of(widest_type(dtypes)),
        device=out.device.type,
        mask=label(match.masked.keep, match.masked.score),
        written=match.written,
        fill=match.masked.fill,
        captured=captured,
        sizes=tuple(hint(node) for node in size_nodes(facts, match)),
        repeats_heads=match.repeats_heads,
        value_in_key=bool(match.within),
        stored=tuple(map(name_of, dtypes)) if narrow else (),
        training=any(map(facts.needs_grad, [*sources, *match.captured])),
        crosses=crosses(facts, match),
    )

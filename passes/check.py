"""Translation validation: the region as written against its rewrite, on random inputs, at a small and ragged size.

The region's own nodes are copied with their lengths and window constants replaced by small ones, lifted again, and
rewritten with the chosen form; both graphs run on the same data, gradients included where the region trains. A wrong
lift, a wrong form or a wrong lowering shows up as a difference; the region is then left as written. A form that is
an approximation, allowed by name, is measured instead, once `dense` has shown that the lift holds: its verdict passes
with the error that was seen.

Source: Pnueli, Siegel, Singerman 1998, "Translation validation".
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from attnc.passes.attention.extent import inside, is_computed, leaves_of
from attnc.passes.attention.lift import Match, anchors, lift
from attnc.passes.attention.within import finished
from attnc.passes.drawn import drawn, run_on
from attnc.passes.graph import GraphFacts, NoMatch, hint, tensor_of
from attnc.passes.rewrite import rewrite
from attnc.store import Store

log = logging.getLogger("attnc.passes.check")

# Elements of the score matrix up to which a region is run at its own size, and up to which an error is measured there.
AFFORDABLE, MEASURED = 1 << 22, 1 << 25
# FLOP of a change of order up to which it is run at its own size: at once, and where no smaller size can be told.
QUICK, PATIENT = 2e8, 4e11
STEP, WIDE_STEP = 34, 514  # between small sizes; the wide one leaves an approximation blocks to be wrong in
SMALL_FROM = 65  # integers below are never replaced: head counts, widths, axes
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Verdict:
    """Whether a rewrite may stand, the error seen relative to the largest value, and why not.

    unknown: whether nothing was run, as no size could be told at which it may be.
    """

    passed: bool
    error: float
    reason: str = ""
    unknown: bool = False


def check(
    match: Match,
    spelling: str,
    training: bool,
    *,
    exact: bool = True,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Verdict:
    """Run the region of `match` as written and as `spelling` on the same small random inputs.

    exact: whether the two must agree; else any finite error passes, and the verdict's reason says how large it is.
    weights: what the user supplies for the region.
    """
    leaves = leaves_of(match)
    smaller = _substitution(match, leaves, exact)
    if isinstance(smaller, str):
        return Verdict(False, 0.0, smaller)
    written = _instance(inside(match, leaves), match.out, leaves, smaller)
    for node in written.graph.find_nodes(op="placeholder"):
        node.meta["requires_grad"] = training and node.meta["val"].is_floating_point()
    facts = GraphFacts(written.graph)
    found = [lift(facts, anchor) for anchor in anchors(written.graph)]
    again = [m for m in found if isinstance(m, Match)]
    if len(again) != 1:
        refusals = "; ".join(str(m) for m in found if isinstance(m, NoMatch))
        return Verdict(False, 0.0, f"the region at a smaller size does not lift ({refusals or 'no anchor'})")
    changed, renamed = _twin(written)
    twin = GraphFacts(changed.graph)
    rewrite(twin, lift_again(twin, renamed[again[0].anchor]), spelling, weights)
    changed.graph.eliminate_dead_code()
    changed.recompile()
    limit = None if exact else torch.finfo(torch.float32).max
    verdict = _compare(written, changed, drawn(written), training, limit)
    if exact or not verdict.passed:
        return verdict
    size = "" if not smaller else f" of length {max(smaller.values())}"
    reason = f"approximate: error {verdict.error:.1e} of the largest value on random inputs{size}"
    return Verdict(True, verdict.error, reason)


def _twin(written: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A copy of an instance, and which node of it stands for which."""
    copied = fx.Graph()
    renamed: dict[fx.Node, fx.Node] = {}
    copied.output(copied.graph_copy(written.graph, renamed))
    for old, new in renamed.items():
        new.meta = dict(old.meta)
    return fx.GraphModule(written, copied), renamed


@dataclass(frozen=True)
class Change:
    """A change of a subgraph that is made before anything is lifted: another order of products, a fold of weights.

    out, leaves: where the subgraph ends and begins. flops: of one run of both at the written lengths.
    lengths: which may be replaced by smaller ones, larger than `apart`. kept: sizes that are none of these.
    make: changes the subgraph alone that ends in the given node; False where it does not find what to change.
    narrower: smaller numbers of heads and channels, and of their products, in the same proportions; tried first.
    placed: whether the lengths are the sizes of leaves[0] before its last, and no sizes of the other leaves.
    """

    name: str
    out: fx.Node
    leaves: tuple[fx.Node, ...]
    lengths: tuple[int, ...]
    kept: tuple[int, ...]
    flops: float
    make: Callable[[fx.Graph, fx.Node], bool]
    apart: int = 0
    placed: bool = False
    narrower: Mapping[int, int] = field(default_factory=dict)


Trial = Callable[[GraphFacts, Change], Verdict]


@dataclass
class Orders:
    """A sentence for each subgraph that was changed, was left on purpose, or was left because its change failed."""

    done: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)


def trial_of(store: Store | None) -> Trial:
    """What says of a change whether it holds, each verdict kept in `store`; without a store every change passes."""

    def trial(facts: GraphFacts, change: Change) -> Verdict:
        if store is None:
            return Verdict(True, 0.0)
        try:
            return _tried(facts, change, store)
        except Exception as exc:  # a fault of the check leaves the region as written, and says so
            log.debug("check of %s failed", change.name, exc_info=True)
            return Verdict(False, 0.0, f"its check raised {type(exc).__name__}: {exc}".splitlines()[0])

    return trial


def _tried(facts: GraphFacts, change: Change, store: Store) -> Verdict:
    nodes = _behind(facts, change)
    narrow = {} if change.flops <= QUICK or set(change.lengths) & change.narrower.keys() else change.narrower
    if narrow:
        kept = {*narrow, *change.kept}
        tight = replace(change, kept=tuple(kept), apart=max(narrow.get(n, n) for n in change.kept))
        try:
            found = _tried_at(facts, tight, nodes, narrow, store)
        except Exception:  # a size outside of these proportions: as wide as written, it is said what is wrong
            log.debug("check of %s at narrower heads failed", change.name, exc_info=True)
            found = None
        if found is not None and not found.unknown:
            return found
    found = _tried_at(facts, change, nodes, {}, store)
    return found or Verdict(False, 0.0, "the region at a smaller size is not recognised again")


def _tried_at(
    facts: GraphFacts, change: Change, nodes: Sequence[fx.Node], narrow: Mapping[int, int], store: Store
) -> Verdict | None:
    """The verdict of the subgraph with smaller lengths and `narrow` sizes; None where it is not recognised again."""
    smaller = _shorter(change, nodes)
    if isinstance(smaller, str):
        return Verdict(False, 0.0, smaller, unknown=True)
    smaller = {**narrow, **smaller}
    training = facts.needs_grad(change.out)
    written = _instance(nodes, change.out, change.leaves, smaller, _placed(change, smaller))
    key = f"{change.name} {training} {_text_of(written.graph)}"
    known = store.get(key)
    if known is not None:
        return Verdict(bool(known["passed"]), float(known["error"]), str(known["reason"]))  # type: ignore[arg-type]
    changed, renamed = _twin(written)
    if not change.make(changed.graph, renamed[written.graph.output_node().args[0]]):
        return None
    changed.graph.eliminate_dead_code()
    changed.recompile()
    verdict = _compare(written, changed, drawn(written), training, None)
    store.put(key, {"passed": verdict.passed, "error": verdict.error, "reason": verdict.reason})
    return verdict


def _behind(facts: GraphFacts, change: Change) -> list[fx.Node]:
    """The subgraph's nodes in order, with what is written into their memory on the way."""
    needed: set[fx.Node] = set()
    stack = [change.out]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        if node not in change.leaves and is_computed(node):
            stack += [n for n in facts.sources(node) if facts.order[n] < facts.order[change.out]]
    return sorted(needed, key=facts.order.__getitem__)


def _shorter(change: Change, nodes: Sequence[fx.Node]) -> dict[int, int] | str:
    """Small values for the lengths of a subgraph, and for multiples of them; {} keeps its own size."""
    lengths = {n for n in change.lengths if n >= SMALL_FROM}
    if change.flops <= QUICK or not lengths:
        return {}
    flat = [pytree.arg_tree_leaves(*n.args, **n.kwargs) for n in nodes if n not in change.leaves]
    inner = [[x for x in args if isinstance(x, int) and not isinstance(x, bool)] for args in flat]
    clash = lengths & set(change.kept)
    if change.placed:  # told from other sizes unless one argument names both
        clash = {n for n in clash if any(args.count(n) > change.lengths.count(n) for args in inner)}
    if clash:
        text = f"its length {max(clash)} cannot be told from another size, so no smaller one can be checked"
        return {} if change.flops <= PATIENT else text
    numbers = {x for args in inner for x in args}
    numbers = {x for x in numbers if SMALL_FROM <= x < 1 << 40} - set(change.kept) - lengths
    multiple = {x: length for x in numbers for length in sorted(lengths) if x % length == 0}
    small = small_sizes(lengths | numbers.difference(multiple), max(STEP, change.apart + 2))
    return small | {x: x // length * small[length] for x, length in multiple.items()}


def _placed(change: Change, smaller: Mapping[int, int]) -> dict[fx.Node, list[int]]:
    """The leaves' sizes where they follow from the place of the lengths; {} where from their values."""
    if not change.placed:
        return {}
    sizes = {leaf: [hint(n) for n in tensor_of(leaf).shape] for leaf in change.leaves}  # type: ignore[union-attr]
    *lengths, width = sizes[change.leaves[0]]
    return sizes | {change.leaves[0]: [*(smaller.get(n, n) for n in lengths), width]}


def _text_of(graph: fx.Graph) -> str:
    """A graph without the names of its nodes: what a verdict about it depends on."""
    order = {node: n for n, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        value = tensor_of(node)
        kind = "" if value is None else f"{value.dtype} {list(value.shape)} {value.device.type}"
        given = fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{order[n]}")
        lines.append(f"{node.op} {'' if node.op == 'placeholder' else node.target} {given} {kind}")
    return "\n".join(lines)


def lift_again(facts: GraphFacts, anchor: fx.Node) -> Match:
    found = lift(facts, anchor)
    assert isinstance(found, Match), found
    return finished(facts, found)


def _substitution(match: Match, leaves: Sequence[fx.Node], exact: bool) -> dict[int, int] | str:
    """Small values for the lengths and large constants of the region; {} keeps its own size."""
    query, key = tensor_of(match.query.source), tensor_of(match.key.source)
    assert query is not None and key is not None
    kinds_q, kinds_k = ([k for k, _ in o.roles] for o in (match.query, match.key))
    sides = ((query, kinds_q), (key, kinds_k))
    rows, cols = (hint(x.shape[kinds.index("n")]) if "n" in kinds else 1 for x, kinds in sides)
    value = tensor_of(match.out)
    assert value is not None
    pairs = rows * cols * match.q_heads * max(1, hint(value.shape[0]))
    if pairs <= (AFFORDABLE if exact else MEASURED):
        return {}
    numbers = {rows, cols}
    for node in inside(match, leaves):
        flat = pytree.arg_tree_leaves(*node.args, **node.kwargs) if node not in leaves else []
        numbers |= {x for x in flat if isinstance(x, int) and not isinstance(x, bool) and SMALL_FROM <= x < 1 << 40}
    fixed = {hint(s) for leaf in leaves if (t := tensor_of(leaf)) is not None for s in t.shape} - {rows, cols}
    clash = {rows, cols} & (fixed | {match.q_heads, *match.widths})
    if clash or any(n < SMALL_FROM for n in (rows, cols) if n != 1):
        return f"its length {max(rows, cols)} cannot be told from another size, so no smaller one can be checked"
    return small_sizes(numbers - fixed, STEP if exact else WIDE_STEP)


def small_sizes(numbers: set[int], step: int = STEP) -> dict[int, int]:
    """Replace large numbers by small ragged ones in the same order, neighbours staying neighbours."""
    chosen: dict[int, int] = {}
    last_from, last_to = 0, 3
    for number in sorted(n for n in numbers if n >= SMALL_FROM):
        chosen[number] = last_to + (number - last_from if number - last_from <= 2 else step)
        last_from, last_to = number, chosen[number]
    return chosen


def _instance(
    nodes: Sequence[fx.Node],
    out: fx.Node,
    leaves: Sequence[fx.Node],
    smaller: dict[int, int],
    sizes: Mapping[fx.Node, list[int]] | None = None,
) -> fx.GraphModule:
    """The region alone as a graph over its leaves, at the smaller size.

    sizes: of leaves whose smaller sizes do not follow from their values.
    """
    graph, root = fx.Graph(), torch.nn.Module()
    env: dict[fx.Node, Any] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def small(x: Any) -> Any:
        if isinstance(x, torch.SymInt):
            x = hint(x)
        if isinstance(x, torch.device):
            return run_on(x)
        return smaller.get(x, x) if isinstance(x, int) and not isinstance(x, bool) else x

    for node in nodes:
        value: Any = node.meta.get("val")
        if isinstance(value, torch.SymInt | torch.SymFloat | int | float) and not isinstance(value, bool):
            env[node] = small(value) if isinstance(value, torch.SymInt | int) else float(value)
            continue
        number = _number(node)
        if number is not None and node not in leaves:
            root.register_buffer(f"number_{len(env)}", number)
            env[node] = graph.get_attr(f"number_{len(env)}")
            with mode:
                env[node].meta["val"] = mode.from_tensor(number)
            continue
        if node in leaves or node.op in ("placeholder", "get_attr"):
            shape = (sizes or {}).get(node) or [small(s) for s in value.shape]
            env[node] = graph.placeholder(node.name)
            with mode:
                env[node].meta["val"] = torch.empty(shape, dtype=value.dtype, device=run_on(value.device))
            continue
        args = _mapped(node.args, env, small)
        kwargs = _mapped(node.kwargs, env, small)
        env[node] = graph.call_function(node.target, args, kwargs)
        with mode:
            plain_args, plain_kwargs = _fakes(args), _fakes(kwargs)
            env[node].meta["val"] = node.target(*plain_args, **plain_kwargs)
    graph.output(env[out])
    return fx.GraphModule(root, graph)


def _number(node: fx.Node) -> torch.Tensor | None:
    """A constant of the graph that is one number: it keeps its value, others are data like inputs."""
    if node.op != "get_attr":
        return None
    table = attrgetter(str(node.target))(node.graph.owning_module)
    return table if isinstance(table, torch.Tensor) and table.numel() == 1 and not table.is_meta else None


def _mapped(tree: Any, env: dict[fx.Node, Any], small: Callable[[Any], Any]) -> Any:
    return fx.node.map_aggregate(tree, lambda x: env[x] if isinstance(x, fx.Node) else small(x))


def _fakes(tree: Any) -> Any:
    return fx.node.map_arg(tree, lambda n: n.meta["val"])


def _compare(
    written: fx.GraphModule, changed: fx.GraphModule, inputs: list[Any], training: bool, limit: float | None
) -> Verdict:
    expected = _run(written, inputs, training)
    found = _run(changed, inputs, training)
    worst, limit = 0.0, _limit(written) if limit is None else limit
    for a, c in zip(expected, found, strict=True):
        if (a is None) != (c is None):
            return Verdict(False, float("inf"), "an input has a gradient on one side only")
        if a is None or c is None:
            continue
        if a.shape != c.shape or a.dtype != c.dtype:
            shapes = f"{c.dtype} {list(c.shape)}, written {a.dtype} {list(a.shape)}"
            return Verdict(False, float("inf"), f"the output is {shapes}")
        same = (a == c) | (torch.isnan(a) & torch.isnan(c))  # equal infinities have no difference
        scale = a.abs()[torch.isfinite(a)].max().clamp_min(1e-3) if torch.isfinite(a).any() else a.new_ones(())
        gap = torch.where(same, 0.0, ((a - c).abs() / scale).double())
        error = float("inf") if bool(torch.isnan(gap).any()) else float(gap.max()) if gap.numel() else 0.0
        worst = max(worst, error)
        if error > limit * (4 if a is not expected[0] else 1):
            what = "output" if a is expected[0] else "gradient"
            found_error = f"differs by {error:.1e} of its largest value, {limit:.0e} is allowed"
            return Verdict(False, error, f"its {what} {found_error}")
    return Verdict(True, worst)


def _limit(written: fx.GraphModule) -> float:
    """The tolerance of the coarsest type that the written region computes in."""
    types = {t.dtype for n in written.graph.nodes if (t := tensor_of(n)) is not None}
    return max((TOLERANCE[d] for d in types if d in TOLERANCE), default=2e-4)


def _run(gm: fx.GraphModule, inputs: list[Any], training: bool) -> list[torch.Tensor | None]:
    fresh = [x.detach().clone().requires_grad_(training and x.is_floating_point()) for x in inputs]
    with torch.enable_grad() if training else torch.no_grad():
        out = gm(*fresh)
    if not training or not out.requires_grad:
        return [out.detach()]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    wanted = [x for x in fresh if x.requires_grad]
    grads = torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True)
    return [out.detach(), *grads]

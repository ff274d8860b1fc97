"""Translation validation of a recurrence: the region as written against the operator, on random inputs.

A loop runs with its first steps, a product at a small and ragged length; outputs, last states and gradients must
agree. Decays are drawn so that states do not grow, keys so that the delta rule contracts.

Source: Pnueli, Siegel, Singerman 1998, "Translation validation".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from attnc.op_recurrence import RECURRENCE
from attnc.passes.check import Verdict, small_sizes
from attnc.passes.graph import GraphFacts, NoMatch, hint, tensor_of
from attnc.passes.recurrence.rewriting import Rewriting

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
AFFORDABLE = 1 << 22  # elements of a square of tokens, or of all states, up to which a region runs at its own size
EMPTY: Mapping[int, int] = MappingProxyType({})
LARGEST = 1e4  # results beyond are growth, in which rounding drowns


def check_rewriting(found: Rewriting, training: bool) -> Verdict:
    """Run what `found` replaces and its replacement on the same random inputs."""
    found, again = found.sample or found, found.again
    smaller: dict[int, int] = {}
    if again is not None and again.elements > AFFORDABLE:
        if again.lengths & again.fixed:
            return Verdict(False, 0.0, "its length cannot be told from another size, so no smaller one can be checked")
        smaller = small_sizes(again.lengths)
    written, places = instance(found.leaves, found.written(), found.outs, smaller)
    if again is not None and smaller:
        facts = GraphFacts(written.graph)
        twin = again.find(facts)
        if isinstance(twin, NoMatch):
            return Verdict(False, 0.0, f"the region at a smaller size is not found ({twin})")
        if found.form:
            twin.spell(found.form)
        found, outs = twin, twin.outs
        written.graph.output(tuple(outs))
        places = twin.leaves
        written.recompile()
    changed = fx.GraphModule(written, found.graph)
    inputs = written.graph.find_nodes(op="placeholder")
    chosen = [inputs.index(p) for p in places]
    scale, decays = _ranges(found)
    verdict = Verdict(False, 0.0, "its results grow without bound on random inputs")
    for sign in (-1.0, 1.0):
        data = _data(inputs, {places[k] for k in decays}, sign, scale)
        want = _run(written, data, training)
        if all(x is None or bool(torch.isfinite(x).all() & (x.abs() < LARGEST).all()) for x in want):
            break
    else:
        return verdict
    got = _run(changed, [data[k] for k in chosen], training)
    count = len(found.outs)
    want = [*want[:count], *(want[count + k] for k in chosen if len(want) > count)]
    return _compare(want, got, count, _limit(written))


def instance(
    leaves: Sequence[fx.Node], nodes: Sequence[fx.Node], outs: Sequence[fx.Node], smaller: Mapping[int, int] = EMPTY
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The nodes from the leaves to the outs as a graph of its own, and its placeholders of the leaves."""
    graph, root = fx.Graph(), torch.nn.Module()
    env: dict[fx.Node, Any] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def small(x: Any) -> Any:
        if isinstance(x, torch.SymInt):
            x = hint(x)
        return smaller.get(x, x) if isinstance(x, int) and not isinstance(x, bool) else x

    def placed(node: fx.Node) -> None:
        value = node.meta["val"]
        env[node] = graph.placeholder(node.name)
        with mode:
            shape, dtype, device = [small(s) for s in value.shape], value.dtype, value.device
            env[node].meta["val"] = torch.empty(shape, dtype=dtype, device=device)

    for leaf in leaves:
        placed(leaf)
    for node in nodes:
        if node.op == "placeholder" and tensor_of(node) is not None:
            placed(node)
    for node in nodes:
        if node in env:
            continue
        value: Any = node.meta.get("val")
        if isinstance(value, torch.SymInt | int) and not isinstance(value, bool):
            env[node] = small(value)
            continue
        if node.op == "get_attr":
            table = attrgetter(str(node.target))(node.graph.owning_module)
            name = f"table_{len(env)}"
            if isinstance(table, torch.nn.Module):
                root.add_module(name, table)
                env[node] = graph.get_attr(name)
                continue
            root.register_buffer(name, table)
            env[node] = graph.get_attr(name)
            with mode:
                env[node].meta["val"] = mode.from_tensor(table)
            continue
        args, kwargs = (fx.node.map_aggregate(x, lambda v: env[v] if isinstance(v, fx.Node) else small(v))
                        for x in (node.args, node.kwargs))  # fmt: skip
        env[node] = graph.call_function(node.target, args, kwargs)
        if not smaller:
            env[node].meta["val"] = node.meta.get("val")
            continue
        with mode:
            plain = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
            env[node].meta["val"] = node.target(*plain[0], **plain[1])
    if not smaller:
        graph.output(tuple(env[x] for x in outs))
    for node in graph.find_nodes(op="placeholder"):
        node.meta["requires_grad"] = True
    return fx.GraphModule(root, graph), [env[x] for x in leaves]


def widened(gm: fx.GraphModule) -> None:
    """Make a graph of `instance` compute in float64, whatever it was written in."""
    narrow = (torch.float32, torch.bfloat16, torch.float16)

    def wide(x: Any) -> Any:
        return torch.float64 if isinstance(x, torch.dtype) and x in narrow else x

    for node in gm.graph.nodes:
        value = tensor_of(node)
        if node.op == "placeholder" and value is not None and value.dtype in narrow:
            node.meta["val"] = value.to(torch.float64)
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), wide)
        schema = getattr(node.target, "_schema", None)
        makes = schema is not None and any(a.name == "dtype" for a in schema.arguments)
        if makes and not node.all_input_nodes and value is not None and value.dtype in narrow:
            node.kwargs = {**node.kwargs, "dtype": torch.float64}
    for name, buffer in list(gm.named_buffers()):
        if buffer.dtype in narrow:
            gm.register_buffer(name, buffer.double())
    gm.recompile()


def _ranges(found: Rewriting) -> tuple[float, set[int]]:
    """How large random inputs are, and the leaves, by position, that the decays come from."""
    inputs = found.graph.find_nodes(op="placeholder")
    widest = 4
    decays: set[int] = set()
    for node in found.graph.nodes:
        if node.target is not RECURRENCE:
            continue
        key = tensor_of(node.args[1])
        widest = max(widest, hint(key.shape[-1]) if key is not None else 0)
        stack = [node.args[3]] if isinstance(node.args[3], fx.Node) else []
        while stack:
            at = stack.pop()
            if at in inputs:
                decays.add(inputs.index(at))
            stack.extend(at.all_input_nodes)
    return widest**-0.5, decays


def _data(inputs: Sequence[fx.Node], decays: set[fx.Node], sign: float, scale: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for node in inputs:
        value = node.meta["val"]
        shape = [hint(s) for s in value.shape]
        x = torch.randn(shape, generator=generator)
        if value.dtype == torch.bool:
            made = x > -0.5
        elif not value.dtype.is_floating_point:
            made = (x > 0).to(value.dtype)
        else:
            made = (sign * (x.abs() * 0.3 + 0.02) if node in decays else scale * x).to(value.dtype)
        drawn.append(made.to(value.device))
    return drawn


def _run(gm: fx.GraphModule, inputs: Sequence[torch.Tensor], training: bool) -> list[torch.Tensor | None]:
    """The results, and where the region trains the gradients of all inputs."""
    fresh = [x.detach().clone().requires_grad_(training and x.is_floating_point()) for x in inputs]
    with torch.enable_grad() if training else torch.no_grad():
        outs = [x for x in pytree.tree_leaves(gm(*fresh)) if isinstance(x, torch.Tensor)]
    found: list[torch.Tensor | None] = [x.detach() for x in outs]
    loss: float | torch.Tensor = 0.0
    for k, x in enumerate(outs):
        if training and x.requires_grad:
            weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(k)).to(x.device, x.dtype)
            loss = loss + (x * weight).sum()
    if not isinstance(loss, torch.Tensor):
        return found
    wanted = [x for x in fresh if x.requires_grad]
    grads = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
    return [*found, *(next(grads) if x.requires_grad else None for x in fresh)]


def _limit(written: fx.GraphModule) -> float:
    types = {t.dtype for n in written.graph.nodes if (t := tensor_of(n)) is not None}
    return max((TOLERANCE[d] for d in types if d in TOLERANCE), default=1e-4)


def _compare(want: Sequence[Any], got: Sequence[Any], outputs: int, limit: float) -> Verdict:
    if len(want) != len(got):
        return Verdict(False, float("inf"), "it has gradients on one side only")
    worst = 0.0
    for k, (a, b) in enumerate(zip(want, got, strict=True)):
        if a is None and b is None:
            continue
        a, b = (torch.zeros_like(b if a is None else a) if x is None else x for x in (a, b))
        what = "output" if k < outputs else "gradient"
        if a.shape != b.shape or a.dtype != b.dtype:
            found = f"{b.dtype} {list(b.shape)}, written {a.dtype} {list(a.shape)}"
            return Verdict(False, float("inf"), f"its {what} is {found}")
        gap = (a.double() - b.double()).abs().max() if a.numel() else torch.zeros(())
        error = float(gap / a.double().abs().max().clamp_min(1e-6)) if a.numel() else 0.0
        worst = max(worst, error)
        if not error <= limit * (1 if k < outputs else 4):
            allowed = f"differs by {error:.1e} of its largest value, {limit:.0e} is allowed"
            return Verdict(False, error, f"its {what} {allowed}")
    return Verdict(True, worst)

"""The order of a latent attention that is predicted to be faster, written into the graph: absorbed or expanded.

The up-projections stay slices of their weight inside the graph, so they are folded in every run and never stale.

Source: DeepSeek-AI 2024, "DeepSeek-V2", arXiv:2405.04434, appendix C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any

import torch
from torch import fx

from attnc.cost_models.device import Cpu, Device, Gpu
from attnc.errors import UsageError
from attnc.expr import H, var
from attnc.passes.attention.absorbed import Absorbed, Axes, Channels, Matrix, absorbed
from attnc.passes.attention.latent import (
    Expansion,
    Latent,
    LatentShape,
    absorbed_work,
    expanded_work,
    has_few_rows,
    latents,
    seconds_of,
)
from attnc.passes.attention.lift import Match, anchors
from attnc.passes.attention.operands import batch_of
from attnc.passes.check import Change, Orders, Trial
from attnc.passes.graph import GraphFacts, NoMatch, hint, module_path, tensor_of

aten = torch.ops.aten
LEAST = 4  # heads and channels that a check keeps


def keep_latent(graph: fx.Graph, device_of: Callable[[str], Device], trial: Trial) -> Orders:
    """Bring each latent attention of `graph` into the order that is predicted to be faster.

    device_of: the device that choices are made for, from the type of the one that tensors are on.
    trial: says of a change whether it holds on random inputs.
    """
    facts, orders = GraphFacts(graph), Orders()
    for anchor in anchors(graph):
        found: Latent | Absorbed | NoMatch | None = latents(facts, anchor)
        found = absorbed(facts, anchor) if found is None else found
        if isinstance(found, NoMatch):
            if not has_few_rows(anchor):
                orders.left.append(f"{_place(found.node)}: {_stays(found.reason)}")
            continue
        if found is None or not _may_change(found.match):
            continue
        value = tensor_of(found.match.out)
        try:
            device = device_of(value.device.type)  # type: ignore[union-attr]
        except UsageError:  # a GPU that is present and not in the table: nothing can be predicted for it
            continue
        if _settle(graph, facts, found, device, trial, orders):
            facts = GraphFacts(graph)
    return orders


def _stays(reason: str) -> str:
    return f"latent attention that is written absorbed stays so: {reason}."


def _settle(
    graph: fx.Graph, facts: GraphFacts, found: Latent | Absorbed, device: Device, trial: Trial, orders: Orders
) -> bool:
    """Change the order of `found` where that is predicted to be faster and holds; whether the graph changed."""
    where, dtype = _place(found.match.out), tensor_of(found.match.value.source).dtype  # type: ignore[union-attr]
    flops_per_s, bytes_per_s = rates(device, dtype)
    times = seconds_of(found.shape, flops_per_s, bytes_per_s / dtype.itemsize)
    s, written = found.shape, isinstance(found, Absorbed)
    absorbs = times[0] < times[1]
    figures = f"{_milliseconds(times[not absorbs])} against {_milliseconds(times[absorbs])} predicted on {device.name}"
    space = f"its latents of {s.rank} channels" if absorbs else f"keys and values of {s.H} heads made from its latents"
    sentence = f"{where}: {s.L} x {s.S} latent attention is computed over {space}"
    if absorbs == written:
        orders.left += [f"{sentence}, as written: {figures}."] if written else []
        return False
    if isinstance(found, Latent) and (found.key.biased or found.value.biased):
        orders.left.append(f"{sentence} only where its up-projection has no bias, and this one has: left as written.")
        return False
    verdict = trial(facts, _change(facts, found))
    if not verdict.passed:
        orders.rejected.append(f"{sentence}: {verdict.reason}. The region is left as written.")
        return False
    change_order(graph, found)
    orders.done.append(f"{sentence}, not as written: {figures}.")
    return True


def _place(node: fx.Node) -> str:
    return module_path(node) or node.name


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _change(facts: GraphFacts, found: Latent | Absorbed) -> Change:
    """The change of order of `found`, to be tried on its own subgraph."""
    s = found.shape
    work = sum(flops for flops, _ in (absorbed_work(s), expanded_work(s)))
    kept = (s.B, s.H, s.nope, s.rope, s.rank, s.width, s.rank + s.rope, s.nope + s.rope)
    make = partial(Change, "latent order", lengths=(s.L, s.S), flops=work, make=_again, narrower=narrower(s))
    if isinstance(found, Absorbed):
        joined = s.rank if found.match.key.more else 0  # products over as many channels as keys are not joined
        return make(found.out[0], found.leaves, kept=kept, apart=max(s.H, joined))
    held = [found.key.latent, found.key.weight, found.value.weight]
    shared = [node for _, operand in found.parts if operand is not None for node in operand.sources]
    leaves = tuple(dict.fromkeys([*found.match.query.sources, *held, *shared, *found.match.captured]))
    rows = [hint(n) for node in held[1:] for n in tensor_of(node).shape]  # type: ignore[union-attr]
    return make(found.match.out, leaves, kept=(*kept, *rows))


def narrower(s: LatentShape) -> dict[int, int]:
    """Fewer heads and channels in the same proportions, none below LEAST, with the numbers made of them.

    {} where a sum could be taken for a product, or the batch for either.
    """
    sizes = (s.H, s.nope, s.rope, s.rank, s.width)
    by = max(d for d in range(1, max(1, min(sizes) // LEAST) + 1) if all(n % d == 0 for n in sizes))
    sums = {*sizes, s.rank + s.rope, s.nope + s.rope, s.nope + s.width}
    small = {n: n // by for n in sums}
    products = {s.H * n: s.H * n // by**2 for n in sums}
    mixed = sums & products.keys() or s.B in small or s.B in products
    return {} if by == 1 or mixed else small | products


def _again(graph: fx.Graph, out: fx.Node) -> bool:
    """Change the order of the one latent attention of `graph`; whether there is one."""
    facts = GraphFacts(graph)
    for anchor in anchors(graph):
        found = latents(facts, anchor, any_length=True)
        found = absorbed(facts, anchor) if found is None else found  # type: ignore[assignment]
        if isinstance(found, Latent | Absorbed):
            change_order(graph, found)
            return True
    return False


def change_order(graph: fx.Graph, found: Latent | Absorbed) -> None:
    """Write the region of `found` in the other order."""
    if isinstance(found, Absorbed):
        expand(graph, found)
        graph.eliminate_dead_code()
    else:
        absorb(graph, found)
        _erase_unread(graph, found.match.key.source)


def _may_change(match: Match) -> bool:
    """Whether the order may change: no random stream to keep, no keys and values that the graph hands out."""
    handed_out = any(user.op == "output" for operand in (match.key, match.value) for user in operand.source.users)
    return not match.dropout and not handed_out


def rates(device: Device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of large products and bytes/s of memory."""
    if isinstance(device, Cpu):
        return device.matmul * device.speed(str(dtype).removeprefix("torch.")), device.bandwidth
    assert isinstance(device, Gpu)
    tensor = device.tensor.get("tf32" if dtype == torch.float32 else "bf16", device.fp32_flops)
    return tensor, device.bandwidth


def absorb(graph: fx.Graph, found: Latent) -> None:
    """Write the region of `found` over its latents."""
    match, sdpa = found.match, found.match.written.startswith("sdpa")
    before = match.anchor if sdpa else match.products[0].node  # type: ignore[index]
    emit = Emitter(graph, match.out)
    with graph.inserting_before(before):
        batch = batch_of(graph, (match.query, match.key), match.batch)
        query = match.query.emit(graph, batch, match.q_heads)
        factor = match.query.factor * match.key.factor
        held = found.latents.emit(graph, batch, match.q_heads)
        rows, columns = [], []
        starts = accumulate((width for width, _ in found.parts), initial=0)
        # The latents come first, so that the values are the key's first channels.
        for at, (width, shared) in sorted(zip(starts, found.parts, strict=False), key=lambda p: p[1][1] is not None):
            part = emit(aten.narrow.default, query, -1, at, width)
            if shared is None:
                part = emit(aten.einsum.default, "bhld,hdc->bhlc", [part, _per_head(emit, found.key, match.q_heads)])
            rows.append(part)
            columns.append(held if shared is None else shared.emit(graph, batch, match.q_heads))
        query, key = (emit(aten.cat.default, x, -1) if len(x) > 1 else x[0] for x in (rows, columns))
        if factor != 1.0:
            query = emit(aten.mul.Tensor, query, factor)
        if not sdpa:
            scores = emit(aten.matmul.default, query, emit(aten.transpose.int, key, -2, -1))
            before.replace_all_uses_with(scores)
    with graph.inserting_before(match.out):
        if sdpa:
            summed = _sdpa(emit, match, query, key, held)
        else:
            summed = emit(aten.matmul.default, match.products[1].left, held)  # type: ignore[index]
        up = _per_head(emit, found.value, match.q_heads)
        out = emit(aten.einsum.default, "bhlc,hdc->bhld", [summed, up])
    match.out.replace_all_uses_with(out)


def expand(graph: fx.Graph, found: Absorbed) -> None:
    """Write the region of `found` over keys and values of every head."""
    match, node = found.match, found.out[0]
    emit = Emitter(graph, node)
    first = match.anchor if found.scores is None else found.scores[0]
    with graph.inserting_before(first):
        batch = batch_of(graph, [x for part in found.channels for x in (part.key, part.rows)], match.batch)
        held = next(part for part in found.channels if part.up is not None)
        latent = emit(aten.select.int, _column(emit, held, batch, match.q_heads), 1, 0)
        rows, columns = _columns(emit, found, latent, batch)
        query, key = (emit(aten.cat.default, x, -1) if len(x) > 1 else x[0] for x in (rows, columns))
        factor = match.query.factor * match.key.factor
        if factor != 1.0:
            query = emit(aten.mul.Tensor, query, factor)
        if found.scores is not None:
            scores = emit(aten.matmul.default, query, emit(aten.transpose.int, key, -2, -1))
            first.replace_all_uses_with(_laid(emit, scores, "bhij", found.scores[1], first))
    with graph.inserting_before(node):
        value = emit(aten.einsum.default, "bsc,hcd->bhsd", [latent, _per_head_of(emit, found.down)])
        if found.scores is None:
            out = _sdpa(emit, match, query, key, value)
        else:
            weights = match.products[1].left  # type: ignore[index]
            if "bh" in found.weights:
                weights = emit(aten.unflatten.int, weights, found.weights.index("bh"), [-1, match.q_heads])
            order = "".join(found.weights)
            weights = emit(aten.permute.default, weights, [order.index(x) for x in "bhij"])
            out = emit(aten.matmul.default, weights, value)
        node.replace_all_uses_with(_laid(emit, out, "bhie", found.out[1], node))


def _columns(emit: Emitter, found: Absorbed, latent: fx.Node, batch: Any) -> tuple[list[fx.Node], list[fx.Node]]:
    """Query and key of every head, channels by channels."""
    rows, columns, heads = [], [], found.match.q_heads
    for part in found.channels:
        row = part.rows.emit(emit.graph, batch, heads)
        rows.append(row if part.weight == 1.0 else emit(aten.mul.Tensor, row, part.weight))
        if part.up is not None:
            columns.append(emit(aten.einsum.default, "bsc,hdc->bhsd", [latent, _per_head_of(emit, part.up)]))
            continue
        columns.append(emit(aten.expand.default, _column(emit, part, batch, heads), [-1, heads, -1, -1]))
    return rows, columns


def _column(emit: Emitter, part: Channels, batch: Any, heads: int) -> fx.Node:
    """The key's channels of one part, of one head."""
    column = replace(part.key, more=()).emit(emit.graph, batch, heads)
    whole = tensor_of(column)
    assert whole is not None
    return column if whole.shape[-1] == part.width else emit(aten.narrow.default, column, -1, part.first, part.width)


def _per_head_of(emit: Emitter, matrix: Matrix) -> fx.Node:
    """The matrices as (H, d, e)."""
    node, index = matrix.node, list(matrix.index)
    for dim in reversed(range(len(index))):
        if index[dim].is_const:
            node = emit(aten.select.int, node, dim, int(index[dim].value))
            del index[dim]
    return emit(aten.permute.default, node, [index.index(x) for x in (H, var("d"), var("e"))])


def _laid(emit: Emitter, node: fx.Node, have: str, axes: Axes, like: fx.Node) -> fx.Node:
    """`node`, its axes `have`, laid out as `axes` in the shape of `like`; lengths of the run are nodes of the graph."""
    order = "".join(axes)
    order = "".join(x for x in have if x not in order) + order  # what is not named has one element
    moved = emit(aten.permute.default, node, [have.index(x) for x in order])
    sizes = {x: emit.size(moved, dim) for dim, x in enumerate(order)}
    written = tensor_of(like)
    assert written is not None
    shape = [
        extent if isinstance(extent, int) and axis != "e" else emit.product([sizes[x] for x in axis])
        for axis, extent in zip(axes, written.shape, strict=True)
    ]
    return emit(aten.reshape.default, moved, shape)


def _sdpa(emit: Emitter, match: Match, query: fx.Node, key: fx.Node, value: fx.Node) -> fx.Node:
    """The same call over latents; its scale stays that of the written width."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = dict(zip(names, match.anchor.args, strict=False)) | dict(match.anchor.kwargs)
    kept = {k: given[k] for k in names[3:] if k in given}
    scale = given.get("scale")
    scale = match.widths[0] ** -0.5 if scale is None else scale
    called = emit.graph.call_function(
        aten.scaled_dot_product_attention.default, (query, key, value), {**kept, "scale": scale, "enable_gqa": True}
    )
    rows, held = tensor_of(query), tensor_of(value)
    assert rows is not None and held is not None
    called.meta.update(emit.meta, val=rows.new_empty((*rows.shape[:3], held.shape[3])))
    return called


def _per_head(emit: Emitter, e: Expansion, heads: int) -> fx.Node:
    """The up-projection as (H, width, rank)."""
    if e.stride == e.width:
        block = emit(aten.narrow.default, e.weight, 0, e.offset, heads * e.width)
        return emit(aten.unflatten.int, block, 0, [heads, e.width])
    whole = emit(aten.unflatten.int, e.weight, 0, [-1, e.stride])
    return emit(aten.narrow.default, whole, 1, e.offset, e.width)


def _erase_unread(graph: fx.Graph, node: fx.Node) -> None:
    """Take out memory that is only written any more, with its writers."""
    graph.eliminate_dead_code()
    facts = GraphFacts(graph)
    if node not in facts.order or facts.root(node) is not node or node.op != "call_function":
        return
    members = {n for n in facts.order if facts.root(n) is node} | set(facts.writers(node))
    if all(user in members for n in members for user in n.users):
        for n in sorted(members, key=facts.order.__getitem__, reverse=True):
            graph.erase_node(n)
    graph.eliminate_dead_code()


class Emitter:
    """Calls with their values computed, at the insertion point, under the name of the node they stand for."""

    def __init__(self, graph: fx.Graph, like: fx.Node) -> None:
        self.graph = graph
        self.meta = {k: v for k, v in like.meta.items() if k in ("nn_module_stack", "stack_trace")}

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta.update(self.meta)
        plain = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*plain[0], **plain[1])
        return node

    def size(self, node: fx.Node, dim: int) -> int | fx.Node:
        """The size of an axis: a number, or the node of one that is known at run time."""
        value = tensor_of(node)
        assert value is not None
        return value.shape[dim] if isinstance(value.shape[dim], int) else self(aten.sym_size.int, node, dim)

    def product(self, sizes: Sequence[int | fx.Node]) -> int | fx.Node:
        """The product of sizes, a number where all are."""
        known, run = prod(x for x in sizes if isinstance(x, int)), [x for x in sizes if isinstance(x, fx.Node)]
        if known != 1 or not run:
            return reduce(partial(self, mul), run, known)
        return reduce(partial(self, mul), run)

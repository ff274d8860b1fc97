"""The absorbed order of a latent attention, written into the graph where it is predicted to be faster.

The up-projections stay slices of their weight inside the graph, so they are folded in every run and never stale.

Source: DeepSeek-AI 2024, "DeepSeek-V2", arXiv:2405.04434, appendix C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from attnc.cost_models.device import Cpu, Device, Gpu
from attnc.errors import UsageError
from attnc.passes.attention.latent import Expansion, Latent, latents, pays
from attnc.passes.attention.lift import Match, anchors
from attnc.passes.graph import GraphFacts, module_path, tensor_of

aten = torch.ops.aten


def keep_latent(graph: fx.Graph, device_of: Callable[[str], Device]) -> list[str]:
    """Absorb the latent attentions of `graph` for which that pays; returns a sentence for each.

    device_of: the device that choices are made for, from the type of the one that tensors are on.
    """
    facts, sentences = GraphFacts(graph), []
    for anchor in anchors(graph):
        found = latents(facts, anchor)
        value = None if found is None else tensor_of(found.value.latent)
        if found is None or value is None or not _may_change(found.match):
            continue
        try:
            device = device_of(value.device.type)
        except UsageError:  # a GPU that is present and not in the table: nothing can be predicted for it
            continue
        flops_per_s, bytes_per_s = rates(device, value.dtype)
        if pays(found.shape, flops_per_s, bytes_per_s / value.element_size()):
            absorb(graph, found)
            _erase_unread(graph, found.match.key.source)
            facts = GraphFacts(graph)
            sentences.append(_sentence(found, device))
    return sentences


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


def _sentence(found: Latent, device: Device) -> str:
    s = found.shape
    return (
        f"{module_path(found.match.out) or found.match.out.name}: {s.L} x {s.S} latent attention is computed over its "
        f"latents of {s.rank} channels, not over the keys and values of {s.H} heads: fewer bytes and FLOP on "
        f"{device.name} at these lengths."
    )


def absorb(graph: fx.Graph, found: Latent) -> None:
    """Write the region of `found` over its latents."""
    match, sdpa = found.match, found.match.written.startswith("sdpa")
    before = match.anchor if sdpa else match.products[0].node  # type: ignore[index]
    emit = Emitter(graph, match.out)
    batch = int(match.batch.value) if match.batch.is_const else tensor_of(match.out).shape[0]  # type: ignore[union-attr]
    with graph.inserting_before(before):
        query = match.query.emit(graph, batch, match.q_heads)
        factor = match.query.factor * match.key.factor
        held = found.latents.emit(graph, batch, match.q_heads)
        rows, columns, at = [], [], 0
        for width, shared in found.parts:
            part = emit(aten.narrow.default, query, -1, at, width)
            if shared is None:
                part = emit(aten.einsum.default, "bhld,hdc->bhlc", [part, _per_head(emit, found.key, match.q_heads)])
            rows.append(part)
            columns.append(held if shared is None else shared.emit(graph, batch, match.q_heads))
            at += width
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

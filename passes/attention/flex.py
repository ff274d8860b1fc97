"""Attention that is already written with FlexAttention: its score and mask functions as facts.

Such a region is reported and left: it runs in time proportional to its visited blocks as it is.

Source: Dong et al. 2024, "Flex Attention", arXiv:2412.05496.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.flex_attention import flex_attention as FLEX
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from attnc.expr import FLOAT, SCORE, TRUE, B, Expr, H, I, J, load, scale
from attnc.passes.attention.rules import MaskedScore, label, split_mask
from attnc.passes.graph import GraphFacts, Unliftable, hint, integer, module_path, tensor_of
from attnc.passes.masks import Lift, kind_of
from attnc.passes.views import Index, Ranges
from attnc.predicate import rebuild, truth
from attnc.region import AS_WRITTEN, AttentionRegion, Choice
from attnc.rule_attention import AttentionRule, AttentionShape


def flex_regions(graph: fx.Graph) -> list[AttentionRegion]:
    """The FlexAttention calls of `graph` as regions."""
    return [_region(node) for node in graph.nodes if node.op == "call_function" and node.target is FLEX]


def _region(node: fx.Node) -> AttentionRegion:
    query, key, value, score_mod, block_mask, factor, _, score_buffers, mask_buffers = (*node.args, *[()] * 9)[:9]
    q, k, v = (tensor_of(x) for x in (query, key, value))
    assert q is not None and k is not None and v is not None
    owner = node.graph.owning_module
    slots: list[Any] = []
    score = _body(owner, score_mod, (SCORE, B, H, I, J), score_buffers, slots, q.dtype)
    keep = _body(owner, block_mask[-1], (B, H, I, J), mask_buffers, slots, q.dtype)
    scaled = scale(SCORE, float(factor)) if isinstance(factor, int | float) else SCORE
    score = SCORE if score is None else rebuild(score, lambda x: scaled if x == SCORE else None)
    joined = MaskedScore.join(score, TRUE if keep is None else truth(keep))
    split = split_mask(joined, Ranges(), (integer(q.shape[2]), integer(k.shape[2])), written="sdpa")
    masked = MaskedScore(score, TRUE, "none", "unknown") if isinstance(split, str) else split
    rule = AttentionRule(masked.score, masked.keep, masked.empty)
    batch, q_heads, rows, width = map(hint, q.shape)
    shape = AttentionShape(batch, q_heads, hint(k.shape[1]), rows, hint(k.shape[2]), width, hint(v.shape[3]))
    unknown = keep is None or isinstance(split, str)
    return AttentionRegion(
        module_path(node), node.name, rule, shape, str(q.dtype).removeprefix("torch."), q.device.type,
        mask="predicate" if unknown else label(rule.keep, rule.score), written="flex_attention",
        fill="none" if rule.keep == TRUE else "-inf",
        choice=Choice(AS_WRITTEN, "already written with FlexAttention, which skips masked blocks"),
    )


def _body(owner: Any, function: Any, arguments: tuple[Expr, ...], buffers: Any, slots: list[Any],
          dtype: torch.dtype) -> Expr | None:
    """What a score or mask function returns, as an expression; None where it does not lift."""
    gm = getattr(owner, str(function.target), None) if isinstance(function, fx.Node) else function
    if not isinstance(gm, fx.GraphModule):
        return None
    tables = [tensor_of(x) for x in buffers]
    if any(t is None for t in tables):
        return None
    with FakeTensorMode(allow_non_fake_inputs=True):
        scalars = [torch.empty((), dtype=dtype if a.kind == FLOAT else torch.int32) for a in arguments]
        fakes = [torch.empty([hint(s) for s in t.shape], dtype=t.dtype) for t in tables]  # type: ignore[union-attr]
        try:
            traced = make_fx(gm)(*scalars, *fakes)
        except (RuntimeError, TypeError):
            return None
    inputs = traced.graph.find_nodes(op="placeholder")
    known = dict(zip(inputs, arguments, strict=False))
    base = len(slots)
    slots.extend(buffers)

    def leaf(node: fx.Node, index: Index) -> Expr | None:
        if node in known:
            return known[node]
        if node in inputs:
            table = tensor_of(node)
            assert table is not None
            return load(base + inputs.index(node) - len(arguments), index, kind_of(table.dtype))
        return None

    (output,) = traced.graph.find_nodes(op="output")
    try:
        return Lift(GraphFacts(traced.graph), output, leaf).element(output.args[0], ())
    except Unliftable:
        return None

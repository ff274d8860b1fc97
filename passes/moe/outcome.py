"""One run of a router on random logits: what the experts are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attnc.passes.graph import hint, tensor_of
from attnc.passes.moe.products import contraction
from attnc.passes.moe.rows import is_single
from attnc.passes.moe.run import behind, inputs, run


@dataclass(frozen=True)
class Wanted:
    """What the experts are given, as nodes of the graph.

    ids:     expert of each (token, slot); None where weights name the experts by position.
    weights: factors of each (token, slot), or of each (token, class); their product counts.
    columns: factors by expert number where each expert has its own: tensors with the column that counts, None where
             they have one; and the rows they belong to, None for all tokens.
    rows:    of each expert, which weights name too: (token, expert, row). mask: what fills those rows.
    """

    ids: fx.Node | None
    weights: tuple[fx.Node, ...]
    columns: tuple[tuple[int, tuple[tuple[fx.Node, int | None], ...], fx.Node | None], ...] = ()
    rows: int = 1
    mask: fx.Node | None = None

    @property
    def factors(self) -> list[fx.Node]:
        """The tensors that weights are read from."""
        return [*self.weights, *(n for _, factors, _ in self.columns for n, _ in factors)]

    @property
    def targets(self) -> list[fx.Node]:
        """All of it, each once."""
        rows = [rows for _, _, rows in self.columns if rows is not None]
        own = [x for x in (self.ids, self.mask) if x is not None]
        return list(dict.fromkeys([*own, *self.factors, *rows]))


@dataclass(frozen=True)
class Outcome:
    """One run: logits (tokens, classes), chosen experts and weights (tokens, slots); vectors by node."""

    logits: Tensor
    ids: Tensor
    weights: Tensor
    vectors: dict[fx.Node, Tensor]


def size(value: Tensor) -> int:
    """Elements, by hint."""
    return math.prod(hint(s) for s in value.shape)


def shape(value: Tensor) -> list[int]:
    """Lengths, by hint."""
    return [hint(s) for s in value.shape]


def between(targets: Sequence[fx.Node]) -> list[fx.Node]:
    """What lies behind `targets` up to products, which are included."""
    needed: dict[fx.Node, None] = {}
    stack = list(targets)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed[node] = None
            if contraction(node) is None:
                stack += inputs(node)
    order = {n: k for k, n in enumerate(targets[0].graph.nodes)}
    return sorted(needed, key=lambda n: order[n])


def outcome(wanted: Wanted, cut: fx.Node, tokens: int, experts: int) -> Outcome | str:
    """The router run on random logits at `cut`, with random vectors; a sentence where it cannot be."""
    targets = wanted.targets
    generator = torch.Generator().manual_seed(1)
    given: dict[fx.Node, Tensor] = {}
    vectors: dict[fx.Node, Tensor] = {}
    for node in behind(targets, {cut}):
        value = tensor_of(node)
        if value is None or (node is not cut and node.op != "placeholder" and contraction(node) is None):
            continue
        if value.dtype == torch.bool:
            given[node] = torch.ones(shape(value), dtype=torch.bool)
        elif not value.is_floating_point():
            given[node] = torch.randint(0, experts, shape(value), generator=generator).to(value.dtype)
        elif node is cut:
            given[node] = torch.randn(shape(value), generator=generator) * 1.5
        elif is_single(node):  # a learned factor of all weights
            given[node] = torch.ones(shape(value))
        else:
            given[node] = vectors[node] = torch.randn(shape(value), generator=generator) * 0.3
    if cut not in given:
        return "the choice does not depend on the logits"
    values = run(targets, given)
    if isinstance(values, str):
        return values
    at = dict(zip(targets, values, strict=True))
    if wanted.mask is not None and not torch.equal(at[wanted.mask] != 0, at[wanted.weights[0]] != 0):
        return "rows are filled by another mask than they are combined with"
    ids, weights = _dense(wanted, at, tokens, experts) if wanted.ids is None else _sparse(wanted, at, tokens)
    return Outcome(given[cut].reshape(tokens, -1), ids, weights, vectors)


def _sparse(wanted: Wanted, at: dict[fx.Node, Any], tokens: int) -> tuple[Tensor, Tensor]:
    assert wanted.ids is not None
    ids = at[wanted.ids].reshape(tokens, -1).long()
    weights = torch.ones(ids.shape)
    for node in wanted.weights:
        weights = weights * at[node].reshape(tokens, -1).float()
    return ids, weights


def _dense(wanted: Wanted, at: dict[fx.Node, Any], tokens: int, experts: int) -> tuple[Tensor, Tensor]:
    """Weights by class as (ids, weights) of those that are not zero."""
    dense = torch.ones(tokens, experts)
    for node in wanted.weights:
        dense = dense * at[node].reshape(tokens, experts, wanted.rows).float().sum(-1)
    if wanted.columns:
        dense = torch.zeros(tokens, experts)
    for expert, factors, rows in wanted.columns:
        column = torch.ones(())
        for node, pick in factors:
            values = at[node].float()
            column = column * (values.reshape(-1) if pick is None else values.flatten(0, -2)[:, pick])
        if rows is None:
            dense[:, expert] += column.expand(tokens)
        else:
            where = at[rows].reshape(-1)
            dense[:, expert].index_add_(0, where, column.expand(len(where)))
    count = int((dense != 0).sum(-1).max().clamp_min(1))
    ids = dense.abs().topk(count, dim=-1).indices
    return ids, dense.gather(-1, ids)

"""Routing attention: clusters take their nearest queries and keys, attend inside, and a token averages its clusters.

    I_c = the `window` queries with the largest mu_c . q_i / |q_i|,   J_c = the same of the keys
    out_i = sum_{c: i in I_c} softmax_{j in J_c or memory of c, j <= i if causal}(scale q_i . k_j) v_j / (n_i + 1e-5)

with n_i the clusters that took query i; 0 for a query that none took. The mean over clusters is no softmax over one set
of keys, so this is a function and no form of dense attention. Which tokens a cluster takes depends on all of them, as
published. The choice has no gradient; the centroids learn by a moving average outside of this function.

Source: Roy et al. 2021, "Efficient Content-Based Sparse Attention with Routing Transformers", arXiv:2003.05997,
section 4.1 and algorithm 1; means over clusters as in lucidrains/routing-transformer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attnc.ops import ATTENTION

EPS = 1e-5  # beside the number of clusters, as in the code that the models were trained with


def routing(
    query: Tensor, key: Tensor, value: Tensor, centroids: Tensor, *, window: int,
    memory: tuple[Tensor, Tensor] | None = None, is_causal: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """The mean of the clusters' attentions, (B, H, L, Ev).

    Shapes: query (B, H, L, E), key (B, H, S, E), value (B, H, S, Ev), centroids (H, C, E). window: tokens of a cluster.
    memory: keys (H, C, M, E) and values (H, C, M, Ev) that stand before those of each cluster and are never masked.
    """
    (B, H, L, E), C = query.shape, centroids.shape[1]
    scale = E**-0.5 if scale is None else scale
    rows, columns = nearest(query, centroids, window), nearest(key, centroids, window)
    q = _taken(query, rows)
    k, v = _taken(key, columns), _taken(value, columns)
    place = columns
    if memory is not None:
        k, v = (
            torch.cat([m.unsqueeze(0).expand(B, -1, -1, -1, -1), x], 3) for m, x in zip(memory, (k, v), strict=True)
        )
        place = F.pad(columns, (memory[0].shape[2], 0), value=-1)
    keep = "keep=t0[b, h, j] <= t1[b, h, i]; " if is_causal else ""
    form = "dense" if query.device.type == "cpu" else "flash"
    q, k, v, place, of_rows = (x.flatten(1, 2) for x in (q, k, v, place, rows))
    part, _ = ATTENTION(q, k, v, [place, of_rows], [], f"{form} | score={scale!r} * s; {keep}empty=zero")
    at = rows.flatten(2).unsqueeze(-1)
    part = part.reshape(B, H, C * rows.shape[-1], -1)
    total = part.new_zeros(B, H, L, part.shape[-1]).scatter_add(2, at.expand_as(part), part)
    count = part.new_zeros(B, H, L, 1).scatter_add(2, at, part.new_ones(()).expand_as(at))
    return total / (count + EPS)


def nearest(x: Tensor, centroids: Tensor, window: int) -> Tensor:
    """The `window` vectors of each centroid, (B, H, C, window) int64, in the order of their positions."""
    with torch.no_grad():
        near = centroids.to(x.dtype) @ F.normalize(x, dim=-1).mT
        return near.topk(min(window, x.shape[2]), -1).indices.sort(-1).values


def _taken(x: Tensor, at: Tensor) -> Tensor:
    """(B, H, n, E) at (B, H, C, w) -> (B, H, C, w, E)."""
    flat = at.flatten(2).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, flat).unflatten(2, at.shape[2:])

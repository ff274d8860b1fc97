"""Prologues of softmax attention that solve a second triangular system over the tokens.

    values:  (D + A) y = v, A strictly lower triangular, then o = softmax(q . k) y
      delta:  A_tj = beta_t softmax_{j < t}(scale q_t . k_j), D = 1
      lucid:  A_tj = exp(k_t . k_j),                          D_t = exp(k_t . k_t)
    scores:  q_i . (R_i ... R_{j+1}) k_j, R_t = 1 - beta_t w_t w_t^T
             = q_i . k_j - [tril(Q W^T) (1 + stril(diag(beta) W W^T))^-1 diag(beta) stril(W K^T)]_ij

Both run in blocks of rows: O(T^2 d) time, O(block T) memory, differentiable. Shapes: query and key (B, H, T, E), value
(B, H, T, Ev), beta (B, H, T); one key head per query head.

Source: Xu et al. 2025, "DeltaFormer", arXiv:2505.19488, equation 5; LUCID, saisuryadv.com/blog/lucid.html; Yang et al.
2025, "PaTH attention", arXiv:2505.16381, section 3.
A layer written with them is recognised as attention behind its prologue, which stays as it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

BLOCK = 64


def solved_values(rows: Callable[[int, int], Tensor], value: Tensor, block: int = BLOCK) -> Tensor:
    """y with `lower y = value`, by blocks; rows(start, stop): rows of the lower triangle (B, H, stop - start, stop)."""
    solved: list[Tensor] = []
    for start in range(0, value.shape[2], block):
        stop = min(start + block, value.shape[2])
        lower, right = rows(start, stop), value[:, :, start:stop]
        if start:
            right = right - lower[..., :start] @ torch.cat(solved, 2)
        solved.append(torch.linalg.solve_triangular(lower[..., start:], right, upper=False))
    return torch.cat(solved, 2) if solved else value


def delta_values(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, scale: float, block: int = BLOCK
) -> Tensor:
    """Values freed of what attention to earlier tokens already reads: u_t = v_t - beta_t sum_{j<t} p_tj u_j."""

    def rows(start: int, stop: int) -> Tensor:
        at = torch.arange(stop, device=query.device)
        earlier = at < at[start:stop, None]
        scores = (query[:, :, start:stop] @ key[:, :, :stop].mT * scale).masked_fill(~earlier, -torch.inf)
        first = ~earlier.any(-1, keepdim=True)  # the first token has no earlier one
        weights = torch.where(first, 0.0, scores).softmax(-1) * earlier
        own = (at == at[start:stop, None]).to(weights.dtype)
        return beta[:, :, start:stop, None] * weights + own

    return solved_values(rows, value, block)


def lucid_values(key: Tensor, value: Tensor, block: int = BLOCK) -> Tensor:
    """Values preconditioned by the exponential kernel of `key`, which carries its norm and scale."""

    def rows(start: int, stop: int) -> Tensor:
        return torch.exp(key[:, :, start:stop] @ key[:, :, :stop].mT).tril(start)

    return solved_values(rows, value, block)


def reflected_scores(
    query: Tensor, key: Tensor, direction: Tensor, beta: Tensor, start: int = 0, stop: int | None = None,
    block: int = BLOCK,
) -> Tensor:
    """q_i . (R_i ... R_{j+1}) k_j of rows start to stop, (B, H, stop - start, stop); above the diagonal 0.

    Blocks of reflections are passed from the right to the left; each transforms the queries it leaves behind.
    """
    stop = query.shape[2] if stop is None else stop
    parts: list[Tensor] = []
    for low in range(start, stop, block):
        high = min(low + block, stop)
        moved = query[:, :, low:high]
        scores: list[Tensor] = []
        edges = [*range(0, low, block), low]
        for first, last in [(low, high), *reversed(list(pairwise(edges)))]:
            within = first == low
            w, k = direction[:, :, first:last], key[:, :, first:last]
            write = beta[:, :, first:last, None]
            system = torch.eye(last - first, dtype=w.dtype, device=w.device) + (write * (w @ w.mT)).tril(-1)
            seen = moved @ w.mT
            seen = seen.tril() if within else seen
            met = torch.linalg.solve_triangular(system.mT, seen.mT, upper=True, unitriangular=True).mT
            met = met * write.mT
            one = moved @ k.mT - met @ (w @ k.mT).tril(-1)
            scores.insert(0, one.tril() if within else one)
            moved = moved - met @ w
        missing = query.new_zeros(*query.shape[:2], high - low, stop - high)
        parts.append(torch.cat([*scores, missing], -1))
    return torch.cat(parts, 2)


def path_attention(
    query: Tensor, key: Tensor, value: Tensor, direction: Tensor, beta: Tensor, gate: Tensor | None, scale: float,
    block: int = BLOCK,
) -> Tensor:
    """Causal attention over reflected scores; gate (B, H, T): log forget gates, their sums scaled like the scores."""
    total = None if gate is None else gate.cumsum(-1)
    out = []
    for start in range(0, query.shape[2], block):
        stop = min(start + block, query.shape[2])
        scores = reflected_scores(query, key, direction, beta, start, stop, block)
        if total is not None:
            scores = scores + total[:, :, start:stop, None] - total[:, :, None, :stop]
        at = torch.arange(stop, device=query.device)
        scores = (scores * scale).masked_fill(at > at[start:stop, None], -torch.inf)
        out.append(scores.softmax(-1) @ value[:, :, :stop])
    return torch.cat(out, 2) if out else value

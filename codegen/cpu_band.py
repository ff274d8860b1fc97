"""Banded attention in plain ATen: every query block sees one window of keys, whatever the length, also a symbolic one.

    out_i = sum_j softmax_j(score_ij where keep_ij) v_j  over j in [m - behind, m + block_m + ahead),
    m the first row of i's block

Where the mask keeps only pairs whose distance i - j lies between two constants, the windows of all blocks are one
strided view of the padded keys, and one call attends them all; the number of blocks may be a symbol of the graph.

Source: Beltagy et al. 2020, "Longformer", arXiv:2004.05150, section 3.2 (overlapping chunks), for any banded mask.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from attnc.codegen.cpu_blocked import merged, value_at
from attnc.codegen.cpu_composed import composed
from attnc.codegen.cpu_flash import Part, flash
from attnc.codegen.cpu_scores import additive, constant_bias, factor_of, is_zero
from attnc.operands import Operands
from attnc.reading import as_tensor

ALIGNED = 16  # keys: rows of the windows' masks then begin on a cache line


def band(given: Operands, *, least: int, most: int, block_m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over windows that hold every pair with least <= i - j <= most; what the rule keeps must lie in there.

    Shapes: query (B, Hq, L, E), key (B, H, L, E), value (B, H, L, Ev) -> out (B, Hq, L, Ev), lse (B, Hq, L).
            B and L may be symbolic.
    Rows that keep no key give 0 and lse -inf (or the sink).
    """
    query, key, value, captured, _, rule = given
    B, _, L, _ = query.shape
    behind, ahead = outside(least, most)
    # Always a block that ends beyond L: a length that needs no padding would be a graph of its own.
    count = L // block_m + 1
    beyond = count * block_m - L

    starts = torch.arange(count, device=query.device)[:, None] * block_m
    # Rows beyond the end stand for the last one: they keep keys, and no gradient reaches them.
    rows = (starts + torch.arange(block_m, device=query.device)).clamp(max=L - 1)
    cols = starts + torch.arange(behind + block_m + ahead, device=query.device) - behind
    exist = ((cols >= 0) & (cols < L))[None, :, None, None, :]
    cols = cols.clamp(min=0).clamp(max=L - 1)

    padded = F.pad(query, (0, 0, 0, beyond)).unflatten(2, (count, block_m))
    q = padded.transpose(1, 2).flatten(0, 1)
    k, v = (_windows(t, behind, block_m, ahead + beyond, ahead) for t in (key, value))
    keep = as_tensor(value_at(given, rule.keep, rows, cols), query, 5) & exist
    sink = None if rule.sink is None else merged(value_at(given, rule.sink, rows, None), B, count)
    bias = constant_bias(rule, captured)
    if bias is None:

        def score(raw: torch.Tensor) -> torch.Tensor:
            return value_at(given, rule.score, rows, cols, raw.unflatten(0, (B, count))).flatten(0, 1)

        out, lse, _ = composed(q, k, v, score, merged(keep, B, count), sink=sink)
    else:
        added = None if is_zero(bias) else value_at(given, bias, rows, cols)
        part = Part(k, v, merged(additive(keep, added, query.dtype), B, count))
        out, lse = flash(q, [part], factor_of(rule), sink=sink, never_empty=rule.empty == "never")
    out = out.unflatten(0, (B, count)).transpose(1, 2).flatten(2, 3)
    lse = lse.unflatten(0, (B, count)).transpose(1, 2).flatten(2, 3)
    return out[:, :, :L], lse[:, :, :L]


def outside(least: int, most: int) -> tuple[int, int]:
    """How many keys before and behind its own rows a block sees."""
    behind = max(most, 0)
    return behind + -behind % ALIGNED, max(-least, 0)


def _windows(t: torch.Tensor, behind: int, block: int, beyond, ahead: int) -> torch.Tensor:
    """(B * blocks, H, behind + block + ahead, E): what each block of `block` rows sees of `t`, padded by zeros."""
    padded = F.pad(t, (0, 0, behind, beyond))
    seen = padded.unfold(2, behind + block + ahead, block)  # (B, H, blocks, E, window)
    return seen.permute(0, 2, 1, 4, 3).flatten(0, 1)

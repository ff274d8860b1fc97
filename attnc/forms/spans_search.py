"""Span search: each query scores one anchor key in every span, and attends to the spans of the best anchors.

    g_ic = q_i . k_a(c), a(c) the last key of span c;   I_i = the spans with the top_k largest g_ic, its own among them
    o_i = softmax_{j in I_i, kept}(score_ij) v_j

With spans of about sqrt(S) keys the search and the attention of a row each read O(sqrt(S)) keys, L S^(1/2) in all.

Superlinear attention as published reads anchors of a state that a recurrence sums up, lets spans differ in width and
overlap, and adds up softmaxes of single spans, weighted by the softmax of their scores, which trains the search. Here
the anchors are the attention's own keys, spans are cut side by side, and one softmax is taken over all chosen keys, so
that more spans lead to dense attention; the search has no gradient.

Source: Huang 2026, "Superlinear Multi-Step Attention", arXiv:2601.18401 (search in two steps); Lu et al. 2025, "MoBA",
arXiv:2502.13189, equations 5 to 8 (the own span is kept and counted).
Exact:  where top_k spans are all there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnc.codegen.selectors_blocks import wide
from attnc.forms.block_mixture import BlockMixture
from attnc.operands import Operands


@dataclass(frozen=True)
class SpansSearch(BlockMixture):
    """The knobs of block_mixture; block: keys of a span."""

    name: ClassVar[str] = "spans_search"

    def summaries(self, given: Operands) -> Tensor:
        """The last key of each span, (B, H, spans, E)."""
        key = given.key
        last = key[:, :, self.block - 1 :: self.block]
        spare = key.shape[2] % self.block > 0  # the last span is short
        return wide(torch.cat([last, key[:, :, -1:]], 2) if spare else last)

"""How much of an attention is kept: its probabilities on the pairs that a form keeps, of a sample of query rows.

    p_ij = softmax of the region's own scores over the keys that its mask keeps, without a sink
    recovered mass = mean_i sum_{j kept by the form} p_ij;   kept fraction = pairs kept by the form / pairs kept

Source: Lai et al. 2025, "FlexPrefill", arXiv:2502.20766, section 2 (recall of attention scores).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.forms.masked import scaled_rows
from attnc.operands import Operands
from attnc.reading import as_tensor, picked, read

ROWS = 64  # sampled at most, over the whole length
SCORES = 1 << 22  # in memory at most


class RowSample:
    """Evenly spaced query rows of an attention, the last among them, with the probabilities of their keys.

    As many rows as SCORES allow, at least one.
    """

    def __init__(self, given: Operands) -> None:
        B, Hq, L, _ = given.query.shape
        S, device = given.key.shape[2], given.query.device
        count = max(1, min(ROWS, L, SCORES // max(B * Hq * S, 1)))
        rows = torch.linspace(L - 1, 0, count, device=device).round().long().flip(0)
        self.axes = {**given.axes, "i": picked("i", rows.view(1, 1, -1, 1))}
        self.shape = (B, Hq, count, S)
        scaled = scaled_rows(given)
        grouped = scaled.query[:, :, rows].unflatten(1, (-1, given.group))
        raw = (grouped @ scaled.key.unsqueeze(2).mT).flatten(1, 2)
        score = self._read(scaled, scaled.rule.score, raw).expand(self.shape)
        self.keep = self._read(given, given.rule.keep).expand(self.shape)
        # A row without keys has no mass to recover, a score that is no number is no weight.
        self.weights = score.masked_fill(~self.keep, -torch.inf).softmax(-1).nan_to_num(0.0)

    def _read(self, given: Operands, e: object, score: Tensor | None = None) -> Tensor:
        found = read(e, self.axes, given.captured, given.sizes, score=score)  # type: ignore[arg-type]
        return as_tensor(found, given.query if score is None else score)

    def recovered(self, kept: Operands) -> tuple[float, float] | None:
        """(recovered mass, kept fraction) under the mask of `kept`; None where no sampled row has keys."""
        alive, pairs = float(self.weights.sum()), int(self.keep.sum())
        if not alive or not pairs:
            return None
        both = self._read(kept, kept.rule.keep).expand(self.shape) & self.keep
        return min(1.0, float((self.weights * both).sum()) / alive), int(both.sum()) / pairs

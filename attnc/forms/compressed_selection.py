"""Compressed selection: blocks of keys chosen by attention to their means, as in native sparse attention.

    p_ic = softmax_c(scale q_i . mean_{j in c} k_j) over the blocks that end at or before row i
    I_i = its own block, those of the first `sinks` and the last `window` keys, then the largest sum_{h in group} p_hic
    o_i = softmax_{j in I_i, kept}(score_ij) v_j

The heads of a key head choose together. With `length` and `stride` the means overlap: they are of `length` keys each,
`stride` apart, and a block has the p of those that overlap it, once for each stride of keys in common. A drop-in
rewrite: one softmax over what is chosen and the window, where the trained function adds three gated branches
(`attnc.mixers.native_sparse`).

Source: Yuan et al. 2025, "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention",
arXiv:2502.11089, equations 7 to 12.
Exact:  where top_k blocks are all there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnc.codegen.selectors import last_keys, positions_of
from attnc.codegen.selectors_blocks import compressed_shares
from attnc.cost_models.cost import Work
from attnc.forms.base import knob
from attnc.forms.selected import ScoredBlocks, scale_of
from attnc.operands import Operands
from attnc.region import ITEM_BYTES, AttentionRegion


@dataclass(frozen=True)
class CompressedSelection(ScoredBlocks):
    """block: keys of a block; top_k: blocks of a row, those that stay among them.

    sinks, window: keys whose blocks stay.
    length, stride: keys of a mean and from one to the next, which divides length and block; 0: the blocks themselves.
    """

    name: ClassVar[str] = "compressed_selection"
    block: int = knob(64, 32, 128, role="semantic", unit="keys")
    top_k: int = knob(16, 8, 32, role="semantic", unit="blocks")
    sinks: int = knob(1, 0, role="semantic", unit="keys")
    window: int = knob(512, 1, 65, role="semantic", unit="keys")
    length: int = knob(0, role="semantic", unit="keys")
    stride: int = knob(0, role="semantic", unit="keys")

    def unfit(self, region: AttentionRegion) -> str | None:
        length = self.length or self.block
        stride = self.stride or length
        if length % stride or self.block % stride:
            return (
                f"compressed_selection takes means of whole strides, found length {length}, stride {stride} and blocks "
                f"of {self.block} keys; use a stride that divides both."
            )
        return None

    def choice_heads(self, given: Operands) -> int:
        return given.key.shape[1]

    def choose(self, given: Operands) -> Tensor:
        last = last_keys(given)
        share = compressed_shares(
            given.query, given.key, last, self.block, self.length, self.stride, scale_of(given)
        )  # fmt: skip
        return self.best(share, positions_of(given, last), last, given)

    def choosing(self, region: AttentionRegion) -> Work:
        s, item = region.shape, ITEM_BYTES.get(region.dtype, 4)
        scores = float(s.B * s.Hq * s.L) * -(-s.S // (self.stride or self.length or self.block))
        return Work("composed", 2.0 * scores * s.E, 4.0 * scores, float(s.B * s.H * s.S * s.E * item) + 8 * scores, 16)

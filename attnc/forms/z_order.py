"""Z order: each query attends to the keys that lie next to it on a Z-order curve, to the last ones and the first.

    z(x): the place on the curve of x in `width` channels, a fixed random projection of it where it has more
    I_i = the top_k keys of the chunks that end at or before row i whose z are next to z(q_i), half of them below it,
          the last `window` keys and the first `sinks`;      o_i = softmax_{j in I_i, kept}(score_ij) v_j

Keys are sorted once; a row sees those of whole chunks before it, so that the rows of a chunk search one list. The
window should be as long as a chunk. ZETA as published trains queries and keys of three channels and weighs keys by a
Cauchy kernel, which is a rule of the score: `attnc.mixers.cauchy`.

Source: Zeng et al. 2025, "ZETA: Leveraging Z-order Curves for Efficient Top-k Attention", arXiv:2501.14577, section 3.
Exact:  where top_k keys are all there are, and the window is as long as a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnc.codegen.key_lists import NONE
from attnc.codegen.selectors import joined, last_keys, positions_of
from attnc.codegen.selectors_curve import codes, nearest_codes, thin
from attnc.cost_models.cost import Work
from attnc.forms.base import knob
from attnc.forms.token_lists import TokenLists
from attnc.operands import Operands
from attnc.region import ITEM_BYTES, AttentionRegion


@dataclass(frozen=True)
class ZOrder(TokenLists):
    """top_k: keys next to a query; chunk: keys that are searched from their last one on; width: channels of a place.

    window, sinks: last and first keys that stay; seed: of the projection.
    """

    name: ClassVar[str] = "z_order"
    top_k: int = knob(64, 32, 256, role="semantic", unit="keys")
    chunk: int = knob(64, 256, role="semantic", unit="keys")
    width: int = knob(3, 2, 4, role="semantic", unit="channels")
    window: int = knob(64, 256, role="semantic", unit="keys")
    sinks: int = knob(0, 4, role="semantic", unit="keys")
    seed: int = knob(0, role="semantic")

    def kept_blocks(self, S: int) -> int:
        return sum(torch.sym_min(n, S) for n in (self.top_k, self.window, self.sinks))

    def sharing(self, region: AttentionRegion) -> int:
        return 1

    def unfit(self, region: AttentionRegion) -> str | None:
        if self.width > 16:
            return f"z_order interleaves at most 16 channels, found width={self.width}; use 3."
        return None

    def choose(self, given: Operands) -> Tensor:
        S, device = given.key.shape[2], given.key.device
        last = last_keys(given)
        own = joined(positions_of(given, last), 1, "amax").amax((0, 1)).expand(given.query.shape[2])
        end = joined(last, 1, "amax").amax((0, 1)).expand(given.query.shape[2]) + 1
        end = torch.where(end >= S, S, end // self.chunk * self.chunk)
        query, key = (codes(thin(x, self.width, self.seed)) for x in given[:2])
        near = nearest_codes(query, key, end, min(self.top_k, S))
        first, window = (
            torch.arange(min(self.sinks, S), device=device),
            torch.arange(min(self.window, S), device=device),
        )
        recent = own.unsqueeze(-1) - window
        back = own.unsqueeze(-1) - near
        fresh = (near >= len(first)) & ((back >= len(window)) | (back < 0))
        recent = torch.where(recent >= len(first), recent, NONE)
        always = torch.cat([first.expand(len(own), -1), recent], -1).expand(*near.shape[:3], -1)
        return torch.cat([torch.where(fresh, near, NONE), always], -1)

    def choosing(self, region: AttentionRegion) -> Work:
        s, item = region.shape, ITEM_BYTES.get(region.dtype, 4)
        vectors = float(s.B * (s.Hq * s.L + s.H * s.S))
        moved = vectors * (s.E * item + 60 * 16) + 24.0 * s.B * s.Hq * s.L * self.top_k
        moved += 17.0 * s.B * s.H * s.S * -(-s.L // self.chunk)  # the sorted keys before each chunk
        return Work("composed", 2.0 * vectors * s.E * self.width, 0.0, moved, 64 + 8 * -(-s.L // self.chunk))

    def keeps_all(self, region: AttentionRegion) -> bool:
        S = region.shape.S
        return self.window >= S or (self.top_k >= S and self.window >= self.chunk)

"""Key importance: each query attends to the keys to which its scores add most, whatever the product with them is.

    I_i = the top_k keys with the largest b_ij among those that row i keeps,   score_ij = factor s_ij + b_ij

b is what the rule adds to the scores; in dynamic mask attention a number of the key alone, exp(A softplus(V W)), for
each key head: the heads of a key head choose together, by the largest of theirs.

Source: Shi et al. 2025, "Trainable Dynamic Mask Sparse Attention", arXiv:2508.02124, section 3.
Exact:  where top_k keys are all there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnc.codegen.selectors import joined, last_keys, positions_of
from attnc.codegen.selectors_tokens import at_pairs, best_keys, pieces
from attnc.cost_models.cost import Work
from attnc.expr import const
from attnc.expr_text import spell
from attnc.forms.base import knob
from attnc.forms.token_lists import TokenLists
from attnc.operands import Operands
from attnc.region import AttentionRegion


@dataclass(frozen=True)
class KeyImportance(TokenLists):
    """top_k: keys of a row, those that stay among them; sinks, window: first and last keys that stay, 0: none.

    share: whether each query head chooses, or those of a key head together.
    """

    name: ClassVar[str] = "key_importance"
    top_k: int = knob(2048, 64, 256, 512, 1024, role="semantic", unit="keys")
    sinks: int = knob(0, 4, role="semantic", unit="keys")
    window: int = knob(0, 64, role="semantic", unit="keys")
    share: str = knob("group", "head", role="semantic")

    def kept_blocks(self, S: int) -> int:
        return torch.sym_min(max(self.top_k, self.sinks + self.window), S)

    def choice_heads(self, given: Operands) -> int:
        return given.query.shape[1] if self.share == "head" else given.key.shape[1]

    def sharing(self, region: AttentionRegion) -> int:
        return region.shape.group if self.share == "group" else 1

    def unfit(self, region: AttentionRegion) -> str | None:
        if region.rule.bias is None:
            return (
                f"key_importance ranks keys by what is added to the product, found the scores "
                f"{spell(region.rule.score)}; use token_top_k."
            )
        return None

    def choose(self, given: Operands) -> Tensor:
        heads, S = self.choice_heads(given), given.key.shape[2]
        bias = const(0.0) if given.rule.bias is None else given.rule.bias  # nothing is added: the first keys
        B, Hq, L, _ = given.query.shape
        last = last_keys(given)
        own, found = joined(positions_of(given, last), heads, "amax"), []
        for first, end in pieces(L, B * Hq * S, given.query.device):
            keep = joined(at_pairs(given, given.rule.keep, first, end), heads, "any")
            score = joined(at_pairs(given, bias, first, end), heads, "amax").expand(B, heads, end - first, S)
            found.append(
                best_keys(
                    score, keep, self.kept_blocks(S), own=own[..., first:end], sinks=self.sinks, window=self.window
                )
            )
        return torch.cat(found, 2)

    def choosing(self, region: AttentionRegion) -> Work:
        s = region.shape
        scores = float(s.B * s.Hq * s.L) * s.S
        return Work("composed", 0.0, 4.0 * scores, 16 * scores, 12)

"""Head blocks: block mixture with blocks of another size in each head, as many keys in all of them.

    run r of key heads has blocks of b_r keys and takes budget / b_r of them;  g_ic = sum over a group of q_i . mean_c k
    o_i = softmax_{j in the best blocks, kept}(score_ij) v_j,   a row's own block among them

A head whose attention is scattered takes small blocks, one whose attention is contiguous large ones, which are cheaper
to rank; a calibration finds the table. Means are in the type of the keys: the paper's quantisation of them is left out.

Source: Liu et al. 2026, "AB-Sparse: Sparse Attention with Adaptive Block Size for Accurate and Efficient Long-Context
Inference", arXiv:2605.12110.
Exact:  where every head takes all of its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from attnc.codegen.key_lists import NONE, KeyLists, listed, of_rows, ragged
from attnc.cost_models.cost import Work
from attnc.expr import BOOL, B, H, I, J, const, floordiv, load
from attnc.forms.base import knob
from attnc.forms.block_mixture import BlockMixture
from attnc.forms.selected import CAUSAL, FEW, Selected, divided, marked
from attnc.operands import Operands
from attnc.predicate import conjunction, disjunction
from attnc.region import ITEM_BYTES, AttentionRegion


@dataclass(frozen=True)
class HeadBlocks(Selected):
    """sizes: keys of a block in runs of key heads, as "16:32:64", each entry serving as many; budget: keys of a row;
    sinks, window: keys whose blocks stay."""

    name: ClassVar[str] = "head_blocks"
    sizes: str = knob(
        "16:32", "16:64", "32:64", role="semantic", unit="keys of a block in runs of key heads",
        pattern=r"[1-9]\d{0,4}(:[1-9]\d{0,4}){0,127}",
    )  # fmt: skip
    budget: int = knob(1024, 256, 512, 2048, role="semantic", unit="keys")
    sinks: int = knob(0, 16, role="semantic", unit="keys")
    window: int = knob(1, 64, role="semantic", unit="keys")

    def unfit(self, region: AttentionRegion) -> str | None:
        count = len(self.sizes.split(":"))
        if region.shape.H % count == 0:
            return None
        return (
            f"head_blocks serves as many key heads by each entry, found {count} entries for {region.shape.H} key heads"
            "; use a divisor."
        )

    def mixtures(self) -> dict[BlockMixture, list[int]]:
        """The block mixture of each size and the runs that take it."""
        found: dict[BlockMixture, list[int]] = {}
        for run, text in enumerate(self.sizes.split(":")):
            size = int(text)
            top_k = max(1, self.budget // size)
            form = BlockMixture(block=size, top_k=top_k, sinks=self.sinks, window=self.window, share="group")
            found.setdefault(form, []).append(run)
        return found

    def _heads(self, runs: list[int], heads: int, device: torch.device) -> Tensor:
        """Which key heads are of these runs, (H, 1, 1)."""
        own = torch.arange(heads, device=device) * len(self.sizes.split(":")) // heads
        return (own.unsqueeze(-1) == torch.tensor(runs, device=device)).any(-1).view(-1, 1, 1)

    def chosen_shape(self, given: Operands) -> tuple[int, ...]:
        (B, _, L, _), (heads, S) = given.query.shape, given.key.shape[1:3]
        most = 0
        for form in self.mixtures():
            most = torch.sym_max(most, form.kept_blocks(S))
        return B, heads, L, most

    def choose(self, given: Operands) -> Tensor:
        """The blocks of each row in the numbers of its head."""
        heads, most = given.key.shape[1], self.chosen_shape(given)[-1]
        found = torch.full((), NONE, device=given.key.device)
        for form, runs in self.mixtures().items():
            one = form.choose(given)
            one = F.pad(one, (0, most - one.shape[-1]), value=NONE)
            found = torch.where(self._heads(runs, heads, one.device), one, found)
        return found

    def narrowed(self, chosen: Tensor, given: Operands) -> Operands:
        heads, S, captured, kept = *given.key.shape[1:3], [*given.captured], []
        head = H if given.group == 1 else floordiv(H, const(given.group))
        for form, own in self._parts(chosen, heads):
            kept.append(load(len(captured), (B, head, I, divided(J, form.block)), BOOL))
            captured.append(marked(own, -(-S // form.block)))
        rule = replace(given.rule, keep=conjunction(given.rule.keep, disjunction(*kept)))
        return given._replace(captured=captured, rule=rule)

    def _parts(self, chosen: Tensor, heads: int) -> list[tuple[BlockMixture, Tensor]]:
        """The choice of each size, NONE in heads of another."""
        return [
            (form, torch.where(self._heads(runs, heads, chosen.device), chosen, NONE))
            for form, runs in self.mixtures().items()
        ]

    def laid(self, chosen: Tensor, given: Operands) -> tuple[Operands, Sequence[KeyLists]]:
        B, Hq, L, _ = given.query.shape
        heads, S = given.key.shape[1:3]
        shape, found = (B, Hq, heads, L), []
        keeps = "causal" if given.rule.keep == CAUSAL and L == S else "rule"
        for form, own in self._parts(chosen, heads):
            if L < FEW:
                found += ragged(listed(own, shape, 1, form.block))
            else:
                found += of_rows(own, shape, -(-S // form.block), form.block, keeps)
        return given, found

    def pairs(self, region: AttentionRegion) -> float:
        s = region.shape
        return float(s.L) * min(s.S, max(self.budget, self.sinks + self.window))

    def choosing(self, region: AttentionRegion) -> Work:
        s, item, sizes = region.shape, ITEM_BYTES.get(region.dtype, 4), [f.block for f in self.mixtures()]
        scores = float(s.B * s.Hq * s.L) * sum(-(-s.S // size) for size in sizes)
        read = float(s.B * s.H * s.S * s.E * item) * len(sizes)
        return Work("composed", 2.0 * scores * s.E, 4.0 * scores, read, 12 * len(sizes))

    def keeps_all(self, region: AttentionRegion) -> bool:
        return all(form.keeps_all(region) for form in self.mixtures())

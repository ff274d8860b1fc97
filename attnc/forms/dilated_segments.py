"""Dilated attention of LongNet: segments of growing length and dilation, mixed by their softmax denominators.

    branch n keeps ij where  floor(p_i / w_n) = floor(j / w_n)  and  p_i mod r_n = j mod r_n = h mod r_n
    o_i = sum_n (l_n / sum l) softmax_n(score) v = softmax_j(score_ij + log(number of branches that keep ij)) v

A row that no branch holds gives 0; the first branch usually has dilation 1.

Source: Ding et al. 2023, "LongNet: Scaling Transformers to 1,000,000,000 Tokens", arXiv:2307.02486, section 3.2.
Exact:  where a single branch of dilation 1 reaches over all keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnc.expr import ONE, Expr, H, J, add, const, floordiv, maximum, mod, num, to_float, unary
from attnc.forms.base import knob
from attnc.forms.narrowed import Frame, Narrowed
from attnc.predicate import conjunction, disjunction, eq
from attnc.region import AttentionRegion


@dataclass(frozen=True)
class DilatedSegments(Narrowed):
    """segments: `length/dilation` of each branch, as "2048/1:4096/2"; the dilation divides the length."""

    name: ClassVar[str] = "dilated_segments"
    segments: str = knob(
        "512/1:1024/2:2048/4",
        "2048/1:4096/2:8192/4",
        "1024/1",
        role="semantic",
        unit="length/dilation of each branch",
        pattern=r"[1-9]\d{0,7}/[1-9]\d{0,3}(:[1-9]\d{0,7}/[1-9]\d{0,3}){0,7}",
    )

    @property
    def branches(self) -> list[tuple[int, int]]:
        """Length and dilation of each branch."""
        pairs = (part.split("/") for part in self.segments.split(":"))
        return [(int(length), int(rate)) for length, rate in pairs]

    @property
    def keeps_own(self) -> bool:
        return any(rate == 1 for _, rate in self.branches)

    def unfit(self, region: AttentionRegion, at: Frame) -> str | None:
        for length, rate in self.branches:
            if length % rate:
                return (
                    f"dilated_segments takes segments of whole steps, found {length}/{rate}; use a length that "
                    f"{rate} divides."
                )
        return None

    def _kept(self, at: Frame) -> list[Expr]:
        found = []
        for length, rate in self.branches:
            same = eq(floordiv(at.row, const(length)), floordiv(J, const(length)))
            step = const(rate)
            found.append(conjunction(same, *(eq(mod(x, step), mod(H, step)) for x in (at.row, J))))
        return found

    def pattern(self, at: Frame) -> Expr:
        return disjunction(*self._kept(at))

    def score(self, score: Expr, at: Frame) -> Expr:
        kept = self._kept(at)
        if len(kept) == 1:
            return score
        return add(score, unary("log", to_float(maximum(add(*map(num, kept)), ONE))))

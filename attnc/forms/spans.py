"""Spans: each head its own sinks and window, the window a part that grows with the length.

    keep_ij = j < sinks_h  or  |p_i - j| < window_h + floor(percent_h * keys / 100)

MoA's elastic windows, MInference's A-shapes by head and DuoAttention's split into full and streaming heads are tables
of this form; a calibration finds them.

Source: Fu et al. 2024, "MoA: Mixture of Sparse Attention", arXiv:2406.14909, section 4.1; Jiang et al. 2024,
"MInference 1.0", arXiv:2407.02490, section 3.2; Xiao et al. 2024, "DuoAttention", arXiv:2410.10819, section 2.
Exact:  where the spans of all heads reach over all keys.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from attnc.expr import TRUE, Expr, H, J, const, floordiv
from attnc.forms.base import knob
from attnc.forms.narrowed import Frame, Narrowed, within
from attnc.predicate import conjunction, disjunction, eq
from attnc.region import AttentionRegion

ENTRY = r"(all|\d{1,7}/[1-9]\d{0,7}(\+\d{1,2}%)?)"


@dataclass(frozen=True)
class Spans(Narrowed):
    """heads: sinks/window of runs of heads, as "4/1024:64/512+5%:all"; each entry serves as many query heads."""

    name: ClassVar[str] = "spans"
    heads: str = knob(
        "4/1024",
        "64/512+5%",
        "64/256+10%",
        "64/1024:all",
        role="semantic",
        unit="sinks/window of runs of heads",
        pattern=rf"{ENTRY}(:{ENTRY}){{0,127}}",
    )

    def unfit(self, region: AttentionRegion, at: Frame) -> str | None:
        count = len(self.heads.split(":"))
        if "%" in self.heads and not region.shape.has_lengths:
            s = region.shape
            return (
                "spans with a part of the keys in its windows takes lengths that are known at compile time, found "
                f"{s.text('L')} x {s.text('S')}; leave the percentage out, or use dynamic=False."
            )
        if at.heads % count == 0:
            return None
        return f"spans serves as many heads by each entry, found {count} entries for {at.heads} heads; use a divisor."

    def pattern(self, at: Frame) -> Expr:
        entries = self.heads.split(":")
        runs: dict[str, list[int]] = {}
        for run, entry in enumerate(entries):
            runs.setdefault(entry, []).append(run)
        each = const(at.heads // len(entries))
        kept = []
        for entry, places in runs.items():
            served = disjunction(*(eq(floordiv(H, each), const(run)) for run in places))
            kept.append(conjunction(TRUE if len(runs) == 1 else served, _span(entry, at)))
        return disjunction(*kept)


def _span(entry: str, at: Frame) -> Expr:
    if entry == "all":
        return TRUE
    sinks, window, percent = (int(text) for text in re.findall(r"\d+", f"{entry}+0")[:3])
    return disjunction(within(J, sinks), at.near(window + percent * at.keys // 100 - 1))

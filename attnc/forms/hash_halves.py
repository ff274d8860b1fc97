"""Hash halves: causal attention by halving; the later half finds keys of the earlier half by a hash, and a sample.

    segments of least, 2 least, 4 least, .. tokens;   a pair i >= j is one of the smallest segment that holds both
    within `least` tokens             n_ij = 1
    i in the later, j in the earlier half of a segment:
        n_ij = 1                      in one chunk of both halves, each sorted by (h, position)
        n_ij = half / samples         j in no chunk of i, but in the sample of its half
    o_i = sum_j n_ij exp(score_ij) v_j / sum_j n_ij exp(score_ij),   h: signs of x R in Gray order

Segments begin at multiples of their length, so that halves are equal where the number of tokens is a power of two times
`least`; elsewhere the rows of a short later half are spread over all chunks of the earlier one. The first `sinks` keys
and the last `window` count once, whatever else brings them. Ranks of rows depend on later rows of their half, as
published.

Source: Han et al. 2023, "HyperAttention: Long-context Attention in Near-Linear Time", arXiv:2310.05869, algorithms 1, 3
and 4 (causal masking).
Exact:  where `least`, the window, or the sample holds every key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from attnc.codegen.key_lists import NONE, KeyLists, of_tiles
from attnc.codegen.selectors_groups import group_lists
from attnc.codegen.selectors_hash import buckets_of, halves_of, logs_of_counts, sampled_columns
from attnc.codegen.selectors_near import blocks_between
from attnc.cost_models.cost import Work
from attnc.expr import BOOL, FLOAT, INT, B, Expr, H, I, J, add, const, load, sub
from attnc.expr_text import spell
from attnc.forms.base import knob
from attnc.forms.selected import Selected, divided
from attnc.operands import Operands
from attnc.predicate import conjunction, disjunction, distances, eq, le, lt, where
from attnc.region import ITEM_BYTES, AttentionRegion

NEAR = 16  # keys of a block of the segment of `least` tokens


@dataclass(frozen=True)
class HashHalves(Selected):
    """least: tokens attended as written; chunk: rows and keys of a chunk; buckets: of the hash; seed: of R and samples.

    samples: keys of a half that stand for those in no chunk of a row; sinks, window: keys that stay.
    """

    name: ClassVar[str] = "hash_halves"
    phases: ClassVar[tuple[str, ...]] = ("prefill", "training")
    least: int = knob(2048, 1024, 4096, role="semantic", unit="tokens")
    chunk: int = knob(256, 128, role="semantic", unit="keys")
    samples: int = knob(256, 128, 512, role="semantic", unit="keys")
    buckets: int = knob(256, role="semantic")
    sinks: int = knob(0, 4, role="semantic", unit="keys")
    window: int = knob(1, 256, role="semantic", unit="keys")
    seed: int = knob(0, role="semantic")

    def unfit(self, region: AttentionRegion) -> str | None:
        s, keep = region.shape, region.rule.keep
        if not s.has_lengths or s.L != s.S:
            return (
                f"hash_halves halves as many rows as keys, their number known at compile time, found {s.text('L')} x "
                f"{s.text('S')}; use token_top_k."
            )
        if distances(keep)[0] != 0:
            return f"hash_halves halves a causal mask, found {spell(keep)}; use hash_buckets."
        if self.buckets < 2 or self.buckets & (self.buckets - 1):
            return f"hash_halves takes a power of two of buckets, found {self.buckets}; use 256."
        return None

    def halves(self, S: int) -> list[int]:
        """Tokens of a half at each level, the smallest first."""
        return [self.least << n for n in range(max(0, (-(-S // self.least) - 1).bit_length()))]

    def chosen_shape(self, given: Operands) -> tuple[int, ...]:
        (B, Hq, L, _), S = given.query.shape, given.key.shape[2]
        return B, Hq, len(self.halves(S)), L + S

    def choose(self, given: Operands) -> Tensor:
        """Chunks of all rows, then of all keys, at each level."""
        query, key = (buckets_of(x, "bits", self.buckets, 1, self.seed).squeeze(2) for x in given[:2])
        found = []
        for half in self.halves(key.shape[-1]):
            rows, _ = halves_of(query, self.buckets, half, self.chunk)
            _, keys = halves_of(key, self.buckets, half, self.chunk)
            found.append(torch.cat([rows, keys.repeat_interleave(given.group, 1)], -1))
        return torch.stack(found, 2) if found else query.new_empty(self.chosen_shape(given))

    def narrowed(self, chosen: Tensor, given: Operands) -> Operands:
        return self._ruled(chosen, given, held=False)

    def _ruled(self, chosen: Tensor, given: Operands, *, held: bool) -> Operands:
        """The choice as mask and weights; held: weights are less what `laid` holds a pair for."""
        S, slot, device = given.key.shape[2], len(given.captured), chosen.device
        halves = self.halves(S)
        rows, keys = chosen.split([chosen.shape[-1] - S, S], -1)
        level = add(*(where(eq(divided(I, h), divided(J, h)), const(0), const(1)) for h in halves))
        found = [
            eq(load(slot, (B, H, const(n), I), INT), load(slot + 1, (B, H, const(n), J), INT))
            for n in range(len(halves))
        ]
        apart, first = sub(I, J), lt(J, const(self.sinks))
        leaf = eq(divided(I, self.least), divided(J, self.least))
        near = conjunction(le(const(0), apart), lt(apart, const(self.window)))
        single = load(slot + 2, (level, J), BOOL)
        logs = torch.tensor([0.0, *(math.log(h / min(self.samples, h)) for h in halves)], dtype=torch.float64)
        counts = logs_of_counts(len(halves) + 3, given.key)
        captured = [*given.captured, rows, keys, self._samples(S, device), logs.to(counts), counts]
        once = disjunction(leaf, near, first, *found)
        weight: Expr = load(slot + 3, (where(once, const(0), level),), FLOAT)
        if held:
            low, high = self._near(given.query.shape[2], device)
            tile, block = divided(I, self._tile(S)), divided(J, NEAR)
            beside = conjunction(le(load(slot + 5, (tile,), INT), block), le(block, load(slot + 6, (tile,), INT)))
            times = add(*(where(p, const(1), const(0)) for p in (*found, single, first, beside)))
            weight = sub(weight, load(slot + 4, (times,), FLOAT))
            captured += [low.clamp(min=0) // NEAR, high // NEAR]
        keep = conjunction(given.rule.keep, disjunction(once, single))
        rule = replace(given.rule, keep=keep, score=add(given.rule.score, weight))
        return given._replace(captured=captured, rule=rule)

    def _samples(self, S: int, device: torch.device) -> Tensor:
        """Whether a key is one of the sample of its half, (levels + 1, S), none at the first."""
        none = torch.zeros(S, dtype=torch.bool, device=device)
        each = [sampled_columns(h, self.samples, self.seed, device).repeat(-(-S // h))[:S] for h in self.halves(S)]
        return torch.stack([none, *each])

    def _tile(self, L: int) -> int:
        """Rows of a tile, none of them in two halves."""
        return min(math.gcd(self.least, 64), L)

    def _near(self, L: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """First and last key that lie in the smallest segment of each tile's rows, or near them."""
        first = torch.arange(0, L, self._tile(L), device=device)
        low = torch.minimum(first // self.least * self.least, first - self.window + 1)
        return low, (first + self._tile(L)).clamp(max=L) - 1

    def laid(self, chosen: Tensor, given: Operands) -> tuple[Operands, Sequence[KeyLists]]:
        (B, Hq, L, _), (heads, S), device = given.query.shape, given.key.shape[1:3], chosen.device
        shape, tile, position = (B, Hq, heads, L), self._tile(L), torch.arange(L, device=device).unsqueeze(0)
        rows, keys = chosen.split([L, S], -1)
        keys = keys[:, :: given.group]
        low, high = self._near(L, device)
        found = of_tiles(blocks_between(low, high, S, NEAR)[None, None], shape, tile, NEAR, "rule")
        samples, top = self._samples(S, device)[1:], torch.arange(0, L, tile, device=device)
        for n, half in enumerate(self.halves(S)):
            total = -(-L // (2 * half)) * -(-half // self.chunk)
            one, other = rows[:, :, n].unsqueeze(-1), keys[:, :, n].unsqueeze(-1)
            found += group_lists(one, other, position, shape, total, is_causal=False)
            within = samples[n, :half].nonzero().squeeze(-1)
            start = torch.where(top // half % 2 == 1, top // half * half - half, -S - 1)
            at = (start.unsqueeze(-1) + within).clamp(min=NONE)
            found += of_tiles(at[None, None], shape, tile, 1, "rule")
        if self.sinks:
            first = torch.arange(min(self.sinks, S), device=device)
            found += of_tiles(first.expand(1, 1, len(top), -1), shape, tile, 1, "rule")
        return self._ruled(chosen, given, held=True), found

    def pairs(self, region: AttentionRegion) -> float:
        s = region.shape
        each = self.least / 2 + len(self.halves(s.S)) / 2 * (self.chunk + self.samples) + self.sinks + self.window
        return float(s.L) * min(s.S, each)

    def choosing(self, region: AttentionRegion) -> Work:
        s, item = region.shape, ITEM_BYTES.get(region.dtype, 4)
        vectors, columns = float(s.B * (s.Hq * s.L + s.H * s.S)), math.log2(self.buckets)
        moved = vectors * (s.E * item + 8 * columns + 64 * len(self.halves(s.S)))
        return Work("composed", 2.0 * vectors * s.E * columns, 0.0, moved, 8 + 16 * len(self.halves(s.S)))

    def keeps_all(self, region: AttentionRegion) -> bool:
        return max(self.least, self.window, self.samples) >= region.shape.S

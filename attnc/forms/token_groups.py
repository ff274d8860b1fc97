"""Token groups: each token belongs to a few groups; a row attends to the keys that share one, and to those near it.

    I_i = {j : groups(i) and groups(j) have one in common}  and  {j : |i - j| < window}  and  the first `sinks` keys
    o_i = softmax_{j in I_i, kept}(score_ij) v_j

    by=key    groups(t): the top_k largest k_t . c_g, centroids (H, G, E) supplied by the user (`Options.weights`)
    by=given  groups(t): the top_k largest a_tg, group_scores (B, S, G) of the call, one set for all heads

A row is a token, so that its groups are those of its own key; it always attends to itself. In Focus the scores are
x C^T of hidden states, made even by Sinkhorn's steps while the centroids train: that is by=given. With by=key a group
depends on its token alone, and the result is causal.

Rows and keys of a group are brought together; what is held twice is counted once.

Source: Yao et al. 2026, "Why Attend to Everything? Focus is the Key", arXiv:2604.03260.
Exact:  where the window holds every key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from attnc.codegen.key_lists import KeyLists, listed, of_tiles
from attnc.codegen.selectors_groups import group_lists, key_groups, top_groups
from attnc.codegen.selectors_hash import logs_of_counts
from attnc.codegen.selectors_near import blocks_between, never_ahead, row_positions, tile_spans
from attnc.cost_models.cost import Work
from attnc.expr import FLOAT, INT, B, H, I, J, add, const, floordiv, load, sub
from attnc.forms.base import knob
from attnc.forms.selected import Selected, divided
from attnc.operands import Operands
from attnc.predicate import conjunction, disjunction, eq, le, lt, where
from attnc.region import ITEM_BYTES, AttentionRegion

TILE, NEAR = 64, 16  # rows of a tile near its keys, and keys of a block of those


@dataclass(frozen=True)
class TokenGroups(Selected):
    """top_k: groups of a token; window: keys from a row to the last one near it, its own counted, 0: none; sinks: first
    keys that stay."""

    name: ClassVar[str] = "token_groups"
    top_k: int = knob(2, 1, 4, role="semantic", unit="groups")
    window: int = knob(512, 0, 128, 2048, role="semantic", unit="keys")
    sinks: int = knob(0, 4, role="semantic", unit="keys")
    by: str = knob("key", "given", role="semantic")

    @property
    def tensor_name(self) -> str:
        return "centroids" if self.by == "key" else "group_scores"

    def tensors(self, width: int, weights: Mapping[str, Tensor]) -> list[Tensor]:
        return [weights[self.tensor_name]]

    def total(self, given: Operands) -> int:
        """All groups."""
        return given.captured[-1].shape[1 if self.by == "key" else 2]

    def unfit(self, region: AttentionRegion) -> str | None:
        s, name = region.shape, self.tensor_name
        if self.by == "given" and not s.has_lengths:
            return f"token_groups{{by=given}} takes scores of one length, found {s.text('S')} keys; use dynamic=False."
        found = tuple(dict(region.weights).get(name, ()))
        wanted, text = ((s.H, "G", s.E), "(H, G, E)") if self.by == "key" else ((s.B, s.S, "G"), "(B, S, G)")
        if len(found) == 3 and all(w in ("G", n) for w, n in zip(wanted, found, strict=True)):
            return None
        return (
            f"token_groups{{by={self.by}}} needs {name} {text} = ({', '.join(map(str, wanted))}), found "
            f"{found or 'none'} for {region.path or region.key!r}; pass it in options['weights']."
        )

    def chosen_shape(self, given: Operands) -> tuple[int, ...]:
        heads = given.key.shape[1] if self.by == "key" else 1
        return given.query.shape[0], heads, given.key.shape[2], min(self.top_k, self.total(given))

    def choose(self, given: Operands) -> Tensor:
        """The groups of each key."""
        if self.by == "key":
            return key_groups(given.key, given.captured[-1], self.top_k)
        return top_groups(given.captured[-1], self.top_k).unsqueeze(1)

    def narrowed(self, chosen: Tensor, given: Operands) -> Operands:
        return self._ruled(chosen, given, held=False)

    def _ruled(self, chosen: Tensor, given: Operands, *, held: bool) -> Operands:
        """The choice as a mask; held: weights are less how often `laid` holds a pair."""
        slot, position = len(given.captured), row_positions(given)
        head = const(0) if chosen.shape[1] == 1 else H if given.group == 1 else floordiv(H, const(given.group))
        row = load(slot, (B if position.shape[0] > 1 else const(0), I), INT)
        count = range(chosen.shape[-1])
        shared = [
            eq(load(slot + 1, (B, head, I, const(r)), INT), load(slot + 2, (B, head, J, const(n)), INT))
            for r in count
            for n in count
        ]
        apart, first = sub(row, J), lt(J, const(self.sinks))
        near = conjunction(lt(apart, const(self.window)), lt(sub(J, row), const(self.window)))
        keep = disjunction(near, first, *shared)
        captured = [*given.captured, position, _of_rows(chosen, position), chosen]
        rule = replace(given.rule, keep=conjunction(given.rule.keep, keep))
        if held:
            low, high = self._span(given, position)
            tile, block = divided(I, _tile(given)), divided(J, NEAR)
            beside = conjunction(le(load(slot + 3, (tile,), INT), block), le(block, load(slot + 4, (tile,), INT)))
            places = [*shared, first, *([beside] if self.window else [])]
            times = add(*(where(p, const(1), const(0)) for p in places))
            captured += [low.clamp(min=0) // NEAR, high // NEAR, logs_of_counts(len(places), given.key)]
            rule = replace(rule, score=sub(rule.score, load(slot + 5, (times,), FLOAT)))
        return given._replace(captured=captured, rule=rule)

    def _span(self, given: Operands, position: Tensor) -> tuple[Tensor, Tensor]:
        """First and last key near each tile of rows, (tiles,)."""
        low, high = tile_spans(position, _tile(given), given.key.shape[2])
        return low - self.window + 1, high + (0 if never_ahead(given) else self.window - 1)

    def laid(self, chosen: Tensor, given: Operands) -> tuple[Operands, Sequence[KeyLists]]:
        (B, Hq, L, _), heads, device = given.query.shape, given.key.shape[1], chosen.device
        shape, position, tile = (B, Hq, heads, L), row_positions(given), _tile(given)
        rows = _of_rows(chosen, position)
        found = group_lists(rows, chosen, position, shape, self.total(given), is_causal=never_ahead(given))
        if self.window:
            near = blocks_between(*self._span(given, position), given.key.shape[2], NEAR)
            found += of_tiles(near[None, None], shape, tile, NEAR, "rule")
        if self.sinks:
            first = torch.arange(min(self.sinks, given.key.shape[2]), device=device)
            found.append(listed(first.expand(1, 1, -(-L // tile), -1), shape, tile, 1))
        return self._ruled(chosen, given, held=True), found

    def pairs(self, region: AttentionRegion) -> float:
        s, groups = region.shape, dict(region.weights).get(self.tensor_name, (0, 1, 1))
        total = groups[1 if self.by == "key" else 2]
        return float(s.L) * min(s.S, self.window + self.sinks + self.top_k**2 * s.S / total)

    def choosing(self, region: AttentionRegion) -> Work:
        s, item = region.shape, ITEM_BYTES.get(region.dtype, 4)
        groups = dict(region.weights).get(self.tensor_name, (0, 1, 1))
        scores = float(s.B * s.S) * (s.H * groups[1] if self.by == "key" else groups[2])
        moved = float(s.B * s.H * s.S * s.E * item) + 24 * scores
        return Work("composed", 2.0 * scores * s.E if self.by == "key" else 0.0, 4.0 * scores, moved, 16)

    def keeps_all(self, region: AttentionRegion) -> bool:
        return self.window >= region.shape.S


def _tile(given: Operands) -> int:
    return min(TILE, given.query.shape[2])


def _of_rows(groups: Tensor, position: Tensor) -> Tensor:
    """The groups of the rows' own keys, (B, heads, L, n)."""
    B, heads, _, n = groups.shape
    at = position.expand(B, -1)[:, None, :, None].expand(B, heads, -1, n)
    return groups.gather(2, at)

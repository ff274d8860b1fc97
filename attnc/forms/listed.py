"""Listed keys: each row attends to the keys, or the blocks of keys, that a list of the model's own names.

    o_i = softmax_{j // c in t[b, h, i // m, :n], kept}(score_ij) v_j      c keys of a block, m rows with one list

The written model scatters such a list into a mask over all pairs: what an indexer chose (DeepSeek's sparse attention),
a gate (MoBA, NSA, MiniMax) or the importance of keys (Doge). Here the keys on the list are gathered, so that the work
is that of n * c keys a row. A number that stands twice on a list, or names no key, counts once, or not at all.

Source: DeepSeek-AI 2025, "DeepSeek-V3.2", arXiv:2512.02556, section 2 (attention to what the indexer lists); Lu et al.
2025, "MoBA", arXiv:2502.13189, algorithm 1.
Exact:  always, where the rule keeps the keys of one list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from attnc.codegen.key_lists import NONE, KeyLists
from attnc.cost_models.cost import Cost, Work
from attnc.cost_models.device import Device
from attnc.expr import BOOL, TRUE, Expr, H, I, J, load
from attnc.expr_text import spell
from attnc.forms.base import knob
from attnc.forms.masked import reference
from attnc.forms.selected import BlockSelected, marked
from attnc.forms.selected_lists import Layout
from attnc.forms.token_lists import TokenLists
from attnc.intervals import bounds
from attnc.operands import Operands
from attnc.predicate import conjunction, rebuild
from attnc.reading import picked, read
from attnc.region import AttentionRegion
from attnc.rule_attention import AttentionRule

SORTED = 64.0  # bytes moved for each number of a list, which is sorted


@dataclass(frozen=True)
class Listing:
    """The list of a rule: `count` numbers of captured tensor `slot` at `index`, of blocks of `width` keys, one for each
    `rows` query rows (0: one for all); rest: what the rule keeps besides."""

    slot: int
    index: tuple[Expr, ...]
    count: int
    width: int
    rows: int
    rest: Expr


def listing_of(rule: AttentionRule) -> Listing | str:
    """The one list that `rule` keeps keys of, or why there is none, as the end of a sentence."""
    parts = rule.keep.args if rule.keep.op == "and" else (rule.keep,)
    lists = [p for p in parts if p.op == "among"]
    if len(lists) != 1:
        many = f"{len(lists)} lists" if lists else "none"
        return f"found {many} in {'no mask' if rule.keep == TRUE else spell(rule.keep)}"
    wanted, numbers = lists[0].args
    slot, *index, count = numbers.args
    width, rows = _divisor(wanted, J), [_divisor(x, I) for x in index if "i" in x.names()]
    if width is None or len(rows) > 1 or None in rows:
        return f"found {spell(lists[0])}, which lists no keys, or no blocks of keys, for rows"
    if any(x.names() - {"b", "h", "i"} or x.has("load") or x.has("size") for x in index):
        return f"found the place {', '.join(map(spell, index))} of a list"
    rest = conjunction(*(p for p in parts if p is not lists[0]))
    return Listing(slot, tuple(index), int(count.value), width, rows[0] or 0 if rows else 0, rest)


def _divisor(e: Expr, coordinate: Expr) -> int | None:
    """c, where `e` is coordinate // c."""
    if e == coordinate:
        return 1
    whole = e.op == "floordiv" and e.args[0] == coordinate and e.args[1].is_const
    return int(e.args[1].value) if whole else None


def unlisted(given: Operands) -> Operands:
    """The same attention with each list as a table of the keys on it, as what reads no lists takes it."""
    captured = list(given.captured)
    lengths = zip("bhij", (*given.query.shape[:3], given.key.shape[2]), strict=True)
    box = {name: (0, length - 1) for name, length in lengths}

    def table(e: Expr) -> Expr | None:
        if e.op != "among":
            return None
        wanted, (slot, *index, count) = e.args[0], e.args[1].args
        most = bounds(wanted, box, given.sizes)
        assert most is not None, spell(e)
        captured.append(marked(given.captured[slot][..., : count.value], most[1] + 1))
        return load(len(captured) - 1, (*index, wanted), BOOL)

    keep, score = (rebuild(e, table) for e in (given.rule.keep, given.rule.score))
    if len(captured) == len(given.captured):
        return given
    return given._replace(captured=captured, rule=replace(given.rule, keep=keep, score=score))


@dataclass(frozen=True)
class Listed(TokenLists):
    """Attention to listed keys. block: keys of a block, rows: query rows with one list; 0: as the rule has it, which an
    operator is told beside the list, the last captured tensor, and a rule without it."""

    name: ClassVar[str] = "listed"
    approximates: ClassVar[bool] = False
    block: int = knob(0, unit="keys")
    rows: int = knob(0, unit="query rows")

    def spell(self) -> str:
        """One line; knobs that are not the rule's or the best only."""
        shown = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name}{{{','.join(shown)}}}" if shown else self.name

    @property
    def block_keys(self) -> int:
        return self.block

    @property
    def tile_rows(self) -> int:
        return self.rows or 1

    def concerns(self, region: AttentionRegion) -> bool:
        return region.rule.keep.has("among")

    def unfit(self, region: AttentionRegion) -> str | None:
        found = listing_of(region.rule)
        if not region.shape.has_lengths:
            s = region.shape
            return f"listed takes lengths of the compile, found {s.text('L')} x {s.text('S')}; use dynamic=False."
        if self.block or self.rows:
            return f"{self.spell()} is an operator's spelling, which says what the rule does; use listed."
        if isinstance(found, Listing):
            return None
        return f"listed gathers the keys of one list of the run that every row keeps, {found}; use dense."

    def is_exact(self, region: AttentionRegion) -> bool:
        return self.refuse(region) is None

    def keeps_all(self, region: AttentionRegion) -> bool:
        return True

    def kept_blocks(self, S: int) -> int:
        return S

    def cpu(self, given: Operands) -> tuple[Tensor, Tensor]:
        found, L = _found(given.rule), given.query.shape[2]
        bare = given._replace(
            captured=[*given.captured, lists(found, given)], rule=replace(given.rule, keep=found.rest)
        )
        return super(Listed, replace(self, block=found.width, rows=found.rows or L)).cpu(bare)

    def choose(self, given: Operands) -> Tensor:
        """The list with its numbers in order, NONE for what stands twice or is no block."""
        numbers, blocks = given.captured[-1].long(), -(-given.key.shape[2] // self.block)
        numbers = torch.where((numbers < 0) | (numbers >= blocks), NONE, numbers).sort(-1).values
        again = numbers[..., 1:] == numbers[..., :-1]
        return torch.cat([numbers[..., :1], numbers[..., 1:].masked_fill(again, NONE)], -1)

    def chosen_shape(self, given: Operands) -> tuple[int, ...]:
        return tuple(given.captured[-1].shape)

    def laid(self, chosen: Tensor, given: Operands) -> tuple[Operands, Sequence[KeyLists]]:
        return (TokenLists if self.block == self.rows == 1 else BlockSelected).laid(self, chosen, given)

    def kept(self, given: Operands) -> Operands:
        return unlisted(given)

    def reference(self, given: Operands) -> tuple[Tensor, Tensor]:
        return reference(unlisted(given.double()))

    def _layout(self, region: AttentionRegion) -> Layout:
        found, s = _found(region.rule), region.shape
        rows = found.rows or s.L
        return Layout.of((s.B, heads_of(found, s.Hq, s.H), -(-s.L // rows), found.count), rows, found.width, region)

    def pairs(self, region: AttentionRegion) -> float:
        found, s = _found(region.rule), region.shape
        return float(s.L) * min(s.S, found.count * found.width)

    def sharing(self, region: AttentionRegion) -> int:
        s = region.shape
        return s.group if heads_of(_found(region.rule), s.Hq, s.H) < s.Hq or s.Hq == s.H else 1

    def cost(self, region: AttentionRegion, device: Device) -> Cost:
        return (TokenLists if _is_single(region) else BlockSelected).cost(self, region, device)

    def gathered(self, region: AttentionRegion) -> float:
        return (TokenLists if _is_single(region) else BlockSelected).gathered(self, region)

    def choosing(self, region: AttentionRegion) -> Work:
        found, s = _found(region.rule), region.shape
        count = s.B * heads_of(found, s.Hq, s.H) * -(-s.L // (found.rows or s.L)) * found.count
        return Work("memory", bytes=SORTED * count, launches=6)


def _found(rule: AttentionRule) -> Listing:
    found = listing_of(rule)
    assert isinstance(found, Listing), found
    return found


def _is_single(region: AttentionRegion) -> bool:
    found = _found(region.rule)
    return found.width == found.rows == 1


def lists(found: Listing, given: Operands) -> Tensor:
    """The numbers of each list, (B, heads, lists of a head, count)."""
    numbers = given.captured[found.slot][..., : found.count]
    (B, Hq, L, _), heads, device = given.query.shape, heads_of(found, *(t.shape[1] for t in given[:2])), numbers.device
    tiles = -(-L // (found.rows or L))
    at = {
        "b": picked("b", torch.arange(B, device=device).view(B, 1, 1)),
        "h": picked("h", torch.arange(heads, device=device).view(heads, 1) * (Hq // heads)),
        "i": picked("i", torch.arange(tiles, device=device) * found.rows),
    }
    place = tuple(torch.as_tensor(read(x, at, (), ()), device=device) for x in found.index)
    return (numbers[place] if place else numbers).expand(B, heads, tiles, -1)


def heads_of(found: Listing, q_heads: int, k_heads: int) -> int:
    """Heads with lists of their own: all, those of keys, or one for all."""
    by_head = [x for x in found.index if "h" in x.names()]
    if not by_head:
        return 1
    return k_heads if all(_divisor(x, H) == q_heads // k_heads for x in by_head) else q_heads

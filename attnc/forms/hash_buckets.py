"""Hash buckets: rows and keys sorted by a hash and cut into chunks; a row attends to the keys of its chunk.

    h(x) = argmax [x R, -x R]   or signs of x R in Gray order;   rows and keys sorted by (h, position), `chunk` a chunk
    o_i = sum_j n_ij exp(score_ij) v_j / sum_j n_ij exp(score_ij)
    n_ij = how often j is in the chunk of i or in one of the `before` chunks ahead of it, over all rounds of hashing

Chunks of all rounds follow each other in a circle, as published. A key that no chunk brings counts S / samples where it
is one of `samples` keys drawn for all rows. The first `sinks` keys and the last `window` count once, whatever else
brings them.

The systems as settings: Reformer hash=rotation,before=1,window=0 with shared queries and keys, and a score that is
-1e5 for a row itself; HyperAttention without a mask hash=bits,buckets=256,chunk=256,before=0,samples=256,window=0 (its
recursion by halves for a causal mask is hash_halves: here the mask is applied to the pairs). hash=given takes buckets
(B, Hq, rounds, L) of the call. Ranks depend on all tokens, later ones among them, as published.

Source: Kitaev et al. 2020, "Reformer", arXiv:2001.04451, section 2; Han et al. 2023, "HyperAttention",
arXiv:2310.05869, algorithms 1 and 3.
Exact:  where a chunk, or the sample, holds every key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from attnc.codegen.key_lists import NONE, KeyLists, listed
from attnc.codegen.selectors_hash import buckets_of, logs_of_counts, ranks, sampled_columns
from attnc.cost_models.cost import Work
from attnc.errors import UsageError
from attnc.expr import BOOL, FLOAT, INT, ZERO, B, Expr, H, I, J, add, const, load, mod, sub
from attnc.forms.base import knob
from attnc.forms.selected import Selected, divided
from attnc.operands import Operands
from attnc.predicate import conjunction, disjunction, le, lt, where
from attnc.region import ITEM_BYTES, AttentionRegion

NEAR = 16  # keys of a block of the window


@dataclass(frozen=True)
class HashBuckets(Selected):
    """buckets: of a hash; chunk: rows and keys of a chunk; before: chunks ahead of it; rounds: of hashing; seed: of R.

    samples: keys that every row attends to for those that it does not; sinks, window: keys that stay.
    """

    name: ClassVar[str] = "hash_buckets"
    phases: ClassVar[tuple[str, ...]] = ("prefill", "training")
    hash: str = knob("rotation", "bits", "given", role="semantic")
    buckets: int = knob(64, role="semantic")
    chunk: int = knob(64, 256, role="semantic", unit="keys")
    before: int = knob(1, 0, role="semantic", unit="chunks")
    rounds: int = knob(1, 2, role="semantic")
    samples: int = knob(0, 256, role="semantic", unit="keys")
    sinks: int = knob(0, role="semantic", unit="keys")
    window: int = knob(1, 0, role="semantic", unit="keys")
    seed: int = knob(0, role="semantic")

    def tensors(self, width: int, weights: Mapping[str, Tensor]) -> list[Tensor]:
        return [weights["buckets"]] if self.hash == "given" else []

    def turns(self, S: int) -> int:
        """Rounds of hashing: one chunk needs no more than one."""
        return self.rounds if self.rounds > 1 and self.chunk < S else 1

    def chosen_shape(self, given: Operands) -> tuple[int, ...]:
        (B, Hq, L, _), S = given.query.shape, given.key.shape[2]
        return B, Hq, self.turns(S), L + S

    def choose(self, given: Operands) -> Tensor:
        """The places of all rows, then of all keys."""
        rounds = self.turns(given.key.shape[2])
        if self.hash == "given":
            place = ranks(self._given(given))
            return torch.cat([place, place], -1)
        query, key = (ranks(buckets_of(x, self.hash, self.buckets, rounds, self.seed)) for x in given[:2])
        return torch.cat([query, key.repeat_interleave(given.group, 1)], -1)

    def _given(self, given: Operands) -> Tensor:
        """The buckets of the call. Raises: UsageError where they are no numbers of these tokens."""
        (B, Hq, L, _), rounds = given.query.shape, self.turns(given.key.shape[2])
        found = given.captured[-1] if given.captured else None
        if found is not None and found.dim() == 4 and not found.is_floating_point():
            found = found[:, :, :rounds]
            if tuple(found.shape) == (B, Hq, rounds, L):
                return found
        seen = "none" if found is None else f"{found.dtype} of shape {tuple(found.shape)}"
        raise UsageError(
            f"hash_buckets{{hash=given,rounds={self.rounds}}}: buckets are {seen}, allowed are integers of shape "
            f"(B, Hq, rounds, L) = {(B, Hq, rounds, L)}. Pass them behind the captured tensors of the rule."
        )

    def narrowed(self, chosen: Tensor, given: Operands) -> Operands:
        return self._ruled(chosen, given, held=False)

    def _ruled(self, chosen: Tensor, given: Operands, *, held: bool) -> Operands:
        """The choice as mask and weights; held: weights are less what `laid` holds a pair for."""
        S, slot = given.key.shape[2], len(given.captured)
        chunks, rounds = -(-S // self.chunk), chosen.shape[2]
        turn = torch.arange(rounds, device=chosen.device).unsqueeze(-1) * chunks
        row, key = (x // self.chunk + turn for x in chosen.split([chosen.shape[-1] - S, S], -1))
        column = self._columns(S, chosen.device)
        places = [[load(slot + n, (B, H, const(r), at), INT) for r in range(rounds)] for n, at in ((0, I), (1, J))]
        apart = [mod(sub(one, other), const(rounds * chunks)) for one in places[0] for other in places[1]]
        found = [le(a, const(self.before)) for a in apart]
        count = add(*(where(f, const(1), const(0)) for f in found))
        logs = logs_of_counts(rounds * rounds + 2, given.key)

        def log(times: Expr) -> Expr:
            return load(slot + 3, (times,), FLOAT)

        first, near, single = lt(J, const(self.sinks)), self._near(), load(slot + 2, (J,), BOOL)
        keep = disjunction(near, *found, *([single] if bool(column.any()) else []))
        brought = math.log(S / min(self.samples, S)) if self.samples else 0.0
        weight = where(
            disjunction(near, first), const(0.0),
            where(disjunction(*found), log(count), const(brought)),
        ) if rounds > 1 or brought else const(0.0)  # fmt: skip
        if held and (self.window or rounds > 1):
            tile = sub(divided(I, NEAR), divided(J, NEAR))
            listed_near = where(conjunction(le(ZERO, tile), le(tile, const(self._reach()))), const(1), const(0))
            times = where(single, const(1), count) if bool(column.any()) else count
            weight = sub(weight, log(add(times, listed_near) if self.window else times))
        rule = replace(given.rule, keep=conjunction(given.rule.keep, keep), score=add(given.rule.score, weight))
        return given._replace(captured=[*given.captured, row, key, column, logs], rule=rule)

    def _near(self) -> Expr:
        apart = sub(I, J)
        return conjunction(le(ZERO, apart), lt(apart, const(self.window)))

    def _reach(self) -> int:
        """Blocks before a row's own that hold its window."""
        return -(-(self.window - 1) // NEAR)

    def _columns(self, S: int, device: torch.device) -> Tensor:
        """Keys that every row attends to."""
        return sampled_columns(S, self.samples, self.seed, device) | (torch.arange(S, device=device) < self.sinks)

    def laid(self, chosen: Tensor, given: Operands) -> tuple[Operands, Sequence[KeyLists]]:
        (B, Hq, L, _), (heads, S), device = given.query.shape, given.key.shape[1:3], chosen.device
        shape, column = (B, Hq, heads, L), self._columns(S, device)
        rows, keys = (_cut(x, self.chunk) for x in chosen.split([L, S], -1))
        flat = torch.where((keys < 0) | column[keys.clamp(min=0)], NONE, keys).flatten(2, 3)
        ahead = range(min(self.before + 1, flat.shape[2]))
        flat = torch.cat([flat.roll(n, 2) for n in ahead], -1).unflatten(2, keys.shape[2:4])
        head = torch.arange(B * Hq, device=device).view(B, Hq, 1, 1)
        place = (head * heads // Hq).expand(B, Hq, rows.shape[3], 1).flatten()
        found = [
            KeyLists(
                torch.where(rows[:, :, r] < 0, NONE, head * L + rows[:, :, r]).flatten(0, 2),
                flat[:, :, r].flatten(0, 2), place, 1,
            )
            for r in range(rows.shape[2])
        ]  # fmt: skip
        single = column.nonzero().squeeze(-1)
        if len(single):
            found.append(listed(single.expand(1, 1, -(-L // NEAR), -1), shape, NEAR, 1))
        if self.window:
            own = torch.arange(-(-L // NEAR), device=device).view(1, 1, -1, 1)
            before = own - torch.arange(self._reach() + 1, device=device)
            found.append(listed(before.clamp(min=NONE), shape, NEAR, NEAR))
        return self._ruled(chosen, given, held=True), found

    def unfit(self, region: AttentionRegion) -> str | None:
        s = region.shape
        if not s.is_square:
            return f"hash_buckets sorts as many rows as keys, found {s.text('L')} x {s.text('S')}; use token_top_k."
        if self.buckets < 2 or self.buckets & (self.buckets - 1):
            return f"hash_buckets takes a power of two of buckets, found {self.buckets}; use 64."
        if self.hash != "given":
            return None
        found = tuple(dict(region.weights).get("buckets", ()))
        if len(found) == 4 and found[2] >= self.rounds and (*found[:2], found[3]) == (s.B, s.Hq, s.L):
            return None
        return (
            f"hash_buckets{{hash=given}} needs buckets (B, Hq, rounds, L) = {(s.B, s.Hq, self.rounds, s.L)} of the "
            f"call, found {found or 'none'}; use hash=rotation."
        )

    def pairs(self, region: AttentionRegion) -> float:
        s = region.shape
        of_chunks = self.turns(s.S) * (self.before + 1) * self.chunk
        return float(s.L) * min(s.S * self.rounds, of_chunks + self.samples + self.sinks + self.window)

    def choosing(self, region: AttentionRegion) -> Work:
        s, item = region.shape, ITEM_BYTES.get(region.dtype, 4)
        vectors = float(s.B * (s.Hq * s.L + s.H * s.S)) * self.turns(s.S)
        columns = self.buckets / 2 if self.hash == "rotation" else math.log2(self.buckets)
        return Work("composed", 2.0 * vectors * s.E * columns, 0.0, vectors * (s.E * item + 8 * columns + 64), 16)

    def keeps_all(self, region: AttentionRegion) -> bool:
        return self.chunk >= region.shape.S or self.samples >= region.shape.S


def _cut(place: Tensor, chunk: int) -> Tensor:
    """Which element stands at each place, in chunks: (B, heads, rounds, n) -> (..., chunks, chunk), NONE behind all."""
    order = F.pad(place.argsort(-1), (0, -place.shape[-1] % chunk), value=NONE)
    return order.unflatten(-1, (-1, chunk))

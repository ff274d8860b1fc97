"""Masks of the narrowed family as loops over queries and keys, written from the papers and not from the forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

Keep = Callable[[int, int, int], float]  # head, position of the query, key -> how many branches keep the pair


@dataclass(frozen=True)
class Setting:
    """A spelling and its mask; whole: knobs that keep all of up to 200 keys; wider: more budget; only: "" or a rule.

    lengths: of queries and keys that the setting is for. by_head: whether heads differ.
    """

    spelling: str
    keep: Callable[[int, int, bool], Keep]  # keys, heads, causal
    whole: str = ""
    wider: str = ""
    only: str = ""
    lengths: tuple[int, ...] = (33, 70, 200)
    by_head: bool = False


def of(keep: Callable[[int, int], bool]) -> Callable[[int, int, bool], Keep]:
    return lambda n, heads, causal: lambda h, p, j: float(keep(p, j))


def bigbird(block: int, window: int, ends: int) -> Callable[[int, int, bool], Keep]:
    def made(n: int, heads: int, causal: bool) -> Keep:
        count = math.ceil(n / block)

        def keep(h: int, p: int, j: int) -> float:
            a, c = p // block, j // block
            return float(abs(a - c) <= window // 2 or min(a, c) < ends or (not causal and max(a, c) >= count - ends))

        return keep

    return made


def segments(*branches: tuple[int, int]) -> Callable[[int, int, bool], Keep]:
    def keep(h: int, p: int, j: int) -> float:
        return float(sum(p // w == j // w and p % r == h % r and j % r == h % r for w, r in branches))

    return lambda n, heads, causal: keep


def shifted(block: int) -> Callable[[int, int, bool], Keep]:
    def made(n: int, heads: int, causal: bool) -> Keep:
        count = math.ceil(n / block)
        return lambda h, p, j: float(j // block == (p // block + h) % count)

    return made


def neighborhood(grid, kernel, stride, dilation, causal) -> Callable[[int, int, bool], Keep]:
    """The members of a dilation group are listed, and the window is a slice of that list."""

    @cache
    def window(q: int, n: int, k: int, s: int, d: int, is_causal: bool) -> list[int]:
        members = [c for c in range(n) if c % d == q % d]
        at = members.index(q)
        if is_causal:
            leader = min(at // s * s + s - 1, len(members) - 1)
            return members[max(leader - k + 1, 0) : at + 1]
        leader = min(at // s * s + s // 2, len(members) - 1)
        first = min(max(leader - k // 2, 0), len(members) - k)
        return members[first : first + k]

    @cache
    def coordinates(p: int, sizes: tuple[int, ...]) -> list[int]:
        found = []
        for size in reversed(sizes):
            found.append(p % size)
            p //= size
        return found[::-1]

    def made(n: int, heads: int, is_causal: bool) -> Keep:
        sizes, flags = (grid or (n,)), (causal if grid else (is_causal,))

        def keep(h: int, p: int, j: int) -> float:
            own, other = coordinates(p, sizes), coordinates(j, sizes)
            every = zip(own, other, sizes, kernel, stride, dilation, flags, strict=True)
            return float(all(x in window(q, *one) for q, x, *one in every))

        return keep

    return made


def spans(*heads) -> Callable[[int, int, bool], Keep]:
    """heads: (sinks, window, percent) of runs of heads, None for all keys."""

    def made(n: int, count: int, causal: bool) -> Keep:
        def keep(h: int, p: int, j: int) -> float:
            entry = heads[h // (count // len(heads))]
            return float(entry is None or j < entry[0] or abs(p - j) < entry[1] + entry[2] * n // 100)

        return keep

    return made


SETTINGS = (
    Setting("sliding_window{window=16}", of(lambda p, j: abs(p - j) < 16), "sliding_window{window=200}",
            "sliding_window{window=24}"),
    Setting("sliding_window{window=5,dilation=3}", of(lambda p, j: abs(p - j) < 15 and (p - j) % 3 == 0),
            wider="sliding_window{window=9,dilation=3}"),
    Setting("sinks_window{sinks=4,window=20}", of(lambda p, j: j < 4 or abs(p - j) < 20),
            "sinks_window{sinks=100,window=200}", "sinks_window{sinks=7,window=20}"),
    Setting("strided{stride=9}", of(lambda p, j: abs(p - j) <= 9 or (p - j) % 9 == 0), "strided{stride=200}"),
    Setting("strided{stride=8,mode=fixed,columns=2}", of(lambda p, j: p // 8 == j // 8 or j % 8 >= 6),
            "strided{stride=200,mode=fixed}", "strided{stride=8,mode=fixed,columns=4}"),
    Setting("bigbird{block=8,random=0}", bigbird(8, 3, 1), "bigbird{block=64,window=9,random=0}",
            "bigbird{block=8,random=2}"),
    Setting("longformer{window=12,globals=3}", of(lambda p, j: abs(p - j) <= 6 or min(p, j) < 3),
            "longformer{window=400}", "longformer{window=16,globals=3}"),
    Setting("longformer{window=6,dilation=2,globals=0}",
            of(lambda p, j: abs(p - j) <= 6 and (p - j) % 2 == 0), wider="longformer{window=6,dilation=2,globals=2}"),
    Setting("dilated_segments{segments=16/1:32/2:64/4}", segments((16, 1), (32, 2), (64, 4)),
            "dilated_segments{segments=256/1}", "dilated_segments{segments=32/1:64/2:128/4}", by_head=True),
    Setting("axial{width=10,axis=row}", of(lambda p, j: p // 10 == j // 10), "axial{width=200,axis=row}",
            "axial{width=10,axis=cross}"),
    Setting("axial{width=10,axis=column}", of(lambda p, j: p % 10 == j % 10), "axial{width=1,axis=column}"),
    Setting("axial{width=10,axis=cross}", of(lambda p, j: p % 10 == j % 10 or p // 10 == j // 10)),
    Setting("block_local{block=16}", of(lambda p, j: p // 16 == j // 16), "block_local{block=200}",
            "block_local{block=16,back=1}"),
    Setting("block_local{block=8,back=1,globals=2}",
            of(lambda p, j: abs(p // 8 - j // 8) <= 1 or min(p, j) < 2), wider="block_local{block=8,back=2,globals=2}"),
    Setting("block_local{block=16,shift=head}", shifted(16), only="plain", by_head=True),
    Setting("neighborhood{kernel=7}", neighborhood((), (7,), (1,), (1,), ())),
    Setting("neighborhood{kernel=8,stride=3,dilation=2}", neighborhood((), (8,), (3,), (2,), ())),
    Setting("neighborhood{grid=12x10,kernel=5x3}", neighborhood((12, 10), (5, 3), (1, 1), (1, 1), (False, False)),
            "neighborhood{grid=12x10,kernel=12x10}", "neighborhood{grid=12x10,kernel=7x5}", lengths=(120,)),
    Setting("neighborhood{grid=3x5x7,kernel=2x3x3,stride=2x1x3,dilation=1x1x2,causal=1x0x0}",
            neighborhood((3, 5, 7), (2, 3, 3), (2, 1, 3), (1, 1, 2), (True, False, False)), lengths=(105,)),
    Setting("spans{heads=2/5:all:0/7+10%}", spans((2, 5, 0), None, (0, 7, 10)), "spans{heads=all}",
            "spans{heads=2/9:all:2/7+20%}", by_head=True),
    Setting("spans{heads=2/5}", spans((2, 5, 0)), wider="spans{heads=2/5+5%}"),
)  # fmt: skip


@cache
def counted(setting: Setting, n: int, heads: int, causal: bool) -> torch.Tensor:
    """How many branches keep each pair, (heads or 1, n, n); 0 for a pair that is not kept."""
    keep, places = setting.keep(n, heads, causal), range(n)
    own = range(heads) if setting.by_head else range(1)
    found = [[[0.0 if causal and j > p else keep(h, p, j) for j in places] for p in places] for h in own]
    return torch.tensor(found, dtype=torch.float64)

"""Many module paths as few patterns: `model.layers.{0-31}.self_attn x32`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise


def fold_paths(paths: Iterable[str]) -> list[str]:
    """Few patterns for many module paths: `layers.{0-31}.attn x32`; numbers fold from the last one to the first."""
    rows = [(path.split("."), count) for path, count in Counter(paths).items()]
    for at in reversed(range(max((len(parts) for parts, _ in rows), default=0))):
        alike: dict[tuple[tuple[str, ...], int], list[list[str]]] = {}
        for parts, count in rows:
            is_number = at < len(parts) and parts[at].isdigit()
            pattern = (*parts[:at], "#", *parts[at + 1 :]) if is_number else tuple(parts)
            alike.setdefault((pattern, count), []).append(parts)
        rows = []
        for (_, count), same in alike.items():
            if len(same) > 1:
                same[0][at] = _ranges(sorted(int(parts[at]) for parts in same))
            rows.append((same[0], count * len(same)))
    return [".".join(parts) + (f" x{count}" if count > 1 else "") for parts, count in rows]


def _ranges(numbers: list[int]) -> str:
    """`{0-4,6-10}` of sorted numbers; `{0-30/2}` where they are equally far apart."""
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) > 2 and len(steps) == 1 and steps != {1}:
        return f"{{{numbers[0]}-{numbers[-1]}/{steps.pop()}}}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs) + "}"

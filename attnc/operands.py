"""What an attention is of: its tensors, its run-time sizes and its rule, as one value that every form takes.

Shapes: query (B, Hq, L, E), key (B, H, S, E), value (B, H, S, Ev); query head h reads key head h // group. captured
holds what the rule looks up by slot, sizes its numbers of the run, which may be symbols of a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnc.expr import Expr
from attnc.reading import Axis, Value, as_tensor, read, span
from attnc.rule_attention import AttentionRule


def hint(size: Any) -> int:
    """A size as it was at compile time, without a guard."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else 1
    return int(size)


class Operands(NamedTuple):
    """The operands of one attention; `_replace` gives those of a changed one."""

    query: Tensor
    key: Tensor
    value: Tensor
    captured: Sequence[Tensor]
    sizes: Sequence[Any]
    rule: AttentionRule

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def axes(self) -> dict[str, Axis]:
        """The coordinates of all scores, laid out for (B, Hq, L, S)."""
        B, Hq, L, _ = self.query.shape
        lengths = {"b": B, "h": Hq, "i": L, "j": self.key.shape[2]}
        return {name: span(name, 0, length, self.query.device) for name, length in lengths.items()}

    def read(self, e: Expr, score: Tensor | None = None) -> Value:
        """`e` at every pair, broadcastable to (B, Hq, L, S); score: the raw product where `e` mentions `s`."""
        return read(e, self.axes, self.captured, self.sizes, score=score)

    def tensor(self, e: Expr, score: Tensor | None = None) -> Tensor:
        """`read`, a number as a tensor of the query's type, or of that of the scores."""
        return as_tensor(self.read(e, score), self.query if score is None else score)

    def double(self) -> Operands:
        """The same numbers in float64: the precision of references."""
        return self._mapped(lambda t: t.double() if t.is_floating_point() else t)

    def on(self, device: torch.device | str) -> Operands:
        """The same tensors on a device."""
        return self._mapped(lambda t: t if t.device == torch.device(device) else t.to(device))

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Operands:
        query, key, value = map(change, self[:3])
        return self._replace(query=query, key=key, value=value, captured=[change(t) for t in self.captured])

"""The reports of this process's latest compiles, found again by the parameters of the model that was compiled."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnc.report import Report

KEPT = 512  # frames whose latest report is kept


@dataclass(frozen=True)
class _Entry:
    inputs: tuple[weakref.ref, ...]
    report: Report


class Reports:
    """The latest report of each compiled frame, oldest first."""

    def __init__(self) -> None:
        self._frames: OrderedDict[int, _Entry] = OrderedDict()

    def add(self, frame: int, inputs: Sequence[Any], report: Report) -> None:
        parameters = tuple(weakref.ref(x) for x in inputs if isinstance(x, torch.nn.Parameter) or _is_buffer(x))
        self._frames.pop(frame, None)
        self._frames[frame] = _Entry(parameters, report)
        while len(self._frames) > KEPT:
            self._frames.popitem(last=False)

    def of(self, compiled: Any) -> Report | None:
        """The merged reports of all frames that read a parameter of `compiled`; else the latest one without any."""
        module = getattr(compiled, "_orig_mod", compiled)
        module = module if isinstance(module, torch.nn.Module) else getattr(module, "__self__", None)
        own = {id(t) for t in (*module.parameters(), *module.buffers())} if isinstance(module, torch.nn.Module) else set()
        mine = [e.report for e in self._frames.values() if own & {id(r()) for r in e.inputs if r() is not None}]
        if mine:
            return Report.merge(mine)
        loose = [e.report for e in self._frames.values() if not e.inputs]
        return loose[-1] if loose else None


def _is_buffer(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and not x.requires_grad and getattr(x, "_is_buffer", False)


REPORTS = Reports()

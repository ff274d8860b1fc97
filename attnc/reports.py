"""The reports of this process's latest compiles, found again by the compiled object whose call led to them.

A graph is compiled while the compiled object runs, so the Python stack at that moment says for whom. A recompile of a
frame replaces its report; frames between graph breaks stand side by side.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType, MethodType
from typing import Any

import torch
from torch._dynamo.symbolic_convert import InstructionTranslator

from attnc.report import Report

KEPT = 512  # frames whose latest report is kept

# The function of torch.compile through which a compiled object is called, and its variable for what was compiled.
_WRAPPER, _WRAPPED = ("torch._dynamo.eval_frame", "compile_wrapper"), "fn"


@dataclass(frozen=True)
class Place:
    """Where a graph comes from.

    code: of the frame, None outside of Dynamo. owners: modules that the frame holds. parameters: among the graph's
    inputs. calls: what was given to torch.compile and is running, innermost first.
    """

    code: CodeType | None
    owners: tuple[weakref.ref, ...]
    parameters: tuple[weakref.ref, ...]
    calls: tuple[weakref.ref, ...]

    @property
    def frame(self) -> tuple[object, ...]:
        """Equal for compiles of one frame of one object, whichever torch.compile they come from."""
        return (self.code, *(id(ref()) for ref in self.owners or self.parameters))

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for a compile of a frame and its recompiles."""
        return (self.frame, *(id(ref()) for ref in self.calls))

    def belongs_to(self, written: object) -> bool:
        """Whether the frame is one of `written`: a module or one of its parts, or a method of them."""
        module = written.__self__ if isinstance(written, MethodType) else written
        if not isinstance(module, torch.nn.Module):
            return False
        own = {id(x) for x in (*module.modules(), *module.parameters())}
        return any(id(x) in own for ref in (*self.owners, *self.parameters) if (x := ref()) is not None)


def place_of(inputs: Sequence[Any]) -> Place:
    """The place of the graph that Dynamo is compiling now."""
    parameters = tuple(weakref.ref(x) for x in inputs if isinstance(x, torch.nn.Parameter))
    calls = tuple(weakref.ref(fn) for fn in _running_calls())
    try:
        frame = InstructionTranslator.current_tx()
    except AttributeError:  # nothing was compiled yet in this thread
        frame = None
    if frame is None:  # called by hand, outside of Dynamo
        return Place(None, (), parameters, calls)
    owners = {id(x): weakref.ref(x) for x in frame.f_locals.values() if isinstance(x, torch.nn.Module)}
    return Place(frame.f_code, tuple(owners.values()), parameters, calls)


def _running_calls() -> Iterator[Any]:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) == _WRAPPER and _WRAPPED in frame.f_locals:
            yield frame.f_locals[_WRAPPED]
        frame = frame.f_back


class Reports:
    """The latest report of each compiled frame, oldest first."""

    def __init__(self) -> None:
        self._frames: dict[tuple[object, ...], tuple[Place, Report]] = {}

    def add(self, place: Place, report: Report) -> Report | None:
        """Keep `report`; returns the one it replaces."""
        before = self._frames.pop(place.key, None)
        self._frames[place.key] = (place, report)
        while len(self._frames) > KEPT:
            del self._frames[next(iter(self._frames))]
        return None if before is None else before[1]

    def of(self, compiled: Any) -> Report | None:
        """The merged reports of all frames compiled in calls of `compiled`.

        Dynamo reuses code that an equal torch.compile made before, also for another module of the same class; then the
        latest report of each frame of the module is taken, or those of the latest call that compiled its code.
        """
        called = _given(compiled)
        written = compiled._orig_mod if isinstance(compiled, torch._dynamo.OptimizedModule) else called
        for found in (self._of_call(called), self._of_frames(written), self._of_code(written)):
            if found:
                return Report.merge(found)
        return None

    def _of_call(self, called: object) -> list[Report]:
        return [report for place, report in self._frames.values() if any(ref() is called for ref in place.calls)]

    def _of_frames(self, written: object) -> list[Report]:
        mine = {place.frame: report for place, report in self._frames.values() if place.belongs_to(written)}
        return list(mine.values())

    def _of_code(self, written: object) -> list[Report]:
        forward = _given(written.forward) if isinstance(written, torch.nn.Module) else written
        code = getattr(forward, "__code__", None)
        calls = [place.calls for place, _ in self._frames.values() if place.code is code is not None]
        return [report for place, report in self._frames.values() if calls and place.calls == calls[-1]]


def _given(compiled: Any) -> Any:
    """What torch.compile wraps in `compiled`."""
    if isinstance(compiled, torch._dynamo.OptimizedModule):
        compiled = compiled.forward
    elif isinstance(compiled, torch.nn.Module):  # compiled in place by module.compile(), or not at all
        compiled = getattr(compiled, "_compiled_call_impl", None) or compiled
    return getattr(compiled, "_torchdynamo_orig_callable", compiled)


REPORTS = Reports()

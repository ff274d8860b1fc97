"""One hook: a library's reference function, what attnc's compiles trace in its place, and the proof that they agree.

A function is named by where it was defined, so instances, partials and other names that hold it are met as well, and
nothing of the library is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import FunctionType
from typing import Any

import torch
from torch.utils import _pytree as pytree

# How far a substitute may be from its original, relative to the largest value, by dtype.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Hook:
    """One row of the table.

    module:     pattern (fnmatch) of the names of modules that define the function.
    name:       its qualified name, as `torch_chunk_gated_delta_rule` or `Block.forward`; for methods a pattern too.
    substitute: what is traced instead; takes the same arguments, and is traced by Dynamo itself.
    sample:     small random arguments of the same kind as those of a call (fake tensors, constants, modules by name of
                the parameter), for original and substitute to be compared on; called once for each of the two, so it
                returns equal arguments for equal states of the generator.
    refuse:     why a call cannot be substituted, as one sentence; None if it can.
    home:       a module that is known to define it: if it is loaded and does not, the report says so.
    """

    module: str
    name: str
    substitute: Callable[..., Any]
    sample: Callable[[Arguments, torch.Generator], Arguments]
    refuse: Callable[[Arguments], str | None] = lambda arguments: None
    home: str = ""

    @property
    def last_name(self) -> str:
        return self.name.rpartition(".")[2]

    def names(self, module: str, qualified: str) -> bool:
        """Whether the function `qualified` of `module` is this row's."""
        return fnmatchcase(qualified, self.name) and fnmatchcase(module, self.module)

    def covers(self, function: FunctionType) -> bool:
        """Whether `function` is this row's."""
        return self.names(function.__module__ or "", function.__qualname__)

    def disagreement(self, original: Callable[..., Any], arguments: Arguments) -> str:
        """How original and substitute differ on small arguments like `arguments`; "" where they agree."""
        try:
            with _quiet():
                want, want_grads = _run(original, self.sample(arguments, _generator()))
                got, got_grads = _run(self.substitute, self.sample(arguments, _generator()))
                return _difference(want, got) or _difference(want_grads, got_grads, "gradient ")
        except Exception as exc:  # noqa: BLE001  # whatever the check raises, the original is traced and the reason is said
            return f"comparing them raised {type(exc).__name__}: {str(exc).partition(chr(10))[0]}"


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _quiet() -> ExitStack:
    """As in a plain eager call, whatever surrounds the trace."""
    stack = ExitStack()
    stack.enter_context(torch.utils._python_dispatch._disable_current_modes())
    stack.enter_context(torch._C.DisableTorchFunction())
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.enable_grad())
    stack.enter_context(torch.autocast("cpu", enabled=False))
    return stack


def _run(function: Callable[..., Any], arguments: Arguments) -> tuple[list[Any], list[Any]]:
    """Tensors that `function` returns and those it wrote to, and gradients of the floating inputs."""
    inputs = [x for x in pytree.tree_leaves(dict(arguments)) if isinstance(x, torch.Tensor)]
    learned, held = ([x for x in inputs if x.requires_grad is given] for given in (True, False))
    values = [x for x in pytree.tree_leaves(function(**arguments)) if isinstance(x, torch.Tensor)]
    loss = sum((x.double() * _weights(x)).sum() for x in values if x.requires_grad)
    grads = torch.autograd.grad(loss, learned, allow_unused=True) if isinstance(loss, torch.Tensor) and learned else ()
    return [*values, *held], list(grads)


def _weights(x: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, x.numel(), dtype=torch.float64).reshape(x.shape)


def _difference(want: list[Any], got: list[Any], what: str = "") -> str:
    if len(want) != len(got):
        return f"{len(got)} tensors for {len(want)}"
    for place, (a, b) in enumerate(zip(want, got, strict=True)):
        if a is None or b is None:  # no gradient counts as zero
            if any(x is not None and bool(x.any()) for x in (a, b)):
                return f"{what}{place} is there on one side only"
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{what}{place} is {b.dtype} {tuple(b.shape)}, against {a.dtype} {tuple(a.shape)}"
        a, b = a.detach(), b.detach()
        far = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        most = TOLERANCE.get(a.dtype, 0.0) * max(float(a.double().abs().max()) if a.numel() else 0.0, 1e-3)
        if not far <= most:
            return f"{what}{place} is {far:.1e} off, against {most:.1e} allowed"
    return ""

"""One hook: a library's reference function, what attnc's compiles trace in its place, and the proof that they agree.

A function is named by where it was defined, so instances, partials and other names that hold it are met as well, and
nothing of the library is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from inspect import signature
from types import FunctionType
from typing import Any

import torch
from torch.utils import _pytree as pytree

# How far a substitute may be from its original, relative to the largest value, by the coarsest dtype that goes in.
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
    by_name:    whether the substitute is called with the arguments it has, by name: the library changes their order.
    """

    module: str
    name: str
    substitute: Callable[..., Any]
    sample: Callable[[Arguments, torch.Generator], Arguments]
    refuse: Callable[[Arguments], str | None] = lambda arguments: None
    home: str = ""
    by_name: bool = False

    @property
    def last_name(self) -> str:
        return self.name.rpartition(".")[2]

    def names(self, module: str, qualified: str) -> bool:
        """Whether the function `qualified` of `module` is this row's."""
        return fnmatchcase(qualified, self.name) and fnmatchcase(module, self.module)

    def covers(self, function: FunctionType) -> bool:
        """Whether `function` is this row's."""
        return self.names(function.__module__ or "", function.__qualname__)

    def taken(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Those of a call's arguments that the substitute is called with."""
        if not self.by_name:
            return arguments
        names = signature(self.substitute).parameters
        return {name: x for name, x in arguments.items() if name in names}

    def disagreement(self, original: Callable[..., Any], arguments: Arguments) -> str:
        """How original and substitute differ on small arguments like `arguments`; "" where they agree."""
        try:
            with _quiet():
                return self._differs(original, arguments)
        except Exception as exc:  # noqa: BLE001  # whatever the check raises, the original is traced and the reason is said
            return f"comparing them raised {type(exc).__name__}: {str(exc).partition(chr(10))[0]}"

    def _differs(self, original: Callable[..., Any], arguments: Arguments) -> str:
        small = dict(self.sample(arguments, _generator()))
        allowed = max((TOLERANCE.get(x.dtype, 0.0) for x in _tensors(small)), default=0.0)
        want = _run(original, small)
        got = _run(self.substitute, self.taken(dict(self.sample(arguments, _generator()))))
        if allowed == TOLERANCE[torch.float32] or _unlike(want, got):
            return _unlike(want, got) or _far(want, got, allowed)
        # Narrow dtypes: at most half as far again from the function in float32 as the function itself is.
        exact = _run(original, _widened(dict(self.sample(arguments, _generator()))))
        return _far(exact, got, allowed, [1.5 * x for x in _distances(exact, want)])


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


def _run(function: Callable[..., Any], arguments: Arguments) -> list[torch.Tensor | None]:
    """Tensors that `function` returns and those it wrote to, and gradients of the floating inputs."""
    inputs = _tensors(dict(arguments))
    learned, held = ([x for x in inputs if x.requires_grad is given] for given in (True, False))
    values = _tensors(function(**arguments))
    loss = sum((x.double() * _weights(x)).sum() for x in values if x.requires_grad)
    grads = torch.autograd.grad(loss, learned, allow_unused=True) if isinstance(loss, torch.Tensor) and learned else ()
    return [*values, *held, *grads]


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _widened(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments in float32, modules among them."""

    def wide(x: torch.Tensor) -> torch.Tensor:
        return x.detach().float().requires_grad_(x.requires_grad) if x.is_floating_point() else x

    given = {name: x.float() if isinstance(x, torch.nn.Module) else x for name, x in arguments.items()}
    return pytree.tree_map_only(torch.Tensor, wide, given)


def _weights(x: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, x.numel(), dtype=torch.float64).reshape(x.shape)


Results = Sequence[torch.Tensor | None]


def _unlike(want: Results, got: Results) -> str:
    """How shapes and dtypes differ."""
    if len(want) != len(got):
        return f"{len(got)} tensors for {len(want)}"
    for place, (a, b) in enumerate(zip(want, got, strict=True)):
        if a is not None and b is not None and (a.shape != b.shape or a.dtype != b.dtype):
            return f"{place} is {b.dtype} {tuple(b.shape)}, against {a.dtype} {tuple(a.shape)}"
    return ""


def _distances(want: Results, got: Results) -> list[float]:
    """The largest distance of each two tensors; no gradient counts as zero."""
    both = [(a, b) if a is not None else (b, a) for a, b in zip(want, got, strict=True)]
    plain = [(a.detach().double(), 0.0 if b is None else b.detach().double()) for a, b in both if a is not None]
    return [float((a - b).abs().max()) if a.numel() else 0.0 for a, b in plain]


def _far(want: Results, got: Results, allowed: float, more: Sequence[float] = ()) -> str:
    """Which of the tensors are too far from each other."""
    given = [a if a is not None else b for a, b in zip(want, got, strict=True)]
    sizes = [float(x.detach().double().abs().max()) if x.numel() else 0.0 for x in given if x is not None]
    for place, (far, size) in enumerate(zip(_distances(want, got), sizes, strict=True)):
        most = allowed * max(size, 1e-3) + (more[place] if more else 0.0)
        if not far <= most:
            return f"{place} is {far:.1e} off, against {most:.1e} allowed"
    return ""

"""Run a module eagerly and through attnc, and compare all it leaves behind: outputs, gradients, buffers."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.gallery_entry import is_float
from tests.tolerance import assert_close

# Sums in the gallery have tens of terms; bfloat16 and float16 round each of a few steps.
TERMS = {torch.float64: 256, torch.float32: 256, torch.bfloat16: 1, torch.float16: 4}


@dataclass(frozen=True)
class Run:
    outputs: tuple
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


def run(model, args: tuple, backward: bool = False, named: nn.Module | None = None) -> Run:
    """One forward from seed 0, and a backward from fixed cotangents where asked.

    `named`: the module that holds the parameters, where `model` is a compiled wrapper of it.
    """
    named = named or model
    args = tuple(x.detach().clone().requires_grad_(backward and is_float(x)) for x in args)
    torch.manual_seed(0)
    with torch.set_grad_enabled(backward):
        outputs = model(*args)
    outputs = tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)
    gradients: dict[str, Tensor | None] = {}
    if backward:
        generator = torch.Generator().manual_seed(1)
        loss = sum((out * torch.randn(out.shape, generator=generator)).sum()
                   for out in outputs if is_float(out) and out.requires_grad)
        loss.backward()
        gradients = {f"input {at}": x.grad for at, x in enumerate(args) if is_float(x)}
        gradients |= {name: parameter.grad for name, parameter in named.named_parameters()}
    return Run(outputs, gradients, {name: b.clone() for name, b in named.named_buffers()})


class RoundedTo(TorchDispatchMode):
    """The coarsest floating type of any tensor that a run makes: what it rounds to, whatever its inputs are."""

    coarsest: torch.dtype | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x.dtype for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point()]
        known = [self.coarsest] if self.coarsest is not None else []
        self.coarsest = max((*known, *made), key=lambda d: torch.finfo(d).eps, default=None)
        return out


def attnc_compiled(model: nn.Module, **options):
    return torch.compile(model, backend="attnc", options={"inner": "aot_eager", **options})


def assert_same(got: Run, want: Run, dtype: torch.dtype | None = None) -> None:
    """Outputs, gradients and buffers agree; an absent gradient equals one of zeros."""
    assert len(got.outputs) == len(want.outputs)
    for at, (a, b) in enumerate(zip(got.outputs, want.outputs, strict=True)):
        assert a.dtype == b.dtype, f"output {at} is {a.dtype}, eager gives {b.dtype}"
        near(f"output {at}", a, b, dtype)
    assert got.gradients.keys() == want.gradients.keys()
    for name, b in want.gradients.items():
        a = got.gradients[name]
        if a is not None or b is not None:
            near(f"gradient of {name}", *(torch.zeros_like(b if a is None else a) if x is None else x
                                          for x in (a, b)), dtype)
    for name, b in want.buffers.items():
        near(f"buffer {name}", got.buffers[name], b, dtype)


def near(what: str, got: Tensor, want: Tensor, dtype: torch.dtype | None = None) -> None:
    if not want.is_floating_point():
        assert torch.equal(got, want), f"{what} differs"
        return
    coarser = dtype or max(got.dtype, want.dtype, key=lambda d: torch.finfo(d).eps)
    try:
        assert_close(got, want, coarser, terms=TERMS[coarser])
    except AssertionError as wrong:
        raise AssertionError(f"{what}: {wrong}") from None


def attention(report) -> list:
    return [region for region in report.regions if region.kind == "attention"]

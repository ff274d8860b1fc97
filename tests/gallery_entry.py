"""What one entry of the gallery is: a small module, its inputs, and the facts it must lift to.

Letters: B batch, H query heads, Hk key heads, L and S query and key length, E and Ev head widths.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Inputs = Callable[[], tuple]
NEG = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class AnyOf:
    """A fact that more than one name describes truly."""

    values: tuple

    def __contains__(self, value: object) -> bool:
        return value in self.values


@dataclass(frozen=True)
class Entry:
    """One spelling.

    `facts` holds for every attention region of the module; `regions` is their number, None when
    any number is right as long as the values are. `expect`: "lifted" (recognised and rewritten),
    "refused" (left as written, with a reason in the report), "values" (only the values count).
    `train`: gradients are compared. `training_mode`: run under .train() rather than .eval().
    """

    name: str
    build: Callable[[], tuple[nn.Module, tuple]]
    facts: Mapping[str, object] = field(default_factory=dict)
    regions: int | None = 1
    expect: str = "lifted"
    train: bool = False
    training_mode: bool = False

    def make(self, dtype: torch.dtype | None = None) -> tuple[nn.Module, tuple]:
        """The same module and inputs on every call; floats in `dtype` where one is given."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module, args = self.build()
        module.train(self.training_mode)
        if dtype is not None:
            module = module.to(dtype)
            args = tuple(a.to(dtype) if is_float(a) else a for a in args)
        return module, args


class Core(nn.Module):
    """A function of tensors as a module; `parameters` and `buffers` reach it by keyword."""

    def __init__(self, fn: Callable, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]):
        super().__init__()
        self.fn = fn
        self.names = (*parameters, *buffers)
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, *args: Tensor):
        return self.fn(*args, **{name: getattr(self, name) for name in self.names})


def is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def any_of(*values: object) -> AnyOf:
    return AnyOf(values)


def qkv(B=2, H=4, L=33, E=16, *, S=None, Ev=None, Hk=None, dtype=torch.float32) -> Inputs:
    """query (B, H, L, E), key (B, Hk, S, E), value (B, Hk, S, Ev)."""
    S, Ev, Hk = S or L, Ev or E, Hk or H

    def make():
        shapes = (B, H, L, E), (B, Hk, S, E), (B, Hk, S, Ev)
        return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)

    return make


def bshd(B=2, H=4, L=33, E=16, *, S=None, Ev=None, Hk=None) -> Inputs:
    """query (B, L, H, E), key (B, S, Hk, E), value (B, S, Hk, Ev)."""
    heads_first = qkv(B, H, L, E, S=S, Ev=Ev, Hk=Hk)
    return lambda: tuple(x.transpose(1, 2).contiguous() for x in heads_first())


def given(first: Inputs, *more: Callable[[], Tensor]) -> Inputs:
    """The inputs of `first`, then one tensor from each of `more`."""
    return lambda: (*first(), *(make() for make in more))


def tensors(*shapes: tuple) -> Inputs:
    return lambda: tuple(torch.randn(shape) for shape in shapes)


def spell(fn: Callable, facts: Mapping, inputs: Inputs | None = None, *, parameters=None, buffers=None,
          train=True, regions=1, expect="lifted", training_mode=False) -> Entry:
    """An entry from a function of tensors; `parameters` and `buffers` map names to makers."""
    inputs = inputs or qkv()

    def build():
        made = [{name: make() for name, make in (group or {}).items()} for group in (parameters, buffers)]
        return Core(fn, *made), inputs()

    name = fn.__name__.strip("_")
    return Entry(name, build, facts, regions, expect, train, training_mode)


def module(make: Callable[[], nn.Module], facts: Mapping, inputs: Inputs, name: str | None = None, *,
           train=True, regions=1, expect="lifted", training_mode=False) -> Entry:
    """An entry from a module class or maker."""

    def build():
        return make(), inputs()

    return Entry(name or make.__name__, build, facts, regions, expect, train, training_mode)


def ids(length: int) -> tuple[Tensor, Tensor]:
    """Query positions as a column, key positions as a row."""
    position = torch.arange(length)
    return position[:, None], position[None, :]

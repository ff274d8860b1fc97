"""Activation functions by name, and the name of a function given by its values.

The names are those of transformers' ACT2FN where it has one, the plainest where it has several: `gelu_new`,
`gelu_fast`, `gelu_pytorch_tanh` and `gelu_accurate` are one function, `gelu_tanh`; `swish` is `silu`. A function with a
parameter is named with its value, `leaky_relu(0.1)`.

Source: Hendrycks and Gimpel 2016, arXiv:1606.08415 (GELU); So et al. 2021, arXiv:2109.08668 (squared ReLU);
Ma et al. 2022, arXiv:2209.10655 (laplace); Huang and Schlag 2024, arXiv:2411.13010 (xIELU).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[[Tensor], Tensor]
Limits = tuple[float | None, float | None]

NO_LIMITS: Limits = (None, None)

# Two functions are one if they differ by no more than this at every sample: constants are written with 6 digits.
SAME = 2e-5


def samples(count: int) -> Tensor:
    """Where functions are compared: dense around 0, beyond every limit in use, never at a kink."""
    wide = torch.linspace(-13.37, 13.73, count - count // 3, dtype=torch.float64)
    return torch.cat([wide, torch.linspace(-1.931, 1.937, count // 3, dtype=torch.float64)]).sort().values


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _laplace(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


NAMED: dict[str, Function] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "mish": F.mish,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "laplace": _laplace,
    "elu": F.elu,
    "selu": F.selu,
    "softsign": F.softsign,
    "logsigmoid": F.logsigmoid,
    "tanhshrink": F.tanhshrink,
    "gelu(relu)": lambda x: F.gelu(F.relu(x)),
    "gelu_tanh(relu)": lambda x: F.gelu(F.relu(x), approximate="tanh"),
    "silu(relu)": lambda x: F.silu(F.relu(x)),
    "square": torch.square,
    "abs": torch.abs,
    "exp": torch.exp,
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
}


def _at(x: Tensor, y: Tensor, where: float) -> tuple[float, float]:
    nearest = int((x - where).abs().argmin())
    return float(x[nearest]), float(y[nearest])


def _slope_left(x: Tensor, y: Tensor) -> float:
    at, value = _at(x, y, -4.0)
    return value / at


def _swish_beta(x: Tensor, y: Tensor) -> float:
    at, value = _at(x, y, 1.0)
    part = value / at
    return math.log(part / (1 - part)) / at if 0 < part < 1 else math.nan


def _elu_alpha(x: Tensor, y: Tensor) -> float:
    at, value = _at(x, y, -4.0)
    return value / math.expm1(at)


def _softplus_beta(x: Tensor, y: Tensor) -> float:
    """From y(x) - y(-x) = x and y(0) = log 2 / beta; the curve is sampled beside 0, so two steps of Newton."""
    at, value = _at(x, y, 0.0)
    beta = math.log(2.0) / value if value > 0 else math.nan
    for _ in range(30):
        error = math.log1p(math.exp(beta * at)) / beta - value
        beta += error * beta * beta / math.log(2.0)
    return beta


# Functions of one parameter, and how its value is read off the curve.
FAMILIES: dict[str, tuple[Callable[[Tensor, float], Tensor], Callable[[Tensor, Tensor], float]]] = {
    "leaky_relu": (lambda x, a: F.leaky_relu(x, a), _slope_left),
    "silu": (lambda x, b: x * torch.sigmoid(b * x), _swish_beta),
    "elu": (lambda x, a: F.elu(x, a), _elu_alpha),
    "softplus": (lambda x, b: F.softplus(b * x, threshold=math.inf) / b, _softplus_beta),
}
LEARNED = {"leaky_relu": "prelu", "silu": "swish"}  # names of families whose parameter is learned


@dataclass(frozen=True)
class Fit:
    """`scale * clip(f(factor * clamp(x, *limits))) + offset` with f called `name`."""

    name: str
    scale: float = 1.0
    offset: float = 0.0
    factor: float = 1.0
    limits: Limits = NO_LIMITS
    clip: Limits = NO_LIMITS


@dataclass(frozen=True)
class Hints:
    """Numbers that a formula is written with: limits of its argument and of its value, factors of its argument.

    learned: whether it has parameters, so that their values name nothing.
    """

    limits: tuple[Limits, ...] = ()
    clips: tuple[Limits, ...] = ()
    factors: tuple[float, ...] = ()
    learned: bool = False


def fit(x: Tensor, y: Tensor, hints: Hints) -> Fit | None:
    """The plainest known function through the points (x, y), or None."""
    for factor in (1.0, *hints.factors):
        at = x * factor
        name = _named(at, y, hints.learned)
        if name is not None:
            return Fit(name, factor=factor)
        scaled = _scaled(at, y, factor, hints.learned)
        if scaled is not None:
            return scaled
        for name, function in NAMED.items():
            for limits in hints.limits:
                if _same(function(x.clamp(*limits) * factor), y):
                    return Fit(name, factor=factor, limits=limits)
            for clip in hints.clips:
                if _same(function(at).clamp(*clip), y):
                    return Fit(name, factor=factor, clip=clip)
    return None


def _named(x: Tensor, y: Tensor, learned: bool) -> str | None:
    for name, function in NAMED.items():
        if _same(function(x), y):
            return name
    for name, (family, estimate) in FAMILIES.items():
        value = estimate(x, y)
        if math.isfinite(value) and _same(family(x, value), y):
            return LEARNED.get(name, name) if learned else f"{name}({value:.6g})"
    return None


def _scaled(x: Tensor, y: Tensor, factor: float, affine: bool) -> Fit | None:
    """A known function times a number; plus a number too where that may be a parameter."""
    for name, function in NAMED.items():
        values = function(x)
        scale, offset = float((values * y).sum() / (values * values).sum()), 0.0
        if affine and not _same(values * scale, y):
            columns = torch.stack([values, torch.ones_like(values)], 1)
            scale, offset = torch.linalg.lstsq(columns, y[:, None]).solution[:, 0].tolist()
        if math.isfinite(scale) and scale != 0 and _same(values * scale + offset, y):
            return Fit(name, scale=rounded(scale), offset=rounded(offset), factor=factor)
    return None


def line(x: Tensor, y: Tensor, limits: Sequence[Limits] = ()) -> tuple[float, float, Limits] | None:
    """(slope, shift, limits) where y is `slope * (clamp(x, *limits) + shift)`, or None."""
    for ends in (NO_LIMITS, *limits):
        inner = x if ends == NO_LIMITS else x.clamp(*ends)
        columns = torch.stack([inner, torch.ones_like(inner)], 1)
        slope, offset = torch.linalg.lstsq(columns, y[:, None]).solution[:, 0].tolist()
        if slope != 0 and _same(slope * inner + offset, y):
            return rounded(slope), rounded(offset / slope), ends
    return None


def rounded(value: float) -> float:
    """To the digits that the samples tell."""
    return 0.0 if abs(value) < SAME else float(f"{value:.6g}")


def is_xielu(x: Tensor, y: Tensor, learned: Sequence[float]) -> bool:
    """Whether y is xIELU of x for some order of its parameters; beta and eps may be numbers, those of the paper."""
    given = {4: learned, 2: (*learned, 0.5, -1e-6)}.get(len(learned), ())
    for alpha_p, alpha_n, beta, eps in itertools.permutations(given, 4):
        positive, negative = math.log1p(math.exp(alpha_p)), beta + math.log1p(math.exp(alpha_n))
        below = (torch.expm1(x.clamp(max=eps)) - x) * negative + beta * x
        if _same(torch.where(x > 0, positive * x * x + beta * x, below), y):
            return True
    return False


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= SAME * (1 + b.abs())).all())

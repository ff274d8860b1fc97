"""What function a hidden unit is: its formula is evaluated at sample points and compared with the known activations.

So every spelling of one function has one name. A product of two projections is told by its rank: f(u, g) on a grid of
points is up(u) * act(g) exactly where that matrix has rank one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnc.passes.ffn.activations import NO_LIMITS, SAME, Fit, Hints, Limits, fit, is_xielu, line, rounded, samples
from attnc.passes.ffn.flow import FACTORS, QUOTIENTS
from attnc.passes.ffn.formula import Formula, Ref, Term, is_constant

POINTS, GRID = 199, 67
LONGEST_TEXT = 160
BOUNDED = frozenset(("clamp", "clip", "clamp_min", "clamp_max", "minimum", "maximum", "min", "max", "hardtanh"))
# Values of learned parameters while a function is named: any, but no two alike, and not those of a known function.
LEARNED = ((0.3713, 0.8317, 1.2149, 0.5923, 0.9371), (0.7411, 0.4567, 0.6173, 1.1311, 0.2903))


@dataclass(frozen=True)
class Unit:
    """A hidden unit: `scale * clip(up(u) * act(factor * g))`, see FFNRule.

    gate: which operand is g, None: not gated. learned: whether its scale is a parameter, and with offset 1 what is
    added to it too. linear: whether it is no activation at all.
    """

    activation: str
    gate: int | None = None
    up: str = "identity"
    shift: float = 0.0
    factor: float = 1.0
    scale: float = 1.0
    offset: float = 0.0
    up_limits: Limits = NO_LIMITS
    gate_limits: Limits = NO_LIMITS
    clip: Limits = NO_LIMITS
    learned: bool = False
    linear: bool = False
    text: str = ""


LINEAR = Unit("identity", linear=True)


def unit_of(formula: Formula) -> Unit:
    """The unit that `formula` computes; "custom", with its text, where the function is not known."""
    first = _named(formula, LEARNED[0])
    parameters = any(t.kind == "learned" for t in formula.terms)
    if first is not None and parameters:
        second = _named(formula, LEARNED[1])
        if second is not None and second != first:
            same = replace(second, scale=first.scale, offset=first.offset) == first
            first = replace(first, scale=1.0, offset=float(first.offset != 0), learned=True) if same else None
        elif second is None:
            first = None
    if first is None or (first.offset and not first.learned):
        return Unit("custom", text=text_of(formula))
    return first


# Evaluation.


def values_of(formula: Formula, operands: Sequence[Tensor], learned: Sequence[float], rows: bool = False) -> list[Any]:
    """The value of each term. rows: operands are matrices (tokens, hidden), and reductions are carried out; else norms
    pass their argument on, and what is reduced has no value."""
    parameters: dict[str, float] = {}
    values: list[Any] = []
    for position, term in enumerate(formula.terms):
        if term.kind == "operand":
            value = operands[int(term.name)]
        elif term.kind == "number":
            value = torch.tensor(term.args[0], dtype=None if isinstance(term.args[0], bool) else torch.float64)
        elif term.kind == "learned":
            name = term.name if term.name != "vector" else f"vector {position}"
            number = parameters.setdefault(name, learned[len(parameters) % len(learned)])
            value = torch.tensor(number, dtype=torch.float64)
        elif term.kind == "step":
            value = values[term.args[0].at]
        elif term.rowwise and not rows:
            value = None
        elif term.kind == "norm" and not rows:
            value = next(values[x.at] for x in term.args if isinstance(x, Ref) and not _is_rowwise(formula, x))
        else:
            value = _called(term, values)
        values.append(value)
    return values


def _is_rowwise(formula: Formula, ref: Ref) -> bool:
    term = formula.terms[ref.at]
    return term.rowwise or is_constant(term)


def _called(term: Term, values: list[Any]) -> Any:
    def given(x: Any) -> Any:
        if isinstance(x, Ref):
            return values[x.at]
        return [given(y) for y in x] if isinstance(x, list | tuple) else x

    result = term.target(*map(given, term.args), **{k: given(v) for k, v in term.kwargs})
    return result[int(term.name)] if isinstance(result, tuple | list) else result


def _samples(formula: Formula, count: int) -> tuple[Tensor, list[Tensor]]:
    x = samples(count)
    if len(formula.operands) == 1:
        return x, [x]
    return x, [x.repeat_interleave(count), x.repeat(count)]


# Names.


def _named(formula: Formula, learned: Sequence[float]) -> Unit | None:
    if len(formula.operands) > 2:
        return None
    x, operands = _samples(formula, POINTS if len(formula.operands) == 1 else GRID)
    try:
        y = values_of(formula, operands, learned)[-1]
    except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError):
        return None  # an operator that does not take samples: the function has no name
    if not isinstance(y, Tensor) or y.shape != operands[0].shape or not bool(torch.isfinite(y).all()):
        return None
    hints = _hints(formula)
    if len(formula.operands) == 1:
        return _plain(formula, x, y.double(), hints, learned)
    return _gated(x, y.double().view(len(x), len(x)), hints)


def _plain(formula: Formula, x: Tensor, y: Tensor, hints: Hints, learned: Sequence[float]) -> Unit | None:
    if line(x, y) is not None:
        return LINEAR
    found = fit(x, y, hints)
    if found is not None:
        return _unit(found)
    names = dict.fromkeys(t.name for t in formula.terms if t.kind == "learned")
    return Unit("xielu") if is_xielu(x, y, learned[: len(names)]) else None


def _unit(found: Fit, **more: Any) -> Unit:
    return Unit(found.name, factor=found.factor, scale=found.scale, offset=found.offset, gate_limits=found.limits,
                clip=found.clip, **more)


def _gated(x: Tensor, grid: Tensor, hints: Hints) -> Unit | None:
    """f(u, g) as up(u) * act(g), for either order of the operands."""
    peak = int(grid.abs().argmax())
    row, column = divmod(peak, len(x))
    first = grid[:, column]
    if grid[row, column] == 0:
        return LINEAR
    second = grid[row] / grid[row, column]
    if bool(((torch.outer(first, second) - grid).abs() > SAME * (1 + grid.abs())).any()):
        return LINEAR if _is_plane(x, grid) else None
    one, two = line(x, first, hints.limits), line(x, second, hints.limits)
    for gate, own, other in ((1, second, one), (0, first, two)):
        if other is None or line(x, own) is not None:
            continue
        slope, shift, limits = other
        found = fit(x, own * slope, hints)
        if found is not None:
            return _unit(found, gate=gate, shift=shift, up_limits=limits)
    if one is not None and two is not None:
        plain = two[1:] == (0.0, NO_LIMITS)
        scale = rounded(one[0] * two[0])
        return Unit("identity", gate=1, shift=one[1], up_limits=one[2], scale=scale) if plain else None
    return _two_nonlinear(x, first, second, hints)


def _two_nonlinear(x: Tensor, first: Tensor, second: Tensor, hints: Hints) -> Unit | None:
    """tanh(u) * sigmoid(g) and the like; of the two, a sigmoid is the gate."""
    fits = [fit(x, part, hints) for part in (first, second)]
    if fits[0] is None or fits[1] is None or any(f.factor != 1.0 or f.clip != NO_LIMITS or f.offset for f in fits if f):
        return None
    gate = 0 if fits[0].name == "sigmoid" and fits[1].name != "sigmoid" else 1
    up = fits[1 - gate]
    assert up is not None
    scale = rounded(fits[0].scale * fits[1].scale)
    return replace(_unit(fits[gate], gate=gate, up=up.name, up_limits=up.limits), scale=scale)  # type: ignore[arg-type]


def _is_plane(x: Tensor, grid: Tensor) -> bool:
    """Whether the grid is linear in both coordinates: no activation at all."""
    ones = torch.ones_like(grid)
    columns = torch.stack([ones, x[:, None] * ones, x[None] * ones], -1).reshape(-1, 3)
    solution = torch.linalg.lstsq(columns, grid.reshape(-1, 1)).solution
    return bool(((columns @ solution)[:, 0] - grid.reshape(-1)).abs().max() < SAME * (1 + grid.abs().max()))


def _hints(formula: Formula) -> Hints:
    """The numbers that the formula clamps at, before and behind the activation, and those that it multiplies by."""
    ends: dict[bool, list[Limits]] = {False: [], True: []}
    factors: list[float] = []
    for term in formula.terms:
        name = _op(term)
        if name in BOUNDED:
            bent = any(formula.terms[x.at].bent for x in term.args if isinstance(x, Ref))
            ends[bent].append(_limits(formula, term, name))
        numbers = [x for x in _numbers(formula, term.args[:2]) if x not in (0.0, 1.0)]
        if name in FACTORS:
            factors += numbers
        elif name in QUOTIENTS:
            factors += [1.0 / x for x in numbers]
    limits, clips = (_with_joint([x for x in found if x != NO_LIMITS]) for found in (ends[False], ends[True]))
    learned = any(t.kind == "learned" for t in formula.terms)
    return Hints(limits, clips, tuple(dict.fromkeys(factors))[:4], learned)


def _limits(formula: Formula, term: Term, name: str) -> Limits:
    """The lower and upper limit that a clamp is written with."""
    given = dict(term.kwargs)
    values = [_numbers(formula, x) for x in term.args[1:3]]
    first, second = (*(x[0] if x else None for x in values), None, None)[:2]
    if name in ("clamp_max", "minimum", "min"):
        first = first if first is not None else next(iter(_numbers(formula, term.args[0])), None)
        return None, first if name != "clamp_max" else _number(given, "max", first)
    if name in ("maximum", "max"):
        return first if first is not None else next(iter(_numbers(formula, term.args[0])), None), None
    low, high = ("min_val", "max_val") if name == "hardtanh" else ("min", "max")
    return _number(given, low, first), _number(given, high, second)


def _number(given: dict[str, Any], name: str, default: float | None) -> float | None:
    return float(given[name]) if isinstance(given.get(name), int | float) else default


def _with_joint(ends: list[Limits]) -> tuple[Limits, ...]:
    """Each pair of limits, and all of them at once."""
    lows, highs = [x for x, _ in ends if x is not None], [x for _, x in ends if x is not None]
    joint = (max(lows, default=None), min(highs, default=None))
    return tuple(dict.fromkeys([*ends[:4], *([joint] if joint != NO_LIMITS else [])]))


def _op(term: Term) -> str:
    return str(term.target).split(".")[1] if "." in str(term.target) else ""


def _numbers(formula: Formula, values: Any) -> list[float]:
    if isinstance(values, Ref):
        term = formula.terms[values.at]
        return [float(term.args[0])] if term.kind == "number" else []
    if isinstance(values, list | tuple):
        return [number for value in values for number in _numbers(formula, value)]
    return [float(values)] if isinstance(values, int | float) and not isinstance(values, bool) else []


# Norms by hand.


def norm_of(formula: Formula) -> str | None:
    """The name of a norm that is written with reductions; None where there is none."""
    joined = [at for at, term in enumerate(formula.terms) if term.kind == "norm"]
    if not joined:
        return None
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(5, 64, dtype=torch.float64, generator=generator) for _ in formula.operands]
    try:
        values = values_of(formula, operands, LEARNED[0], rows=True)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError):
        return "row statistics"
    before = next(x for x in formula.terms[joined[0]].args if isinstance(x, Ref) and not _is_rowwise(formula, x))
    given, result = values[before.at], values[joined[-1]]
    for name, value in (
        ("rms_norm", F.rms_norm(given, (64,))),
        ("layer_norm", F.layer_norm(given, (64,))),
        ("l2_norm", F.normalize(given, dim=-1)),
    ):
        if result.shape == value.shape and bool(((result - value).abs() <= 2e-2 * (value.abs() + 0.05)).all()):
            return name
    return "row statistics"


# Text.


def text_of(formula: Formula) -> str:
    """The formula as nested calls of u, and g where there are two operands."""
    names = ("u",) if len(formula.operands) == 1 else ("u", "g", *(f"x{k}" for k in range(len(formula.operands))))
    texts: list[str] = []

    def text(value: Any) -> str:
        if isinstance(value, Ref):
            return texts[value.at]
        return f"{value:g}" if isinstance(value, float) else str(value)

    for term in formula.terms:
        if term.kind == "operand":
            said = names[int(term.name)]
        elif term.kind in ("number", "learned"):
            said = f"{term.args[0]:g}" if term.kind == "number" else "p"
        elif term.kind == "step":
            said = text(term.args[0])
        else:
            said = f"{_op(term)}({', '.join(map(text, term.args))})"
        texts.append(said if len(said) <= LONGEST_TEXT else said[: LONGEST_TEXT - 3] + "...")
    return texts[-1]

"""Latency of one call on a GPU, from closed formulas of the shape, the datasheet and a few fitted constants.

`predict("attn_prefill", device_named("h200"), {...})` takes microseconds and needs no GPU. The constants, what they
mean and how far they are off stand in coefficients.json; benchmarks/fit_latency.py fits them.

Source: measurements of shared/measurements/README.md; the formulas cite theirs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files

import sympy

from attnc.cost_models.device_kinds import Device
from attnc.cost_models.estimate import Bounds, Estimate
from attnc.cost_models.latency import attention, delta, gemm, mla, moe, sparse
from attnc.cost_models.latency.matrix_units import DTYPES, GpuFigures, figures_of, figures_of_sheet, of_class
from attnc.cost_models.latency.terms import Model
from attnc.errors import UsageError, did_you_mean

__all__ = ["KINDS", "MODELS", "Kind", "encode", "figures_of", "figures_of_sheet", "predict", "scalar"]

Encode = Callable[[str, Mapping], tuple[str, tuple[float, ...]]]


@dataclass(frozen=True)
class Kind:
    """One kind of call. columns: of its shape, as in shared/measurements; encode: shape -> model and its columns."""

    name: str
    columns: tuple[str, ...]
    encode: Encode


ATTENTION = ("dtype", "batch", "seq_q", "q_heads", "kv_heads", "head_dim", "window")
DELTA = ("variant", "phase", "stage", "batch", "seq", "k_heads", "v_heads", "head_k_dim", "head_v_dim", "d_conv")
SPARSE = ("batch", "seq_q", "prefix", "q_heads", "index_heads", "index_dim", "topk", "head_dim_qk", "head_dim_v")
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("attn_prefill", ATTENTION, attention.encode),
        Kind("attn_decode", (*ATTENTION, "seq_kv"), attention.encode),
        Kind("attn_encoder", ("dtype", "batch", "seq_q", "q_heads", "head_dim"), attention.encode),
        Kind("mla_prefill", ("dtype", "batch", "seq_q", "q_heads", "head_dim_qk", "head_dim_v"), mla.encode),
        Kind("mla_decode", ("dtype", "batch", "seq_kv", "q_heads", "head_dim_qk", "head_dim_v"), mla.encode),
        Kind("gdn", ("dtype", *DELTA), delta.encode),
        Kind("dsa", ("dtype", "stage", "score_mode", *SPARSE), sparse.encode),
        Kind("gemm", ("dtype", "m", "n", "k"), gemm.encode),
        Kind("moe", ("dtype", "tokens", "d_model", "d_ff", "experts", "topk", "gated", "routing"), moe.encode),
    )
}
MODELS: dict[str, Model] = {
    **attention.MODELS,
    **mla.MODELS,
    **delta.MODELS,
    **sparse.MODELS,
    **gemm.MODELS,
    **moe.MODELS,
}
ZERO_ALLOWED = {"window", "prefix", "gated"}


def encode(kind: str, shape: Mapping) -> tuple[str, tuple[float, ...]]:
    """The model of a call and the numeric columns of its shape.

    Raises: UsageError that names the kind or the column, what was found and what is allowed.
    """
    known = KINDS.get(kind)
    if known is None:
        near = did_you_mean(kind, KINDS)
        raise UsageError(f"latency of {kind!r}: no such kind; known are {', '.join(KINDS)}.{near or ' Name one.'}")
    try:
        name, columns = known.encode(kind, shape)
        if name in MODELS and shape["dtype"] in DTYPES and min(columns[: len(columns) - MODELS[name].flags]) > 0:
            return name, columns
    except (LookupError, TypeError, ValueError, OverflowError, AttributeError):
        pass
    raise UsageError(_complaint(known, shape))


def _complaint(kind: Kind, shape: Mapping) -> str:
    """What is wrong with a shape that its kind could not read."""
    needed = f"a shape has the columns {', '.join(kind.columns)}"
    for column in kind.columns:
        if column not in shape:
            near = did_you_mean(column, [str(key) for key in shape])
            return f"{kind.name}: column {column!r} is missing; {needed}.{near or ' Add it.'}"
        value = shape[column]
        if column == "dtype" and value not in DTYPES:
            return f"{kind.name}: dtype: found {str(value)[:40]!r}, allowed are {', '.join(DTYPES)}. Name one of them."
        if column in ("dtype", "variant", "phase", "stage", "score_mode", "routing"):
            continue
        low = 0 if column in ZERO_ALLOWED else 1
        if not isinstance(value, int | float) or not low <= value < 2**63:
            return f"{kind.name}: {column}: found {value!r}, allowed are positive numbers. Correct it."
    words = {c: shape[c] for c in kind.columns if isinstance(shape[c], str)}
    return f"{kind.name}: found {words}, which is in no table of shared/measurements. Name a stage that is."


@lru_cache(maxsize=1)
def coefficients() -> dict[str, dict]:
    """The content of coefficients.json, by model."""
    text = files("attnc.cost_models.latency").joinpath("coefficients.json").read_text(encoding="utf-8")
    return json.loads(text)["models"]


@cache
def scalar(name: str) -> Callable[..., tuple[float, float]]:
    """The formula of a model for single numbers: (seconds, share of them that is fixed)."""
    model = MODELS[name]
    modules = [{"largest": max, "least": min}, "math"]
    return sympy.lambdify(model.arguments, [model.latency, model.fixed], modules=modules, cse=True)


@dataclass(frozen=True)
class _Prepared:
    device: object
    call: Callable[..., tuple[float, float]]
    tail: tuple[float, ...]
    bounds: Bounds


# By identity of the device: hashing all its figures would take longer than the prediction. Each entry keeps its device.
_PREPARED: dict[tuple[int, str, str], _Prepared] = {}


def _prepare(name: str, device: Device | GpuFigures, dtype: str) -> _Prepared:
    figures = figures_of(device)
    stored = coefficients()[name]
    values = tuple(of_class(stored["coefficients"][c.name]["value"], figures.arch) for c in MODELS[name].coefficients)
    interval = stored["interval"]["seen" if figures.arch in stored["classes"] else "unseen"]
    made = _Prepared(device, scalar(name), figures.values(dtype) + values, Bounds.of(interval))
    if len(_PREPARED) > 500:
        _PREPARED.clear()
    _PREPARED[id(device), name, dtype] = made
    return made


def predict(kind: str, device: Device | GpuFigures, shape: Mapping) -> Estimate:
    """Seconds of one call of `kind` with the columns `shape` (shared/measurements/README.md) on `device`.

    Raises: UsageError for an unknown kind, a missing or impossible column, a dtype the device lacks, a CPU.
    """
    name, columns = encode(kind, shape)
    dtype = shape["dtype"]
    ready = _PREPARED.get((id(device), name, dtype)) or _prepare(name, device, dtype)
    try:
        seconds, fixed = ready.call(*columns, *ready.tail)
    except (OverflowError, ValueError):  # a number beyond floats, or none
        raise UsageError(_complaint(KINDS[kind], shape)) from None
    if not 0 < seconds < math.inf:
        raise UsageError(f"{kind}: found {seconds} seconds for {dict(shape)}; sizes must be finite. Correct them.")
    return ready.bounds.around(seconds, fixed / seconds)

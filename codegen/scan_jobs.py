"""The scan and the step kernels as jobs of the ahead-of-time compiler: what a launch would pass."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

import torch

from attnc.codegen import gpu_scan, gpu_step
from attnc.codegen.compile_stats import Job
from attnc.codegen.flash_jobs import TRITON_TYPES
from attnc.codegen.gpu_scan import ScanKnobs
from attnc.codegen.gpu_step import StepKnobs
from attnc.rule_recurrence import RecurrenceRule, RecurrenceShape

OF_INPUTS = ("p_q", "p_k", "p_v", "p_a", "p_b", "p_out", "p_do", "p_dv")  # in the dtype of the model

OF_CHANNELS = ("v", "o", "w", "g", "dv", "dw", "dg")


def scan_jobs(
    rule: RecurrenceRule,
    dtype: torch.dtype,
    shape: RecurrenceShape,
    knobs: ScanKnobs,
    target: str,
    *,
    bonus: bool = False,
) -> list[Job]:
    """The jobs of forward and backward for a plain rule, in this order; decays, gates and states are float32.

    Strides are multiples of 16 but for the last, which is 1; for V = 1 so is that of the heads. target: "cuda:90".
    """
    given = shape.Hk > 0
    constants = {
        **gpu_scan.kinds_of(rule, query=given, key=given, bonus=bonus),
        **gpu_scan.sizes_of(shape.H, shape.Hk, shape.K, shape.V, knobs, rule.decay),
        "PACKED": rule.packed,
        "INITIAL": rule.state_in,
        "READ": True,
        "KEEP": False,
    }
    present = {**_present(constants), "p_states": False}
    text = gpu_scan.text_of(target)
    forward = _job(text, "recurrence_scan", constants, present, dtype, target, knobs.warps)
    present |= {"p_states": True, "p_dg": rule.decay not in ("none", "head"), "p_dw": constants["GATED"]}
    present |= {"p_drates": rule.decay in ("head", "state"), "p_dbonus": bonus, "p_dinitial": rule.state_in}
    present |= {"p_dq": given, "p_dk": given}
    warps = gpu_scan.backward_warps(shape.K, knobs)
    return [forward, _job(text, "recurrence_scan_backward", constants, present, dtype, target, warps)]


def step_job(
    rule: RecurrenceRule,
    dtype: torch.dtype,
    shape: RecurrenceShape,
    knobs: StepKnobs,
    target: str,
    *,
    bonus: bool = False,
) -> Job:
    """The job of a step, as `scan_jobs`."""
    given = shape.Hk > 0
    constants = {
        **gpu_step.kinds_of(rule, query=given, key=given, rank=rule.low_rank, bonus=bonus, packed=rule.packed),
        **gpu_step.sizes_of(shape.K, shape.V, knobs),
        **dict.fromkeys(("GROUP", "GROUP_A", "GROUP_B"), shape.group),
        "INITIAL": rule.state_in,
    }
    present = _present(constants) | {"p_beta": rule.gate != "none", "p_a": rule.low_rank, "p_b": rule.low_rank}
    return _job(gpu_step.text_of(target), "recurrence_step", constants, present, dtype, target, knobs.warps)


def _present(constants: Mapping[str, Any]) -> dict[str, bool]:
    """Whether a launch passes a pointer; others it always does."""
    kind = constants["KIND"]
    return {
        "p_q": constants["QUERY"],
        "p_k": constants["KEY"],
        "p_decay": kind != gpu_step.KINDS["none"],
        "p_rates": kind == gpu_step.KINDS["state"],
        "p_beta": constants.get("GATED", False),
        "p_bonus": constants["BONUS"],
        "p_segments": constants["PACKED"],
        "p_initial": constants["INITIAL"],
    }


def _job(
    text: str, kernel: str, constants: Mapping[str, Any], present: Mapping[str, bool], dtype: torch.dtype, target: str,
    warps: int,
) -> Job:  # fmt: skip
    function = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == kernel)
    names = [arg.arg for arg in function.args.args]
    fixed = {name: constants[name] for name in names if name in constants}
    fixed |= {name: None for name in names if not present.get(name, True)}
    ones = {name for name in names if name.endswith("_e")}
    if constants["V"] == 1:
        ones |= {f"{x}_h" for x in OF_CHANNELS} & set(names)
        ones -= {"g_h", "dg_h"} if constants["KIND"] == gpu_step.KINDS["channel"] and constants["K"] > 1 else set()
    fixed |= dict.fromkeys(ones - set(fixed), 1)
    signature = {name: _type_of(name, dtype) for name in names if name not in fixed}
    return Job(text, kernel, signature, fixed, target, warps, 1)


def _type_of(name: str, dtype: torch.dtype) -> str:
    if name in OF_INPUTS:
        return f"*{TRITON_TYPES[dtype]}"
    if name == "p_segments":
        return "*i32"
    if name.startswith("p_"):
        return "*fp32"
    return "i32" if name in ("H", "L") else "i32:16"

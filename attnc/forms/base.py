"""The contract of a form, and knobs: fields of a frozen dataclass that spell and parse as one line.

    block_sparse{provider=flex,block_m=128,block_n=128}

Source: the pass and its spelling as in xDSL (`xdsl/passes.py`); knobs as values in Helion's `config_fragment.py`.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch

from attnc.cost_models.cost import Cost
from attnc.cost_models.device import Device, Gpu
from attnc.cost_models.estimate import Estimate
from attnc.cost_models.roofline import estimate, seconds
from attnc.cost_models.tile_estimate import unmeasured
from attnc.errors import LoweringError, UsageError, did_you_mean
from attnc.operands import Operands

Knobs = TypeVar("Knobs", bound="Form")


@dataclass(frozen=True)
class Knob:
    """What a knob may be. role: "schedule" never changes results, "semantic" does.

    pattern: regular expression of the texts that are allowed beside the choices, "" for none; unit says what they are.
    """

    choices: tuple
    role: str
    unit: str
    pattern: str = ""


def knob(*choices: Any, role: str = "schedule", unit: str = "", pattern: str = "") -> Any:
    """A field of a form; the first choice is its default."""
    return field(default=choices[0], metadata={"knob": Knob(choices, role, unit, pattern)})


@dataclass(frozen=True)
class Form(ABC):
    """One way to compute regions of a kind; methods take regions of that kind."""

    name: ClassVar[str]
    kind: ClassVar[str]
    approximates: ClassVar[bool] = False  # whether some setting is not exact: considered only where `allow` names it

    @abstractmethod
    def refuse(self, region: Any) -> str | None:
        """Why this form with these knobs cannot compute `region`, as one sentence; None where it can."""

    @abstractmethod
    def is_exact(self, region: Any) -> bool:
        """Whether this form with these knobs equals the region."""

    @abstractmethod
    def cost(self, region: Any, device: Device) -> Cost:
        """What one run of the region costs on a CPU, forward, and backward where it trains."""

    def concerns(self, region: Any) -> bool:
        """Whether the form is about such regions at all; one that is not is neither offered nor said to refuse."""
        return True

    @property
    def is_distinct(self) -> bool:
        """Whether every knob of this setting matters: one that does not is not tried at several values."""
        return True

    def gpu_seconds(self, region: Any, gpu: Gpu) -> float:
        """Predicted time of one run on a GPU, forward, and backward where it trains."""
        raise self._no_gpu()

    def untargeted(self, device: Device) -> str | None:
        """Why no setting of this form runs on `device`, whatever the region; None where some does."""
        return None

    def misfit(self, region: Any, device: Device) -> str | None:
        """Why this form with these knobs, which does not refuse `region`, cannot run on `device`; None where it can."""
        return self.untargeted(device)

    def launches(self, region: Any) -> bool:
        """Whether kernels of our own, which lie in a store, compute `region`."""
        return False

    def seconds(self, region: Any, device: Device) -> float:
        """Predicted time of one run, forward, and backward where it trains."""
        if isinstance(device, Gpu):
            return self.gpu_seconds(region, device)
        return seconds(self.cost(region, device), device, region.dtype)

    def by_length(self, region: Any, device: Device) -> Callable[[Any], float]:
        """`seconds` of regions that differ from `region` in length alone, inf where the form does not apply.

        For asking at many lengths: what is searched for `region` serves the others.
        """

        def taken(other: Any) -> float:
            applies = self.refuse(other) is None and self.misfit(other, device) is None
            return self.seconds(other, device) if applies else math.inf

        return taken

    def estimate(self, region: Any, device: Device) -> Estimate:
        """`seconds` with the interval that holds about 80% of measured times of predictions of its sort."""
        if isinstance(device, Gpu):
            return self.gpu_estimate(region, device)
        return estimate(self.cost(region, device), device, region.dtype)

    def gpu_estimate(self, region: Any, gpu: Gpu) -> Estimate:
        """`gpu_seconds` with its interval: here that of a kernel that no table shows."""
        return unmeasured(self.gpu_seconds(region, gpu))

    def _no_gpu(self) -> LoweringError:
        return LoweringError(
            f"run {self.spell()} on a GPU: this form is lowered for the CPU only. Use flash, dense or "
            "block_sparse{provider=flex}."
        )

    @abstractmethod
    def space(self, region: Any, device: Device) -> tuple[Form, ...]:
        """The settings of this form worth trying for `region`, none of which it refuses; best guess first."""

    def spell(self) -> str:
        """One line; `parse` reads it back."""
        knobs = ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))
        return f"{self.name}{{{knobs}}}" if knobs else self.name

    @classmethod
    def parse(cls: type[Knobs], knobs: str) -> Knobs:
        """The form with the knobs of `name=value,...`; left-out knobs keep their default.

        Raises: UsageError for an unknown knob or a value of the wrong type.
        """
        known = {f.name: f for f in fields(cls)}
        given: dict[str, Any] = {}
        for part in filter(None, (p.strip() for p in knobs.split(","))):
            key, _, text = part.partition("=")
            key = key.strip()
            if key not in known:
                raise UsageError(
                    f"knob {key!r} of form {cls.name}: no such knob; known are {', '.join(known) or 'none'}."
                    + (did_you_mean(key, known) or " Leave it out.")
                )
            given[key] = _value(cls.name, key, text.strip(), known[key].metadata["knob"])
        return cls(**given)

    def knobs(self) -> dict[str, Knob]:
        """The knobs by name."""
        return {f.name: f.metadata["knob"] for f in fields(self)}


@dataclass(frozen=True)
class AttentionForm(Form):
    """One way to compute a softmax attention."""

    kind: ClassVar[str] = "attention"
    phases: ClassVar[tuple[str, ...]] = ("prefill", "decode", "training")

    def unserved(self, region: Any) -> str | None:
        """Why a form without a random stream, which serves `phases` alone, leaves `region` as written."""
        if region.kind != self.kind:
            return f"{self.name} computes attention, found a region of kind {region.kind}; leave it as written."
        if region.rule.dropout:
            return (
                f"{self.name} keeps no random stream, found dropout {region.rule.dropout:g} active; use model.eval() "
                "or dropout 0."
            )
        if region.crosses and self.approximates:
            found = f"{region.shape.text('L')} queries of {region.shape.text('S')} keys"
            return f"{self.name} is for rows among their own keys, found cross-attention, {found}; leave it as written."
        phase = "training" if region.training else "decode" if region.shape.L == 1 else "prefill"
        if phase not in self.phases:
            return f"{self.name} serves {' and '.join(self.phases)}, found {phase}; leave it as written there."
        return None

    @abstractmethod
    def cpu(self, given: Operands) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse in plain torch; differentiable, traceable."""

    def tensors(self, width: int, weights: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """What the form takes behind the captured tensors, for queries of `width`; weights: the user's."""
        return []

    def kept(self, given: Operands) -> Operands | None:
        """The same attention under the mask of the pairs that this form keeps; None for a form that drops no pairs.

        Keys may be added behind those of `given`.
        """
        return None

    def gpu(self, given: Operands) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse on a GPU; differentiable, traceable."""
        raise self._no_gpu()


def _value(form: str, key: str, text: str, allowed: Knob) -> Any:
    kind = type(allowed.choices[0])
    if kind is int and (re.fullmatch(r"[1-9][0-9]{0,8}", text) or (text == "0" and 0 in allowed.choices)):
        return int(text)
    if kind is str and (text in allowed.choices or (allowed.pattern and re.fullmatch(allowed.pattern, text))):
        return text
    number = f"{'0 or ' if 0 in allowed.choices else ''}a positive integer in {allowed.unit or 'counts'}"
    texts = ", ".join(map(str, allowed.choices)) + (f", or {allowed.unit}" if allowed.pattern else "")
    found = texts if kind is str else number
    raise UsageError(f"knob {key}={text!r:.80} of form {form}: allowed is {found}. Leave {key} out for the default.")

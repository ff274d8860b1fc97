"""What forms share whose kernels are rendered from skeletons: an operator of the form's own name, on GPUs alone.

Source: Dao 2023, "FlashAttention-2", arXiv:2307.08691, section 3.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch

from attnc.codegen.float8 import unread
from attnc.cost_models.cost import Cost
from attnc.cost_models.device import Device, Gpu
from attnc.cost_models.estimate import Estimate
from attnc.cost_models.tile_estimate import predicted
from attnc.cost_models.tile_model import FlashTiles, FlashWork, fits
from attnc.errors import LoweringError
from attnc.forms.base import AttentionForm, Form
from attnc.forms.masked import SETTLED, settle_empty, widened
from attnc.operands import Operands
from attnc.region import AttentionRegion

BAR, IN = " | ", " @ "  # in an operator's spelling: before the rule, before the store that kernels are kept in
DTYPES = ("bfloat16", "float16", "float32")


def kept_in(form: str, store: str | None) -> str:
    """The spelling of a form with the store that its kernels are kept in, for an operator; None: the user's own."""
    return form if store is None else f"{form}{IN}{store}"


def store_in(spelling: str) -> str | None:
    """The store that an operator's spelling names."""
    _, named, store = spelling.rpartition(BAR)[0].partition(IN)
    return store if named else None


@dataclass(frozen=True)
class Generated(AttentionForm):
    """A form whose operator `attnc::<name>` renders, loads and launches its kernels."""

    @abstractmethod
    def settings(self, region: AttentionRegion, gpu: Gpu, kernel: str = "forward") -> tuple[Form, ...]:
        """Every setting of one kernel's knobs that fits `gpu`, this one first."""

    def launches(self, region: AttentionRegion) -> bool:
        return True

    def is_exact(self, region: AttentionRegion) -> bool:
        return self.refuse(region) is None

    def unfit(self, region: AttentionRegion, widest: int) -> str | None:
        """Why no kernel of such a form computes `region`: its kind, device, dropout, type or widths."""
        E, Ev = region.shape.E, region.shape.Ev
        if region.kind != "attention":
            return f"{self.name} computes attention, found a region of kind {region.kind}; leave it as written."
        if region.device != "cuda":
            return f"{self.name} is a Triton kernel for GPUs, found a region on {region.device}; use dense."
        if region.rule.dropout:
            return (
                f"{self.name} keeps no random stream, found dropout {region.rule.dropout:g} active; "
                "use model.eval() or dropout 0."
            )
        if region.dtype not in DTYPES:
            return f"{self.name} takes {', '.join(DTYPES)}, found {region.dtype}; use dense."
        if region.widened and region.training:
            return (
                f"{self.name} has no gradient of operands of 8 bits, found a region that trains over "
                f"{', '.join(region.types)}; train on float32, float16 or bfloat16."
            )
        if max(E, Ev) > widest:
            return f"{self.name} takes heads of up to {widest}, found E={E}, Ev={Ev}; use dense."
        return None

    def untargeted(self, device: Device) -> str | None:
        if not isinstance(device, Gpu):
            return f"{self.name} is a Triton kernel for GPUs, found the device {device.name}; use dense."
        if device.target is None:
            return f"{self.name} needs a target of Triton's, {device.name} has none: {device.no_target}."
        return None

    def misfit(self, region: AttentionRegion, device: Device) -> str | None:
        if not isinstance(device, Gpu) or device.target is None:
            return self.untargeted(device)
        return self.unread(region, device) or fits(self.work(region), self.tiles, device)

    def unread(self, region: AttentionRegion, gpu: Gpu) -> str | None:
        """Why kernels for `gpu` do not read what `region` stores: no target, or types of 8 bits that it has not."""
        if gpu.target is None:
            return self.untargeted(gpu)
        why = unread((getattr(torch, name) for name in region.stored), gpu.target)
        return None if why is None else f"{self.name}: {why}; use dense, which widens them."

    @property
    @abstractmethod
    def tiles(self) -> FlashTiles:
        """The knobs as the cost model takes them."""

    @abstractmethod
    def work(self, region: AttentionRegion) -> FlashWork:
        """What the region has to compute, as the cost model takes it."""

    def gpu_estimate(self, region: AttentionRegion, gpu: Gpu) -> Estimate:
        seconds = self.gpu_seconds(region, gpu)
        return predicted(seconds, self.work(region), self.tiles, gpu, forward=not region.training)

    def cost(self, region: AttentionRegion, device: Device) -> Cost:
        raise LoweringError(f"predict {self.spell()} on {device.name}: it is a Triton kernel for GPUs. Use dense.")

    def gpu(self, given: Operands, *, store: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """As of any form; store: where the kernels are kept, None for the user's own."""
        *operands, rule = given
        operator = getattr(torch.ops.attnc, self.name)
        out, lse = operator(*operands, f"{kept_in(self.spell(), store)}{BAR}{rule.spell()}")
        if rule.sink is None and rule.empty in SETTLED:
            out = settle_empty(out, lse != -torch.inf, widened(given))  # a NaN is not no key
        return out, lse

    cpu = gpu  # by Triton's interpreter, where it is switched on

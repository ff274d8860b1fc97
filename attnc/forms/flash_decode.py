"""Split-KV decoding by generated Triton kernels: few query rows, keys in parts that run side by side and are merged.

    o_i = sum_p exp(lse_ip - lse_i) o_ip,  lse_i = log sum_p exp(lse_ip)  over parts p of the keys

All query heads of a key head are rows of one tile, so keys are read once per group.

Source: Dao et al. 2023, "Flash-Decoding for long-context inference", pytorch.org/blog/flash-decoding.
Exact:  always, for regions without active dropout and without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import product
from typing import ClassVar

import torch

from attnc.codegen.gpu_decode import ROWS, DecodeKnobs
from attnc.cost_models.cost import Cost
from attnc.cost_models.device import Device, Gpu
from attnc.cost_models.tile_model import FlashTiles, fits, flash_seconds
from attnc.errors import LoweringError
from attnc.forms.base import Form, knob
from attnc.forms.flash import DTYPES, WIDEST, work_of
from attnc.forms.masked import SETTLED, settle_empty
from attnc.region import AttentionRegion
from attnc.rule_attention import AttentionRule

QUICK = tuple(product((32, 64, 128), (2, 4), (2, 3)))
SPLITS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class FlashDecode(Form):
    """Tiles of `block_m` packed query rows and `block_n` keys, over `splits` parts of the keys."""

    name: ClassVar[str] = "flash_decode"
    block_m: int = knob(16, 32, 64, unit="packed query rows")
    block_n: int = knob(64, 32, 128, 16, 256, unit="keys")
    splits: int = knob(8, 1, 2, 4, 16, 32, 64, 128, unit="parts of the keys")
    warps: int = knob(4, 2, 8, 1, unit="warps")
    stages: int = knob(2, 3, 1, 4, 5, unit="tiles in flight")

    def spell(self) -> str:
        """One line; knobs at their default are left out."""
        shown = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name}{{{','.join(shown)}}}" if shown else self.name

    def refuse(self, region: AttentionRegion) -> str | None:
        if region.kind != "attention":
            return f"flash_decode computes attention, found a region of kind {region.kind}; leave it as written."
        if region.device != "cuda":
            return f"flash_decode is a Triton kernel for GPUs, found a region on {region.device}; use dense."
        if region.training:
            return "flash_decode has no backward, found a region that trains; use flash."
        if region.rule.dropout:
            return (
                f"flash_decode keeps no random stream, found dropout {region.rule.dropout:g} active; "
                "use model.eval() or dropout 0."
            )
        if region.shape.L > ROWS or "L" in region.shape.symbols:
            return f"flash_decode takes at most {ROWS} query rows, found {region.shape.text('L')}; use flash."
        if region.dtype not in DTYPES:
            return f"flash_decode takes {', '.join(DTYPES)}, found {region.dtype}; use dense."
        if max(region.shape.E, region.shape.Ev) > 2 * WIDEST + 64:
            return f"flash_decode takes heads of up to {2 * WIDEST + 64}, found E={region.shape.E}; use dense."
        return None

    def is_exact(self, region: AttentionRegion) -> bool:
        return self.refuse(region) is None

    def cost(self, region: AttentionRegion, device: Device) -> Cost:
        raise LoweringError(f"predict {self.spell()} on {device.name}: it is a Triton kernel for GPUs. Use dense.")

    @property
    def tiles(self) -> FlashTiles:
        """The knobs as the cost model takes them."""
        return FlashTiles(self.block_m, self.block_n, self.warps, self.stages, splits=self.splits, pack=True)

    @property
    def schedule(self) -> DecodeKnobs:
        """The knobs as the launcher takes them."""
        return DecodeKnobs(**{f.name: getattr(self, f.name) for f in fields(self)})

    def gpu_seconds(self, region: AttentionRegion, gpu: Gpu) -> float:
        return flash_seconds(work_of(region), self.tiles, gpu)

    def cpu(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        captured: Sequence[torch.Tensor],
        sizes: Sequence,
        rule: AttentionRule,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.gpu(query, key, value, captured, sizes, rule)  # Triton's interpreter, where it is switched on

    def gpu(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        captured: Sequence[torch.Tensor],
        sizes: Sequence,
        rule: AttentionRule,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        given = (query, key, value, captured, sizes, rule)
        out, lse = torch.ops.attnc.flash_decode(*given[:-1], f"{self.spell()} | {rule.spell()}")
        if rule.sink is None and rule.empty in SETTLED:
            out = settle_empty(out, lse > -torch.inf, *given)
        return out, lse

    def space(self, region: AttentionRegion, device: Device) -> tuple[Form, ...]:
        if not isinstance(device, Gpu) or self.refuse(region) is not None:
            return ()
        start = decode_default(replace(region, path="", node="", choice=None), device)
        return () if start is None else (start,)

    def settings(self, region: AttentionRegion, gpu: Gpu, kernel: str = "forward") -> tuple[Form, ...]:
        """Every setting that fits `gpu`, this one first."""
        work = work_of(region)
        names, choices = [f.name for f in fields(self)], [sorted(k.choices) for k in self.knobs().values()]
        forms = (FlashDecode(**dict(zip(names, values, strict=True))) for values in product(*choices))
        return (self, *(f for f in forms if f != self and fits(work, f.tiles, gpu, backward=False) is None))


@lru_cache(maxsize=512)
def decode_default(region: AttentionRegion, gpu: Gpu) -> FlashDecode | None:
    """The knobs the cost model picks: a tile at parts that fill the device, then the parts; None where none fits."""
    work, s = work_of(region), region.shape
    rows = 16 if s.group * s.L <= 16 else 32 if s.group * s.L <= 32 else 64

    def best(tried: list[FlashDecode]) -> FlashDecode | None:
        fitting = [f for f in tried if fits(work, f.tiles, gpu, backward=False) is None]
        offers = [(flash_seconds(work, f.tiles, gpu), n, f) for n, f in enumerate(fitting)]
        return min(offers)[2] if offers else None

    wanted = max(1, 2 * gpu.sms // max(1, s.B * s.H))
    near = min(SPLITS, key=lambda n: abs(n - wanted))
    tile = best([FlashDecode(rows, n, near, warps, stages) for n, warps, stages in QUICK])
    return tile and best([replace(tile, splits=n) for n in SPLITS])

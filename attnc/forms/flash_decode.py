"""Split-KV decoding by generated Triton kernels: few query rows, keys in parts that run side by side and are merged.

    o_i = sum_p exp(lse_ip - lse_i) o_ip,  lse_i = log sum_p exp(lse_ip)  over parts p of the keys

All query heads of a key head are rows of one tile, so keys are read once per group.

Source: Dao et al. 2023, "Flash-Decoding for long-context inference", pytorch.org/blog/flash-decoding.
Exact:  always, for regions without active dropout and without gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import product
from typing import ClassVar

from attnc.codegen.gpu_decode import ROWS, DecodeKnobs, shares_latent
from attnc.cost_models.device import Device, Gpu
from attnc.cost_models.tile_model import FlashTiles, FlashWork, fits, flash_seconds
from attnc.forms.base import Form, knob
from attnc.forms.flash import WIDEST as FLASH_WIDEST
from attnc.forms.flash import kernel_work
from attnc.forms.generated import Generated
from attnc.region import AttentionRegion

QUICK = tuple(product((32, 64, 128), (2, 4), (2, 3)))
WIDEST = 576  # the key of absorbed latent attention: 512 channels and 64 rotary ones
HEADS = 128  # query heads of one row of absorbed latent attention
SPLITS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class FlashDecode(Generated):
    """Tiles of `block_m` packed query rows and `block_n` keys, over `splits` parts of the keys.

    value: "in_key" where the value is the key's first Ev channels, which are then read once. dot8: as of `Flash`.
    """

    name: ClassVar[str] = "flash_decode"
    block_m: int = knob(16, 32, 64, unit="packed query rows")
    block_n: int = knob(64, 32, 128, 16, 256, unit="keys")
    splits: int = knob(8, 1, 2, 4, 16, 32, 64, 128, unit="parts of the keys")
    warps: int = knob(4, 2, 8, 1, unit="warps")
    stages: int = knob(2, 3, 1, 4, 5, unit="tiles in flight")
    value: str = knob("apart", "in_key", role="semantic")
    dot8: str = knob("off", "on", role="semantic")

    def spell(self) -> str:
        """One line; knobs at their default are left out."""
        shown = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name}{{{','.join(shown)}}}" if shown else self.name

    def refuse(self, region: AttentionRegion) -> str | None:
        if region.training:
            return "flash_decode has no backward, found a region that trains; use flash."
        if region.kind == "attention" and (self._rows(region) < region.shape.L or "L" in region.shape.symbols):
            found = region.shape.text("L")
            return f"flash_decode takes at most {self._rows(region)} query rows, found {found}; use flash."
        return self.unfit(region, WIDEST) or self._unshared(region)

    @staticmethod
    def _rows(region: AttentionRegion) -> int:
        """Query rows up to which decoding pays; where heads lie in the rows and no other kernel is as wide, theirs."""
        s = region.shape
        return max(ROWS, HEADS // s.group) if max(s.E, s.Ev) > FLASH_WIDEST else ROWS

    def _unshared(self, region: AttentionRegion) -> str | None:
        E, Ev = region.shape.E, region.shape.Ev
        if self.value == "apart":
            return None
        if not region.value_in_key:
            return (
                "flash_decode{value=in_key} reads values from the key's first channels, found values that the graph "
                "does not prove to be those; use value=apart."
            )
        if not shares_latent(E, Ev):
            return (
                f"flash_decode{{value=in_key}} takes values as wide as the key's leading power of two, found E={E}, "
                f"Ev={Ev}; use value=apart."
            )
        return None

    @property
    def tiles(self) -> FlashTiles:
        """The knobs as the cost model takes them."""
        return FlashTiles(self.block_m, self.block_n, self.warps, self.stages, splits=self.splits, pack=True)

    @property
    def schedule(self) -> DecodeKnobs:
        """The knobs as the launcher takes them."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "value"}
        return DecodeKnobs(**given | {"dot8": self.dot8 == "on"})

    @property
    def value_in_key(self) -> bool:
        """Whether the kernel takes the value from the key's tile."""
        return self.value == "in_key"

    def work(self, region: AttentionRegion) -> FlashWork:
        return replace(kernel_work(region, dot8=self.dot8 == "on"), value_in_key=self.value_in_key)

    def gpu_seconds(self, region: AttentionRegion, gpu: Gpu) -> float:
        return flash_seconds(self.work(region), self.tiles, gpu)

    def space(self, region: AttentionRegion, device: Device) -> tuple[Form, ...]:
        if not isinstance(device, Gpu) or (self.refuse(region) or self.unread(region, device)) is not None:
            return ()
        start = decode_default(replace(region, path="", node="", choice=None), device)
        return () if start is None else (start,)

    def settings(self, region: AttentionRegion, gpu: Gpu, kernel: str = "forward") -> tuple[Form, ...]:
        """Every setting that fits `gpu`, this one first."""
        work = self.work(region)
        varied = ((n, sorted(k.choices)) for n, k in self.knobs().items() if k.role == "schedule")
        names, choices = zip(*varied, strict=True)
        forms = (replace(self, **dict(zip(names, values, strict=True))) for values in product(*choices))
        return (self, *(f for f in forms if f != self and fits(work, f.tiles, gpu, backward=False) is None))


@lru_cache(maxsize=512)
def decode_default(region: AttentionRegion, gpu: Gpu) -> FlashDecode | None:
    """The knobs the cost model picks: a tile at parts that fill the device, then the parts; None where none fits."""
    s = region.shape
    held = "in_key" if region.value_in_key and shares_latent(s.E, s.Ev) else "apart"
    work = FlashDecode(value=held).work(region)
    rows = 16 if s.group * s.L <= 16 else 32 if s.group * s.L <= 32 else 64

    def best(tried: list[FlashDecode]) -> FlashDecode | None:
        fitting = [f for f in tried if fits(work, f.tiles, gpu, backward=False) is None]
        offers = [(flash_seconds(work, f.tiles, gpu), n, f) for n, f in enumerate(fitting)]
        return min(offers)[2] if offers else None

    wanted = max(1, 2 * gpu.sms // max(1, s.B * s.H))
    near = min(SPLITS, key=lambda n: abs(n - wanted))
    tile = best([FlashDecode(rows, n, near, warps, stages, held) for n, warps, stages in QUICK])
    return tile and best([replace(tile, splits=n) for n in SPLITS])

"""Flash attention by generated Triton kernels: the mask, the score and the sink of the region are compiled into them.

    o_i = softmax_j(score_ij where keep_ij) v_j,  tiles of keys one after another under a running maximum; tiles that
    the mask empties are not visited, tiles that it keeps whole take no mask

One skeleton for the forward, two for the backward; heads that share keys are never copied, E != Ev is allowed.

Source: Dao 2023, "FlashAttention-2", arXiv:2307.08691; Dong et al. 2024, "Flex Attention", arXiv:2412.05496.
Exact:  always, for regions without active dropout.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import product
from typing import Any, ClassVar

from attnc.codegen.gpu_flash import FlashKnobs
from attnc.codegen.tiles import static_tiles
from attnc.cost_models.device import Device, Gpu
from attnc.cost_models.device_kinds import LAUNCH_S
from attnc.cost_models.tile_counts import band_tiles
from attnc.cost_models.tile_model import (
    Band,
    CompiledFigures,
    FlashTiles,
    FlashWork,
    TileCount,
    fits,
    flash_seconds,
)
from attnc.expr import TRUE, Expr
from attnc.forms.base import Form, knob
from attnc.forms.generated import Generated
from attnc.predicate import distances
from attnc.region import FLOAT8, ITEM_BYTES, AttentionRegion

WIDEST = 256
# Operations of a score beside its product, per pair: FP32 ones, exponentials.
SCORE_WORK = {"tanh": (4.0, 2.0), "exp": (1.0, 1.0), "sigmoid": (2.0, 1.0), "load": (2.0, 0.0)}
KERNELS = {"forward": "", "dq": "dq_", "dkv": "dkv_"}  # kernel -> prefix of its knobs
TILES = ("block_m", "block_n", "warps", "stages")
# What is tried where nothing was tuned: few, so that choosing takes milliseconds.
QUICK = {
    "forward": (*product((64, 128), (32, 64, 128), (4, 8), (2,)), *product((128,), (64, 128), (4, 8), (3,))),
    "dq": tuple(product((64, 128), (32, 64), (4, 8), (2,))),
    "dkv": tuple(product((32, 64), (64, 128), (4, 8), (2,))),
}
SECTIONS = (1, 4)
TABLE_LAUNCHES = 6  # small kernels that classify tiles and list them, before each run


@dataclass(frozen=True)
class Flash(Generated):
    """Tiles of `block_m` query rows and `block_n` keys; the same for dq (dq_) and for dk with dv (dkv_).

    skip: tiles are skipped by ranges of the mask's bounds ("range"), or by tables of exact classes ("table").
    section: heads that run side by side, block after block. xcds: dies over which programs are spread (MI300X: 8).
    precision: of float32 products. dot8: queries and keys of one type of 8 bits are multiplied as they are, which on
    compute capability 8.9 and 9.0 keeps fewer bits of their sums.
    """

    name: ClassVar[str] = "flash"
    block_m: int = knob(128, 64, 32, 16, 256, unit="query rows")
    block_n: int = knob(64, 128, 32, 16, 256, unit="keys")
    warps: int = knob(4, 8, 2, 1, 16, unit="warps")
    stages: int = knob(3, 2, 1, 4, 5, unit="tiles in flight")
    dq_block_m: int = knob(64, 128, 32, 16, 256, unit="query rows")
    dq_block_n: int = knob(64, 128, 32, 16, 256, unit="keys")
    dq_warps: int = knob(4, 8, 2, 1, 16, unit="warps")
    dq_stages: int = knob(2, 3, 1, 4, 5, unit="tiles in flight")
    dkv_block_m: int = knob(64, 128, 32, 16, 256, unit="query rows")
    dkv_block_n: int = knob(64, 128, 32, 16, 256, unit="keys")
    dkv_warps: int = knob(4, 8, 2, 1, 16, unit="warps")
    dkv_stages: int = knob(2, 3, 1, 4, 5, unit="tiles in flight")
    skip: str = knob("range", "table")
    section: int = knob(1, 2, 4, 8, unit="heads")
    xcds: int = knob(1, 8, unit="dies")
    precision: str = knob("ieee", "tf32", role="semantic")
    dot8: str = knob("off", "on", role="semantic")

    def spell(self) -> str:
        """One line: the forward's tile, and what is not the default."""
        shown = [f.name for f in fields(self) if f.name in TILES or getattr(self, f.name) != f.default]
        return f"{self.name}{{{','.join(f'{name}={getattr(self, name)}' for name in shown)}}}"

    def refuse(self, region: AttentionRegion) -> str | None:
        return self.unfit(region, WIDEST)

    def work(self, region: AttentionRegion) -> FlashWork:
        return kernel_work(region, self.skip, self.dot8 == "on")

    def gpu_seconds(self, region: AttentionRegion, gpu: Gpu) -> float:
        kernels = KERNELS if region.training else ("forward",)
        return sum(kernel_seconds(self, self.work(region), gpu, kernel) for kernel in kernels)

    @property
    def tiles(self) -> FlashTiles:
        """The knobs as the cost model takes them."""
        one = {
            kernel: FlashTiles(*(getattr(self, prefix + name) for name in TILES)) for kernel, prefix in KERNELS.items()
        }
        return replace(one["forward"], dq=one["dq"], dkv=one["dkv"])

    @property
    def schedule(self) -> FlashKnobs:
        """The knobs as the launcher takes them."""
        return FlashKnobs(**{f.name: getattr(self, f.name) for f in fields(self)} | {"dot8": self.dot8 == "on"})

    def space(self, region: AttentionRegion, device: Device) -> tuple[Form, ...]:
        if not isinstance(device, Gpu) or (self.refuse(region) or self.unread(region, device)) is not None:
            return ()
        if self.skip not in skips(region.rule.keep):
            return ()
        start = default_for(replace(region, path="", node="", choice=None), device, self.skip)
        return () if start is None else (start,)

    def settings(self, region: AttentionRegion, gpu: Gpu, kernel: str = "forward") -> tuple[Form, ...]:
        """Every setting of one kernel's knobs ("forward", "dq", "dkv") that fits `gpu`, this one first.

        How tiles are skipped and the order of heads belong to the forward.
        """
        choices = [sorted(self.knobs()[KERNELS[kernel] + name].choices) for name in TILES]
        work = self.work(region)
        around = product(skips(region.rule.keep), SECTIONS) if kernel == "forward" else [(self.skip, self.section)]
        bases = [replace(self, skip=skip, section=section) for skip, section in around]
        found: list[Form] = [self]
        for values in product(*choices):
            knobs = _named(kernel, values)
            if _fits(replace(self, **knobs), work, gpu, kernel):
                found += [form for form in (replace(base, **knobs) for base in bases) if form != self]
        return tuple(found)


def skips(keep: Expr) -> tuple[str, ...]:
    """How tiles of a mask may be skipped: bounds alone where they say all, tables alone where tensors say it."""
    if keep.has("load"):
        return ("table",)
    return ("range",) if keep == TRUE else ("range", "table")


def _fits(form: Flash, work: FlashWork, gpu: Gpu, kernel: str) -> bool:
    return fits(work, form.tiles, gpu, kernels=(kernel,)) is None


@lru_cache(maxsize=512)
def default_for(region: AttentionRegion, gpu: Gpu, skip: str = "range") -> Flash | None:
    """The knobs the cost model picks among QUICK, kernel by kernel; None where none fits. Deterministic."""
    form = Flash(skip=skip, xcds=gpu.dies)
    work = form.work(region)
    for kernel in KERNELS if region.training else ("forward",):
        tried = [replace(form, **_named(kernel, values)) for values in QUICK[kernel]]
        fitting = [f for f in tried if _fits(f, work, gpu, kernel)]
        offers = [(kernel_seconds(f, work, gpu, kernel), n, f) for n, f in enumerate(fitting)]
        if not offers:
            return None
        form = min(offers)[2]
    return form


def _named(kernel: str, values: tuple[int, ...]) -> dict[str, Any]:
    return {KERNELS[kernel] + name: value for name, value in zip(TILES, values, strict=True)}


def kernel_seconds(
    form: Flash, work: FlashWork, gpu: Gpu, kernel: str, compiled: CompiledFigures | None = None
) -> float:
    """Predicted time of one of the kernels alone, its tables included; compiled: what the compiler made of it."""
    listed = TABLE_LAUNCHES * LAUNCH_S if form.skip == "table" else 0.0
    made = {} if compiled is None else {kernel: compiled}
    return listed + flash_seconds(work, form.tiles, gpu, made, kernels=(kernel,))


@lru_cache(maxsize=512)
def work_of(region: AttentionRegion, skip: str = "range") -> FlashWork:
    """What the region has to compute, as the cost model takes it; skip: how tiles are skipped."""
    s, rule = region.shape, region.rule
    vector, exps = score_work(rule.score)
    pair_bytes = sum(ITEM_BYTES.get(region.dtype, 4) for x in rule.score.walk() if x.op == "load" and _is_memory(x))
    band = band_of(rule.keep)
    work = FlashWork(
        s.B,
        s.Hq,
        s.H,
        s.L,
        s.S,
        s.E,
        s.Ev,
        region.dtype,
        band=band,
        training=region.training,
        vector=vector,
        exps=exps,
        pair_bytes=float(pair_bytes),
    )
    if is_band(rule.keep):
        return work
    if skip == "table" and not rule.keep.has("load"):
        return replace(work, counts=_Counted(rule.keep, s.B, s.Hq, s.L, s.S, region.sizes))
    return replace(work, counts=_Bounded(band, s.L, s.S))  # what tensors empty is not known before the run


@lru_cache(maxsize=512)
def kernel_work(region: AttentionRegion, skip: str = "range", dot8: bool = False) -> FlashWork:
    """The same for kernels that read operands as they are stored; dot8: which multiply those of 8 bits so."""
    work, (query, key, value) = work_of(region, skip), region.types
    if not region.stored:
        return work
    items = (ITEM_BYTES.get(query, 4), ITEM_BYTES.get(key, 4), ITEM_BYTES.get(value, 4))
    return replace(work, stored=items, dtype="fp8" if dot8 and query == key and key in FLOAT8 else work.dtype)


def band_of(keep: Expr) -> Band:
    """The keys around a row that the mask's bounds allow."""
    least, most = distances(keep)
    return Band(back=most, ahead=None if least is None else -least)


def is_band(keep: Expr) -> bool:
    """Whether the mask is its bounds and nothing else."""
    parts = keep.args if keep.op == "and" else (keep,)
    return keep == TRUE or all(part.op == "le" and distances(part) != (None, None) for part in parts)


def score_work(score: Expr) -> tuple[float, float]:
    """FP32 operations and exponentials of a score beside the product, per pair."""
    found = [SCORE_WORK[x.op] for x in score.walk() if x.op in SCORE_WORK]
    return sum(v for v, _ in found), sum(e for _, e in found)


def _is_memory(load: Expr) -> bool:
    """Whether a lookup reads another number for each pair: memory, not a register."""
    return {"i", "j"} <= load.names()


@dataclass(frozen=True)
class _Bounded:
    """Tiles within the mask's bounds, each with a mask."""

    band: Band
    L: int
    S: int

    def __call__(self, block_m: int, block_n: int) -> TileCount:
        found = band_tiles(self.L, self.S, block_m, block_n, self.band)
        return replace(found, masked=found.visited)


@dataclass(frozen=True)
class _Counted:
    """Exact tiles of a mask that is no band, classified once per tile size."""

    keep: Expr
    B: int
    Hq: int
    L: int
    S: int
    sizes: tuple[int, ...]

    def __call__(self, block_m: int, block_n: int) -> TileCount:
        counts = {"B": self.B, "Hq": self.Hq}  # one class for all where the mask does not ask
        tiles = static_tiles(self.keep, self.L, self.S, block_m, block_n, sizes=self.sizes, **counts)
        rows = tiles.may.sum(-1).double()
        return TileCount(
            float(rows.sum(-1).mean()), float(tiles.partial.sum((-1, -2)).double().mean()), float(rows.max())
        )

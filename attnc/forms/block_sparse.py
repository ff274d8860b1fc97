"""Block-sparse attention: only tiles in which the mask keeps a pair are visited.

    o_i = softmax_j(score_ij where keep_ij) v_j  over the blocks of keys that some row of i's block keeps

Three providers: "blocked" (batched ATen calls; trains; tiles from the static part of the mask, lengths known), "band"
(one window of keys for each query block; trains; masks of bounded distance, symbolic lengths) and "flex"
(FlexAttention; any score, forward only on the CPU, tiles from run-time data and symbolic lengths too).

Source: Dong et al. 2024, "Flex Attention", arXiv:2412.05496; Zaheer et al. 2020, "Big Bird", arXiv:2007.14062.
Exact:  always, for regions without active dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from attnc.codegen.cpu_band import band, outside
from attnc.codegen.cpu_blocked import blocked, most_groups
from attnc.codegen.cpu_flex import flex
from attnc.codegen.cpu_groups import Group, grouped, is_run
from attnc.codegen.tiles import blocks, visited
from attnc.cost_models.cost import Cost
from attnc.cost_models.device import Device, Gpu
from attnc.cost_models.roofline import attention_cost
from attnc.cost_models.tile_model import FlashTiles, FlashWork, TileCount, fits, flash_seconds
from attnc.errors import LoweringError
from attnc.expr import TRUE
from attnc.expr_text import spell
from attnc.forms.base import AttentionForm, Form, knob
from attnc.forms.flash import work_of
from attnc.forms.masked import SETTLED, alive_rows, settle_empty
from attnc.operands import Operands
from attnc.predicate import distances
from attnc.region import ITEM_BYTES, AttentionRegion
from attnc.rule_attention import AttentionRule, linear_score

FLEX_DTYPES = ("float32", "bfloat16", "float16")
# Tiles of FlexAttention's Triton kernel on a GPU, the first that fits; its time over ours with the same tiles (block
# lists, a mask from Python's operators) is assumed, not measured.
FLEX_TILES = (
    FlashTiles(128, 64, 4, 3, dq=FlashTiles(64, 64, 4, 3), dkv=FlashTiles(64, 64, 4, 3)),
    FlashTiles(64, 32, 4, 2),
)
FLEX_OVER = 1.1
MOST_VISITED = 0.9  # share of the pairs above which nothing is gained by skipping


@dataclass(frozen=True)
class BlockSparse(AttentionForm):
    """Attention over visited tiles of `block_m` query rows and `block_n` keys."""

    name: ClassVar[str] = "block_sparse"
    provider: str = knob("flex", "blocked", "band")
    block_m: int = knob(128, 64, 256, 512, 1024, unit="query rows")
    block_n: int = knob(128, 64, 256, 512, 1024, unit="keys")

    def refuse(self, region: AttentionRegion) -> str | None:
        if region.kind != "attention":
            return f"block_sparse computes attention, found a region of kind {region.kind}; leave it as written."
        if region.device != "cpu" and (region.device != "cuda" or self.provider != "flex"):
            known = "CPU and GPU" if self.provider == "flex" else "the CPU"
            return (
                f"block_sparse{{provider={self.provider}}} is lowered for {known}, found a region on {region.device}; "
                "leave it as written."
            )
        if region.rule.dropout:
            return (
                f"block_sparse keeps no random stream, found dropout {region.rule.dropout:g} active; "
                "use model.eval() or dropout 0."
            )
        refuse = {"flex": self._refuse_flex, "blocked": self._refuse_blocked, "band": self._refuse_band}
        return refuse[self.provider](region)

    def _refuse_flex(self, region: AttentionRegion) -> str | None:
        rule = region.rule
        if region.training and region.device == "cpu":
            return (
                "block_sparse{provider=flex} has no backward on the CPU, found a region that trains; "
                "use provider=blocked."
            )
        if region.dtype not in FLEX_DTYPES:
            return (
                f"block_sparse{{provider=flex}} takes {', '.join(FLEX_DTYPES)}, found {region.dtype}; "
                "use provider=blocked."
            )
        moving = _symbolic_lookups(region)
        if moving and region.device == "cpu":
            return (
                f"block_sparse{{provider=flex}} reads no table of symbolic length on the CPU (torch 2.13 compiles it "
                f"wrongly), found lookups by {', '.join(moving)}; compile with dynamic=False, or use dense."
            )
        if rule.keep == TRUE and linear_score(rule.score) is not None and rule.bias is None:
            return "block_sparse skips masked tiles, found no mask and a plain score; use dense."
        return None

    def _refuse_blocked(self, region: AttentionRegion) -> str | None:
        shape = region.shape
        symbolic = sorted(set(shape.symbols) & {"L", "S", "B", "Hq", "H"})
        if symbolic:
            return (
                f"block_sparse{{provider=blocked}} needs lengths known at compile time, found "
                f"{', '.join(symbolic)} symbolic; compile with dynamic=False, or use provider=band."
            )
        share = self._visits(region)[1] / max(shape.L * shape.S, 1)
        if share > MOST_VISITED:
            return (
                f"block_sparse{{provider=blocked}} skips tiles the mask empties, found {share:.0%} of the pairs in "
                f"visited tiles of {self.block_m} x {self.block_n}, at most {MOST_VISITED:.0%} pays; use dense."
            )
        return None

    def _refuse_band(self, region: AttentionRegion) -> str | None:
        shape, (least, most) = region.shape, distances(region.rule.keep)
        names = [shape.symbols.get(name) for name in ("L", "S")]
        if (shape.L, names[0]) != (shape.S, names[1]):
            return (
                "block_sparse{provider=band} needs as many keys as queries, found "
                f"L={names[0] or shape.L}, S={names[1] or shape.S}; use dense."
            )
        if least is None or most is None:
            return (
                "block_sparse{provider=band} needs a mask that bounds i - j on both sides by constants, found "
                f"{'no lower' if least is None else 'no upper'} bound in {spell(region.rule.keep)}; use dense."
            )
        share = self._window(region) / shape.S
        if share > MOST_VISITED:
            return (
                f"block_sparse{{provider=band}} skips keys outside a window, found one of {share:.0%} of the keys, at "
                f"most {MOST_VISITED:.0%} pays; use dense."
            )
        return None

    def _window(self, region: AttentionRegion) -> int:
        """Keys in the window of one query block."""
        least, most = distances(region.rule.keep)
        assert least is not None and most is not None
        return self.block_m + sum(outside(least, most))

    def is_exact(self, region: AttentionRegion) -> bool:
        return self.refuse(region) is None

    def _visits(self, region: AttentionRegion) -> tuple[tuple[Group, ...], float]:
        """Groups of tiles and the pairs in them."""
        s, keep = region.shape, region.rule.keep
        names = keep.names()
        visits = visited(
            keep,
            s.L,
            s.S,
            self.block_m,
            self.block_n,
            sizes=region.sizes,
            B=s.B if "b" in names else 1,
            Hq=s.Hq if "h" in names else 1,
        )
        ragged = s.S // self.block_n if s.S % self.block_n else None
        if self.provider == "flex":
            pairs = sum(
                min(self.block_m, s.L - m * self.block_m) * min(self.block_n, s.S - n * self.block_n)
                for m, row in enumerate(visits)
                for n, _ in row
            )
            return (), pairs
        groups = grouped(visits, bool(s.L % self.block_m), ragged, most_groups(region.rule))
        pairs = sum(
            min(self.block_m, s.L - m * self.block_m) * min(g.width * self.block_n, s.S) for g in groups for m in g.rows
        )
        return groups, pairs

    def cost(self, region: AttentionRegion, device: Device) -> Cost:
        engine = "flash" if linear_score(region.rule.score) is not None else "composed"
        item = ITEM_BYTES.get(region.dtype, 4)
        if self.provider == "band":
            s, window = region.shape, self._window(region)
            keys = blocks(s.L, self.block_m) * window
            moved = 2 * item * (s.B * s.H * keys * (s.E + s.Ev) + keys * self.block_m)
            return attention_cost(region, engine, s.L * window, mask=True, launches=8, extra_bytes=moved)
        groups, pairs = self._visits(region)
        if self.provider == "flex":
            return attention_cost(region, "flex", pairs, launches=8)
        moved = 2 * self._copied(region, groups) * item
        return attention_cost(region, engine, pairs, mask=True, launches=8 * len(groups), extra_bytes=moved)

    def gpu_seconds(self, region: AttentionRegion, gpu: Gpu) -> float:
        whole = work_of(region, "table")
        work = replace(whole, counts=_Blocks(whole, self.block_m, self.block_n))
        fitting = [tiles for tiles in FLEX_TILES if fits(work, tiles, gpu) is None]
        return FLEX_OVER * flash_seconds(work, fitting[0], gpu) if fitting else float("inf")

    def _copied(self, region: AttentionRegion, groups: Sequence[Group]) -> int:
        """Numbers written beside the products: gathered keys and values, query rows, masks, and rows put in order."""
        s = region.shape
        keys = rows = masks = 0
        for g in groups:
            count = len(g.rows) * self.block_m
            is_view = s.B == 1 and g.step is not None and is_run(g.cols[0][g.still :])
            keys += 0 if g.shared or is_view else len(g.rows) * g.width * self.block_n
            rows += 0 if g.stride == 1 else count
            repeated = g.step is not None
            masks += (self.block_m if repeated else count) * g.width * self.block_n
        order = [m for g in groups for m in g.rows]
        out = 0 if is_run(order) else 2 * s.L
        return s.B * (s.H * keys * (s.E + s.Ev) + s.Hq * (rows * s.E + out * s.Ev)) + masks

    def cpu(self, given: Operands) -> tuple[torch.Tensor, torch.Tensor]:
        rule = given.rule
        if self.provider == "band":
            least, most = _band_of(rule, given.query.shape[2])
            out, lse = band(given, least=least, most=most, block_m=self.block_m)
        else:
            run = flex if self.provider == "flex" else blocked
            out, lse = run(given, block_m=self.block_m, block_n=self.block_n)
        if rule.sink is None and rule.empty in SETTLED:
            if self.provider == "flex":  # no lse to tell by; the reduction is fused and stores no mask
                alive = alive_rows(given)
            else:
                alive = lse > -torch.inf
            out = settle_empty(out, alive, given)
        return out, lse

    gpu = cpu  # FlexAttention has a template for each

    def space(self, region: AttentionRegion, device: Device) -> tuple[Form, ...]:
        if self.provider == "flex":
            tried = [BlockSparse("flex", 128, 128)]
        elif self.provider == "band":  # where lengths are known, blocked visits fewer tiles
            tried = [] if region.shape.is_static else [BlockSparse("band", m) for m in (64, 128, 256)]
        else:
            tried = [
                BlockSparse("blocked", m, n)
                for m in (64, 128, 256, 512, 1024)
                for n in (64, 128, 256, 512)
                if n <= m and m <= max(64, region.shape.L)
            ]
        fits = [form for form in tried if form.refuse(region) is None]
        return tuple(sorted(fits, key=lambda form: form.seconds(region, device)))


@dataclass(frozen=True)
class _Blocks:
    """Tiles of FlexAttention's kernel: those of the blocks of its block mask."""

    work: FlashWork
    block_m: int
    block_n: int

    def __call__(self, block_m: int, block_n: int) -> TileCount:
        found = self.work.tile_count(self.block_m, self.block_n)
        each = self.block_m * self.block_n / (block_m * block_n)
        return TileCount(found.visited * each, found.masked * each, found.longest * self.block_n / block_n)


def _band_of(rule: AttentionRule, length: int | torch.SymInt) -> tuple[int, int]:
    """Bounds of i - j; a length that is known bounds them where the mask does not."""
    least, most = distances(rule.keep)
    if isinstance(length, int):
        return (1 - length if least is None else least), (length - 1 if most is None else most)
    if least is None or most is None:
        raise LoweringError(
            f"block_sparse{{provider=band}} at a symbolic length needs a mask that bounds i - j on both sides, found "
            f"{spell(rule.keep)}; use dense."
        )
    return least, most


def _symbolic_lookups(region: AttentionRegion) -> list[str]:
    """Coordinates of symbolic length by which the rule looks captured tensors up."""
    names = {"b": "B", "i": "L", "j": "S"}
    rule = region.rule
    loads = [x for e in (rule.keep, rule.score, rule.sink) if e is not None for x in e.walk() if x.op == "load"]
    return sorted({name for x in loads for name in x.names() if names.get(name) in region.shape.symbols})

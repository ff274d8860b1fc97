"""The narrowed family: softmax attention whose mask keeps fewer pairs than the region's own, by positions alone.

    keep'_ij = keep_ij and pattern(p_i, j, h),   p_i the position of query i among the keys

A form of this family is a pattern, and a changed score where its definition weighs pairs; everything else is that of
the exact form that is predicted to be the fastest under the narrowed mask: kernels, gradients, cost. Whether later keys
are kept is the region's own affair. p_i is the last key that the mask lets row i keep, the end of the cache for a
single row without a mask, and i where there are as many keys as queries. A mask of the run is asked at the run.

A row that keeps no key gives 0 where only the pattern may have left it without one.

Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers", arXiv:1904.10509, section 4; Dong et
al. 2024, "Flex Attention", arXiv:2412.05496 (masks as predicates).
Exact:  where the pattern keeps every pair that the region's mask keeps. An approximation by name elsewhere.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnc.codegen.selectors import last_keys, with_masks_of_scores
from attnc.codegen.tiles import static_tiles
from attnc.cost_models.cost import Cost
from attnc.cost_models.device import Device, Gpu, device_from_torch_name, device_named
from attnc.cost_models.estimate import Estimate
from attnc.errors import LoweringError, UsageError
from attnc.expr import FALSE, INT, ONE, TRUE, ZERO, B, Expr, H, I, J, add, const, load, size, sub, terms_of
from attnc.forms.base import AttentionForm, Form
from attnc.forms.block_sparse import BlockSparse
from attnc.forms.dense import Dense
from attnc.forms.flash import Flash, skips
from attnc.forms.flash_decode import FlashDecode
from attnc.forms.masked import reference
from attnc.operands import Operands, hint
from attnc.predicate import conjunction, disjunction, le
from attnc.region import AttentionRegion
from attnc.rule_attention import AttentionShape, lowered

# The exact forms that may run a narrowed region; FlexAttention on the CPU is left out as the chooser leaves it out.
EXACT: dict[str, tuple[AttentionForm, ...]] = {
    "cpu": (Dense(), BlockSparse("blocked"), BlockSparse("band")),
    "cuda": (Dense(), BlockSparse("flex"), Flash(), Flash(skip="table"), FlashDecode()),
}
LAST = "int64"  # a captured tensor of the last key of each row
TILE = 128  # rows and keys of the tiles by which a pattern is found to keep everything


@dataclass(frozen=True)
class Frame:
    """Where a pattern is laid.

    row: position of query i among the keys. keys, heads: how many keys and query heads there are. causal: whether the
    region never keeps a key behind its row. asked: what `row` reads at the run, behind what the operands hold: "last",
    a captured tensor of the last key that each row keeps, "keys", their number as a size, "" nothing.
    """

    row: Expr
    keys: int
    heads: int
    causal: bool
    asked: str = ""

    @property
    def back(self) -> Expr:
        """Positions from a key to the row, negative for keys behind it."""
        return sub(self.row, J)

    def near(self, reach: int) -> Expr:
        """Whether a key is at most `reach` positions off; only before the row where the region is causal."""
        before = le(self.back, const(reach))
        return before if self.causal else conjunction(before, le(sub(ZERO, self.back), const(reach)))

    def first(self, count: int) -> Expr:
        """Whether a key is one of the first ones, or its row, where the region is not causal."""
        keys = within(J, count)
        return keys if self.causal else disjunction(keys, within(self.row, count))


@dataclass(frozen=True)
class Narrowed(AttentionForm):
    """A form that narrows the region's mask.

    phases: what it serves, of "prefill", "decode" and "training". keeps_own: whether every row keeps its own key.
    counts_keys: whether the pattern goes by the number of keys.
    """

    approximates: ClassVar[bool] = True
    counts_keys: ClassVar[bool] = False

    @abstractmethod
    def pattern(self, at: Frame) -> Expr:
        """Which pairs of a row and a key are kept, over b, h, i and j, beside what the region's mask says."""

    def score(self, score: Expr, at: Frame) -> Expr:
        """The score of a pair that is kept."""
        return score

    @property
    def keeps_own(self) -> bool:
        return True

    def unfit(self, region: AttentionRegion, at: Frame) -> str | None:
        """Why the pattern, beyond what all of the family ask for, cannot be laid on `region`."""
        return None

    def refuse(self, region: AttentionRegion) -> str | None:
        if reason := self.unserved(region):
            return reason
        if region.device not in EXACT:
            return f"{self.name} is lowered for CPU and GPU, found a region on {region.device}; leave it as written."
        if self.counts_keys and not region.shape.has_lengths:
            return (
                f"{self.name} is laid on lengths that are known at compile time, found {region.shape.text('L')} x "
                f"{region.shape.text('S')}; mark the lengths with dynamic=False."
            )
        at = frame_of(region)
        return at if isinstance(at, str) else self.unfit(region, at)

    def narrow(self, region: AttentionRegion) -> AttentionRegion:
        """The region under the narrowed mask; one that `refuse` accepts."""
        return _narrowed(self, replace(region, path="", node="", choice=None))

    def lowered(self, region: AttentionRegion, device: Device) -> tuple[AttentionForm, AttentionRegion] | None:
        """The exact form predicted to be the fastest, and the region that it runs; None where none applies."""
        narrowed = self.narrow(region)
        form = _fastest(narrowed, device)
        return None if form is None else (form, narrowed)

    def is_exact(self, region: AttentionRegion) -> bool:
        if self.refuse(region) is not None or not region.shape.has_lengths or region.sizes:
            return False
        at = frame_of(region)
        assert isinstance(at, Frame)
        s, rule = region.shape, region.rule
        return self.score(rule.score, at) == rule.score and _keeps_all(self.pattern(at), rule.keep, s.B, s.Hq, s.L, s.S)

    def misfit(self, region: AttentionRegion, device: Device) -> str | None:
        if self.lowered(region, device) is not None:
            return None
        return f"{self.name}: no exact form computes the narrowed region on {device.name}; leave it as written."

    def space(self, region: AttentionRegion, device: Device) -> tuple[Form, ...]:
        return () if self.refuse(region) or self.misfit(region, device) else (self,)  # attnc.budget searches the knobs

    def cost(self, region: AttentionRegion, device: Device) -> Cost:
        form, narrowed = self._lowered(region, device)
        return form.cost(narrowed, device)

    def gpu_seconds(self, region: AttentionRegion, gpu: Gpu) -> float:
        found = self.lowered(region, gpu)
        return math.inf if found is None else found[0].gpu_seconds(found[1], gpu)

    def gpu_estimate(self, region: AttentionRegion, gpu: Gpu) -> Estimate:
        form, narrowed = self._lowered(region, gpu)
        return form.gpu_estimate(narrowed, gpu)

    def by_length(self, region: AttentionRegion, device: Device) -> Callable[[AttentionRegion], float]:
        found = _exact_forms(self.narrow(region), device)

        def taken(other: AttentionRegion) -> float:
            if self.refuse(other) is not None:
                return math.inf
            there = self.narrow(other)
            fit = (form for form in found if form.refuse(there) is None and form.misfit(there, device) is None)
            return min((form.seconds(there, device) for form in fit), default=math.inf)

        return taken

    def _lowered(self, region: AttentionRegion, device: Device) -> tuple[AttentionForm, AttentionRegion]:
        found = self.lowered(region, device)
        if found is None:
            raise LoweringError(f"predict {self.spell()} on {device.name}: {self.misfit(region, device)}")
        return found

    def cpu(self, given: Operands) -> tuple[Tensor, Tensor]:
        found = self.lowered(region_of(given), device_named("cpu"))
        assert found is not None, self  # dense applies everywhere
        return found[0].cpu(asked(given)._replace(rule=found[1].rule))

    def gpu(self, given: Operands) -> tuple[Tensor, Tensor]:
        region, gpu = region_of(given), gpu_here()
        found = None if gpu is None else self.lowered(region, gpu)
        form, narrowed = (None, self.narrow(region)) if found is None else found
        form = form or Flash(skip=skips(narrowed.rule.keep)[-1])
        return form.gpu(asked(given)._replace(rule=narrowed.rule))

    def kept(self, given: Operands) -> Operands:
        return asked(given)._replace(rule=self.narrow(region_of(given)).rule)

    def reference(self, given: Operands) -> tuple[Tensor, Tensor]:
        """The formula in float64, every pair in memory."""
        return reference(self.kept(given.double()))


def frame_of(region: AttentionRegion) -> Frame | str:
    """Where a pattern is laid on an attention, or the sentence that says why it cannot be."""
    rule, s = region.rule, region.shape
    bounds = _last_keys(rule.keep)
    of_rows = [row for row in bounds if "i" in row.names()]
    if s.L > s.S:
        return (
            "a pattern is laid on queries that are among the keys, found more queries than keys, "
            f"{s.text('L')} x {s.text('S')}; leave it as written."
        )
    if of_rows:
        return Frame(of_rows[0], s.S, s.Hq, True)
    if s.is_square and s.L > 1:
        return Frame(I, s.S, s.Hq, False)
    added = lowered(rule.score)
    if s.L == 1 and bounds and added is None:
        return Frame(bounds[0], s.S, s.Hq, True)
    if s.L == 1 and rule.keep == TRUE and added is None:
        if s.has_lengths:
            return Frame(const(s.S - 1), s.S, s.Hq, True)
        return Frame(sub(size(f"n{len(region.sizes)}"), ONE), s.S, s.Hq, True, "keys")
    if s.L == 1 or any("i" in e.names() for e in (rule.keep, added) if e is not None):
        return Frame(load(len(region.captured), (B, H, I), INT), s.S, s.Hq, True, "last")
    return (
        f"a pattern needs the positions of queries among the keys, found {s.text('L')} queries of {s.text('S')} keys "
        "without a causal mask; leave it as written."
    )


def asked(given: Operands) -> Operands:
    """The operands with what their frame reads at the run, behind what they hold."""
    at = frame_of(region_of(given))
    if isinstance(at, str) or not at.asked:
        return given
    if at.asked == "keys":
        return given._replace(sizes=[*given.sizes, given.key.shape[2]])
    last = last_keys(with_masks_of_scores(given)).expand(given.query.shape[:3])
    return given._replace(captured=[*given.captured, last])


def _last_keys(keep: Expr) -> list[Expr]:
    """The bounds `j <= row` of a mask, the simplest first."""
    rows = []
    for part in keep.args if keep.op == "and" else (keep,):
        if part.op != "le" or dict(terms_of(part.args[0])[1]).get(J) != 1:
            continue
        row = sub(J, part.args[0])
        if not row.names() & {"j", "h"}:
            rows.append(row)
    return sorted(rows, key=lambda row: sum(1 for _ in row.walk()))


@lru_cache(maxsize=1024)
def _narrowed(form: Narrowed, region: AttentionRegion) -> AttentionRegion:
    rule, at = region.rule, frame_of(region)
    if isinstance(at, str):
        raise LoweringError(f"narrow an attention by {form.spell()}: {at}")
    keep = conjunction(rule.keep, form.pattern(at))
    narrowed = replace(rule, keep=keep, score=form.score(rule.score, at), empty=_emptied(form, region, at))
    if at.asked == "keys":
        region = replace(region, sizes=(*region.sizes, region.shape.S))
    elif at.asked == "last":
        region = replace(region, captured=(*region.captured, LAST))
    # Operands of 8 bits are widened, and values read apart, before an exact form runs.
    return replace(region, rule=narrowed, stored=(), value_in_key=False, weights=())


def _emptied(form: Narrowed, region: AttentionRegion, at: Frame) -> str:
    """What a row without keys gives under the narrowed mask."""
    rule, s = region.rule, region.shape
    if rule.empty in ("zero", "mean", "mean_added"):
        return rule.empty
    ahead = at.row if at.row.is_const else sub(at.row, I)  # by how much positions are ahead of rows
    inside = at.asked == "keys" or (ahead.is_const and 0 <= ahead.value <= s.S - s.L)
    own = rule.keep in (TRUE, le(J, at.row)) and form.keeps_own
    return "never" if rule.empty == "never" and own and inside else "zero"


@lru_cache(maxsize=1024)
def _keeps_all(pattern: Expr, keep: Expr, B: int, Hq: int, L: int, S: int) -> bool:
    if pattern == TRUE or conjunction(keep, pattern) == keep:
        return True
    names = pattern.names()
    counts = {"B": B if "b" in names else 1, "Hq": Hq if "h" in names else 1}
    always = static_tiles(pattern, L, S, TILE, TILE, **counts).must
    return bool((always | ~static_tiles(keep, L, S, TILE, TILE).may).all())


@lru_cache(maxsize=1024)
def _fastest(region: AttentionRegion, device: Device) -> AttentionForm | None:
    """The exact form of least predicted time, the earlier one where two are alike."""
    return min(_exact_forms(region, device), key=lambda form: form.seconds(region, device), default=None)


@lru_cache(maxsize=1024)
def _exact_forms(region: AttentionRegion, device: Device) -> tuple[AttentionForm, ...]:
    """Each exact form that applies, in its best setting."""
    found = [form for start in EXACT[region.device] for form in start.space(region, device)[:1]]
    return tuple(form for form in found if isinstance(form, AttentionForm))


def region_of(given: Operands) -> AttentionRegion:
    """The operands of a run, or of a graph with symbols for sizes, as a region, for forms that go by one."""
    query, key, value, captured, sizes, rule = given
    (B, Hq, L, E), (_, H, S, _) = query.shape, key.shape
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (*given[:3], *captured))
    extents: dict[str, Any] = {"B": B, "L": L, "S": S}
    symbols = {name: str(n.node.expr) for name, n in extents.items() if isinstance(n, torch.SymInt)}
    return AttentionRegion(
        "",
        "",
        rule,
        AttentionShape(hint(B), Hq, H, hint(L), hint(S), E, value.shape[-1], symbols=symbols),
        str(query.dtype).removeprefix("torch."),
        query.device.type,
        training=training,
        captured=tuple(str(t.dtype).removeprefix("torch.") for t in captured),
        sizes=tuple(map(hint, sizes)),
    )


@lru_cache(maxsize=1)
def gpu_here() -> Gpu | None:
    """The GPU that torch is on; None where there is none, or none that the table knows."""
    if not torch.cuda.is_available():
        return None
    try:
        return device_from_torch_name(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    except UsageError:
        return None


def within(position: Expr, first: int) -> Expr:
    """Whether a position is one of the first ones."""
    return le(add(position, ONE), const(first)) if first else FALSE

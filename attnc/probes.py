"""Probes: what stands for a region while a model runs, to measure the error of approximations on real inputs.

A graph of the model is rewritten as the backend would, but each region of a unit becomes a module that computes it
exactly, or as the unit has it; while a batch is judged, it also computes the region in float64 in every setting, keeps

    error = ||o - o_exact||_F / ||o_exact||_F,   the same of the worst row,   recovered mass and kept fraction

and drops the tensors.

Source: DESIGN.md, section 1 (an error budget measured on the user's data).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from attnc.calibration import Judged, Measured, is_finite
from attnc.forms import Form, parse_attention, spell_attention
from attnc.forms.base import AttentionForm
from attnc.mass import RowSample
from attnc.operands import Operands
from attnc.ops import ATTENTION
from attnc.options import Options
from attnc.passes.apply import weights_of
from attnc.passes.capture import ambient_autocast_off, device_of
from attnc.passes.check import check
from attnc.passes.found import Found
from attnc.passes.pipeline import analyse, bodies
from attnc.passes.rewrite import rewrite
from attnc.region import AttentionRegion, Region
from attnc.rule_attention import AttentionRule

EXACT = "dense"  # how a probe computes what no approximation replaces
CHUNK = 1 << 22  # elements compared at a time


@dataclass
class Unit:
    """Regions that share one name in the plan, and so one choice.

    settings: setting -> predicted seconds of one of the regions, fastest first. count: of the regions. key: theirs.
    exact_s: predicted seconds of one of them as it is without an approximation.
    measured: setting -> what it did so far. failed: setting -> why it is out of question. seen: what probes have judged
    since `settle`. taken: the setting that probes compute; None: what is exact.
    """

    settings: dict[Form, float]
    refused: dict[str, str]
    key: str = ""
    exact_s: float = 0.0
    count: int = 0
    measured: dict[Form, Measured] = field(default_factory=dict)
    failed: dict[Form, str] = field(default_factory=dict)
    seen: dict[Form, list[Judged]] = field(default_factory=dict)
    taken: Form | None = None

    def settle(self) -> None:
        """Count what was judged on one batch: the worst of the unit's regions, the mean of their shares."""
        for form, found in self.seen.items():
            if form in self.failed:
                continue
            shares = [(j.mass, j.kept) for j in found if j.mass is not None and j.kept is not None]
            mass, kept = (sum(column) / len(shares) for column in zip(*shares, strict=True)) if shares else (None, None)
            worst = Judged(max(j.error for j in found), max(j.row for j in found), mass, kept)
            if is_finite(worst):
                self.measured[form].add(worst)
            else:
                self.failed[form] = f"its output is off by {worst.error:g}, the worst row by {worst.row:g}"
        self.seen.clear()

    def says(self, form: Form) -> str:
        """What is measured of a setting."""
        found = self.measured[form]
        return f"measured error {found.error:.2g} on {found.batches} batch{'es' if found.batches != 1 else ''}"


class Session:
    """What runs in place of the model's graphs: as written, or with a probe for each region that is measured.

    units: by the identity of a region. judging: the number of the batch that probes measure; None: they compute what
    is taken. written: graphs run as written.
    """

    def __init__(self, units: Mapping[str, Unit], options: Options) -> None:
        self.units, self.options = dict(units), options
        self.written = False
        self.judging: int | None = None
        self.checked: dict[str, str] = {}

    def close(self) -> None:
        """Let go of the units; Dynamo's cache outlives the run and holds the probes."""
        self.units = {}

    def read(self, gm: fx.GraphModule, example_inputs: Sequence[Any], place: str) -> Callable[..., Any]:
        analysis = analyse(gm, example_inputs, self.options)
        kind = device_of(example_inputs)
        names = identities([(place, [found.region for found in analysis.found])])
        probes = sum(self._probe(found, name) for found, name in zip(analysis.found, names, strict=True))
        if not probes:
            return gm.forward
        assert analysis.gm is not None
        probed = analysis.gm
        for part in bodies(probed):
            part.graph.eliminate_dead_code()
            part.graph.lint()
            part.recompile()

        def run(*args: Any) -> Any:
            if self.written:
                return gm(*args)
            with ambient_autocast_off(kind):
                return probed(*args)

        return run

    def _probe(self, found: Found, name: str) -> bool:
        region = found.region
        unit = self.units.get(f"{name} {region.key}") or self.units.get(name)
        if unit is None or not unit.settings or found.match is None or found.facts is None:
            return False
        if not isinstance(region, AttentionRegion) or found.match.readers:
            return False
        if why := self._mislifted(found):
            unit.failed |= dict.fromkeys(unit.settings, why)
            return False
        settings = [form for form in unit.settings if form.refuse(region) is None]
        call = rewrite(found.facts, found.match, EXACT)
        *given, spelling = call.args
        probe = Probe(self, unit, settings, parse_attention(str(spelling))[1], weights_of(region, self.options))
        owner = call.graph.owning_module
        assert owner is not None
        at = f"attnc_probe_{call.name}"
        owner.add_module(at, probe)
        with call.graph.inserting_before(call):
            call.replace_all_uses_with(call.graph.call_module(at, tuple(given)))
        call.graph.erase_node(call)
        return True

    def _mislifted(self, found: Found) -> str:
        """Why the exact form may not stand for the region; "" where it may. Asked once for regions of one key."""
        key = found.region.key
        if key not in self.checked:
            try:
                self.checked[key] = check(found.match, EXACT, found.region.training).reason
            except Exception as exc:  # noqa: BLE001  # told as the reason
                self.checked[key] = f"its check raised {type(exc).__name__}: {exc}".splitlines()[0]
        return self.checked[key]


def identities(graphs: Iterable[tuple[str, Sequence[Region]]]) -> list[str]:
    """A text for each region of graphs, each with its place, that is the same whatever the lengths of the inputs."""
    return [name for place, regions in graphs for name in _identities(place, regions)]


def _identities(place: str, regions: Sequence[Region]) -> Iterator[str]:
    seen: dict[str, int] = {}
    for region in regions:
        shape = region.shape.sizes()
        fixed = [f"{name}={size}" for name, size in shape.items() if name not in ("B", "L", "S")]
        text = " ".join([place, region.path, region.kind, region.dtype, *fixed])
        seen[text] = seen.get(text, -1) + 1
        yield f"{text} {seen[text]}"


class Probe(torch.nn.Module):
    """A region of the graph: measured where the session says so, else computed as its unit has it."""

    def __init__(
        self,
        session: Session,
        unit: Unit,
        settings: Sequence[Form],
        rule: AttentionRule,
        weights: Mapping[str, torch.Tensor],
    ) -> None:
        super().__init__()
        self.session, self.unit, self.settings, self.rule, self.weights = session, unit, settings, rule, weights

    def forward(self, query: Any, key: Any, value: Any, captured: Sequence[Any], sizes: Sequence[Any]) -> Any:
        given = Operands(query, key, value, captured, sizes, self.rule)
        if self.session.judging is not None:
            with torch.no_grad():
                self.judge(self.session.judging, given)
        form = self.unit.taken if self.unit.taken in self.settings else None
        return self.computed(form, given)

    def computed(self, form: Form | None, given: Operands) -> Any:
        given = self.held(form, given)
        spelling = spell_attention(EXACT if form is None else form, self.rule)
        return ATTENTION(*given[:5], spelling)

    def held(self, form: Form | None, given: Operands) -> Operands:
        """The operands with what the form takes behind the captured tensors."""
        held = form.tensors(given.query.shape[-1], self.weights) if isinstance(form, AttentionForm) else []
        return given._replace(captured=[*given.captured, *held])

    def judge(self, batch: int, given: Operands) -> None:
        given = given.on("cpu").double()
        exact, sample = self.computed(None, given)[0], RowSample(given)
        for form in self.settings:
            found = self._judged(form, given, exact, sample)
            if isinstance(found, str):  # as a solver that does not converge
                self.unit.failed[form] = f"on batch {batch} it raises {found}"
            else:
                self.unit.seen.setdefault(form, []).append(found)

    def _judged(self, form: Form, given: Operands, exact: torch.Tensor, sample: RowSample) -> Judged | str:
        """The errors of a setting, or what it raises."""
        try:
            out = self.computed(form, given)[0]
            kept = form.kept(self.held(form, given)) if isinstance(form, AttentionForm) else None
            shares = None if kept is None else sample.recovered(kept)
        except Exception as exc:  # noqa: BLE001  # told as the reason
            said = f"{type(exc).__name__}: {exc}".splitlines()[0]
            return "".join(c if c.isprintable() else " " for c in said)
        return Judged(relative([out], [exact]), worst_row(out, exact), *(shares or (None, None)))


def relative(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """The Frobenius norm of the difference over that of `exact`, the worst of the tensors.

    Where both are NaN, or the same infinity, they agree; where only one is, the error is infinite.
    """
    return max((_relative(f, e) for f, e in zip(found, exact, strict=True)), default=0.0)


def _relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    if found.shape != exact.shape:
        return math.inf
    off = size = 0.0
    for f, e in zip(found.detach().flatten().split(CHUNK), exact.detach().flatten().split(CHUNK), strict=True):
        f, e = f.double(), e.double()
        same = (f == e) | (f.isnan() & e.isnan())
        off += float(torch.where(same, 0.0, f - e).square().sum())
        size += float(torch.where(e.isfinite(), e, 0.0).square().sum())
    if not math.isfinite(off):
        return math.inf
    return math.sqrt(off / size) if size else (0.0 if off == 0 else math.inf)


def worst_row(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The norm of the difference of a row over that of the exact row, the worst of the rows.

    A row that is 0 where it is exact counts against the mean norm of rows.
    """
    if found.shape != exact.shape:
        return math.inf
    same = (found == exact) | (found.isnan() & exact.isnan())
    off = torch.where(same, 0.0, found - exact).norm(dim=-1)
    size = torch.where(exact.isfinite(), exact, 0.0).norm(dim=-1)
    if not bool(off.isfinite().all()):
        return math.inf
    share = torch.where(off > 0, off / torch.where(size > 0, size, size.mean()), 0.0)
    return float(share.max()) if share.numel() else 0.0

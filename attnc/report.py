"""Reports: what was found in a model, what was chosen for it and why, as a table for people and as JSON for programs.

`print(report)` folds identical layers into one row (`model.layers.{0-31}.self_attn x32`); FLOP and bytes are those of
one such layer, forward. `report.to_json()` keeps every region apart and follows `SCHEMA` (JSON Schema):

    schema      "attnc.report/1"; the number changes when a field changes its meaning or goes
    attnc       the version that wrote it; model, device: names; graphs: how many graphs Dynamo made of the model
    regions     [{kind, path, node, dtype, device, mask, written, fill, captured, training, rule, shape, facts, flops,
                bytes, choice}]; `rule` reads back with AttentionRule.parse; `facts` repeats rule and shape by name;
                `choice` is null or {form, reason, rewrites, predicted_s, written_s, speedup, refused: {form: sentence}}
    unmatched   [{anchor, reason, node, path}]: what looked like a region; the node where it stopped fitting, and why
    problems    sentences about graphs that could not be read
    timings     seconds attnc spent in each pass; counts: regions by kind, form, mask, and how many are rewritten

Units: times in seconds, costs in FLOP and bytes. A number that is not finite is null.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from attnc import __version__
from attnc.errors import ArtifactError
from attnc.folding import fold_paths
from attnc.region import KINDS, AttentionRule, Choice, Region, Shape

SCHEMA_ID = "attnc.report/1"

# From this width on the reasons stand in a column of the table, below it in lines under the table.
WIDE = 120
LEAST_WIDTH = 60
WHERE_WIDE, WHERE_NARROW = 34, 22
NOT_CHOSEN = "not chosen"


@dataclass(frozen=True)
class Unmatched:
    """Something that looked like a region and is none.

    anchor: name of the node that looked like a region's core.
    reason: one sentence. node: name of the node at which the match ended. path: module path, "" where unknown.
    """

    anchor: str
    reason: str
    node: str
    path: str


@dataclass(frozen=True)
class Report:
    """The regions of one model, their choices, and what did not fit.

    graphs: how many graphs were analysed. timings: attnc's own seconds per pass.
    """

    regions: tuple[Region, ...] = ()
    unmatched: tuple[Unmatched, ...] = ()
    problems: tuple[str, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict, hash=False)
    graphs: int = 0
    model: str = ""
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("regions", "unmatched", "problems"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "timings", dict(self.timings))

    @classmethod
    def merge(cls, reports: Iterable[Report]) -> Report:
        """One report of several graphs of one model, in their order; times and graphs are summed."""
        reports = list(reports)
        timings: Counter[str] = Counter()
        for report in reports:
            timings.update(report.timings)
        return cls(
            regions=tuple(r for report in reports for r in report.regions),
            unmatched=tuple(u for report in reports for u in report.unmatched),
            problems=tuple(dict.fromkeys(p for report in reports for p in report.problems)),
            timings=timings,
            graphs=sum(report.graphs for report in reports),
            model=next((report.model for report in reports if report.model), ""),
            device=reports[0].device if reports else "cpu",
        )

    def counts(self) -> dict[str, object]:
        """How many regions there are, and how many by kind, form, mask and spelling."""
        forms = [r.choice.form if r.choice else NOT_CHOSEN for r in self.regions]
        return {
            "regions": len(self.regions),
            "rewritten": sum(r.choice is not None and r.choice.rewrites for r in self.regions),
            "unmatched": len(self.unmatched),
            "kinds": dict(Counter(r.kind for r in self.regions)),
            "forms": dict(Counter(forms)),
            "masks": dict(Counter(r.mask for r in self.regions)),
            "written": dict(Counter(r.written for r in self.regions)),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON that follows `SCHEMA`; `from_json` reads it back."""
        content = {
            "schema": SCHEMA_ID,
            "attnc": __version__,
            **{name: getattr(self, name) for name in ("model", "device", "graphs")},
            "regions": [_region_content(r) for r in self.regions],
            "unmatched": [asdict(u) for u in self.unmatched],
            "problems": list(self.problems),
            "timings": dict(self.timings),
            "counts": self.counts(),
        }
        return json.dumps(_finite(content), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote. Raises: ArtifactError if `text` is none of this version."""
        try:
            content = json.loads(text)
            if content["schema"] != SCHEMA_ID:
                raise ValueError(f"schema {content['schema']!r}")
            return cls(
                regions=tuple(_region_of(r) for r in content["regions"]),
                unmatched=tuple(Unmatched(**u) for u in content["unmatched"]),
                **{name: content[name] for name in ("problems", "timings", "graphs", "model", "device")},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise ArtifactError(
                f"read a report: found {type(exc).__name__}: {exc}; allowed is JSON that follows {SCHEMA_ID}. "
                "Read what Report.to_json() of this version of attnc wrote."
            ) from exc

    def to_text(self, width: int | None = None) -> str:
        """The report as a table `width` columns wide; the terminal's width, or 120, when left out."""
        columns = shutil.get_terminal_size((WIDE, 24)).columns if width is None else width
        file = io.StringIO()
        Console(file=file, width=max(columns, LEAST_WIDTH), color_system=None, legacy_windows=False).print(self)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())

    def __str__(self) -> str:
        return self.to_text()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        wide = options.max_width >= WIDE
        yield Text(f"{self.model or 'model'} on {self.device}, {_plural(self.graphs, 'graph')}", style="bold")
        groups = fold_regions(self.regions)
        yield _region_table(groups, wide) if groups else Text("no region found")
        if groups and not wide:
            for number, group in enumerate(groups, 1):
                yield Text(f"{number}: {_reason(group[0])}")
        yield from map(Text, _not_used(groups))
        if self.unmatched:
            yield Text(f"not recognised: {len(self.unmatched)}", style="bold")
            yield _unmatched_table(self.unmatched)
        for problem in self.problems:
            yield Text(f"problem: {problem}")
        yield Text("\n".join(_totals(self)))


def fold_regions(regions: Iterable[Region]) -> list[list[Region]]:
    """Regions in groups of equal facts and choice, in the order of their first appearance."""
    groups: dict[Region, list[Region]] = {}
    for region in regions:
        groups.setdefault(replace(region, path="", node=""), []).append(region)
    return list(groups.values())


def _region_table(groups: list[list[Region]], wide: bool) -> Table:
    headings = ["where", "what", "FLOP", "bytes", "form", "speed-up"]
    table = _table(["#", *headings, "why"] if wide else ["#", *headings], right=("#", "FLOP", "bytes", "speed-up"))
    longest = max(len(line) for group in groups for line in _where(group))
    table.columns[1].width = min(longest, WHERE_WIDE if wide else WHERE_NARROW)
    for number, group in enumerate(groups, 1):
        region = group[0]
        form = region.choice.form if region.choice else NOT_CHOSEN
        speedup = _speedup(region.choice)
        gain = "-" if speedup is None else f"{speedup:.2f}x"
        amounts = _amount(region.flops).rstrip(), _amount(region.bytes, "B")
        cells = [str(number), "\n".join(_where(group)), _what(region), *amounts, form, gain]
        table.add_row(*map(Text, cells + [_reason(region)] * wide))
    return table


def _unmatched_table(unmatched: Iterable[Unmatched]) -> Table:
    groups: dict[str, list[Unmatched]] = {}
    for entry in unmatched:
        groups.setdefault(entry.reason, []).append(entry)
    table = _table(["where", "anchor", "stopped at", "why"])
    for reason, entries in groups.items():
        nodes = [_listed(e.anchor for e in entries), _listed(e.node for e in entries)]
        table.add_row(*map(Text, ("\n".join(_where(entries)), *nodes, reason)))
    return table


def _table(headings: Iterable[str], right: tuple[str, ...] = ()) -> Table:
    table = Table(box=box.ASCII, show_edge=False, show_lines=True, pad_edge=False)
    for heading in headings:
        at_right = heading in right
        table.add_column(heading, justify="right" if at_right else "left", no_wrap=at_right, overflow="fold")
    return table


def _where(entries: Iterable[Region | Unmatched]) -> list[str]:
    """Folded paths; nodes by name where no path is known."""
    entries = list(entries)
    paths = fold_paths(e.path for e in entries if e.path)
    nodes = [e.node for e in entries if not e.path]
    count = f" x{len(nodes)}" if len(nodes) > 1 else ""
    return paths + ([f"({_listed(nodes)}){count}"] if nodes else [])


def _listed(names: Iterable[str]) -> str:
    distinct = list(dict.fromkeys(names))
    return ", ".join(distinct[:3]) + (", ..." if len(distinct) > 3 else "")


def _what(region: Region) -> str:
    s, rule = region.shape, region.rule
    batch, queries, keys = (
        f"{s.symbols[name]}={getattr(s, name)}" if name in s.symbols else str(getattr(s, name)) for name in "BLS"
    )
    parts = [
        f"{'full' if region.mask == 'none' else region.mask} {region.kind}",
        f"{queries} x {keys}",
        f"heads {s.Hq}" if s.Hq == s.H else f"heads {s.Hq}/{s.H}",
        f"E {s.E}" if s.Ev == s.E else f"E {s.E}/{s.Ev}",
        f"B {batch}",
        region.dtype,
    ]
    parts += [f"softcap {rule.softcap}"] if rule.softcap is not None else []
    parts += [name for name in ("bias", "sink") if getattr(rule, name) is not None]
    parts += [f"dropout {rule.dropout}"] if rule.dropout else []
    return ", ".join([*parts, f"written {region.written}", *(["training"] if region.training else [])])


def _reason(region: Region) -> str:
    return region.choice.reason if region.choice else "no choice was made"


def _not_used(groups: list[list[Region]]) -> Iterator[str]:
    """Each form that refused, once, with the rows in which it did."""
    rows: dict[str, list[str]] = {}
    for number, group in enumerate(groups, 1):
        for refusal in group[0].refusals:
            rows.setdefault(refusal, []).append(str(number))
    for refusal, numbers in rows.items():
        yield f"not used in {', '.join(numbers)}: {refusal}"


def _speedup(choice: Choice | None) -> float | None:
    """Predicted time as written over predicted time of the chosen form; None where either is unknown."""
    if choice is None or not choice.predicted_s or not choice.written_s:
        return None
    return choice.written_s / choice.predicted_s


def _totals(report: Report) -> Iterator[str]:
    counts = report.counts()
    yield f"total: {_plural(len(report.regions), 'region')}, {counts['rewritten']} rewritten" + (
        f", {_amount(sum(r.flops for r in report.regions))}FLOP, {_amount(sum(r.bytes for r in report.regions), 'B')}"
    )
    for title in ("forms", "masks"):
        named = counts[title]
        if isinstance(named, dict) and named:
            yield f"{title}: " + ", ".join(f"{name} x{count}" for name, count in named.items())
    timed = [r.choice for r in report.regions if _speedup(r.choice) is not None]
    if timed:
        written, chosen = (sum(getattr(c, name) for c in timed) for name in ("written_s", "predicted_s"))
        known = f"{len(timed)} of {_plural(len(report.regions), 'region')}"
        yield f"predicted for {known}: {written * 1e3:.3g} ms as written, {chosen * 1e3:.3g} ms as chosen"
    passes = ", ".join(f"{name} {seconds:.3f}" for name, seconds in report.timings.items())
    yield f"attnc's own time: {sum(report.timings.values()):.3f} s" + (f" ({passes})" if passes else "")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _amount(value: float, unit: str = "") -> str:
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.4g} P{unit}"


_TEXTS = ("kind", "path", "node", "dtype", "device", "mask", "written", "fill")


def _region_content(region: Region) -> dict[str, object]:
    choice = region.choice
    return {
        **{name: getattr(region, name) for name in (*_TEXTS, "training", "flops", "bytes")},
        "captured": list(region.captured),
        "rule": region.rule.spell(),
        "shape": asdict(region.shape),
        "facts": region.facts,
        "choice": choice and {**asdict(choice), "rewrites": choice.rewrites, "speedup": _speedup(choice)},
    }


def _region_of(content: Mapping[str, object]) -> Region:
    given: dict = dict(content)
    choice = given["choice"]
    return Region(
        **{name: given[name] for name in _TEXTS},
        rule=replace(AttentionRule.parse(given["rule"]), empty=given["facts"]["empty"]),
        shape=Shape(**given["shape"]),
        captured=tuple(given["captured"]),
        training=given["training"],
        choice=choice and Choice(**{f.name: choice[f.name] for f in fields(Choice)}),
    )


def _finite(value: object) -> object:
    """`value` with null for every number that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _object(**properties: object) -> dict[str, object]:
    return {"type": "object", "required": sorted(properties), "properties": properties}


def _array(items: object) -> dict[str, object]:
    return {"type": "array", "items": items}


_TEXT, _FLAG, _NUMBER = {"type": "string"}, {"type": "boolean"}, {"type": ["number", "null"]}
_COUNT = {"type": "integer", "minimum": 0}
_TEXTS_BY_NAME = {"type": "object", "additionalProperties": _TEXT}
_COUNTS_BY_NAME = {"type": "object", "additionalProperties": _COUNT}
_CHOICE = _object(
    **dict.fromkeys(("form", "reason"), _TEXT),
    **dict.fromkeys(("predicted_s", "written_s", "speedup"), _NUMBER),
    rewrites=_FLAG,
    refused=_TEXTS_BY_NAME,
)
_REGION = _object(
    **dict.fromkeys((*_TEXTS, "rule"), _TEXT) | {"kind": {"enum": list(KINDS)}},
    **dict.fromkeys(("flops", "bytes"), _COUNT),
    captured=_array(_TEXT),
    training=_FLAG,
    shape=_object(**dict.fromkeys(("B", "Hq", "H", "L", "S", "E", "Ev"), _COUNT), symbols=_TEXTS_BY_NAME),
    facts={"type": "object"},
    choice={**_CHOICE, "type": ["object", "null"]},
)
_COUNTS = _object(
    **dict.fromkeys(("regions", "rewritten", "unmatched"), _COUNT),
    **dict.fromkeys(("kinds", "forms", "masks", "written"), _COUNTS_BY_NAME),
)

# JSON Schema of what `Report.to_json` writes; what the fields mean stands at the top of this file.
SCHEMA: dict[str, object] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": SCHEMA_ID,
    **_object(
        schema={"const": SCHEMA_ID},
        **dict.fromkeys(("attnc", "model", "device"), _TEXT),
        graphs=_COUNT,
        regions=_array(_REGION),
        unmatched=_array(_object(**dict.fromkeys(("anchor", "reason", "node", "path"), _TEXT))),
        problems=_array(_TEXT),
        timings={"type": "object", "additionalProperties": {"type": "number"}},
        counts=_COUNTS,
    ),
}

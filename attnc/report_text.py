"""Reports as tables for people: equal layers in one row, totals by kind, every reason once."""

from __future__ import annotations

import io
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from attnc.cost_models.estimate import Estimate
from attnc.folding import fold_paths
from attnc.region import AS_WRITTEN, AttentionRegion, Choice, Region, Unmatched, form_name
from attnc.report_json import speedup

# From this width on the reasons stand in a column of the table, below it in lines under the table.
WIDE = 120
LEAST_WIDTH = 60
WHERE_WIDE, WHERE_NARROW = 34, 22
NOT_CHOSEN = "not chosen"


class ReportText:
    """How a report prints."""

    regions: tuple[Region, ...]
    unmatched: tuple[Unmatched, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    timings: Mapping[str, float]
    graphs: int
    model: str
    device: str

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
        for note in self.notes:
            yield Text(f"note: {note}")
        yield Text("\n".join(_totals(self)))


def fold_regions(regions: Iterable[Region]) -> list[list[Region]]:
    """Regions in groups of equal facts and choice, in the order of their first appearance."""
    groups: dict[Region, list[Region]] = {}
    for region in regions:
        groups.setdefault(replace(region, path="", node=""), []).append(region)
    return list(groups.values())


def _region_table(groups: list[list[Region]], wide: bool) -> Table:
    headings = ["where", "what", "FLOP", "bytes", "form", "time", "speed-up"]
    right = ("#", "FLOP", "bytes", "time", "speed-up")
    table = _table(["#", *headings, "why"] if wide else ["#", *headings], right)
    longest = max(len(line) for group in groups for line in _where(group))
    table.columns[1].width = min(longest, WHERE_WIDE if wide else WHERE_NARROW)
    for number, group in enumerate(groups, 1):
        region = group[0]
        form = ", ".join([region.choice.form, *_measured(region.choice)]) if region.choice else NOT_CHOSEN
        amounts = _amount(region.flops).rstrip(), _amount(region.bytes, "B")
        times = _time(region.choice), _gain(region.choice)
        cells = [str(number), "\n".join(_where(group)), _what(region), *amounts, form, *times]
        table.add_row(*map(Text, cells + [_reason(region)] * wide))
    return table


def _measured(choice: Choice) -> Iterator[str]:
    """What is known of an approximation."""
    shares = ("error", choice.error), ("worst row", choice.row_error), ("mass", choice.mass), ("kept", choice.kept)
    yield from (f"{name} {share:.3g}" for name, share in shares if share is not None)
    if choice.pays_from is not None and choice.rewrites:
        yield f"pays from {choice.pays_from}"


def _gain(choice: Choice | None) -> str:
    """The predicted speed-up."""
    factor = speedup(choice)
    return "-" if factor is None else f"{factor:.2f}x"


def _time(choice: Choice | None) -> str:
    """The predicted time, its interval below it where it is known."""
    if choice is None or choice.predicted_s is None:
        return "-"
    return str(_estimate(choice)).replace(" (", "\n(")


def _estimate(choice: Choice) -> Estimate:
    seconds = choice.predicted_s or 0.0
    return Estimate(seconds, choice.low_s or seconds, choice.high_s or seconds)


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
    parts = [region.title, *region.rule.summary(region.shape), region.dtype, f"written {region.written}"]
    return ", ".join([*parts, *(["training"] if region.training else [])])


def _reason(region: Region) -> str:
    return region.choice.reason if region.choice else "no choice was made"


def _not_used(groups: list[list[Region]]) -> Iterator[str]:
    """Each form that refused, once for all settings that do so with one sentence, with the rows in which it did."""
    rows: dict[str, list[str]] = {}
    for number, group in enumerate(groups, 1):
        settings: dict[tuple[str, str], str] = {}
        for setting, why in group[0].choice.refused.items() if group[0].choice else ():
            settings.setdefault((form_name(setting), why), setting)
        for (_, why), setting in settings.items():
            rows.setdefault(f"{setting}: {why}", []).append(str(number))
    for refusal, numbers in rows.items():
        yield f"not used in {', '.join(numbers)}: {refusal}"


def _totals(report: ReportText) -> Iterator[str]:
    regions = report.regions
    rewritten = sum(r.choice is not None and r.choice.rewrites for r in regions)
    flops, moved = sum(r.flops for r in regions), sum(r.bytes for r in regions)
    yield (
        f"total: {_plural(len(regions), 'region')}, {rewritten} rewritten, {_amount(flops)}FLOP, {_amount(moved, 'B')}"
    )
    for kind, count in Counter(r.kind for r in regions).items():
        part = [r for r in regions if r.kind == kind]
        shares = (_share(sum(getattr(r, name) for r in part), of) for name, of in (("flops", flops), ("bytes", moved)))
        yield "  {} x{}: {} of the FLOP, {} of the bytes; {}".format(kind, count, *shares, _could_be(part))
    masks = Counter(r.mask for r in regions if isinstance(r, AttentionRegion))
    forms = Counter(r.choice.form if r.choice else NOT_CHOSEN for r in regions)
    for title, named in (("forms", forms), ("masks", masks)):
        if named:
            yield f"{title}: " + ", ".join(f"{name} x{count}" for name, count in named.items())
    timed = [r.choice for r in regions if r.choice is not None and speedup(r.choice) is not None]
    if timed:
        written, chosen = sum(c.written_s or 0.0 for c in timed), sum(map(_estimate, timed), Estimate(0.0, 0.0, 0.0))
        known = f"{len(timed)} of {_plural(len(regions), 'region')}"
        yield f"predicted for {known}: {Estimate(written, written, written)} as written, {chosen} as chosen"
    passes = ", ".join(f"{name} {seconds:.3f}" for name, seconds in report.timings.items())
    yield f"attnc's own time: {sum(report.timings.values()):.3f} s" + (f" ({passes})" if passes else "")


def _could_be(regions: Iterable[Region]) -> str:
    """The forms that apply to some of `regions`, by name, with the number of regions each one applies to."""
    known = [r.choice for r in regions if r.choice is not None]
    applies = Counter(name for c in known for name in set(map(form_name, (c.form, *c.offers))))
    del applies[AS_WRITTEN]
    named = ", ".join(f"{name} x{count}" for name, count in applies.most_common())
    return f"could be {named}" if named else "no form replaces it here"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f}%" if whole else "-"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _amount(value: float, unit: str = "") -> str:
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.4g} P{unit}"

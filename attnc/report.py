"""Reports: what was found in a model, what was chosen for it and why, as a table for people and as JSON for programs.

`print(report)` folds identical layers into one row (`model.layers.{0-31}.self_attn x32`); FLOP and bytes are those of
one such layer, forward. `report.to_json()` keeps every region apart and follows the JSON Schema
`attnc.report_json.SCHEMA`:

    schema      "attnc.report/2"; the number changes when a field changes its meaning or goes
    attnc       the version that wrote it; model, device: names; graphs: how many graphs Dynamo made of the model
    regions     [{kind, path, node, dtype, device, written, training, rule, shape, facts, flops, bytes, choice}]; `rule`
                reads back with the parse of the kind's rule; `facts` repeats rule and shape by name, with what only the
                kind has; `choice` is null or {form, reason, rewrites, predicted_s, written_s, speedup, refused:
                {form: sentence}, offers: {form: predicted seconds}, error, low_s, high_s, row_error, mass, kept,
                pays_from}; `error` is the measured relative error of an approximation and `row_error` its worst row's,
                low_s and high_s the interval of predicted_s, `mass` the probability and `kept` the pairs that it
                keeps, as shares, `pays_from` the length from which it is predicted to be faster than as written
    unmatched   [{anchor, reason, node, path}]: what looked like a region; the node where it stopped fitting, and why
    problems    sentences about graphs that could not be read
    notes       sentences about the libraries that are loaded
    timings     seconds attnc spent in each pass; counts: regions by kind, form, mask, and how many are rewritten

Units: times in seconds, costs in FLOP and bytes. A number that is not finite is null.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

from attnc import __version__
from attnc.errors import ArtifactError
from attnc.region import AttentionRegion, Region, Unmatched
from attnc.report_json import SCHEMA_ID, finite, region_content, region_of
from attnc.report_text import NOT_CHOSEN, ReportText


@dataclass(frozen=True)
class Report(ReportText):
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
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("regions", "unmatched", "problems", "notes"):
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
            notes=tuple(dict.fromkeys(n for report in reports for n in report.notes)),
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
            "masks": dict(Counter(r.mask for r in self.regions if isinstance(r, AttentionRegion))),
            "written": dict(Counter(r.written for r in self.regions)),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON that follows `SCHEMA`; `from_json` reads it back."""
        content = {
            "schema": SCHEMA_ID,
            "attnc": __version__,
            **{name: getattr(self, name) for name in ("model", "device", "graphs")},
            "regions": [region_content(r) for r in self.regions],
            "unmatched": [asdict(u) for u in self.unmatched],
            "problems": list(self.problems),
            "notes": list(self.notes),
            "timings": dict(self.timings),
            "counts": self.counts(),
        }
        return json.dumps(finite(content), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote. Raises: ArtifactError if `text` is none of this version."""
        try:
            content = json.loads(text)
            if content["schema"] != SCHEMA_ID:
                raise ValueError(f"schema {content['schema']!r}")
            return cls(
                regions=tuple(region_of(r) for r in content["regions"]),
                unmatched=tuple(Unmatched(**u) for u in content["unmatched"]),
                **{name: content[name] for name in ("problems", "notes", "timings", "graphs", "model", "device")},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise ArtifactError(
                f"read a report: found {type(exc).__name__}: {exc}; allowed is JSON that follows {SCHEMA_ID}. "
                "Read what Report.to_json() of this version of attnc wrote."
            ) from exc

"""A calibration: what each candidate setting costs in error, region by region, on a user's data; a JSON file.

A file holds sums and worst cases over the batches so far, so that a calibration that was stopped goes on, and a digest
of each batch, 16 characters, by which a batch is known again. It is read strictly and replaced in one step.

Source: DESIGN.md, sections 1 and 7 (an error budget measured on the user's data, from per-region errors).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from attnc import __version__
from attnc.atomic_file import replace_file
from attnc.errors import UsageError
from attnc.forms import parse_form
from attnc.strict_json import StrictReader

VERSION = 1
DIGEST = re.compile(r"[0-9a-f]{16}")
AGAIN = "Calibrate again with `attnc calibrate`, or name another file."
MOST = 1e300
COUNTS = ("batches", "sampled", "runs")


@dataclass(frozen=True)
class Judged:
    """One setting in one region on one batch: errors of its output, recovered mass and kept fraction where known."""

    error: float
    row: float
    mass: float | None = None
    kept: float | None = None


@dataclass
class Measured:
    """One setting in one region over the batches so far.

    seconds: predicted for one run at the lengths of the first batch. batches: that reached the region.
    error: Frobenius norm of what the region's output is off by over that of the output, the worst of the batches, and
           their mean; row: the same of a single row of the output, the worst.
    sampled: batches on which pairs were sampled; mass, kept: means of recovered mass and kept fraction.
    runs: of the model with this setting in this region alone; output: the worst error of the model's output; kl: mean
           of KL(exact || found) in nats over rows of the logits, and the worst of the runs; None where there are none.
    """

    seconds: float
    batches: int = 0
    error: float = 0.0
    mean_error: float = 0.0
    row: float = 0.0
    sampled: int = 0
    mass: float | None = None
    kept: float | None = None
    runs: int = 0
    output: float = 0.0
    kl: float | None = None
    worst_kl: float | None = None

    def add(self, found: Judged) -> None:
        """Count one batch."""
        self.batches += 1
        self.error, self.row = max(self.error, found.error), max(self.row, found.row)
        self.mean_error += (found.error - self.mean_error) / self.batches
        if found.mass is not None and found.kept is not None:
            self.sampled += 1
            self.mass = _mean(self.mass, found.mass, self.sampled)
            self.kept = _mean(self.kept, found.kept, self.sampled)

    def add_run(self, output: float, kl: float | None) -> None:
        """Count one run of the model with this setting alone."""
        self.runs += 1
        self.output = max(self.output, output)
        if kl is not None:
            self.kl, self.worst_kl = _mean(self.kl, kl, self.runs), max(self.worst_kl or 0.0, kl)


def _mean(before: float | None, found: float, count: int) -> float:
    return found if before is None else before + (found - before) / count


@dataclass
class RegionErrors:
    """The settings of one region by spelling, fastest first.

    key: of the region at the lengths of the first batch; identity: see `attnc.probes.identities`.
    exact_s: predicted seconds of what is exact. failed: settings that raise or give what is not finite, and why.
    refused: settings that do not apply, and why.
    """

    key: str
    identity: str
    exact_s: float
    settings: dict[str, Measured]
    failed: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


@dataclass
class Calibration:
    """Errors of settings by region, by the name that a plan gives it.

    device: that seconds are predicted for. pairs: how many (region, setting) pairs the model is run with per batch.
    digests: of the batches counted, in order.
    """

    model: str
    device: str
    pairs: int
    regions: dict[str, RegionErrors]
    digests: list[str] = field(default_factory=list)

    @property
    def batches(self) -> int:
        """How many batches are counted."""
        return len(self.digests)

    def to_json(self) -> str:
        """The calibration as JSON text; `from_json` reads it back."""
        body = {"attnc_calibration": VERSION, "attnc": __version__, **asdict(self)}
        return json.dumps(body, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "a calibration") -> Calibration:
        """The calibration that `text` holds. Raises: ArtifactError if it holds none, or one of another version."""
        return _calibration(StrictReader(where, AGAIN), text)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the file in one step. Raises: UsageError where it cannot be written."""
        try:
            replace_file(Path(file), (self.to_json() + "\n").encode())
        except OSError as exc:
            raise UsageError(
                f"write the calibration {file}: it cannot be written ({exc.strerror}). Name a file that can."
            ) from exc

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Calibration:
        """What `save` wrote. Raises: UsageError where there is no such file; ArtifactError where it holds another."""
        try:
            text = Path(file).read_bytes()
        except OSError as exc:
            raise UsageError(
                f"read the calibration {file}: it cannot be read ({exc.strerror}). Make it with `attnc calibrate`."
            ) from exc
        return cls.from_json(text, str(file))


def _calibration(reader: StrictReader, text: str | bytes) -> Calibration:
    data = reader.read(text)
    if type(data.get("attnc_calibration")) is not int or data["attnc_calibration"] != VERSION:
        reader.fail(f"version {data.get('attnc_calibration')!r:.40}", f"version {VERSION}")
    parts = ("attnc_calibration", "attnc", *(f.name for f in fields(Calibration)))
    reader.keys(data, "the calibration", parts, parts)
    digests = data["digests"]
    if type(digests) is not list:
        reader.fail(f"{type(digests).__name__} as digests", "a list of texts")
    found = Calibration(
        reader.text(data["model"], "model"),
        reader.text(data["device"], "device"),
        reader.count(data["pairs"], "pairs"),
        {_name(reader, n): _region(reader, n, r) for n, r in reader.table(data["regions"], "regions").items()},
        [reader.text(digest, "a digest", DIGEST) for digest in digests],
    )
    for name, region in found.regions.items():
        for spelling, measured in region.settings.items():
            if measured.batches > found.batches:
                reader.fail(
                    f"{measured.batches} batches of {spelling} in region {name!r:.80}",
                    f"at most {found.batches}, of which there are digests",
                )
    return found


def _name(reader: StrictReader, name: str) -> str:
    return name and reader.text(name, "the name of a region")  # that of the model itself is empty


def _region(reader: StrictReader, name: str, value: object) -> RegionErrors:
    place = f"region {name!r:.80}"
    given = reader.table(value, place)
    parts = tuple(f.name for f in fields(RegionErrors))
    reader.keys(given, place, parts, parts)
    settings = reader.table(given["settings"], f"settings of {place}")
    return RegionErrors(
        reader.text(given["key"], f"key of {place}"),
        reader.text(given["identity"], f"identity of {place}", most=1 << 16),
        reader.number(given["exact_s"], f"exact_s of {place}", 0.0, MOST),
        {_spelling(reader, spelling, place): _measured(reader, f"{spelling:.80} of {place}", found)
         for spelling, found in settings.items()},
        _sentences(reader, given["failed"], f"failed of {place}"),
        _sentences(reader, given["refused"], f"refused of {place}"),
    )  # fmt: skip


def _spelling(reader: StrictReader, spelling: str, place: str) -> str:
    try:
        form = parse_form(spelling)
    except UsageError as exc:
        reader.fail(f"{spelling!r:.80} in {place}", f"a form of this version ({exc})")
    if form.spell() != spelling:
        reader.fail(f"{spelling!r:.80} in {place}", f"{form.spell()}, all knobs in their order")
    return spelling


def _sentences(reader: StrictReader, value: object, place: str) -> dict[str, str]:
    return {
        reader.text(n, place): reader.text(why, place, most=1 << 16) for n, why in reader.table(value, place).items()
    }


def _measured(reader: StrictReader, place: str, value: object) -> Measured:
    given = reader.table(value, place)
    parts = tuple(f.name for f in fields(Measured))
    reader.keys(given, place, parts, parts)
    read: dict[str, Any] = {}
    for part, found in given.items():
        if part in COUNTS:
            read[part] = reader.count(found, f"{part} of {place}")
        elif found is None and part in ("mass", "kept", "kl", "worst_kl"):
            read[part] = None
        else:
            most = 1.0 if part in ("mass", "kept") else MOST
            read[part] = reader.number(found, f"{part} of {place}", 0.0, most)
    return Measured(**read)


def is_finite(found: Judged) -> bool:
    """Whether the errors are numbers that a calibration can hold."""
    return math.isfinite(found.error) and math.isfinite(found.row)


def resumed(file: Calibration, asked: Calibration, where: str) -> Calibration:
    """`file`, to go on with. Raises: UsageError where it is of another model, device or number of pairs, or of other
    regions or settings than what is `asked`."""
    for what in ("model", "device", "pairs"):
        found, wanted = getattr(file, what), getattr(asked, what)
        if found != wanted:
            raise _other(where, f"{what} {found!r}", repr(wanted))
    if list(file.regions) != list(asked.regions):
        raise _other(where, f"the regions {_listed(file.regions)}", _listed(asked.regions))
    for name, region in file.regions.items():
        wanted = asked.regions[name]
        if region.identity != wanted.identity:
            raise _other(where, f"region {name!r} as {region.identity}", wanted.identity)
        if list(region.settings) != list(wanted.settings):
            odd = sorted(region.settings.keys() ^ wanted.settings.keys()) or ["another order"]
            raise _other(where, f"other settings in region {name!r} ({', '.join(odd[:3])})", "the same forms")
    return file


def _other(where: str, found: str, allowed: str) -> UsageError:
    return UsageError(
        f"go on with the calibration {where}: found {found}, allowed is {allowed}. Ask for what it began with, or name "
        "another file."
    )


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(map(repr, list(names)[:6])) or "none"

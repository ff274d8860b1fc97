"""Records: what tuning found, one JSON file per region, device, dtype and versions; the time of every setting tried.

A file is read strictly and replaced in one step, under a lock that dies with its holder; what two processes found for
one key is merged. Nothing depends on clocks: `date` is for people.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not a Unix: writers are then not kept apart
    fcntl = None  # type: ignore[assignment]

from attnc import __version__
from attnc.atomic_file import private_folder, replace_file
from attnc.codegen.compile_stats import triton_version
from attnc.cost_models.estimate import Estimate
from attnc.errors import ArtifactError
from attnc.strict_json import StrictReader

log = logging.getLogger("attnc.records")

VERSION = 1
PARTS = ("attnc_record", "key", "shape", "seed", "date", "default", "best", "timings")
SHORTEST, LONGEST = 1e-9, 1e5  # seconds a kernel may take
SPELLING = re.compile(r"\w+(\{[\w.+=,\- ]*\})?")
DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00")
WORD = re.compile(r"[\w.+\-]{1,80}")
AGAIN = "Tune again with `attnc tune`, or delete the file."


@dataclass(frozen=True)
class RecordKey:
    """What a tuning result is for, and what it was made by. kernel: hash of the kernel's source."""

    region: str
    device: str
    dtype: str
    kernel: str
    attnc: str = __version__
    triton: str = field(default_factory=lambda: triton_version() or "none")

    @property
    def what(self) -> str:
        return f"{self.region} on {self.device} in {self.dtype}"

    @property
    def made_by(self) -> str:
        return f"attnc {self.attnc}, Triton {self.triton}, kernel {self.kernel[:12]}"

    @property
    def stem(self) -> str:
        """Start of the names of all files for this region, device and dtype."""
        return f"{_file_word(self.device)}-{_file_word(self.dtype)}-{_digest(self.region, self.device, self.dtype)}"

    @property
    def file(self) -> str:
        return f"{self.stem}-{_digest(self.attnc, self.triton, self.kernel)}.json"


def _digest(*words: str) -> str:
    return sha256("\0".join(words).encode("utf-8", "replace")).hexdigest()[:16]


def _file_word(word: str) -> str:
    return re.sub(r"[^\w.]", "_", word)[:40]


@dataclass(frozen=True)
class Timing:
    """Seconds of one setting by closed form, compiled, measured with a relative `error`; or why it failed."""

    predicted_s: float | None = None
    compiled_s: float | None = None
    measured_s: float | None = None
    error: float | None = None
    failure: str | None = None

    def at(self, fidelity: str) -> float | None:
        """Seconds at "predict", "compile" or "measure"; None where unknown or the setting failed."""
        return None if self.failure else getattr(self, TIMES[fidelity])

    @property
    def spread(self) -> Estimate:
        """A measured time with its error on either side."""
        assert self.measured_s is not None
        error = min(0.99, _or(self.error, 0.0))
        return Estimate(self.measured_s, self.measured_s * (1 - error), self.measured_s * (1 + error))

    def merged(self, later: Timing) -> Timing:
        """Both: a failure stays; of two measured times the slower one, so that luck never wins."""
        measured = [t for t in (self, later) if t.measured_s is not None]
        kept = max(measured, key=lambda t: (_or(t.measured_s, 0.0), _or(t.error, 0.0)), default=later)
        return Timing(
            _or(later.predicted_s, self.predicted_s),
            _or(later.compiled_s, self.compiled_s),
            kept.measured_s,
            kept.error,
            _or(self.failure, later.failure),
        )


TIMES = {"predict": "predicted_s", "compile": "compiled_s", "measure": "measured_s"}


def _or(value: Any, other: Any) -> Any:
    return other if value is None else value


def told(timing: Timing) -> dict[str, Any]:
    """The timing as a table for a file, without what is unknown; `timing_of` reads it back."""
    return {part: value for part, value in asdict(timing).items() if value is not None}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def best_of(timings: Mapping[str, Timing], default: str) -> str | None:
    """The fastest setting at the dearest fidelity at which the default has a time, where it beats the default.

    A difference within the spread of the two measured times is a tie, and ties go to the default. Where the default
    failed, the fastest at the dearest fidelity of any; None where every setting failed.
    """
    base = timings.get(default, Timing())
    for fidelity in reversed(TIMES):
        held = base.at(fidelity)
        if held is None and default in timings and not base.failure:
            continue
        times = sorted((s, name) for name, t in timings.items() if (s := t.at(fidelity)) is not None)
        if held is None:
            if times:
                return times[0][1]
            continue
        for seconds, name in times:
            spreads = (timings[name].error, base.error) if fidelity == "measure" else ()
            if seconds < held * (1 - min(1.0, math.hypot(*(_or(e, 0.0) for e in spreads)))):
                return name
        return default
    return None


@dataclass(frozen=True)
class Record:
    """A tuning result. shape: sizes the times are for. timings: by spelling, every setting tried."""

    key: RecordKey
    default: str
    timings: Mapping[str, Timing] = field(hash=False)
    shape: Mapping[str, int] = field(default_factory=dict, hash=False)
    seed: int = 0
    date: str = field(default_factory=_now, compare=False)

    @property
    def best(self) -> str | None:
        """Spelling of the setting to use, never slower than the default; None where every setting failed."""
        return best_of(self.timings, self.default)

    def merged(self, later: Record) -> Record:
        """What both know; where they differ in what follows from the key, `later` is kept."""
        timings = dict(self.timings)
        for name, timing in later.timings.items():
            timings[name] = timings[name].merged(timing) if name in timings else timing
        return replace(later, timings=timings)

    def to_json(self) -> str:
        """The record as JSON text; `from_json` reads it back."""
        body = {
            "attnc_record": VERSION,
            "key": asdict(self.key),
            "shape": dict(self.shape),
            "seed": self.seed,
            "date": self.date,
            "default": self.default,
            "best": self.best,
            "timings": {n: told(t) for n, t in self.timings.items()},
        }
        return json.dumps(body, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "a record") -> Record:
        """The record that `text` holds. Raises: ArtifactError if it holds none, or one of another version."""
        return _record(StrictReader(where, AGAIN), text)


def _record(reader: StrictReader, text: str | bytes) -> Record:
    data = reader.read(text)
    if type(data.get("attnc_record")) is not int or data["attnc_record"] != VERSION:
        reader.fail(f"version {data.get('attnc_record')!r:.40}", f"version {VERSION}")
    reader.keys(data, "the record", PARTS, PARTS)
    key = reader.table(data["key"], "key")
    parts = tuple(f.name for f in fields(RecordKey))
    reader.keys(key, "key", parts, parts)
    for part in parts:
        reader.text(key[part], f"key {part}", None if part == "region" else WORD)
    shape = reader.table(data["shape"], "shape")
    timings = {
        reader.text(name, "a setting", SPELLING): timing_of(body, f"timing of {name:.80}", reader)
        for name, body in reader.table(data["timings"], "timings").items()
    }
    date = reader.text(data["date"], "date", DATE)
    record = Record(
        RecordKey(**key),
        reader.text(data["default"], "default", SPELLING),
        timings,
        {reader.text(name, "a size", WORD): reader.count(size, f"size {name}") for name, size in shape.items()},
        reader.count(data["seed"], "seed"),
        date,
    )
    if data["best"] != record.best:
        reader.fail(f"{data['best']!r:.80} as best", f"{record.best!r}, which follows from its timings")
    return record


def timing_of(body: object, place: str, reader: StrictReader | None = None) -> Timing:
    """The timing that a table read from a file holds. Raises: ArtifactError if it holds none."""
    reader = reader or StrictReader(place, AGAIN)
    given = reader.table(body, place)
    reader.keys(given, place, tuple(f.name for f in fields(Timing)), ())
    read: dict[str, Any] = {}
    for part, value in given.items():
        if part == "failure":
            read[part] = reader.text(value, f"{part} in {place}")
        else:
            limits = (0.0, 100.0) if part == "error" else (SHORTEST, LONGEST)
            read[part] = reader.number(value, f"{part} in {place}", *limits)
    return Timing(**read)


class Records:
    """A folder of records. Where it cannot be written, one warning, and results stay in this object."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._kept: dict[RecordKey, Record] = {}
        self._said: set[str] = set()

    def find(self, key: RecordKey) -> Record | None:
        """The record for `key`; a warning where there is none but one that other versions made, or it is broken."""
        stored, kept = self._read(key), self._kept.get(key)
        found = stored.merged(kept) if stored and kept else stored or kept
        if found is None:
            for sentence in self.stale(key):
                self._say(sentence)
        return found

    def stale(self, key: RecordKey) -> list[str]:
        """A sentence per record for the same region, device and dtype that another version or kernel made."""
        sentences = []
        for file in sorted(self.directory.glob(f"{key.stem}-*.json")):
            if file.name == key.file:
                continue
            try:
                other = Record.from_json(file.read_bytes(), str(file)).key
            except (ArtifactError, OSError) as exc:
                sentences.append(str(exc))
                continue
            sentences.append(
                f"record of {key.what}: found one by {other.made_by}, allowed is {key.made_by}; it is not used. "
                "Tune again with `attnc tune`."
            )
        return sentences

    def put(self, record: Record) -> Record:
        """Keep `record`, merged with what is stored for its key; returns both."""
        kept = self._kept.get(record.key)
        merged = kept.merged(record) if kept else record
        try:
            private_folder(self.directory)
            with locked(self.directory / "records.lock"):
                stored = self._read(record.key, self._set_aside)
                merged = stored.merged(merged) if stored else merged
                text = merged.to_json()
                Record.from_json(text)  # what could not be read again is not written
                replace_file(self.directory / record.key.file, text.encode())
            self._kept.pop(record.key, None)
        except OSError as exc:
            self._kept[record.key] = merged
            said = f"records are not written to {self.directory} ({exc}): they are kept in this process"
            self._say(said, about="unwritable")
        return merged

    def _read(self, key: RecordKey, broken: Callable[[Path], None] | None = None) -> Record | None:
        file = self.directory / key.file
        try:
            record = Record.from_json(file.read_bytes(), str(file))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ArtifactError, OSError) as exc:
            self._say(str(exc))
            if broken is not None:
                broken(file)
            return None
        if record.key != key:
            self._say(f"read {file}: found a record of {record.key.what}, allowed is {key.what}. {AGAIN}")
            return None
        return record

    def _set_aside(self, file: Path) -> None:
        """A file that cannot be read is kept under another name, so that a new one can be written."""
        file.replace(file.with_suffix(".broken"))

    def _say(self, sentence: str, about: str = "") -> None:
        if (about or sentence) not in self._said:
            self._said.add(about or sentence)
            log.warning("%s", sentence)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock of `file`, waiting for it; the system lets go of it when the holder dies. Raises: OSError."""
    with file.open("a+b") as held:
        if fcntl is not None:
            fcntl.flock(held, fcntl.LOCK_EX)
        yield

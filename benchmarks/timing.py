"""Measuring: interleaved timing, errors, peak memory in a fresh process, the record of where a number comes from.

    python benchmarks/timing.py               prints that record
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Seconds of each round, in order."""

    rounds: tuple[float, ...]

    @property
    def best(self) -> float:
        return min(self.rounds)

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Time each of `runs`, warmed up already, once a round; each round begins with another one of them."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        at = turn % max(len(names), 1)
        for name in names[at:] + names[:at]:
            gc.collect()
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def relative_error(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """The largest max|got - want| / max|want| over pairs of tensors; nan where a number is none or shapes differ."""
    if len(got) != len(want) or any(a.shape != b.shape for a, b in zip(got, want, strict=False)):
        return float("nan")
    worst = [
        (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-300)
        for a, b in zip(got, want, strict=True)
    ]
    return torch.stack(worst).max().item()  # max of a tensor keeps nan


# A fresh process.


def in_fresh_process(work: Callable[..., T], *args: Any, environment: Mapping[str, str] | None = None) -> T:
    """What `work(*args)` returns in a new interpreter that sees `environment` too. `work` must be importable."""
    with _environment(environment or {}), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def peak_memory(run: Callable[[], object]) -> dict[str, float]:
    """Resident MiB of this process: before one call of `run`, already warmed up, and at its peak.

    Linux forgets an earlier peak when asked; elsewhere the peak is the process's, compiling included.
    """
    gc.collect()
    if platform.system() == "Linux":
        ctypes.CDLL(None).malloc_trim(0)
    before, forgotten = _status("VmRSS"), _forget_peak()
    run()
    peak = _status("VmHWM") if forgotten else _own_peak()
    return {"before_mib": before, "peak_mib": peak, "above_mib": peak - before, "compile_included": not forgotten}


def _forget_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), float("nan"))


def _own_peak() -> float:
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


# Where a number comes from.


def environment() -> dict[str, object]:
    """Versions, machine, load and commit."""
    dirty = _git("status", "--porcelain")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("transformers", "attnc")},
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "commit": _git("rev-parse", "--short", "HEAD") + (" with changes" if dirty else ""),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _git(*command: str) -> str:
    try:
        done = subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def print_environment() -> dict[str, object]:
    record = environment()
    print(", ".join(f"{name} {value}" for name, value in record.items()), flush=True)
    return record


# What is shown and kept.


def write_result(
    name: str, before: Mapping[str, object], settings: Mapping[str, object], rows: object, folder: str = "cpu"
) -> Path:
    """Keep `rows` in results/<folder>/<name>.json with what they were measured on, before and after."""
    path = RESULTS / folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": before, "load_average_after": os.getloadavg(), "settings": settings, "rows": rows}
    path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return path


def write_part(
    name: str,
    before: Mapping[str, object],
    settings: Mapping[str, object],
    parts: Mapping[str, object],
    folder: str = "cpu",
) -> Path:
    """Keep each of `parts`, rows by name, in results/<folder>/<name>.json with what it was made on; others stay."""
    path = RESULTS / folder / f"{name}.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}
    made = {part: {"environment": before, "rows": rows} for part, rows in parts.items()}
    return write_result(name, before, settings, {**kept, **made}, folder)


def exponent(lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """p of the least-squares fit of seconds = c * length**p."""
    return statistics.linear_regression([math.log(n) for n in lengths], [math.log(s) for s in seconds]).slope


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Plain columns; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[at]) for row in [list(headings), *cells]) for at in range(len(headings))]
    numeric = [bool(cells) and all(_is_number(row[at]) for row in cells) for at in range(len(headings))]
    for row in [list(headings), ["-" * width for width in widths], *cells]:
        aligned = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        print("  ".join(aligned).rstrip(), flush=True)


def _is_number(cell: str) -> bool:
    return cell == "-" or cell[:1].isdigit() or cell == "nan"


if __name__ == "__main__":
    print_environment()

"""What a kernel costs a target, from compiling it ahead of time: no GPU needed.

    compile_for(text, "attend", {"q": "*bf16", "stride": "i32:16"}, {"BLOCK_M": 128}, "cuda:90", num_warps=8)

gives registers, spills, stack, shared memory and the instructions of the hottest loop, or a sentence why not. Results
are kept on disk by content: source, arguments, target, settings, Triton's version and our own reading of the assembly.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from attnc.atomic_file import private_folder, replace_file
from attnc.codegen.compile_pool import POOL
from attnc.options import Options

# Shared memory that one block may ask for, in bytes (CUDA programming guide, table of compute capabilities; AMD ISA
# documents, LDS per workgroup).
SHARED_LIMIT = {
    "cuda:80": 166912,
    "cuda:86": 101376,
    "cuda:89": 101376,
    "cuda:90": 232448,
    "cuda:100": 232448,
    "cuda:120": 101376,
    "hip:gfx942": 65536,
    "hip:gfx950": 163840,
}
TARGETS = tuple(SHARED_LIMIT)
TIMEOUT_S = 120.0
DISTRIBUTIONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm")


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a kernel.

    registers: 32-bit, of a thread. spill_bytes: stored to the stack, of a thread. shared_bytes: of a block, dynamic.
    instructions: class -> count in one pass of the hottest loop, of one warp; classes in `attnc.codegen.assembly`.
    """

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    threads: int
    instructions: Mapping[str, int] = field(hash=False)


@dataclass(frozen=True)
class Failure:
    """Why there is no kernel, as one sentence. transient: another try may end otherwise (time, memory)."""

    sentence: str
    transient: bool = False


@dataclass(frozen=True)
class Job:
    """One kernel for one target.

    signature:  argument -> Triton type, "*bf16", "i32", "fp32"; ":16" behind it says divisible by 16, which pointers
                are taken to be (":1" says they are not).
    constexprs: argument -> number, bool, None, text, or a type as "tl.float16"; arguments that are None or 1 at the
                launch are constants too.
    options:    further options of Triton's backend, such as maxnreg or waves_per_eu.
    """

    text: str = field(repr=False)
    kernel: str
    signature: Mapping[str, str] = field(hash=False)
    constexprs: Mapping[str, Any] = field(hash=False)
    target: str
    num_warps: int = 4
    num_stages: int = 2
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> str:
        """Hash of all that decides the result."""
        content = json.dumps([asdict(self), triton_version(), _reader_hash()], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def compile_for(
    text: str,
    kernel: str,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    target: str,
    num_warps: int = 4,
    num_stages: int = 2,
    *,
    options: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Compiled | Failure:
    """Compile one kernel of the Triton source `text` for a target that need not be present; see `Job`.

    folder: of kept results; by default "compiled" in the store of `Options`.
    """
    job = Job(text, kernel, signature, constexprs, target, num_warps, num_stages, options or {})
    return compile_job(job, folder=folder, timeout_s=timeout_s)


def compile_many(
    jobs: Iterable[Job], *, workers: int | None = None, folder: str | Path | None = None, timeout_s: float = TIMEOUT_S
) -> list[Compiled | Failure]:
    """Compile jobs in parallel, by default one worker for each core (8 at most); results in the order of the jobs."""
    count = workers or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda job: compile_job(job, folder=folder, timeout_s=timeout_s), jobs))


def compile_job(job: Job, *, folder: str | Path | None = None, timeout_s: float = TIMEOUT_S) -> Compiled | Failure:
    """The kept result of a job, else what the compiler says now; a crash, hang or lack of memory is a Failure."""
    refusal = refuse(job)
    if refusal is not None:
        return Failure(refusal)
    room = Path(folder) if folder is not None else compiled_folder(Options().store)
    path = room / f"{job.key}.json"
    found = _kept(path)
    if found is None:
        found = POOL.run(asdict(job), timeout_s)
        if not found.get("transient"):
            _keep(path, found)
    return _outcome(job, found)


def compiled_folder(store: str | Path) -> Path:
    """Where results lie in the user's store (`Options.store`)."""
    return Path(store) / "compiled"


def refuse(job: Job) -> str | None:
    """Why the job is not even tried, or None."""
    if job.target not in SHARED_LIMIT:
        return (
            f"target {job.target!r}: kernels are compiled for {', '.join(TARGETS)}. "
            "Choose a device with one of these, or a form without a kernel."
        )
    if triton_version() is None:
        return f"kernel {job.kernel} for {job.target}: Triton is not installed, which compiles it. Install triton>=3.6."
    if job.num_warps not in (1, 2, 4, 8, 16, 32) or job.num_stages < 1:
        return (
            f"kernel {job.kernel} with {job.num_warps} warps and {job.num_stages} stages: "
            "allowed are 1, 2, 4, 8, 16 or 32 warps and at least one stage."
        )
    return None


@lru_cache(maxsize=1)
def triton_version() -> str | None:
    """Version of the installed Triton, without importing it; None where there is none."""
    for name in DISTRIBUTIONS:
        with suppress(PackageNotFoundError):
            return version(name)
    return None


@lru_cache(maxsize=1)
def _reader_hash() -> str:
    """Hash of the code that reads the assembly: kept results of another reading are not ours."""
    here = Path(__file__).parent
    return hashlib.sha256(b"".join((here / f).read_bytes() for f in ("assembly.py", "compile_worker.py"))).hexdigest()


def _outcome(job: Job, found: Mapping[str, Any]) -> Compiled | Failure:
    what = f"kernel {job.kernel} for {job.target}, {job.num_warps} warps, {job.num_stages} stages"
    if "failure" in found:
        return Failure(f"{what}: {found['failure']} (Triton {triton_version()}).", bool(found.get("transient")))
    compiled = Compiled(**found)
    if compiled.shared_bytes > SHARED_LIMIT[job.target]:
        return Failure(
            f"{what}: needs {compiled.shared_bytes} bytes of shared memory, a block has {SHARED_LIMIT[job.target]}. "
            "Use smaller blocks or fewer stages."
        )
    return compiled


_NUMBERS = ("registers", "spill_bytes", "stack_bytes", "shared_bytes", "threads")


def _kept(path: Path) -> dict[str, Any] | None:
    """A kept result; None where there is none, or it is not whole."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("found"), dict):
        return None
    found = entry["found"]
    if entry.get("sum") != _sum(found) or not (_is_failure(found) or _is_figures(found)):
        return None
    return found


def _is_failure(found: Mapping[str, Any]) -> bool:
    return set(found) == {"failure"} and isinstance(found["failure"], str)


def _is_figures(found: Mapping[str, Any]) -> bool:
    counts = found.get("instructions")
    if not isinstance(counts, dict):
        return False
    numbers = [*(found.get(n) for n in _NUMBERS), *counts.values()]
    return set(found) == {*_NUMBERS, "instructions"} and all(type(n) is int and n >= 0 for n in numbers)


def _sum(found: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _keep(path: Path, found: Mapping[str, Any]) -> None:
    """Write whole or not at all; a folder that cannot be written costs only the next compile."""
    with suppress(OSError):
        replace_file(private_folder(path.parent) / path.name, json.dumps({"found": found, "sum": _sum(found)}).encode())

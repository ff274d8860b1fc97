"""Child processes that compile, handed from thread to thread: a crash, a hang or hunger costs one job, not the caller.

Each worker reads one line of JSON and writes one (`attnc.codegen.compile_worker`).
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Any

from attnc.options import environment_without

MEMORY_BYTES = 12 << 30  # address space of a worker; LLVM reserves far more than it touches
JOBS_PER_WORKER = 400  # the compiler never gives its memory back in full


class Worker:
    """One child process; its compilers (ptxas) share its process group and end with it."""

    def __init__(self) -> None:
        self.jobs = 0
        self.folder = tempfile.TemporaryDirectory(prefix="attnc-compile-", ignore_cleanup_errors=True)
        self.complaints: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the worker
        self.child = subprocess.Popen(
            [sys.executable, "-m", "attnc.codegen.compile_worker", self.folder.name, str(MEMORY_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            env=environment_without("TRITON_INTERPRET"),
            start_new_session=True,
        )

    def run(self, job: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """The worker's answer, {"failure": why} where it gives none in time."""
        self.jobs += 1
        self.complaints.seek(0)
        self.complaints.truncate()
        assert self.child.stdin is not None and self.child.stdout is not None
        try:
            self.child.stdin.write(json.dumps(job).encode() + b"\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            return self._crash()
        ready, _, _ = select.select([self.child.stdout], [], [], timeout_s)
        if not ready:
            self.end()
            return {"failure": f"the compiler was stopped after {timeout_s:g} s", "transient": True}
        line = self.child.stdout.readline()
        if not line.endswith(b"\n"):
            return self._crash()
        return json.loads(line)

    def _crash(self) -> dict[str, Any]:
        code = self.child.wait()
        self.complaints.seek(0)
        lines = [s.strip() for s in self.complaints.read().decode(errors="replace").splitlines() if s.strip()]
        telling = [s for s in lines if "LLVM ERROR" in s or "Assertion" in s or "bad_alloc" in s] or lines[-1:]
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        self.end()
        said = f": {telling[0][:200]}" if telling else ""
        return {"failure": f"the compiler ended {how}{said}", "transient": True}

    @property
    def is_alive(self) -> bool:
        return self.child.poll() is None and self.jobs < JOBS_PER_WORKER

    def end(self) -> None:
        """Stop the worker and all it started."""
        with suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        for pipe in (self.child.stdin, self.child.stdout, self.complaints):
            if pipe is not None and not pipe.closed:
                with suppress(BrokenPipeError):  # a line that the worker no longer read
                    pipe.close()
        self.folder.cleanup()


class Pool:
    """Idle workers; a job takes one, or starts one where none is idle."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.idle: list[Worker] = []
        self.kept: list[Worker] = []  # of the parent process

    def run(self, job: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Run a job on an idle worker, waiting for no other thread."""
        with self.lock:
            worker = self.idle.pop() if self.idle else None
        if worker is None or not worker.is_alive:
            if worker is not None:
                worker.end()
            worker = Worker()
        try:
            return worker.run(job, timeout_s)
        except BaseException:  # Ctrl-C must not leave an answer in the pipe for the next job
            worker.end()
            raise
        finally:
            with self.lock:
                if worker.is_alive:
                    self.idle.append(worker)

    def close(self) -> None:
        """End the idle workers; the pool can be used again."""
        with self.lock:
            idle, self.idle = self.idle, []
        for worker in idle:
            worker.end()

    def forget(self) -> None:
        """In a forked child: the workers are the parent's, leave them and their folders to it."""
        self.lock = threading.Lock()
        self.kept, self.idle = self.idle, []


POOL = Pool()
atexit.register(POOL.close)
if hasattr(os, "register_at_fork"):  # Triton runs on Linux alone, but this module is imported everywhere
    os.register_at_fork(after_in_child=POOL.forget)

"""The local CPU measured: memory by copying, matrix products per dtype, softmax, the cost of a call.

Engines of cpu.toml, which take a compiler and minutes to measure (benchmarks/cost_fit.py), are carried over in the
ratio of the products and of the softmax measured here to those of that file; their launches, and the interval of times
predicted from them, as they stand there.

Source: copy bandwidth as in McCalpin, STREAM, https://www.cs.virginia.edu/stream/ (read and write counted once each).
"""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from attnc.cost_models.device import device_named
from attnc.cost_models.device_kinds import Cpu, Engine
from attnc.cost_models.figures import Figures

BUDGET_S = 0.5  # per measurement, of which there are eight
COPIED_BYTES = 1 << 27  # beyond the last-level caches
SIDE = 512
DTYPES = (torch.float64, torch.bfloat16, torch.float16)
CPUINFO = Path("/proc/cpuinfo")


def measure_cpu(budget_s: float = BUDGET_S, copied_bytes: int = COPIED_BYTES, side: int = SIDE) -> Cpu:
    """The figures of one thread of this CPU, under the name "this-cpu"; about 8 * `budget_s` seconds.

    copied_bytes: of the copy that bandwidth is measured with. side: of the square matrices multiplied.
    """
    threads = torch.get_num_threads()
    with _threads(threads):
        together = _bandwidth(copied_bytes, budget_s)
    with _threads(1):
        alone = _bandwidth(copied_bytes, budget_s)
        matmul = _matmul(torch.float32, side, budget_s)
        speeds = {str(d).removeprefix("torch."): _matmul(d, side, budget_s) / matmul for d in DTYPES}
        exps = _softmax(side, budget_s)
        launch = _launch(budget_s)
    known = device_named("cpu", 1)
    engines = {
        name: Engine(
            _rounded(engine.rate * matmul / known.matmul),
            _rounded(engine.elements * exps / known.exps),
            engine.launch_s,
        )
        for name, engine in known.engines
    }
    return Cpu(
        name="this-cpu",
        bandwidth=_rounded(alone),
        bandwidth_threads=min(max(round(together / alone), 1), threads),
        matmul=_rounded(matmul),
        exps=_rounded(exps),
        launch_s=_rounded(launch),
        dtype_speed=Figures(tuple((name, _rounded(speed)) for name, speed in speeds.items())),
        interval=known.interval,
        source=(("figures", f"attnc devices --measure: {cpu_model()}, torch {torch.__version__}"),),
        engines=tuple(engines.items()),
    )


def device_text(cpu: Cpu) -> str:
    """A device file that describes `cpu`, given for one thread; `load_devices` reads it back."""
    lines = [
        "# Written by `attnc devices --measure`. Units: FLOP/s, scores/s, bytes/s, seconds, each of one thread.",
        "# bandwidth, matmul, exps, launch_s and dtype_speed were measured; the engines are those of attnc's cpu.toml",
        "# in the ratio of matmul and of exps (scores/s of a softmax); launches and interval (of measured over",
        "# predicted times) as they stand there.",
        "",
        f"[{cpu.name}]",
        'kind = "cpu"',
        f"bandwidth = {cpu.bandwidth:g}",
        f"bandwidth_threads = {cpu.bandwidth_threads}",
        f"matmul = {cpu.matmul:g}",
        f"exps = {cpu.exps:g}",
        f"launch_s = {cpu.launch_s:g}",
        f"dtype_speed = {_inline(cpu.dtype_speed)}",
        f"interval = {_inline(cpu.interval)}",
        "source = { " + ", ".join(f'{key} = "{text}"' for key, text in cpu.source) + " }",
    ]
    for name, engine in cpu.engines:
        lines += ["", f"[{cpu.name}.engines.{name}]"]
        lines += [f"rate = {engine.rate:g}", f"elements = {engine.elements:g}", f"launch_s = {engine.launch_s:g}"]
    return "\n".join(lines) + "\n"


def cpu_model() -> str:
    """What the operating system calls this CPU, with its vector instructions."""
    lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines() if CPUINFO.is_file() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    plain = "".join(c for c in named or platform.processor() or platform.machine() if c.isalnum() or c in " ()@.-")
    return f"{plain} ({torch.backends.cpu.get_cpu_capability()})"


def _bandwidth(copied_bytes: int, budget_s: float) -> float:
    source = torch.ones(copied_bytes // 4)
    target = torch.empty_like(source)
    return 2 * copied_bytes / _seconds(lambda: target.copy_(source), budget_s)


def _matmul(dtype: torch.dtype, side: int, budget_s: float) -> float:
    left, right = (torch.ones(side, side, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _seconds(lambda: left @ right, budget_s)


def _softmax(side: int, budget_s: float) -> float:
    """Scores per second through a scale and a softmax, as attention spelled out does them."""
    scores = torch.ones(8, side, side)
    return scores.numel() / _seconds(lambda: torch.softmax(scores * 0.125, -1), budget_s)


def _launch(budget_s: float) -> float:
    """Of an operation of four numbers."""
    few = torch.ones(4)

    def hundred() -> None:
        for _ in range(100):
            few.neg()

    return _seconds(hundred, budget_s) / 100


def _seconds(run: Callable[[], object], budget_s: float) -> float:
    """Least of the runs that fit into the budget, after one to warm up; at least one."""
    run()
    start = now = time.perf_counter()
    best = float("inf")
    while best == float("inf") or now - start < budget_s:
        before = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - before)
    return max(best, 1e-9)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _inline(figures: Mapping[str, float]) -> str:
    return "{ " + ", ".join(f"{key} = {value:g}" for key, value in figures.items()) + " }"

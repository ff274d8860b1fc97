"""A rewritten region holds neither its mask nor its scores, and keys once per key head: peak memory, operands."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.tiny import compiled

LENGTH, HEADS, WIDTH = 8192, 4, 16
PEAK = """
import sys, torch
from pathlib import Path
from tests.end_to_end.test_memory import HEADS, LENGTH, WIDTH
from tests.tiny import compiled

def status(key):  # kB of this process
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(key + ":"))

def windowed(q, k, v):
    at = torch.arange(q.shape[2])
    far = at[:, None] - at
    k, v = (t.repeat_interleave(HEADS, 1) for t in (k, v))
    scores = q @ k.mT * 0.25
    return scores.masked_fill((far < 0) | (far >= 64), float("-inf")).softmax(-1) @ v

torch.set_num_threads(1)
q, k, v = (torch.randn(1, heads, LENGTH, WIDTH) for heads in (HEADS, 1, 1))
run = compiled(windowed, force="block_sparse{provider=blocked,block_m=64,block_n=64}", dynamic=False)
for train in (False, True):
    q, k, v = (t.detach().requires_grad_(train) for t in (q, k, v))
    for measured in (False, True):
        if measured:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here on
            before = status("VmRSS")
        run(q, k, v).sum().backward() if train else run(q, k, v)
    print("PEAK", (status("VmHWM") - before) * 1024)
"""


@pytest.fixture(scope="module")
def peaks() -> dict[str, float]:
    """Bytes that a call adds at its peak, without and with its backward, in one process of its own."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    out = subprocess.run([sys.executable, "-c", PEAK], cwd=ROOT, env=environment, capture_output=True, text=True,
                         timeout=300)
    assert out.returncode == 0, out.stderr[-2000:]
    return dict(zip(("run", "trained"), map(float, out.stdout.split("PEAK")[1:]), strict=True))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from Linux's /proc")
@pytest.mark.parametrize("mode", ["run", "trained"])
def test_no_tensor_of_all_pairs_exists(mode, peaks):
    assert peaks[mode] < LENGTH * LENGTH, f"{peaks[mode] / 2**20:.0f} MiB: more than one boolean for each pair"


@pytest.mark.parametrize("form", ["dense", "block_sparse{provider=blocked,block_m=64,block_n=64}"])
def test_repeated_heads_are_read_as_they_are_stored(form):
    def grouped(q, k, v):
        k, v = (t[:, :, None].expand(-1, -1, 4, -1, -1).reshape(q.shape) for t in (k, v))
        at = torch.arange(q.shape[2])
        far = at[:, None] - at
        return (q @ k.mT * 0.25).masked_fill((far < 0) | (far >= 64), -torch.inf).softmax(-1) @ v

    q, k, v = (torch.randn(1, heads, 256, 16) for heads in (8, 2, 2))
    fast = compiled(grouped, force=form, inner="eager")
    fast(q, k, v)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        fast(q, k, v)
    read = [event.input_shapes[1:3] for event in profile.events() if "flash_attention_for_cpu" in event.name]
    assert {shape[1] for shapes in read for shape in shapes} == {2}

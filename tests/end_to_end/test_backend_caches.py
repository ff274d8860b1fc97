"""Inductor's graph cache and AOTAutograd's hit in a second process, and miss when attnc's own sources change."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from attnc.passes import shield
from tests.tiny import Net, compiled, rewritten, tokens

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import json, sys, torch
from torch._dynamo.utils import counters
from tests.tiny import Net, compiled, rewritten, tokens
torch.set_num_threads(1)
torch.manual_seed(0)
model = Net()
fast = compiled(model, inner="inductor", force=sys.argv[1])
fast(tokens(96)).sum().backward()
assert rewritten(fast) == 2
print("COUNTS", json.dumps({**counters["inductor"], **counters["aot_autograd"]}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "block_sparse{provider=blocked,block_m=32,block_n=32}"])
def test_both_caches_hit_in_a_second_process(form, tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "ATTNC_STORE": str(tmp_path)}
    runs = []
    for _ in range(2):
        out = subprocess.run([sys.executable, "-c", PROGRAM, form], cwd=ROOT, env=environment, capture_output=True,
                             text=True, check=True, timeout=500)
        runs.append(json.loads(out.stdout.split("COUNTS")[1]))
    first, second = runs
    assert first["fxgraph_cache_miss"] == 2
    assert first["autograd_cache_saved"] == 1
    assert second["fxgraph_cache_hit"] == 2
    assert second["autograd_cache_hit"] == 1
    assert "fxgraph_cache_miss" not in second
    assert "autograd_cache_bypass" not in second


def compiled_once() -> dict[str, int]:
    """The cache counts of compiling one small model for inference."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    fast = compiled(Net(1), inner="inductor")
    with torch.no_grad():
        fast(tokens(16))
    assert rewritten(fast) == 1
    return {**counters["inductor"], **counters["aot_autograd"]}


def test_a_change_of_attnc_misses_both_caches(monkeypatch):
    with fresh_cache():
        assert compiled_once()["autograd_cache_saved"] == 1
        assert compiled_once()["autograd_cache_hit"] == 1
        monkeypatch.setattr(shield, "source_version", lambda: "another")
        counts = compiled_once()
        assert counts["autograd_cache_miss"] == 1
        assert counts["fxgraph_cache_miss"] == 1

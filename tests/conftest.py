"""What every test starts from: one thread, fixed seeds, a fresh Dynamo, no network, no user's store."""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Read when torch or transformers is imported, so set before either: workers of pytest-xdist share the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Kernels run under Triton's interpreter; real compilations run in worker processes without this.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from tests.tolerance import tol as tolerance_of

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT.parent / "shared" / "golden"


@dataclass(frozen=True)
class Golden:
    """One file of golden vectors: what goes in, what must come out, and how it was made."""

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    tensors: dict[str, torch.Tensor]
    options: dict[str, object]
    layout: dict[str, object]
    meta: dict[str, str]


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    for absent in (torch.cuda, torch.mtia, torch.xpu):  # which would remember every seed, and a stack with each
        if not absent.is_available():
            absent.manual_seed_all = lambda seed: None
    store = tempfile.TemporaryDirectory(prefix="attnc-test-store-", ignore_cleanup_errors=True)
    os.environ["ATTNC_STORE"] = store.name
    config.add_cleanup(store.cleanup)


def pytest_report_header() -> list[str]:
    golden = str(GOLDEN) if GOLDEN.is_dir() else f"ABSENT, its tests are skipped (looked in {GOLDEN})"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none, tests marked gpu are skipped"
    return [f"torch: {torch.__version__}, {torch.get_num_threads()} thread, GPU {gpu}", f"golden: {golden}"]


def pytest_collection_finish() -> None:
    """What was imported stays for good, so no collection of garbage has to walk it; and there are fewer of them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same random numbers, alone or among others."""
    random.seed(0)
    torch.manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No test sees what another one compiled; none empties the caches of the CPU to time its guards (50 ms each)."""
    if "torch._dynamo.guards" in sys.modules:
        sys.modules["torch._dynamo.guards"].profile_guard_manager = lambda *given: 0.0
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its family come filled with NaN, so that an unwritten output cannot pass by luck."""
    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)


@pytest.fixture
def tol() -> Callable[..., float]:
    """`tolerance.tol`: the tolerance of a dtype."""
    return tolerance_of


@pytest.fixture
def golden() -> Callable[[str], Golden]:
    """Load "form/case" of the golden vectors; skips, naming the folder, where they are absent."""
    if not GOLDEN.is_dir():
        pytest.skip(f"golden vectors are absent: put the shared folder beside the clone (looked in {GOLDEN})")
    safetensors = pytest.importorskip("safetensors", reason="needs safetensors: pip install attnc[dev]")

    def load(name: str) -> Golden:
        with safetensors.safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            meta, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        named = {part: {k: tensors[k] for k in json.loads(meta[part])} for part in ("inputs", "outputs")}
        options, layout = json.loads(meta["options"]), json.loads(meta["layout"])
        return Golden(named["inputs"], named["outputs"], tensors, options, layout, meta)

    return load

"""DistributedDataParallel on gloo with two processes: gradients as in one process that sees both halves."""
from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.tiny import Net, compiled, gradients, rewritten, tokens
from tests.tolerance import error

BATCH = 4


def half(rank: int) -> slice:
    return slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)


def steps(rank: int, folder: str, wrapped: Callable[[Net], nn.Module]) -> tuple[Net, nn.Module]:
    """Two steps of one of two processes on its half: its model, with its gradients, and what `wrapped` made of it."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/rendezvous", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    torch.manual_seed(0)
    model = Net()
    parallel = wrapped(model)
    for _ in range(2):  # the second step with what the first compiled
        model.zero_grad()
        parallel(tokens(32, BATCH)[half(rank)]).square().mean().backward()
    dist.barrier()
    dist.destroy_process_group()
    return model, parallel


def other(folder: str) -> None:
    """The other process: eagerly, which the first one cannot tell."""
    steps(1, folder, DistributedDataParallel)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize(
    "outside", [pytest.param(True, id="compiled(ddp)"), pytest.param(False, id="ddp(compiled)", marks=pytest.mark.slow)]
)
def test_gradients_equal_one_process(outside: bool, tmp_path: Path):
    process = mp.get_context("spawn").Process(target=other, args=(str(tmp_path),))
    process.start()
    # Both orders that are in use; Dynamo splits the graph at DDP's buckets where it sees the wrapper.
    around, within = (compiled, DistributedDataParallel) if outside else (DistributedDataParallel, compiled)
    model, fast = steps(0, str(tmp_path), lambda model: around(within(model)))
    process.join()
    assert process.exitcode == 0
    found = gradients(model)
    model(tokens(32, BATCH)).square().mean().backward()
    want = gradients(model)
    assert found.keys() == want.keys()
    for name, gradient in want.items():
        assert error(found[name], gradient) < 1e-5, name
    assert rewritten(fast if outside else fast.module) == 2

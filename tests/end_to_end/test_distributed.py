"""DistributedDataParallel on gloo with two processes: gradients as in one process that sees both halves."""
from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tests.tiny import Net, compiled, gradients, rewritten, tokens
from tests.tolerance import error

BATCH = 4


def half(rank: int) -> slice:
    return slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)


def worker(rank: int, folder: str, outside: bool) -> None:
    """One of two processes; rank 0 writes its gradients and how many regions were rewritten."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/rendezvous", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    torch.manual_seed(0)
    model = Net()
    # Both orders that are in use; Dynamo splits the graph at DDP's buckets where it sees the wrapper.
    fast = compiled(DistributedDataParallel(model)) if outside else DistributedDataParallel(compiled(model))
    for _ in range(2):  # the second step with what the first compiled
        model.zero_grad()
        fast(tokens(32, BATCH)[half(rank)]).square().mean().backward()
    if rank == 0:
        count = rewritten(fast if outside else fast.module)
        torch.save({"gradients": gradients(model), "rewritten": count}, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize(
    "outside", [pytest.param(True, id="compiled(ddp)"), pytest.param(False, id="ddp(compiled)", marks=pytest.mark.slow)]
)
def test_gradients_equal_one_process(outside: bool, tmp_path: Path):
    mp.spawn(worker, (str(tmp_path), outside), nprocs=2)
    found = torch.load(tmp_path / "found.pt")
    torch.manual_seed(0)
    model = Net()
    model(tokens(32, BATCH)).square().mean().backward()
    want = gradients(model)
    assert found["gradients"].keys() == want.keys()
    for name, gradient in want.items():
        assert error(found["gradients"][name], gradient) < 1e-5, name
    assert found["rewritten"] == 2

"""What do linear mixers cost the compiler: nodes of the graph and seconds to the first result, with and without attnc?

    python benchmarks/loops.py models [--only mamba,rwkv] [--limit 240]
    python benchmarks/loops.py cores [--only delta_steps,kda] [--limit 600]

models: tiny models of two to four layers and 48 tokens from the model zoo's configurations, forward. The attention
model held against a hybrid has as many layers, and feed-forwards of the same kind (llama; qwen3_moe with experts).
cores: loops over 256 tokens, and the chunked torch code of models in transformers at 4096 tokens, which Dynamo unrolls.
Each in a process of its own on empty caches, with one thread. Nodes: of Dynamo's graphs, placeholders left out. Writes
results/cpu/loops.json, each part under its name.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zoo
from recurrence import MIXERS
from timing import print_environment, print_table, write_part
from torch import Tensor
from torch._inductor.compile_fx import compile_fx

from attnc.backend import attnc_backend

COMPILERS = {"inductor": compile_fx, "attnc": attnc_backend}
PEERS = {
    "llama": "llama",
    "qwen3_moe": "qwen3_moe",
    "bamba": "llama",
    "falcon_h1": "llama",
    "falcon_mamba": "llama",
    "kimi_linear": "qwen3_moe",
    "lfm2": "llama",
    "lfm2_moe": "qwen3_moe",
    "jamba": "qwen3_moe",
    "mamba": "llama",
    "mamba2": "llama",
    "minimax": "qwen3_moe",
    "qwen3_next": "qwen3_moe",
    "recurrent_gemma": "llama",
    "rwkv": "llama",
    "xlstm": "llama",
}


# What is compiled: a callable and its arguments by name.

Compiled = tuple[Callable[..., Any], dict[str, Any]]


def model(name: str, layers: int | None, folder: Path) -> Compiled:
    """A model of the zoo; layers: None for as many as the zoo gives it."""
    zoo.harness(folder)
    import zoo_build

    if layers is not None:
        top = f"@{name}"
        zoo_build.CONFIG[top] = {**zoo_build.CONFIG.get(top, {}), "num_hidden_layers": layers}
    built = zoo_build.build(zoo_build.catalog()[name], attn="eager", train=False)
    return built.model, built.inputs


def linear_steps(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """A state that fades and is written to, token by token, (B, L, H, ...)."""
    state, found = torch.zeros_like(key[:, 0, ..., None] * value[:, 0, :, None]), []
    for t in range(query.shape[1]):
        state = decay[:, t, :, None, None].exp() * state + key[:, t, ..., None] * value[:, t, :, None]
        found.append((query[:, t, :, None] @ state)[..., 0, :])
    return torch.stack(found, 1)


def delta_steps(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """The gated delta rule, token by token, (B, L, H, ...)."""
    state, found = torch.zeros_like(key[:, 0, ..., None] * value[:, 0, :, None]), []
    for t in range(query.shape[1]):
        state = decay[:, t, :, None, None].exp() * state
        wrong = value[:, t] - (key[:, t, :, None] @ state)[..., 0, :]
        state = state + key[:, t, ..., None] * (beta[:, t, :, None] * wrong)[:, :, None]
        found.append((query[:, t, :, None] @ state)[..., 0, :])
    return torch.stack(found, 1)


STEPS, CHUNKED = 256, 4096  # tokens
LOOPS = {"linear_steps": linear_steps, "delta_steps": delta_steps}
CORES = [*LOOPS, *MIXERS]


def core(name: str) -> Compiled:
    """A loop of this file, or the torch code of a mixer of recurrence.py."""
    torch.manual_seed(0)
    if name in LOOPS:
        operands = MIXERS["gated_delta"].operands(STEPS)
        return LOOPS[name], {**operands, "key": torch.nn.functional.normalize(operands["key"], dim=-1)}
    operands, theirs = MIXERS[name].operands(CHUNKED), MIXERS[name].theirs
    return (lambda **given: theirs(given)), operands


def tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    import zoo_build

    return zoo_build.outputs(found)


def compile_once(name: str, layers: int | None, compiler: str, folder: str, answers: Any) -> None:
    """Compile one model or core in this process and put nodes, seconds and error; what is raised becomes a word."""
    torch.set_num_threads(1)
    try:
        run, given = core(name) if name in CORES else model(name, layers, Path(folder))
        nodes: list[int] = []
        backend = counting(COMPILERS[compiler], nodes)
        with torch.no_grad():
            want = tensors(run(**given))
            start, spent = time.perf_counter(), _cpu()
            got = tensors(torch.compile(run, backend=backend)(**given))
            seconds, spent = time.perf_counter() - start, _cpu() - spent
        error = max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-9)) for a, b in zip(got, want, strict=True))
        config = getattr(run, "config", None)
        depth = config and config.get_text_config().num_hidden_layers
        times = {"seconds": seconds, "cpu_seconds": spent}
        answers.put({"nodes": sum(nodes), "graphs": len(nodes), "layers": depth, **times, "error": error})
    except Exception as exc:  # noqa: BLE001  # other models still count; the traceback is shown
        traceback.print_exc()
        answers.put({"failure": f"{type(exc).__name__}: {str(exc)[:120]}"})


def _cpu() -> float:
    """Seconds of processors that this process and those it waited for took."""
    return sum(os.times()[:4])


def counting(compile_graph: Callable[..., Any], nodes: list[int]) -> Callable[..., Any]:
    """`compile_graph` as a backend that notes how many nodes each of Dynamo's graphs has."""

    def backend(gm: torch.fx.GraphModule, inputs: list) -> Callable[..., Any]:
        nodes.append(sum(node.op != "placeholder" for node in gm.graph.nodes))
        return compile_graph(gm, inputs)

    return backend


def measured(name: str, layers: int | None, compiler: str, limit: float, folder: Path) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory(prefix="attnc_loops_", ignore_cleanup_errors=True) as caches:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "ATTNC_STORE": f"{caches}/attnc"}
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no processes that outlive the measurement
        process = context.Process(target=compile_once, args=(name, layers, compiler, str(folder), answers))
        process.start()
        deadline = time.monotonic() + limit
        while process.is_alive() and time.monotonic() < deadline:
            process.join(0.2)
        ended = not process.is_alive()
        process.kill()
        process.join()
        try:
            return answers.get(timeout=1)
        except queue.Empty:
            return {"failure": "the process died" if ended else f"not within {limit:.0f} s"}


def both(name: str, layers: int | None, limit: float, folder: Path) -> dict[str, Any]:
    """What each compiler made of it."""
    row: dict[str, Any] = {}
    for compiler in COMPILERS:
        row[compiler] = measured(name, layers, compiler, limit, folder)
        print(f"{name}, {layers or 'its own'} layers, {compiler}: {row[compiler]}", file=sys.stderr, flush=True)
    return row


def cores(names: list[str], limit: float, folder: Path) -> list[dict[str, Any]]:
    """A row for each loop and mixer."""
    rows, table = [], []
    for name in names:
        rows.append({"core": name, **both(name, None, limit, folder)})
        alone, ours = rows[-1]["inductor"], rows[-1]["attnc"]
        times = [f"{side['cpu_seconds']:.1f}" if "seconds" in side else side["failure"] for side in (alone, ours)]
        ratio = (
            f"{alone['cpu_seconds'] / ours['cpu_seconds']:.1f}" if {"seconds"} <= alone.keys() & ours.keys() else "-"
        )
        error = f"{ours['error']:.0e}" if "error" in ours else "-"
        table.append([name, alone.get("nodes", "-"), ours.get("nodes", "-"), *times, ratio, error])
    print_table(["core", "nodes alone", "attnc's", "Inductor, CPU s", "attnc, CPU s", "ratio", "error"], table)
    return rows


def models(names: list[str], limit: float, folder: Path) -> list[dict[str, Any]]:
    """A row for each model, and for its peer at the same number of layers."""
    rows: dict[tuple[str, int | None], dict[str, Any]] = {}

    def enter(name: str, layers: int | None) -> dict[str, Any]:
        row = {"model": name, "peer": PEERS[name], **both(name, layers, limit, folder)}
        row["layers"] = row["attnc"].get("layers", layers)
        rows[name, row["layers"]] = row
        return row

    for name in names:
        row = enter(name, None)
        if (row["peer"], row["layers"]) not in rows:
            enter(row["peer"], row["layers"])
    print_rows(list(rows.values()))
    return list(rows.values())


def print_rows(rows: list[dict[str, Any]]) -> None:
    nodes = {(row["model"], row["layers"]): row["attnc"].get("nodes") for row in rows}
    table = []
    for row in rows:
        alone, ours, peer = row["inductor"], row["attnc"], nodes.get((row["peer"], row["layers"]))
        share = f"{ours['nodes'] / peer:.2f}" if peer and "nodes" in ours else "-"
        seconds = [f"{side['seconds']:.1f}" if "seconds" in side else side["failure"] for side in (alone, ours)]
        graphs = [f"{side.get('nodes', '-')} in {side.get('graphs', '-')}" for side in (alone, ours)]
        error = f"{ours['error']:.0e}" if "error" in ours else "-"
        table.append([row["model"], row["layers"], *graphs, share, row["peer"], *seconds, error])
    heads = ["model", "layers", "nodes, graphs alone", "attnc's", "of peer", "peer", "Inductor s", "attnc s", "error"]
    print_table(heads, table)


PARTS = {"models": (models, [name for name in PEERS if PEERS[name] != name]), "cores": (cores, CORES)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--only", help="these models or cores, with commas; peers of models come along")
    parser.add_argument("--limit", type=float, default=600, help="seconds a compile may take")
    parser.add_argument("--zoo", type=Path, default=zoo.ZOO, help=f"folder of the model zoo, {zoo.ZOO} when left out")
    args = parser.parse_args()
    rows_of, names = PARTS[args.part]
    asked = args.only.split(",") if args.only else names
    if unknown := set(asked) - set(names):
        sys.exit(f"loops.py --only: found {', '.join(sorted(unknown))}; allowed are {', '.join(names)}.")
    before = print_environment()
    rows = rows_of(asked, args.limit, args.zoo)
    write_part("loops", before, {"limit_s": args.limit}, {args.part: rows})


if __name__ == "__main__":
    main()

"""What do linear mixers cost the compiler: nodes of the graph and seconds to the first result, with and without attnc?

Tiny models of two to four layers and 48 tokens from the model zoo's configurations, forward, each in a process of its
own on empty caches. Nodes: of Dynamo's graphs, placeholders left out. The attention model held against a hybrid has as
many layers, and feed-forwards of the same kind (llama; qwen3_moe with experts). Writes results/cpu/loops.json.

    python benchmarks/loops.py [--only mamba,rwkv] [--limit 240]
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
from timing import print_environment, print_table, write_result
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


def compile_once(name: str, layers: int | None, compiler: str, folder: str, answers: Any) -> None:
    """Compile one model in this process and put nodes, seconds and error; what is raised becomes a word.

    layers: None for as many as the zoo gives it.
    """
    torch.set_num_threads(1)
    zoo.harness(Path(folder))
    import zoo_build

    if layers is not None:
        top = f"@{name}"
        zoo_build.CONFIG[top] = {**zoo_build.CONFIG.get(top, {}), "num_hidden_layers": layers}
    try:
        built = zoo_build.build(zoo_build.catalog()[name], attn="eager", train=False)
        nodes: list[int] = []
        backend = counting(COMPILERS[compiler], nodes)
        with torch.no_grad():
            want = zoo_build.outputs(built.model(**built.inputs))
            start = time.perf_counter()
            got = zoo_build.outputs(torch.compile(built.model, backend=backend)(**built.inputs))
            seconds = time.perf_counter() - start
        error = max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-9)) for a, b in zip(got, want, strict=True))
        depth = built.model.config.get_text_config().num_hidden_layers
        answers.put(
            {"nodes": sum(nodes), "graphs": len(nodes), "layers": depth, "seconds": seconds, "error": error}
        )
    except Exception as exc:  # noqa: BLE001  # other models still count; the traceback is shown
        traceback.print_exc()
        answers.put({"failure": f"{type(exc).__name__}: {str(exc)[:120]}"})


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


def rows_of(names: list[str], limit: float, folder: Path) -> list[dict[str, Any]]:
    """A row for each model, and for its peer at the same number of layers."""
    rows: dict[tuple[str, int | None], dict[str, Any]] = {}

    def enter(name: str, layers: int | None) -> dict[str, Any]:
        row: dict[str, Any] = {"model": name, "peer": PEERS[name]}
        for compiler in COMPILERS:
            row[compiler] = measured(name, layers, compiler, limit, folder)
            print(f"{name}, {layers or 'its own'} layers, {compiler}: {row[compiler]}", file=sys.stderr, flush=True)
        row["layers"] = row["attnc"].get("layers", layers)
        rows[name, row["layers"]] = row
        return row

    for name in names:
        row = enter(name, None)
        if (row["peer"], row["layers"]) not in rows:
            enter(row["peer"], row["layers"])
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="these models, with commas; their peers come along")
    parser.add_argument("--limit", type=float, default=240, help="seconds a compile may take")
    parser.add_argument("--zoo", type=Path, default=zoo.ZOO, help=f"folder of the model zoo, {zoo.ZOO} when left out")
    args = parser.parse_args()
    asked = args.only.split(",") if args.only else list(PEERS)
    if unknown := set(asked) - PEERS.keys():
        sys.exit(f"loops.py --only: found {', '.join(sorted(unknown))}; allowed are {', '.join(PEERS)}.")
    before = print_environment()
    rows = rows_of([name for name in asked if args.only or PEERS[name] != name], args.limit, args.zoo)
    print_rows(rows)
    write_result("loops", before, {"limit_s": args.limit}, rows)


if __name__ == "__main__":
    main()

"""How fast are sparse attentions predicted to be on GPUs that are not here, from their compiled kernels?

    python benchmarks/sparse_predicted.py [--devices h100 a100]

One layer, bf16, batch 1, 32 query heads on 8 key heads of 128, or 64 on 4; prompts of 8k, 32k and 128k tokens, one
decoded row.
Kernels are compiled ahead of time in two settings, the two best by closed form at 32k tokens, and the better one is
taken; choosing is by closed form. Dense is the faster of our flash kernel, compiled too, and of torch's attention as
the measured tables have it. `of ideal` is what dense times the kept share of pairs takes, over what ours takes: 0.7 is
asked. `pays from` is the first of some lengths at which ours is faster than dense.

A device that results/predicted/sparse.json has is not done again, but for --again; what is compiled stays in the store.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from timing import RESULTS, print_environment, print_table, write_part

from attnc.codegen.compile_stats import Compiled, compile_job, compiled_folder
from attnc.codegen.gpu_key_lists import KERNELS
from attnc.codegen.key_list_jobs import list_job
from attnc.cost_models.attention import written_seconds
from attnc.cost_models.cost import Cost
from attnc.cost_models.device import Gpu, device_named
from attnc.cost_models.roofline import seconds
from attnc.forms import parse_form
from attnc.forms.narrowed import Narrowed
from attnc.forms.selected import BlockSelected, Selected
from attnc.forms.selected_lists import Layout, around, kernel_seconds, list_settings
from attnc.operands import Operands
from attnc.options import Options
from attnc.region import AttentionRegion
from attnc.rule_attention import AttentionRule, AttentionShape
from attnc.tuned import start_of
from attnc.tuning.flash import FlashProblem

DEVICES = ("h100", "h200", "a100", "b200", "mi300x")
WIDTH = 128
LENGTHS, TUNED_AT = (8192, 32768, 131072), 32768
GRID = tuple(round(512 * 2 ** (n / 2)) for n in range(19))  # 512 .. 262144
SETTINGS, ASKED = 2, 0.7
INDEXER = (64, 128)  # heads and width


class Layer(NamedTuple):
    """Heads of a layer, and whether one row is decoded."""

    heads: int = 32
    key_heads: int = 8
    decodes: bool = False


WIDE = Layer(64, 4)  # heads of one list as in the paper of NSA: 16
# name: spelling, layer, keys that a row keeps
FORMS = {
    "sinks and window": ("sinks_window{sinks=4,window=508}", Layer(), 512),
    "block mixture": ("block_mixture{block=512,top_k=3}", Layer(), 1536),
    "NSA-style selection": ("compressed_selection{block=64,top_k=25,sinks=1,window=512}", Layer(), 1600),
    "NSA-style selection, 64 on 4": ("compressed_selection{block=64,top_k=25,sinks=1,window=512}", WIDE, 1600),
    "block scores": ("block_scores{rows=128,block=128,top_k=16}", Layer(), 2048),
    "token top-k, indexer": ("token_top_k{scorer=indexer,top_k=2048}", Layer(decodes=True), 2048),
}
At = Callable[[int], float]  # seconds by length


@dataclass(frozen=True)
class Predicted:
    """A form on a device: seconds of attending and of choosing by length, and the setting that was compiled."""

    attend: At
    choose: At
    setting: str

    def __call__(self, length: int) -> float:
        return self.attend(length) + self.choose(length)


@cache
def region(length: int, layer: Layer) -> AttentionRegion:
    """One layer, as models write it with scaled_dot_product_attention."""
    rule = AttentionRule.parse(f"score={WIDTH**-0.5} * s" + ("" if layer.decodes else "; keep=j - i <= 0"))
    shape = AttentionShape(1, layer.heads, layer.key_heads, 1 if layer.decodes else length, length, WIDTH, WIDTH)
    given = (1, INDEXER[0], shape.L, INDEXER[1]), (1, length, INDEXER[1]), (1, shape.L, INDEXER[0])
    weights = tuple(zip(("index_query", "index_key", "index_weight"), given, strict=True)) if layer.decodes else ()
    written = "sdpa" if layer.decodes else "sdpa_causal"
    return AttentionRegion("", "", rule, shape, "bfloat16", "cuda", written=written, weights=weights)


def folder() -> Any:
    return compiled_folder(Options().store)


# The kernels.


def flash(at: Callable[[int], AttentionRegion], gpu: Gpu) -> Predicted:
    """Our flash kernels, or those of decoding, on a region by length."""
    first = _first(gpu)

    def problem(length: int, on: Gpu = gpu) -> FlashProblem:
        start = start_of(at(length), on)
        assert start is not None, on.name
        return FlashProblem(at(length), on, "decode" if at(length).shape.L == 1 else "forward", start)

    tuned = problem(TUNED_AT, first)
    best = sorted(tuned.space(), key=tuned.predict)[:SETTINGS]
    form = min(best, key=lambda f: tuned.compile(f).seconds or math.inf)

    def attend(length: int) -> float:
        found = problem(length).compile(form)
        return found.seconds or math.inf

    return Predicted(attend, lambda length: 0.0, form.spell())


def lists(form: BlockSelected, layer: Layer, gpu: Gpu) -> Predicted:
    """The kernels that walk the lists of a choice."""

    def layout(length: int) -> Layout:
        s = region(length, layer).shape
        rows, keys = (torch.empty(n, device="meta") for n in ((s.B, s.Hq, s.L, s.E), (s.B, s.H, s.S, s.E)))
        chosen = form.chosen_shape(Operands(rows, keys, keys, (), (), region(length, layer).rule))
        return Layout.of(chosen, form.tile_rows, form.block_keys, region(length, layer))

    def compiled(knobs: Any, length: int) -> Compiled:
        here = layout(length)
        tile = knobs.of(KERNELS[0], here.rows or knobs.block_m, here.width)
        final = here.cut(layer.key_heads, tile.block_m).parts == 1
        job = list_job(
            KERNELS[0], region(length, layer).rule, (), torch.bfloat16, WIDTH, WIDTH, here.rows or knobs.block_m,
            here.width, knobs, str(gpu.target), final=final,
        )  # fmt: skip
        found = compile_job(job, folder=folder())
        assert isinstance(found, Compiled), found
        return found

    def attend(knobs: Any, length: int) -> float:
        here, where = layout(length), region(length, layer)
        cut = here.cut(layer.key_heads, knobs.of(KERNELS[0], here.rows or knobs.block_m, here.width).block_m)
        time = kernel_seconds(here, where, gpu, knobs, KERNELS[0], compiled(knobs, length))
        return time + around(cut, where, gpu)

    tried = list_settings(layout(TUNED_AT), region(TUNED_AT, layer), _first(gpu))[:SETTINGS]
    best = min(tried, key=lambda knobs: attend(knobs, TUNED_AT))

    def choose(length: int) -> float:
        return seconds(Cost((form.choosing(region(length, layer)),)), gpu, "bfloat16")

    spelled = f"{best.block_m}x{best.block_n}, {best.warps} warps, {best.stages} stages"
    return Predicted(lambda length: attend(best, length), choose, spelled)


def _first(gpu: Gpu) -> Gpu:
    """The first device of a target: settings are picked for it, so that each is compiled once."""
    found = next(d for d in map(device_named, DEVICES) if isinstance(d, Gpu) and d.target == gpu.target)
    assert isinstance(found, Gpu)
    return found


def predicted(spelling: str, layer: Layer, gpu: Gpu) -> Predicted:
    form = parse_form(spelling)
    if isinstance(form, Narrowed):
        return flash(lambda length: form.narrow(region(length, layer)), gpu)
    assert isinstance(form, Selected) and isinstance(form, BlockSelected)
    return lists(form, layer, gpu)


# Rows.


def kept(length: int, decodes: bool, keys: int) -> float:
    """Share of pairs, where a row keeps at most so many keys."""
    if decodes:
        return min(1.0, keys / length)
    few = min(keys, length)
    return (few * (few + 1) / 2 + (length - few) * few) / (length * (length + 1) / 2)


def rows_of(device: str) -> list[dict[str, Any]]:
    gpu = device_named(device)
    assert isinstance(gpu, Gpu)
    layers = dict.fromkeys(layer for _, layer, _ in FORMS.values())
    own = {layer: flash(lambda length, layer=layer: region(length, layer), gpu) for layer in layers}

    def dense(length: int, layer: Layer) -> float:
        return min(own[layer](length), written_seconds(region(length, layer), gpu))

    rows = []
    for name, (spelling, layer, keys) in FORMS.items():
        ours = predicted(spelling, layer, gpu)
        pays = next((n for n in GRID if ours(n) < dense(n, layer)), None)
        for length in LENGTHS:
            share = kept(length, layer.decodes, keys)
            rows.append({
                "device": device, "form": name, "spelling": spelling, "length": length, "decodes": layer.decodes,
                "setting": ours.setting, "ours_ms": 1e3 * ours(length), "choosing_ms": 1e3 * ours.choose(length),
                "flash_ms": 1e3 * own[layer](length), "flash_setting": own[layer].setting,
                "torch_ms": 1e3 * written_seconds(region(length, layer), gpu), "kept": share,
                "faster": dense(length, layer) / ours(length),
                "of_ideal": dense(length, layer) * share / ours(length), "pays_from": pays,
            })  # fmt: skip
        print_rows(rows[-len(LENGTHS) :])
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    headings = ["device", "form", "tokens", "ms", "choosing", "flash", "torch", "faster", "kept", "of ideal"]
    cells = [
        [r["device"], r["form"] + (", decode" if r["decodes"] else ""), r["length"]]
        + [f"{r[what]:.3g}" for what in ("ours_ms", "choosing_ms", "flash_ms", "torch_ms")]
        + [f"{r['faster']:.2f}x", f"{r['kept']:.1%}", f"{r['of_ideal']:.2f}", r["pays_from"] or "-", r["setting"]]
        for r in rows
    ]
    print_table([*headings, "pays from", "setting"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", default=DEVICES)
    parser.add_argument("--again", action="store_true", help="also what is kept")
    args = parser.parse_args()
    before, path = print_environment(), RESULTS / "predicted" / "sparse.json"
    found = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}
    for device in args.devices:
        if device in found and not args.again:
            print(f"{device}: kept from {found[device]['environment']['time']}")
            continue
        write_part("sparse", before, {}, {device: rows_of(device)}, "predicted")
    found = json.loads(path.read_text(encoding="utf-8"))["rows"]
    with redirect_stdout(text := io.StringIO()):
        print(
            f"bf16, batch 1, 32 query heads on 8 key heads of {WIDTH} but where named; nothing is measured: predicted"
        )
        print(f"from compiled kernels; choosing, and torch's attention, by closed form. Asked: {ASKED} of ideal.\n")
        print_rows([row for device in DEVICES for row in found.get(device, {"rows": []})["rows"]])
    path.with_suffix(".txt").write_text(text.getvalue(), encoding="utf-8")
    print(f"written: {path} and .txt")


if __name__ == "__main__":
    main()

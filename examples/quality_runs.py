"""How an approximation of attention is judged on the model of bytes: its settings, its runs, what they give.

Prompts are judged at every position of CONTEXT bytes. What serves decoding alone is judged there: the prompt is read
exactly, then each of the last DECODED bytes is given one by one over a StaticCache, and only these count.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from byte_model import CONTEXT, TASKS, batches
from torch import Tensor
from torch.nn import functional as F
from transformers import StaticCache

import attnc

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from timing import Timing, interleaved

DECODED = 192  # the lines that ask for needles are shorter
TIMED = 64
SHARES = (2, 4, 8, 16)  # of the length, that a row may keep: a half to a sixteenth


@dataclass(frozen=True)
class Family:
    """A form and its setting for `keys` of a row, cut into blocks of `block` keys."""

    title: str
    spelling: Callable[[int, int], str]
    phase: str = "prefill"


FAMILIES = (
    Family("sinks + window", lambda keys, block: f"sinks_window{{sinks=4,window={keys - 4}}}"),
    Family("block mixture", lambda keys, block: f"block_mixture{{block={block},top_k={keys // block}}}"),
    Family(
        "vertical-slash",
        lambda keys, block: f"vertical_slash{{columns={keys // 2},diagonals={keys // 2},sinks=4,window=16}}",
    ),
    Family(
        "NSA-style selection",
        lambda keys, block: (
            f"compressed_selection{{block={block // 2},top_k={2 * keys // block},sinks=1,window={keys // 4}}}"
        ),
    ),
    Family("Quest", lambda keys, block: f"page_bounds{{block=16,top_k={keys // 16},window=1}}", "decode"),
)


# Runs.


def options_of(spelling: str | None) -> dict[str, Any]:
    """The options that put one setting wherever it applies; None: the exact model."""
    exact = {"inner": "eager"}
    return exact if spelling is None else {**exact, "allow": [spelling], "force": spelling}


def compiled(model: torch.nn.Module, spelling: str | None) -> Callable[..., Any]:
    """The model with every attention in one setting."""
    return torch.compile(model, backend="attnc", options=options_of(spelling), dynamic=False)


def check_taken(run: Any, spelling: str) -> None:
    """Raises: SystemExit where some attention of what was run is in another form."""
    for region in attnc.last_report(run).regions:
        if region.kind == "attention" and region.choice.name != spelling.partition("{")[0]:
            sys.exit(f"{spelling}: {region.path} is {region.choice.form}: {region.choice.reason}")


class Prompt:
    """Logits of the bytes behind each of a text but the last, (B, L - 1, 256), by one call of the model."""

    counted = CONTEXT - 1

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run

    def __call__(self, ids: Tensor) -> Tensor:
        return self.run(ids).logits[:, :-1]

    def once(self, ids: Tensor) -> Callable[[], object]:
        """What is timed."""
        return partial(self.run, ids)


class Decoding:
    """Logits of the last DECODED bytes of a text, (B, DECODED, 256): each byte before them is given one by one."""

    counted = DECODED

    def __init__(self, run: Callable[..., Any], model: torch.nn.Module) -> None:
        self.run, self.model = run, model

    def steps(self, ids: Tensor, first: int) -> Iterator[dict[str, Any]]:
        """The inputs of each step from position `first` on; what is before is read at once by the exact model."""
        cache = StaticCache(config=self.model.config, max_cache_len=CONTEXT)
        self.model(ids[:, :first], past_key_values=cache, use_cache=True)
        for at in range(first, ids.shape[1] - 1):
            yield {"input_ids": ids[:, at : at + 1], "past_key_values": cache}

    def __call__(self, ids: Tensor) -> Tensor:
        first = ids.shape[1] - 1 - DECODED
        return torch.cat([self.run(**step, use_cache=True).logits for step in self.steps(ids, first)], 1)

    def once(self, ids: Tensor) -> Callable[[], object]:
        """What is timed: one step after another, of the last TIMED of a text."""
        steps = self.steps(ids, ids.shape[1] - 1 - TIMED)
        return lambda: self.run(**next(steps), use_cache=True)


# Judgements.


@dataclass
class Judgement:
    """loss: nats per byte of each text. recall, needle: whether each value that is asked for is found."""

    loss: list[float]
    recall: list[bool]
    needle: list[bool]

    def summary(self, exact: Judgement) -> dict[str, float]:
        """Means; `spread` is the standard error of the loss increase over texts."""
        more = torch.tensor(self.loss, dtype=torch.float64) - torch.tensor(exact.loss, dtype=torch.float64)
        return {
            "loss": sum(self.loss) / len(self.loss),
            "increase": more.mean().item(),
            "spread": (more.std() / len(self.loss) ** 0.5).item(),
            "recall": sum(self.recall) / len(self.recall),
            "needle": sum(self.needle) / len(self.needle),
            "texts": len(self.loss), "recalls": len(self.recall), "needles": len(self.needle),
        }  # fmt: skip


@torch.no_grad()
def judge(run: Prompt | Decoding, count: int, rows: int) -> Judgement:
    """On `count` batches of each task, of texts that were not trained on; what is asked for before `counted` is not."""
    found: dict[str, list] = {task: [] for task in TASKS}
    for task in TASKS:
        rng = random.Random(f"judged {task}")
        for _ in range(count):
            drawn = [TASKS[task](rng, CONTEXT, True) for _ in range(rows)]
            ids = torch.tensor([list(text) for text, _ in drawn])
            logits, want = run(ids), ids[:, -run.counted :]
            if task == "text":
                found[task] += F.cross_entropy(logits.transpose(1, 2), want, reduction="none").mean(1).tolist()
                continue
            hits, skipped = logits.argmax(-1) == want, CONTEXT - run.counted
            for row, (_, spans) in zip(hits, drawn, strict=True):
                found[task] += [bool(row[a - skipped : b - skipped].all()) for a, b in spans if a >= skipped]
    return Judgement(found["text"], found["recall"], found["needle"])


def layer_errors(model: torch.nn.Module, spellings: Sequence[str], phase: str, count: int) -> dict[str, dict[str, Any]]:
    """By spelling: error of the layer output, recovered mass and kept fraction, means over layers and held-out texts.

    Decoding is calibrated at the last position of each text.
    """
    texts = list(batches("text", count, rows=1, seed=2))
    decoding = Decoding(model, model)
    with torch.no_grad():
        data = texts if phase == "prefill" else [next(decoding.steps(ids, CONTEXT - 2)) for ids in texts]
    found = attnc.calibrate(model, data, forms=spellings, pairs=0, device="cpu", options={"inner": "eager"})
    rows: dict[str, dict[str, Any]] = {}
    for spelling in spellings:
        every = [(whole, m) for region in found.regions.values() for whole, m in region.settings.items()]
        measured = [m for whole, m in every if knobs_of(spelling) <= knobs_of(whole)]
        rows[spelling] = {
            "error": sum(m.mean_error for m in measured) / len(measured),
            "worst_error": max(m.error for m in measured),
            "mass": sum(m.mass or 0.0 for m in measured) / len(measured),
            "kept": sum(m.kept or 0.0 for m in measured) / len(measured),
        }
    return rows


@torch.no_grad()
def times(runs: Mapping[str, Prompt | Decoding], rounds: int) -> dict[str, Timing]:
    """Seconds of one call each, interleaved: batch 1, CONTEXT bytes."""
    ids = next(batches("text", 1, rows=1, seed=3))
    calls = {name: run.once(ids) for name, run in runs.items()}
    for call in calls.values():
        call()
    return interleaved(calls, rounds)


# Predictions.

KEYS = (4096, 2048, 1024, 512)  # of a row, at every length
LENGTHS, DEVICES = (8192, 32768, 131072), ("h100", "h200", "a100", "mi300x")
HEADS, KEY_HEADS, WIDTH, BLOCK = 32, 8, 128, 128


def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A layer's attention, of a prompt or of one decoded row."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1, enable_gqa=True)


def predictions(device: str, length: int, phase: str) -> list[dict[str, Any]]:
    """Predicted seconds of one layer's attention in every setting of a phase, the exact one first; nothing is run."""
    families = [family for family in FAMILIES if family.phase == phase]
    asked = {(f.title, keys): f.spelling(keys, BLOCK) for f in families for keys in KEYS}
    rows = length if phase == "prefill" else 1
    with torch.device("meta"):
        sizes = ((HEADS, rows), (KEY_HEADS, length), (KEY_HEADS, length))
        operands = [torch.empty(1, *size, WIDTH, dtype=torch.bfloat16) for size in sizes]
    with torch.no_grad():
        report = attnc.explain(attended, *operands, device=device, options={"allow": list(asked.values())})
    choice = report.regions[0].choice
    names = {spelling.partition("{")[0] for spelling in asked.values()}
    exact = {form: s for form, s in choice.offers.items() if form.partition("{")[0] not in names}
    exact["as written"] = choice.written_s
    best = min(exact, key=lambda form: exact[form])
    common = {"device": device, "length": length, "phase": phase}
    made = [{**common, "family": "dense", "keys": 0, "spelling": best, "seconds": exact[best], "ratio": 1.0}]
    by_name = {knobs_of(form): seconds for form, seconds in choice.offers.items()}
    for (family, keys), spelling in asked.items():
        seconds = next((s for form, s in by_name.items() if knobs_of(spelling) <= form), None)
        ratio = None if seconds is None else seconds / exact[best]
        row = {**common, "family": family, "keys": keys, "spelling": spelling, "seconds": seconds, "ratio": ratio}
        made.append(row)
    return made


def knobs_of(spelling: str) -> frozenset[str]:
    """The form and its knobs, in any order."""
    name, _, knobs = spelling.partition("{")
    return frozenset([name, *knobs.rstrip("}").split(",")])

"""Every recurrent architecture of the installed transformers: is each mixer found, is the model computed as by eager?

Tiny random models of the zoo (`../shared/zoo`), each in a process forked from a warm parent: a prefill, a training
step, and `generate`, compiled with attnc over aot_eager and held against eager. Rows go to
results/cpu/recurrent_models.json; rows of other models stay.

Left out: multimodal models around a text model that is here (qwen3_5, lfm2_vl, minicpm_ocr), and those whose recurrence
is an LSTM of torch.nn (encodec, parakeet, nemotron_asr_streaming), which is not linear.

    python benchmarks/recurrent_models.py [--only mamba,rwkv] [--parts prefill,train,generate] [--timeout 600]
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import zoo
import zoo_judges as judges
from timing import RESULTS, print_environment, print_table, write_result

# The classes of the mixers: how many a model has is read off its modules, and never used to find one. A mixer may hold
# several recurrences (zamba's, one for each of two heads). None: the cache holds states of convolutions or delays only.
MIXERS = {
    "bailing_hybrid": "BailingHybridDeltaAttention",
    "bamba": "BambaMixer",
    "falcon_h1": "FalconH1Mixer",
    "falcon_mamba": "FalconMambaMixer",
    "glm5_next": "Glm5NextTextLinearAttention",
    "granitemoehybrid": "GraniteMoeHybridMambaLayer",
    "inkling2_text": None,
    "inkling_text": None,
    "jamba": "JambaMambaMixer",
    "kimi_linear": "KimiLinearDeltaAttention",
    "lfm2": "Lfm2ShortConv",
    "lfm2_moe": "Lfm2MoeShortConv",
    "lfm3": "Lfm3ShortConv",
    "mamba": "MambaMixer",
    "mamba2": "Mamba2Mixer",
    "minimax": "MiniMaxLightningAttention",
    "nemotron_h": "NemotronHMamba2Mixer",
    "olmo_hybrid": "OlmoHybridGatedDeltaNet",
    "qwen3_5_text": "Qwen3_5GatedDeltaNet",
    "qwen3_5_moe_text": "Qwen3_5MoeGatedDeltaNet",
    "qwen3_next": "Qwen3NextGatedDeltaNet",
    "qwen4_exp_text": "Qwen4ExpTextGatedDeltaNet",
    "recurrent_gemma": "RecurrentGemmaRecurrentBlock",
    "rwkv": "RwkvSelfAttention",
    "xlstm": "xLSTMLayer",
    "zamba": "ZambaMambaMixer",
    "zamba2": "Zamba2MambaMixer",
    "zaya": None,
}
# xlstm's cache rounds widths of states up to multiples of 64, its layers do not: eager raises at the zoo's 32.
CONFIGS = {"xlstm": {"hidden_size": 128}}
PARTS = ("prefill", "train", "generate")
NAME = "recurrent_models"
INNER = {"inner": "aot_eager"}
PROMPT, PADDED, NEW = 11, 4, 8  # tokens of a prompt, how many of the second are padding, how many are generated


def measure(job: Mapping[str, Any], save: Callable[[dict], None]) -> dict[str, Any]:
    """One model: its row, part by part; `save` keeps what there is in case of a timeout."""
    _, _, check = zoo.loaded()
    row: dict[str, Any] = {}
    for part in job["parts"]:
        start = time.process_time()
        try:
            row |= {"prefill": prefill, "train": train, "generate": generate}[part](job["model"])
        except Exception as exc:  # noqa: BLE001  # a result like any other: the row names it
            row[part] = check.said(exc)
        row[f"{part}_s"] = round(time.process_time() - start, 1)
        save(row)
    return row


def built(model: str, **given: Any) -> Any:
    zoo_build, _, _ = zoo.loaded()
    zoo_build.CONFIG.setdefault(model, {}).update(CONFIGS.get(model, {}))
    return zoo_build.build(zoo_build.catalog()[model], **given)


def program(made: Any, training: bool) -> Any:
    zoo_build, _, check = zoo.loaded()
    return check.Program(made.model, made.inputs, training, False, zoo_build.outputs)


def against(check: Any) -> Any:
    import zoo_capture

    return check._Compare(zoo_capture.compare, zoo_capture.short_reason)


def prefill(model: str) -> dict[str, Any]:
    """Mixers found and there, graphs of attnc and of Dynamo alone, what breaks them, the error of the outputs."""
    _, _, check = zoo.loaded()
    made = built(model)
    run, compare = program(made, False), against(check)
    want = run.run(made.model)
    ours = check.attempt(run, want, compare, "attnc", INNER)
    row: dict[str, Any] = {"mixers": sum(type(m).__name__ == MIXERS[model] for m in made.model.modules())}
    if "failed" in ours:
        return row | {"prefill": ours["failed"]}
    row |= {"found": ours["regions"].get("recurrence", 0), "graphs": ours["graphs"], "breaks": ours["breaks"]}
    row["logits_error"] = largest(ours["errors"])
    alone = check.attempt(run, want, compare, "eager", None)
    row |= {"graphs_of_dynamo": alone.get("graphs", alone.get("failed"))}
    if row["found"] < row["mixers"] or ours["problems"]:
        row["reasons"] = sorted({said[1] for said in ours["unmatched"]}) + ours["problems"]
    return row


def largest(errors: Mapping[str, float | None]) -> float | None:
    return None if None in errors.values() else max(errors.values())  # type: ignore[type-var]


def train(model: str) -> dict[str, Any]:
    """The error of the gradients; where it is large, what float32 can say of them at all."""
    _, _, check = zoo.loaded()
    made = built(model, train=True)
    run, compare = program(made, True), against(check)
    want = run.run(made.model)
    ours = check.attempt(run, want, compare, "attnc", INNER)
    if "failed" in ours:
        return {"train": ours["failed"]}
    row = {"train_error": ours["errors"]["first"], "gradient_error": ours["errors"]["gradient"]}
    if is_far(row["gradient_error"], check.TOLERANCE):
        anew = lambda other: check.replace(run, model=other).run(other)  # noqa: E731
        exact = judges.in_float64(made.model, anew)
        if exact[1]:
            row["eager_to_float64"] = compare.errors(exact, want, None)["gradient"]  # of eager's
            row["attnc_to_float64"] = check.attempt(run, exact, compare, "attnc", INNER)["errors"]["gradient"]
    return row


def is_far(error: float | None, tolerance: float) -> bool:
    """Whether an error is beyond the tolerance; None is no number."""
    return error is None or not error <= tolerance


def as_exact(row: Mapping[str, Any]) -> bool:
    """Whether attnc's gradients are at most half as far again from float64's as eager's are."""
    own, ours = row.get("eager_to_float64"), row.get("attnc_to_float64")
    return own is not None and ours is not None and ours <= 1.5 * own


def generate(model: str) -> dict[str, Any]:
    """Tokens of `generate`, prefill and cached decode, that are eager's; mixers found in every one of its calls."""
    _, _, check = zoo.loaded()
    made = built(model, use_cache=True)
    compiled = copy.deepcopy(made.model)
    want = generated(made.model, made.inputs)
    torch._dynamo.reset()
    with check.Watch() as watch:
        step = torch.compile(compiled.forward, backend="attnc", options=INNER)

        @functools.wraps(compiled.forward)
        def lapped(*args: Any, **given: Any) -> Any:
            out = step(*args, **given)
            watch.lap()
            return out

        compiled.forward = lapped
        got = generated(compiled, made.inputs)
    regions = watch.regions()
    return {
        "tokens_same": int((got == want).sum()) if got.shape == want.shape else 0,
        "tokens": want.numel(),
        "padded": PADDED,
        "found_in_decode": min(lap.get("recurrence", 0) for lap in regions[1:]),
        "decode_graphs": len(watch.graphs),
    }


def generated(model: torch.nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """(B, NEW): tokens after prompts of the model's own inputs, the second one padded on the left."""
    ids = inputs["input_ids"][:, :PROMPT].clone()
    mask = torch.ones_like(ids)
    ids[1:, :PADDED], mask[1:, :PADDED] = 0, 0
    given = {name: x for name, x in inputs.items() if name not in ("input_ids", "use_cache", "attention_mask")}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None,
            use_cache=True, disable_compile=True, **given,
        )  # fmt: skip
    return out[:, ids.shape[1] :]


def verdict(row: Mapping[str, Any], tolerance: float = 1e-4) -> str:
    """What does not hold, or that all does."""
    wrong = [part for part in PARTS if part in row] + [row["status"]] * (row.get("status", "ok") != "ok")
    wrong += ["mixers"] * (row.get("found", 0) < row.get("mixers", 0))
    wrong += ["mixers in decode"] * (row.get("found_in_decode", row.get("mixers", 0)) < row.get("mixers", 0))
    same = row.get("graphs") == row.get("graphs_of_dynamo")
    wrong += ["graphs, as of Dynamo alone" if same else "graphs"] * (row.get("graphs", 0) > 1)
    far = [name for name in ("logits_error", "gradient_error") if name in row and is_far(row[name], tolerance)]
    wrong += [name for name in far if name == "logits_error" or not as_exact(row)]
    wrong += ["tokens"] * (row.get("tokens_same") != row.get("tokens"))
    return ", ".join(wrong) or "holds"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: zoo.several(text, tuple(MIXERS)), default=tuple(MIXERS))
    parser.add_argument("--parts", type=lambda text: zoo.several(text, PARTS), default=PARTS)
    parser.add_argument("--timeout", type=float, default=600, help="seconds a model may take")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--zoo", type=Path, default=zoo.ZOO)
    args = parser.parse_args()
    zoo.harness(args.zoo)
    before = print_environment()
    zoo_build, zoo_run, check = zoo.loaded()
    if absent := [name for name in args.only if name not in zoo_build.catalog()]:
        sys.exit(f"recurrent_models.py: this release of transformers has no {', '.join(absent)}")
    torch.set_num_threads(1)
    check.wake("aot_eager")
    jobs = [{"key": name, "model": name, "parts": args.parts} for name in args.only]
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.jsonl"
        zoo_run.run_jobs(jobs, measure, str(records), args.workers, args.timeout)
        found = zoo_run.load(str(records))
    path = RESULTS / "cpu" / f"{NAME}.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = {row["model"]: row for row in kept}
    for name in args.only:
        record = found[name]
        fresh = {"model": name, "status": record["status"], **(record.get("result") or {})}
        rows[name] = {**rows.get(name, {}), **fresh} if args.parts != PARTS else fresh
        rows[name]["commit"] = before["commit"]
    rows = {name: row | {"verdict": verdict(row)} for name, row in rows.items()}
    tell([rows[name] for name in args.only])
    write_result(
        NAME,
        before,
        {**INNER, "prompt": PROMPT, "padded": PADDED, "new_tokens": NEW},
        [rows[name] for name in sorted(rows)],
    )


def tell(rows: list[dict[str, Any]]) -> None:
    heads = ["model", "mixers", "graphs", "Dynamo", "logits", "gradients", "tokens", "in decode", "verdict"]
    print_table(heads, [[
        row["model"], f"{row.get('found')}/{row.get('mixers')}", row.get("graphs"), row.get("graphs_of_dynamo"),
        row.get("logits_error"), row.get("gradient_error"), f"{row.get('tokens_same')}/{row.get('tokens')}",
        row.get("found_in_decode"), row["verdict"],
    ] for row in rows])  # fmt: skip


if __name__ == "__main__":
    main()

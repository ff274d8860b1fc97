"""`attnc estimate --config config.json --device h100`: what a model needs and how long its steps take."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from attnc.cost_models.device import device_named
from attnc.cost_models.device_kinds import Device
from attnc.cost_models.estimate import Estimate
from attnc.cost_models.layers import Conventions
from attnc.cost_models.model_card import PHASES, ModelCard, model_card
from attnc.cost_models.model_time import DTYPES, USABLE, Setting, memory, step_time
from attnc.errors import UsageError, did_you_mean

MAX_BYTES = 10_000_000  # a config.json is a few kilobytes
KEPT = {"prefill": "weights", "decode": "weights", "train": "weights, gradients and optimizer"}
WIDTH = 100
STEPS = {"prefill": "a prompt", "decode": "one token per sequence", "train": "a training step"}


def run(
    config: Annotated[Path, typer.Option(help="A transformers config.json, or the folder it lies in.")],
    device: Annotated[str, typer.Option(help="A device of `attnc devices`; it need not be present.")] = "h100",
    batch: Annotated[int, typer.Option(help="Sequences.", min=1)] = 1,
    context: Annotated[
        int, typer.Option(help="Tokens of a sequence: of the prompt, before and with the decoded one, or trained on.")
    ] = 4096,
    dtype: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")] = "bf16",
    kv: Annotated[str | None, typer.Option(help="Of keys and values; fp32 for fp32 weights, else bf16.")] = None,
    phase: Annotated[str | None, typer.Option(help=f"Only this one of {', '.join(PHASES)}.")] = None,
    causal: Annotated[str, typer.Option(help="FLOP of attention over half the square or the full one.")] = "half",
    mla: Annotated[
        str, typer.Option(help="FLOP of latent attention: naive, absorbed, padded, or by phase as served.")
    ] = "phase",
    file: Annotated[Path | None, typer.Option(help="A file of devices of your own, laid out as devices.toml.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in SI units.")] = False,
) -> None:
    """Count parameters, memory and FLOP of a model from its config, and predict the time of a step on a device."""
    card = read_card(config)
    target = device_named(device, file=file)
    if phase is not None and phase not in PHASES:
        near = did_you_mean(phase, PHASES) or " Leave it out for all."
        raise UsageError(f"--phase {phase}: allowed are {', '.join(PHASES)}.{near}")
    how = Conventions(causal=causal, mla=mla)
    kept = kv or ("fp32" if dtype == "fp32" else "bf16")
    settings = [Setting(batch, context, name, dtype, kept, how) for name in ([phase] if phase else PHASES)]
    told = estimate(card, target, settings)
    typer.echo(json.dumps(told, indent=2) if as_json else text(told))


def read_card(path: Path) -> ModelCard:
    """The card of a config file. Raises: UsageError for a file that cannot be read or is no config."""
    path = path / "config.json" if path.is_dir() else path
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(
                f"--config {path}: found {path.stat().st_size} bytes, allowed are {MAX_BYTES}. Correct it."
            )
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise UsageError(f"--config {path}: cannot be read ({exc.strerror}). Name a config.json.") from exc
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"--config {path}: found no JSON ({exc}). Name a config.json of transformers.") from exc
    return model_card(config)


def estimate(card: ModelCard, device: Device, settings: list[Setting]) -> dict[str, Any]:
    """All figures in SI units, by name; one entry of `phases` per setting."""
    at, parameters = settings[0], card.parameters()
    fewest, most = card.active_range
    told: dict[str, Any] = {
        "model": card.name,
        "device": device.name,
        "batch": at.batch,
        "context": at.context,
        "dtype": at.dtype,
        "kv": at.kv,
        "notes": list(card.notes),
        "conventions": str(at.how),
        "parameters": {
            "total": parameters.total,
            "active_without_embeddings": parameters.active,
            "active_with_output_head": parameters.active_head,
            "active_with_both_embeddings": parameters.active_both,
        },
        "cache": {
            "kv_bytes_per_token": card.kv_bytes_per_token(at.kv_item),
            "kv_bytes": card.kv_bytes(at.context, at.kv_item),
            "state_bytes": card.state_bytes(),
            "conv_bytes": card.conv_bytes(at.kv_item),
        },
        "phases": {s.phase: _phase(card, device, s) for s in settings},
    }
    if most > fewest:
        told["parameters"] |= {"active_with_output_head_least": fewest, "active_with_output_head_most": most}
    return told


def _phase(card: ModelCard, device: Device, at: Setting) -> dict[str, Any]:
    needs = memory(card, device, at)
    rows = step_time(card, device, at)
    total = rows.pop("total")
    flops = card.flops(at.phase, at.context, at.how).total
    summed = {"flop_of_all_positions": at.batch * card.generation_flops(at.context, at.how)}
    slowest_first = sorted(rows.items(), key=lambda row: -row[1].seconds)
    return {
        "tokens": at.tokens,
        "flop_per_token": flops / at.new,
        "flop": at.batch * flops,
        **(summed if at.phase == "decode" else {}),
        "memory": {
            "weights_bytes": needs.weights,
            "per_sequence_bytes": needs.per_sequence,
            "needed_bytes": needs.needed,
            "usable_bytes": needs.usable,
            "fits": needs.fits,
            "largest_batch": needs.largest_batch,
        },
        "seconds": total.seconds,
        "low": total.low,
        "high": total.high,
        "tokens_per_second": at.tokens / total.seconds,
        "rows": {name: {"seconds": row.seconds, "low": row.low, "high": row.high} for name, row in slowest_first},
    }


# Text.


def text(told: Mapping[str, Any]) -> str:
    """The figures as lines: parameters, memory, and one block per phase."""
    head = f"{told['model']} on {told['device']}: {told['dtype']} weights, {told['kv']} keys and values, "
    lines = [f"{head}batch {told['batch']}, context {told['context']}"]
    lines += [f"note: {note}" for note in told["notes"]]
    lines += ["", "parameters"]
    lines += [_line(name.replace("_", " "), f"{value / 1e9:.3f} B") for name, value in told["parameters"].items()]
    cache = told["cache"]
    lines += ["", "cache of one sequence"]
    lines.append(_line("keys and values", f"{_bytes(cache['kv_bytes'])}, growing {cache['kv_bytes_per_token']:,.0f} B"))
    lines[-1] += " per token"
    if cache["state_bytes"]:
        lines.append(_line("states", f"{_bytes(cache['state_bytes'])} float32"))
    if cache["conv_bytes"]:
        lines.append(_line("convolutions", _bytes(cache["conv_bytes"])))
    for phase, figures in told["phases"].items():
        lines += ["", f"{phase}: {STEPS[phase]}, {figures['tokens']} tokens", *_phase_lines(phase, figures)]
    counted = textwrap.wrap(f"FLOP counted: {told['conventions']}.", WIDTH, subsequent_indent="  ")
    return "\n".join([*lines, "", *counted])


def _phase_lines(phase: str, figures: Mapping[str, Any]) -> list[str]:
    needs = figures["memory"]
    fits = {None: "the memory of this device is not known", True: "fits", False: "does not fit"}[needs["fits"]]
    room = "" if needs["usable_bytes"] is None else f" in {_bytes(needs['usable_bytes'])} ({USABLE:.0%} of it)"
    most = "" if needs["largest_batch"] is None else f", largest batch {needs['largest_batch']}"
    lines = [
        _line("memory", f"{_bytes(needs['needed_bytes'])}, of it {KEPT[phase]} {_bytes(needs['weights_bytes'])}"),
        _line("", f"{fits}{room}{most}"),
        _line("FLOP per token", f"{figures['flop_per_token']:.3e}{_summed(figures)}"),
        _line("time", f"{_time(figures)}, {figures['tokens_per_second']:,.0f} tokens/s"),
    ]
    return lines + [
        _line(f"  {name}", f"{_time(row)}, {row['seconds'] / figures['seconds']:.0%}")
        for name, row in figures["rows"].items()
    ]


def _summed(figures: Mapping[str, Any]) -> str:
    """Decode costs more with every position: say which one the figure is of."""
    if "flop_of_all_positions" not in figures:
        return ""
    return f" at this position, {figures['flop_of_all_positions']:.3e} in all for a batch decoded up to it"


def _line(name: str, value: str) -> str:
    return f"  {name:<30}{value}"


def _time(row: Mapping[str, float]) -> str:
    return str(Estimate(row["seconds"], row["low"], row["high"]))


def _bytes(value: float) -> str:
    unit, scale = next(((u, s) for u, s in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if value >= s), ("kB", 1e3))
    return f"{value / scale:.3g} {unit}"

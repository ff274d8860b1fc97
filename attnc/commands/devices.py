"""`attnc devices`: the figures of GPUs and of the local CPU, side by side, as JSON, or measured."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from attnc.commands.loading import command
from attnc.cost_models.device import Cpu, Device, Engine, Gpu, device_named, load_devices, shipped
from attnc.cost_models.device_kinds import TENSOR_TYPES
from attnc.errors import UsageError

WIDE, LEAST_WIDTH = 120, 60
ABSENT = "-"
LEGEND = (
    "Dense, FP32 accumulation; 16-bit is bf16, or fp16 where none is. ridge: FLOP of the 16-bit rate per DRAM byte.\n"
    "?: unsure, measure or check it before it decides anything. `attnc devices NAME` shows limits, sources and notes."
)


def run(
    names: Annotated[
        list[str] | None, typer.Argument(help="Devices to compare, as h100 b200; all when left out.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A file of devices of your own, laid out as devices.toml.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in SI units.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this CPU (about 6 seconds) and print it as a device file.")
    ] = False,
    write: Annotated[Path | None, typer.Option(help="With --measure: a new file for what was measured.")] = None,
) -> None:
    """Show the devices attnc knows, or compare some: peaks, roofs, limits, and where the figures come from."""
    if measure:
        if names or file is not None:
            raise UsageError(
                "devices --measure: found a name or --file beside it; it measures this CPU. Leave them out."
            )
        command("measure")(as_json, write)
        return
    if write is not None:
        raise UsageError(f"devices --write {write}: found no --measure, so there is nothing to write. Add --measure.")
    chosen = [device_named(name, file=file) for name in names] if names else _all(file)
    if as_json:
        typer.echo(json.dumps([to_json(device) for device in chosen], indent=2))
    else:
        typer.echo(comparison(chosen) if names else overview(chosen))


def _all(file: Path | None) -> list[Device]:
    own = load_devices(file) if file is not None else {}
    return [device_named(name, file=file) for name in {**shipped().devices, **own}]


# JSON.


def to_json(device: Device) -> dict[str, object]:
    """Every figure of a device in SI units, and the roofs that follow from them."""
    told: dict[str, object] = {"kind": device.kind}
    for field in fields(device):
        value = getattr(device, field.name)
        if field.name == "engines":
            value = {name: {part.name: getattr(engine, part.name) for part in fields(Engine)} for name, engine in value}
        elif field.name == "source" or isinstance(value, Mapping):
            value = dict(value)
        told[field.name] = list(value) if isinstance(value, tuple) else value
    if isinstance(device, Gpu):
        told["exp2_rate"] = device.exp2_rate
        told["shared_bandwidth"] = device.shared_bandwidth
        told["matmul_share"] = {key: device.matmul_share(key) for key in device.tensor}
        told["ridge"] = {key: device.ridge(key) for key in device.tensor}
    return told


# Tables.


@dataclass(frozen=True)
class Row:
    """One figure: how it reads, the fields it comes from, which make it unsure if they are, and its value or None."""

    label: str
    of: tuple[str, ...]
    gpu: Callable[[Gpu], float | str | None]
    cpu: Callable[[Cpu], float | str | None] = lambda cpu: None


def _rate(kind: str) -> Callable[[Gpu], float | None]:
    return lambda gpu: gpu.tensor[kind] / 1e12 if kind in gpu.tensor else None


def _ridge(kind: str) -> Callable[[Gpu], float | None]:
    return lambda gpu: gpu.ridge(kind) if kind in gpu.tensor else None


EXP2 = ("exp2_per_clock", "sms", "clock_hz")
ROWS = (
    Row("architecture", ("arch",), lambda g: g.arch),
    Row("Triton target", ("target",), lambda g: g.target or "none"),
    *(Row(f"{kind} tensor TFLOP/s", (f"tensor.{kind}",), _rate(kind)) for kind in TENSOR_TYPES),
    Row("FP32 TFLOP/s", ("fp32_flops",), lambda g: g.fp32_flops / 1e12, lambda c: c.matmul / 1e12),
    Row("exp2 T/s", EXP2, lambda g: g.exp2_rate / 1e12, lambda c: c.exps / 1e12),
    Row("shared memory TB/s", ("shared_bytes_per_clock", "sms", "clock_hz"), lambda g: g.shared_bandwidth / 1e12),
    Row("DRAM TB/s", ("bandwidth",), lambda g: g.bandwidth / 1e12, lambda c: c.bandwidth / 1e12),
    Row("link GB/s, both directions", ("link_bytes",), lambda g: g.link_bytes / 1e9 or None),
    Row("host GB/s, one direction", ("host_bytes",), lambda g: g.host_bytes / 1e9 or None),
    *(Row(f"ridge {kind} FLOP/byte", (f"tensor.{kind}", "bandwidth"), _ridge(kind)) for kind in TENSOR_TYPES),
    Row("matmul seen, share of peak", ("matmul_seen",), lambda g: g.matmul_share(g.half) if g.matmul_seen else None),
    Row("SMs, CUs or threads", ("sms",), lambda g: g.sms, lambda c: c.threads),
    Row("clock GHz", ("clock_hz",), lambda g: g.clock_hz / 1e9),
    Row("clock of tensor rates GHz", ("tensor_clock_hz", "clock_hz"), lambda g: g.tensor_clock_hz / 1e9),
    Row("memory GB", ("memory_bytes",), lambda g: g.memory_bytes / 1e9),
    Row("L2 MiB", ("l2_bytes",), lambda g: g.l2_bytes / 2**20),
    Row("L3 MiB", ("l3_bytes",), lambda g: g.l3_bytes / 2**20 or None),
    Row("power W", ("power_w",), lambda g: g.power_w),
    Row("warps per SM", ("warps_per_sm",), lambda g: g.warps_per_sm),
    Row("threads per warp", ("warp_size",), lambda g: g.warp_size),
    Row("blocks per SM", ("blocks_per_sm",), lambda g: g.blocks_per_sm),
    Row("registers per SM", ("registers_per_sm",), lambda g: g.registers_per_sm),
    Row("shared KiB per SM", ("shared_per_sm",), lambda g: g.shared_per_sm / 1024),
    Row("shared KiB per block", ("shared_per_block",), lambda g: g.shared_per_block / 1024),
)
COLUMNS = (
    Row("arch", ("arch",), lambda g: g.arch, lambda c: "cpu"),
    Row("SMs", ("sms",), lambda g: g.sms, lambda c: c.threads),
    Row("GHz", ("clock_hz",), lambda g: g.clock_hz / 1e9),
    Row("16-bit\nTFLOP/s", ("tensor",), lambda g: g.tensor[g.half] / 1e12),
    Row("fp8\nTFLOP/s", ("tensor.fp8",), _rate("fp8")),
    Row("FP32\nTFLOP/s", ("fp32_flops",), lambda g: g.fp32_flops / 1e12, lambda c: c.matmul / 1e12),
    Row("exp2\nT/s", EXP2, lambda g: g.exp2_rate / 1e12, lambda c: c.exps / 1e12),
    Row("DRAM\nTB/s", ("bandwidth",), lambda g: g.bandwidth / 1e12, lambda c: c.bandwidth / 1e12),
    Row("GB", ("memory_bytes",), lambda g: g.memory_bytes / 1e9),
    Row("L2\nMiB", ("l2_bytes",), lambda g: g.l2_bytes / 2**20),
    Row("link\nGB/s", ("link_bytes",), lambda g: g.link_bytes / 1e9 or None),
    Row("W", ("power_w",), lambda g: g.power_w),
    Row("ridge", ("tensor", "bandwidth"), lambda g: g.ridge()),
)


def overview(devices: Sequence[Device]) -> str:
    """One row per device."""
    table = _table("device", [(row.label, row.label == "arch") for row in COLUMNS])
    for device in devices:
        table.add_row(device.name, *(_shown(row, device) for row in COLUMNS))
    return f"{_text(table)}\n{LEGEND}"


def comparison(devices: Sequence[Device]) -> str:
    """One column per device, each figure beside its ratio to the first device's; sources, flags and notes below."""
    table = _table("", [(device.name, len(devices) == 1) for device in devices])
    for row in ROWS:
        values = [_value(row, device) for device in devices]
        if any(value is not None for value in values):
            table.add_row(row.label, *(_shown(row, d, values[0] if n else None) for n, d in enumerate(devices)))
    return "\n".join([_text(table), *(line for device in devices for line in _about(device))])


def _value(row: Row, device: Device) -> float | str | None:
    return row.gpu(device) if isinstance(device, Gpu) else row.cpu(device) if isinstance(device, Cpu) else None


def _shown(row: Row, device: Device, first: float | str | None = None) -> str:
    """A figure to three or four digits, "?" where it is unsure, and its ratio to `first`."""
    value = _value(row, device)
    if value is None or isinstance(value, str):
        return value or ABSENT
    text = f"{value:.0f}" if value >= 1000 else f"{value:.4g}"
    unsure = {*device.unsure, *device.limits_unsure} if isinstance(device, Gpu) else set()
    if unsure & {name for field in row.of for name in (field, field.partition(".")[0])}:
        text += "?"
    if not isinstance(first, int | float) or not first:
        return text
    ratio = value / first
    return f"{text} ({ratio:{'.0f' if ratio >= 10 else '.2f' if ratio >= 0.1 else '.2g'}}x)"


def _about(device: Device) -> list[str]:
    """What stands below a comparison about one device."""
    if isinstance(device, Cpu):
        return [f"{device.name}: {device.threads} threads; {'; '.join(text for _, text in device.source)}"]
    assert isinstance(device, Gpu)
    lines = [f"{device.name}: {device.title}" + (f"; {device.note}" if device.note else "")]
    lines += [f"  {group}: {text}" for group, text in (*device.source, ("limits", device.limits_source))]
    lines += [f"  matrix instructions: {device.matrix}"]
    unsure = (*device.unsure, *device.limits_unsure)
    lines += [f"  unsure: {', '.join(unsure)}"] if unsure else []
    return lines + ([f"  no Triton target: {device.no_target}"] if device.no_target else [])


def _table(first: str, columns: Sequence[tuple[str, bool]]) -> Table:
    """columns: title, and whether it holds words and not figures."""
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for title, is_words in columns:
        table.add_column(title, justify="left" if is_words else "right", overflow="fold")
    return table


def _text(table: Table) -> str:
    width = max(shutil.get_terminal_size((WIDE, 24)).columns, LEAST_WIDTH)
    file = io.StringIO()
    Console(file=file, width=width, color_system=None, legacy_windows=False).print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().strip("\n").splitlines())

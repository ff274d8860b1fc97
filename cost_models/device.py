"""Devices by name: GPUs from their datasheets, the local CPU from measurements.

`device_named("h100")` needs no GPU. Users add devices in a file of the same layout as devices.toml, or vary a known one
with `like`, and name them by the file: "my_gpu.toml", or "my_gpu.toml:mine" where it holds several.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal, overload

from attnc.cost_models.device_kinds import ENGINES, NAME, Cpu, Device, Engine, Gpu, Limits
from attnc.cost_models.figures import Allowed, as_table, figure_fields, read_table, read_toml, read_value
from attnc.errors import UsageError, did_you_mean

__all__ = [
    "Cpu",
    "Device",
    "Engine",
    "Gpu",
    "Limits",
    "answers_to",
    "device_from_torch_name",
    "device_named",
    "gpu_named",
    "load_devices",
]

# Files.


@dataclass(frozen=True)
class Table:
    """The devices of one file, or of several: `devices` by name, and what `like` and `arch` may refer to."""

    devices: Mapping[str, Device]
    raw: Mapping[str, Mapping[str, object]]
    limits: Mapping[str, Limits]


# What `like` does not take over: a variant has its own name and documents, and nobody measured it.
OWN = ("title", "also", "source", "matmul_seen", "unsure", "note")
EMPTY = Table({}, {}, {})


def load_devices(path: str | Path) -> dict[str, Device]:
    """The devices of a file laid out as devices.toml (GPUs) or cpu.toml, by name; CPUs at one thread.

    Raises: UsageError that names the file, the device, the key, what was found and what is allowed.
    """
    return dict(read_devices(Path(path), shipped()).devices)


def read_devices(path: Path, known: Table = EMPTY) -> Table:
    """The table of a file; its devices may be like those of `known` and use its architectures."""
    top = read_toml(path)
    limits = dict(known.limits)
    for name, table in as_table(top.pop("arch", {}), f"{path}: arch").items():
        if name in known.limits:
            raise _known(f"{path}: arch {name}", "an architecture")
        limits[_named(name, f"{path}: arch")] = _limits(table, f"{path}: arch {name}")
    devices: dict[str, Device] = {}
    raw = dict(known.raw)
    for name, value in top.items():
        where = f"{path}: device {_named(name, str(path))}"
        if name in known.devices:
            raise _known(where, "a device")
        table = _like(dict(as_table(value, where)), raw, where)
        kind = read_value(table.pop("kind", Gpu.kind), Allowed("text", names=(Gpu.kind, Cpu.kind)), f"{where}: kind")
        devices[name] = _gpu(name, table, limits, where) if kind == Gpu.kind else _cpu(name, table, where)
        raw[name] = {**table, "kind": kind}
    return Table(devices, raw, limits)


def _named(name: str, where: str) -> str:
    if re.fullmatch(NAME, name) is None:
        raise UsageError(
            f"{where}: found the name {name[:60]!r}; allowed are 1 to 40 of a-z, 0-9, '.', '_' and '-', a letter or "
            "digit first. Rename it."
        )
    return name


def _known(where: str, what: str) -> UsageError:
    return UsageError(
        f"{where}: found the name of {what} that attnc knows; allowed is one that it does not, because plans and "
        "records go by names. Rename it."
    )


def _like(table: dict[str, object], known: Mapping[str, Mapping[str, object]], where: str) -> dict[str, object]:
    if "like" not in table:
        return table
    other = table.pop("like")
    if not isinstance(other, str) or other not in known:
        near = did_you_mean(other, known) if isinstance(other, str) else ""
        raise UsageError(
            f"{where}: like: found {str(other)[:60]!r}, allowed is a device that stands before it: "
            f"{', '.join(known)}.{near or ' Name one of them.'}"
        )
    return {**{key: value for key, value in known[other].items() if key not in OWN}, **table}


def _limits(table: object, where: str) -> Limits:
    limits = read_table(Limits, table, where)
    if (limits.target is None) != bool(limits.no_target):
        found = "neither" if limits.target is None else "both"
        raise UsageError(f"{where}: found {found} of target and no_target, needed is one of them. Correct it.")
    if limits.shared_per_block > limits.shared_per_sm:
        raise UsageError(
            f"{where}: shared_per_block: found {limits.shared_per_block} bytes, allowed is at most shared_per_sm, "
            f"{limits.shared_per_sm} bytes. Correct one of them."
        )
    _check_unsure(limits.limits_unsure, figure_fields(Limits), f"{where}: limits_unsure")
    return limits


def _check_unsure(names: Iterable[str], known: Iterable[str], where: str) -> None:
    for name in names:
        if name not in known:
            near = did_you_mean(name, known) or " Leave it out."
            raise UsageError(f"{where}: found {name[:60]!r}, allowed are names of fields, as {', '.join(known)}.{near}")


def _gpu(name: str, table: Mapping[str, object], limits: Mapping[str, Limits], where: str) -> Gpu:
    arch = table.get("arch")
    if not isinstance(arch, str) or arch not in limits:
        near = did_you_mean(arch, limits) if isinstance(arch, str) else ""
        raise UsageError(
            f"{where}: arch: found {str(arch)[:60]!r}, allowed are {', '.join(limits)}.{near or ' Name one of them.'}"
        )
    of = limits[arch]
    gpu = read_table(Gpu, table, where, name=name, **{key: getattr(of, key) for key in figure_fields(Limits)})
    gpu = replace(gpu, tensor_clock_hz=gpu.tensor_clock_hz or gpu.clock_hz)
    if not {"fp16", "bf16"} & set(gpu.tensor):
        raise UsageError(
            f"{where}: tensor: found {', '.join(gpu.tensor) or 'nothing'}, needed is bf16 or fp16. Add one."
        )
    if gpu.tensor_clock_hz > gpu.clock_hz:
        raise UsageError(
            f"{where}: tensor_clock_hz: found {gpu.tensor_clock_hz:g} Hz, allowed is at most clock_hz, "
            f"{gpu.clock_hz:g} Hz. Correct one of them."
        )
    for key, seen in gpu.matmul_seen.items():
        if seen > gpu.tensor.get(key, 0.0):
            raise UsageError(
                f"{where}: matmul_seen.{key}: found {seen:g} FLOP/s, allowed is at most tensor.{key}, "
                f"{gpu.tensor.get(key, 0.0):g} FLOP/s. Correct one of them."
            )
    _check_unsure(gpu.unsure, [*figure_fields(Gpu), *(f"tensor.{key}" for key in gpu.tensor)], f"{where}: unsure")
    return gpu


def _cpu(name: str, table: Mapping[str, object], where: str) -> Cpu:
    rows = as_table(table.get("engines", {}), f"{where}: engines")
    if set(rows) != set(ENGINES):
        raise UsageError(
            f"{where}: engines: found {', '.join(rows)[:200] or 'none'}; needed are {', '.join(ENGINES)}, and no other."
        )
    engines = tuple((key, read_table(Engine, rows[key], f"{where}: engines.{key}")) for key in ENGINES)
    rest = {key: value for key, value in table.items() if key != "engines"}
    return read_table(Cpu, rest, where, name=name, engines=engines)


@lru_cache(maxsize=1)
def shipped() -> Table:
    """The devices that attnc knows: the local CPU first, then the GPUs of devices.toml."""
    table = EMPTY
    for file in ("cpu.toml", "devices.toml"):
        with as_file(files("attnc.cost_models").joinpath(file)) as path:
            found = read_devices(path, table)
        table = Table({**table.devices, **found.devices}, found.raw, found.limits)
    return table


# Names.


@overload
def device_named(name: Literal["cpu"] = "cpu", threads: int | None = None) -> Cpu: ...
@overload
def device_named(name: str, threads: int | None = None, *, file: str | Path | None = None) -> Device: ...
def device_named(name: str = "cpu", threads: int | None = None, *, file: str | Path | None = None) -> Device:
    """The device called `name`: as in the table ("h100"), as sold ("H100 SXM"), as torch reports it, or by its file.

    threads: of a CPU, by default as many as torch uses now, or as there are where nothing has loaded torch.
    file: more devices, beside those of the table.
    Raises: UsageError for an unknown device.
    """
    by_file = IN_FILE.fullmatch(name)
    if by_file is not None:
        device = _of_file(name, by_file["file"], by_file["name"] or "")
    else:
        own = load_devices(file) if file is not None else {}
        devices = {**own, **shipped().devices}
        found = _called(name, devices)
        if found is None:
            raise UsageError(
                f"device {name!r}: no such device; known are {', '.join(devices)}."
                + (did_you_mean(name.casefold(), devices) or OTHERWISE)
            )
        device = found
    if isinstance(device, Cpu):
        return device.at(threads if threads is not None else _threads())
    return device


IN_FILE = re.compile(r"(?P<file>.+?\.toml)(?::(?P<name>[^:/\\]*))?")
OTHERWISE = " Leave device out for the local CPU, or name a device file, as my_gpu.toml."


def _called(name: str, devices: Mapping[str, Device]) -> Device | None:
    return devices.get(name) or devices.get(_spellings(devices.values()).get(_plain(name), ""))


def _of_file(asked: str, file: str, name: str) -> Device:
    """The device of `file` that is called `name`; "" is the only one."""
    path = Path(file).expanduser()
    try:
        info = path.stat()
        devices = _devices_in(path, (info.st_mtime_ns, info.st_size, info.st_ino))
    except (OSError, ValueError):  # told as any file that cannot be read
        devices = load_devices(path)
    found = _called(name, devices) if name else next(iter(devices.values())) if len(devices) == 1 else None
    if found is not None:
        return found
    if not devices:
        raise UsageError(f"device {asked!r}: found no device in {file}, needed is one. Write it as in devices.toml.")
    if not name:
        raise UsageError(
            f"device {asked!r}: found {len(devices)} devices in {file}: {', '.join(devices)}; allowed is one. "
            f"Write {file}:{next(iter(devices))}."
        )
    raise UsageError(
        f"device {asked!r}: no such device in {file}; it has {', '.join(devices)}."
        + (did_you_mean(name.casefold(), devices) or " Name one of them.")
    )


@lru_cache(maxsize=16)
def _devices_in(path: Path, stamp: tuple[int, int, int]) -> Mapping[str, Device]:
    return load_devices(path)


def _threads() -> int:
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch else os.cpu_count() or 1


def gpu_named(name: str, *, file: str | Path | None = None) -> Gpu:
    """`device_named` for who needs a GPU's figures. Raises: UsageError for a CPU or an unknown device."""
    device = device_named(name, file=file)
    if not isinstance(device, Gpu):
        raise UsageError(f"device {name!r}: found a {device.kind}, allowed is a GPU. Name one, as h100.")
    return device


def device_from_torch_name(name: str, capability: tuple[int, int] | None = None) -> Gpu:
    """The GPU that `torch.cuda.get_device_name` calls `name`, checked against get_device_capability.

    Raises: UsageError for one that is not in the table, or is of another architecture than its name says.
    """
    devices = shipped().devices
    found = _spellings(devices.values()).get(_plain(name))
    asked = "" if capability is None else f"{capability[0]}.{capability[1]}"
    if found is None:
        kin = [d.name for d in devices.values() if isinstance(d, Gpu) and asked and d.capability == asked]
        near = f" Those of its capability {asked} are {', '.join(kin)}." if kin else ""
        raise UsageError(f"device {name!r}: no such GPU in the table.{near} Describe it in a device file.")
    gpu = devices[found]
    assert isinstance(gpu, Gpu)
    if asked and asked != gpu.capability:
        raise UsageError(
            f"device {name!r}: found compute capability {asked}, but {found} has {gpu.capability}. Describe it in a "
            "device file."
        )
    return gpu


def answers_to(device: Device, name: str, capability: tuple[int, int] | None = None) -> bool:
    """Whether `torch.cuda.get_device_name` calls this device `name`, and get_device_capability agrees."""
    if not isinstance(device, Gpu) or _plain(name) not in _spellings([device]):
        return False
    return capability is None or device.capability == f"{capability[0]}.{capability[1]}"


VENDOR_WORDS = re.compile(r"\b(nvidia|amd|intel|r|tm|geforce|tesla|instinct|radeon|graphics|data center gpu)\b")


def _plain(name: str) -> str:
    """`name` without case, maker and punctuation."""
    words = re.sub(r"[^a-z0-9]+", " ", name.casefold())
    return "".join(VENDOR_WORDS.sub(" ", words).split())


def _spellings(devices: Iterable[Device]) -> dict[str, str]:
    """Every name of every GPU, plain, to its name in the table."""
    gpus = [d for d in devices if isinstance(d, Gpu)]
    return {_plain(spelling): gpu.name for gpu in gpus for spelling in (*gpu.also, gpu.title, gpu.name)}

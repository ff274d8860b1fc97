"""Devices as tables of figures: the local CPU, scaled to the threads torch uses.

Source: figures measured by benchmarks/cost_fit.py; see the head of devices.toml.
"""

from __future__ import annotations

from configparser import ConfigParser
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import torch

from attnc.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Engine:
    """One kernel family on a device. rate: FLOP/s of its products. elements: scores handled per second beside them."""

    rate: float
    elements: float
    launch_s: float


@dataclass(frozen=True)
class Device:
    """A target. bandwidth in bytes/s; `dtype_speed` multiplies rates for types other than float32."""

    name: str
    bandwidth: float
    engines: tuple[tuple[str, Engine], ...]
    dtype_speed: tuple[tuple[str, float], ...] = ()

    def engine(self, name: str) -> Engine:
        return dict(self.engines)[name]

    def speed(self, dtype: str) -> float:
        return dict(self.dtype_speed).get(dtype, 1.0)


# Plain `key = number` lines under [sections], the part of TOML that the standard library of Python 3.10 reads too.
@lru_cache(maxsize=1)
def _table() -> ConfigParser:
    table = ConfigParser(inline_comment_prefixes=("#",))
    table.read_string(files("attnc.cost_models").joinpath("devices.toml").read_text(encoding="utf-8"))
    return table


@lru_cache(maxsize=16)
def device_named(name: str = "cpu", threads: int | None = None) -> Device:
    """The device `name`, by default at the threads that torch uses now.

    Engines scale with threads; the memory's bandwidth does up to `bandwidth_threads`.
    Raises: UsageError for an unknown device.
    """
    table = _table()
    known = [section for section in table.sections() if "." not in section]
    if name not in known:
        raise UsageError(
            f"device {name!r}: no such device; known are {', '.join(known)}."
            + (did_you_mean(name, known) or " Leave device out for the local CPU.")
        )
    head = table[name]
    count = threads if threads is not None else torch.get_num_threads()
    engines = tuple(
        (
            section.split(".", 1)[1],
            Engine(float(body["rate"]) * count, float(body["elements"]) * count, float(body["launch_s"])),
        )
        for section, body in table.items()
        if section.startswith(f"{name}.") and section != f"{name}.dtype_speed"
    )
    speeds = tuple((dtype, float(speed)) for dtype, speed in table[f"{name}.dtype_speed"].items())
    busy = min(count, int(head["bandwidth_threads"]))
    return Device(name, float(head["bandwidth"]) * busy, engines, speeds)

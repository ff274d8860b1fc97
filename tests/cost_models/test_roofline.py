"""Figures of the cost model: units, threads, roofline."""

from __future__ import annotations

import pytest

from attnc.cost_models.cost import Cost, Work
from attnc.cost_models.device import device_named
from attnc.cost_models.roofline import seconds
from attnc.errors import UsageError


def test_an_unknown_device_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="known are cpu"):
        device_named("cpuu")


def test_compute_scales_with_threads_and_memory_until_it_is_saturated() -> None:
    one, two, many = (device_named("cpu", n) for n in (1, 2, 64))
    compute, memory = Cost((Work("flash", flops=1e12, launches=0),)), Cost((Work("memory", bytes=1e10, launches=0),))
    assert seconds(compute, one) == pytest.approx(2 * seconds(compute, two))
    assert seconds(memory, many) == pytest.approx(seconds(memory, device_named("cpu", 4)))


def test_time_is_the_larger_of_compute_and_memory() -> None:
    device = device_named("cpu", 1)
    rate = device.engine("flash").rate
    ridge = rate / device.bandwidth
    for flops in (0.5 * ridge, ridge, 2 * ridge):
        work = Cost((Work("flash", flops=flops * 1e9, bytes=1e9, launches=0),))
        assert seconds(work, device) == pytest.approx(max(flops * 1e9 / rate, 1e9 / device.bandwidth))


def test_costs_add_up() -> None:
    a, b = Work("flash", 1.0, 2.0, 3.0, 4), Work("memory", bytes=5.0)
    total = Cost((a,)) + Cost((b,))
    assert (total.flops, total.exps, total.bytes, total.launches) == (1.0, 2.0, 8.0, 5)
    assert seconds(total, device_named("cpu", 1), "float64") > 0

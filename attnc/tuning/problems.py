"""What there is to tune in the regions of a model: one list for regions of every kind, on every device asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attnc.cost_models.device import Device, Gpu, device_named
from attnc.errors import UsageError
from attnc.region import AttentionRegion, Region
from attnc.tuning.flash import FlashProblem, flash_problems
from attnc.tuning.measure import is_here
from attnc.tuning.recurrence import RecurrenceProblem, recurrence_problem

RegionProblem = FlashProblem | RecurrenceProblem


def problems_in(regions: Iterable[Region], devices: Iterable[str], store: str | None = None) -> list[RegionProblem]:
    """Each kernel of each attention that Flash can compute and each recurrence in chunks, on each device.

    On a CPU recurrences alone: attentions have no kernels there.
    store: where what is compiled and run is kept; None: in the user's own.
    Raises: UsageError for a device that is not known, or a GPU that Triton has no target for.
    """
    regions = list(regions)
    found: list[RegionProblem] = []
    for device in map(device_named, devices):
        if isinstance(device, Gpu) and device.target is None:
            raise UsageError(
                f"tune for {device.name}: it has no target of Triton's ({device.no_target}). Name another device."
            )
        for region in regions:
            if region.choice is None or region.choice.offers:  # else left whatever a record says
                found += _problems(region, device, store)
    return found


def _problems(region: Region, device: Device, store: str | None) -> Sequence[RegionProblem]:
    if isinstance(region, AttentionRegion):
        return flash_problems(region, device, store) if isinstance(device, Gpu) else ()
    if region.kind != "recurrence":
        return ()
    problem = recurrence_problem(region, device, store)
    return () if problem is None else (problem,)


def dearest(devices: Iterable[str]) -> str:
    """The fidelity of a search where none is asked for: "measure" where all devices are here, else "compile"."""
    return "measure" if all(is_here(device_named(name)) for name in devices) else "compile"

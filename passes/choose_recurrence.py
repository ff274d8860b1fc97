"""Pick a form for a recurrence operator: by plan, by force, by record, else the one with the least predicted time.

The operator runs by any form, and nothing is written that could stay instead: a choice is always made where some form
applies. Regions that differ only in place share one decision.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from attnc.cost_models.device import Device, Gpu
from attnc.cost_models.estimate import Estimate
from attnc.errors import UsageError
from attnc.forms import FORMS, Form, parse_form
from attnc.options import Options
from attnc.passes.choose import target_device
from attnc.region import AS_WRITTEN, Choice, Region
from attnc.tuned import tuned

AS_OPERATOR = "one operator that runs as plain torch code"


def choose_recurrence(region: Region, options: Options) -> Region:
    """`region` with its choice made, for the device that the options name or its tensors are on."""
    try:
        device = target_device(options.device, region.device)
    except UsageError as exc:  # a GPU that is present and not in the table
        return replace(region, choice=Choice(AS_WRITTEN, f"{AS_OPERATOR}: {exc}".rstrip(".")))
    there = replace(region, device="cuda") if isinstance(device, Gpu) else region
    plan = options.plan
    given = None
    if plan is not None and plan.device == device.name:
        given = plan.choices.get(region.key) or plan.choices.get(region.path)
    if given is not None and given.form != AS_WRITTEN:
        reason = f"by the plan for {device.name}: {given.reason}"
        return replace(there, choice=_asked(there, given.form, device, reason))
    if options.force is not None and parse_form(options.force).kind == "recurrence":
        return replace(there, choice=_asked(there, options.force, device, "forced by the options"))
    named = tuple(name for name in options.forms or () if name in _names())
    bare = replace(there, path="", node="", choice=None)
    record = tuned(bare, device, options.store)
    return replace(there, choice=_choose(bare, named or _names(), device, record))


@lru_cache(maxsize=1)
def _names() -> tuple[str, ...]:
    return tuple(form.name for form in FORMS if form.kind == "recurrence")


def _asked(region: Region, spelling: str, device: Device, reason: str) -> Choice:
    """A form that someone names, or why it does not apply."""
    form = parse_form(spelling)
    if "{" not in spelling:
        form = next(iter(form.space(region, device)), form)
    why = form.refuse(region) or form.misfit(region, device)
    if why is not None:
        return Choice(AS_WRITTEN, f"{form.spell()} does not apply: {why}", refused={form.name: why})
    return Choice(form.spell(), reason)


@lru_cache(maxsize=1024)
def _choose(region: Region, allowed: tuple[str, ...], device: Device, record: tuple[Form, Estimate] | None) -> Choice:
    offers: list[tuple[float, int, Form]] = []
    refused = {}
    for number, form in enumerate(f for f in FORMS if f.name in allowed):
        why = form().refuse(region) or form().untargeted(device)
        if why is not None:
            refused[form.name] = why
            continue
        if record is not None and record[0].name == form.name:
            offers.append((record[1].seconds, number, record[0]))
            continue
        offers += [(best.seconds(region, device), number, best) for best in form().space(region, device)[:1]]
    if not offers:
        return Choice(AS_WRITTEN, f"{AS_OPERATOR}: every form refuses", refused=refused)
    offers.sort()
    seconds, _, best = offers[0]
    is_tuned = record is not None and best == record[0]
    found = record[1] if record is not None and is_tuned else best.estimate(region, device)
    offered = {form.spell(): time for time, _, form in offers}
    reason = f"{'tuned' if is_tuned else 'predicted'} {found} on {device.name}"
    return Choice(best.spell(), reason, seconds, None, refused, offered, low_s=found.low, high_s=found.high)

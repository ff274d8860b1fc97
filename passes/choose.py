"""Pick a form for a region: each form refuses with a sentence or offers its best knobs; the cheapest predicted wins.

Nothing is rewritten that is not predicted to be faster than what is written; the choice then states the length at
which the answer would change. A form that does not equal the region is taken only where `allow` names it, with its
knobs or without, whether by cost, by force or by a plan; under a plan for the device, only where the plan has it as
well.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from itertools import product

import torch

from attnc.cost_models.attention import written_estimate, written_seconds
from attnc.cost_models.device import Device, Gpu, device_from_torch_name, device_named
from attnc.cost_models.estimate import Estimate
from attnc.errors import UsageError
from attnc.forms import FORMS, Form, form_named, is_allowed, parse_form, settings_allowed
from attnc.forms.base import Knob
from attnc.options import Options, Planned
from attnc.region import AS_WRITTEN, AttentionRegion, Choice, form_name
from attnc.tuned import tuned

# A rewrite must be predicted this much faster: below it the prediction itself is not sure.
GAIN = 0.95
DEVICES = ("cpu", "cuda")  # types of devices, as torch names them, that forms are lowered for
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


def choose(region: AttentionRegion, options: Options) -> AttentionRegion:
    """`region` with its choice made, for the device that the options name or its tensors are on.

    Regions that differ only in place share one decision. For a named GPU a region on the CPU counts as lying there.
    """
    try:
        device = target_device(options.device, region.device)
    except UsageError as exc:  # a GPU that is present and not in the table: nothing can be predicted for it
        return replace(region, choice=Choice(AS_WRITTEN, str(exc).rstrip(".")))
    there = replace(region, device="cuda") if isinstance(device, Gpu) else region
    bare = replace(there, path="", node="")
    planned = None if options.plan is None else _planned(there, options.plan, options.allow, device)
    if planned is not None:
        return replace(there, choice=planned)
    record = tuned(bare, device, options.store) if isinstance(device, Gpu) else None
    # What a plan does not name was not measured when the plan was made: exact forms only.
    allow = () if options.plan is not None and options.plan.device == device.name else options.allow
    return replace(there, choice=_choose(bare, options.forms, allow, options.force, device, record))


def approximations(region: AttentionRegion, options: Options) -> tuple[list[tuple[float, Form]], dict[str, str]]:
    """(predicted seconds, setting), fastest first, of the approximations in `options.allow` that apply to `region`.

    Each combination of semantic knobs is a setting; those that equal the region are none. With the sentences of those
    that refuse, by spelling, the same sentence of one form once.
    """
    device = target_device(options.device, region.device)
    unfit = _unfit(region)
    offers, refused = [], {}
    for name in dict.fromkeys(form_name(spelling) for spelling in options.allow):
        form = form_named(name)
        if options.forms is not None and name not in options.forms:
            refused[name] = f"the option forms leaves {name} out; add it there."
            continue
        for setting in settings_allowed(name, options.allow) or _settings(form, lambda k: k.role == "semantic"):
            why = unfit or setting.refuse(region) or setting.misfit(region, device)
            if why is not None:
                refused.setdefault(setting.spell(), why)
                if why == form().refuse(region) or why == unfit:
                    break  # not for the knobs of this setting
            elif not setting.is_exact(region):
                offers.append((setting.seconds(region, device), setting))
    return sorted(offers, key=lambda offer: offer[0]), refused


def _planned(region: AttentionRegion, plan: Planned, allow: tuple[str, ...], device: Device) -> Choice | None:
    """What the plan says of `region`, by its key or else its path; None where it says nothing, or of another device."""
    given = plan.choices.get(region.key) or plan.choices.get(region.path)
    if given is None or plan.device != device.name:
        return None
    reason = f"by the plan for {plan.device}: {given.reason}"
    if given.form == AS_WRITTEN:
        return replace(given, reason=reason)
    form = parse_form(given.form)
    why = _unfit(region) or _inapplicable(form, region, allow, device)
    if why is not None:
        return Choice(AS_WRITTEN, f"the plan's {given.form} does not apply here: {why}", refused={given.name: why})
    return replace(given, reason=reason)


@lru_cache(maxsize=4096)
def _choose(
    region: AttentionRegion,
    allowed: tuple[str, ...] | None,
    allow: tuple[str, ...],
    force: str | None,
    device: Device,
    record: tuple[Form, Estimate] | None,
) -> Choice:
    why = _unfit(region)
    if why is not None:
        return Choice(AS_WRITTEN, why)
    if force is not None:
        return _forced(region, force, allow, device)
    offers, refused = _offers(region, allowed, allow, device)
    if record is not None and (allowed is None or record[0].name in allowed):
        offers = [(time, form) for time, form in offers if form.name != record[0].name]
        offers.append((record[1].seconds, record[0]))
    as_written = written_estimate(region, device)
    written = as_written.seconds
    if not offers:
        why = "every form refuses" if refused else f"the option forms names no form of {region.kind}"
        return Choice(AS_WRITTEN, why, written_s=written, refused=refused)
    offers.sort(key=lambda offer: offer[0])
    time, best = offers[0]
    offered = {form.spell(): taken for taken, form in offers}
    if time > GAIN * written:
        at = crossover(region, allowed, allow, device)
        when = f"; from length {at} on it would" if at is not None else ""
        figures = f"{_milliseconds(time)} against {_milliseconds(written)} as written"
        reason = f"{best.spell()} is not predicted to pay{_example(region)} ({figures}){when}"
        return Choice(
            AS_WRITTEN, reason, written, written, refused, offered, low_s=as_written.low, high_s=as_written.high,
            pays_from=at,
        )  # fmt: skip
    is_tuned = record is not None and best == record[0]
    found = record[1] if record is not None and is_tuned else best.estimate(region, device)
    by = "tuned, " if is_tuned else ""
    reason = f"{by}predicted {written / time:.1f}x faster than as written on {device.name}{_example(region)}"
    exact = best.is_exact(region)
    reason += "" if exact else f"; {best.name} is an approximation by name"
    least = None if exact else pays_from(best, region, device)
    return Choice(
        best.spell(), reason, time, written, refused, offered, low_s=found.low, high_s=found.high, pays_from=least
    )


def _unfit(region: AttentionRegion) -> str | None:
    """Why no form at all may replace `region`."""
    if region.rule.empty == "unknown":
        return "a row may lose all its keys as no form reproduces it (several masks, a clamp, a mask of run-time data)"
    if region.rule.dropout:
        return f"dropout {region.rule.dropout:g} is active, and its random stream must be kept"
    if region.written == "flex_attention":
        return "already written with FlexAttention"
    if region.device not in DEVICES:
        return f"no form is lowered for {region.device} yet, only for {', '.join(DEVICES)}"
    return None


def _example(region: AttentionRegion) -> str:
    """For which lengths figures are where others may come."""
    s = region.shape
    return "" if s.has_lengths else f" at the example's {s.L} x {s.S}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.{2 if seconds > 1e-4 else 3}f} ms"


def _forced(region: AttentionRegion, spelling: str, allow: tuple[str, ...], device: Device) -> Choice:
    """The form that the options force; without knobs in its spelling, with the best ones it offers."""
    form = parse_form(spelling)
    if "{" not in spelling:
        form = next(iter(form.space(region, device)), form)  # the same form, other knobs
    why = _inapplicable(form, region, allow, device)
    if why is not None:
        return Choice(AS_WRITTEN, f"{form.spell()} was forced and refuses: {why}", refused={form.name: why})
    exact = form.is_exact(region)
    return Choice(form.spell(), "forced by the options" + ("" if exact else ", an approximation by name"))


def _inapplicable(form: Form, region: AttentionRegion, allow: tuple[str, ...], device: Device) -> str | None:
    """Why this setting may not be taken for `region` on `device`, whoever asks for it."""
    return form.refuse(region) or _unnamed(form, region, allow) or form.misfit(region, device)


def _unnamed(form: Form, region: AttentionRegion, allow: tuple[str, ...]) -> str | None:
    """Why a form that does not refuse `region` is still not taken: it does not equal it, and no name allows that."""
    if is_allowed(form, allow) or form.is_exact(region):
        return None
    return f"{form.spell()} is an approximation by name; add {form.name!r} to the option allow to accept its error."


def _offers(
    region: AttentionRegion,
    allowed: tuple[str, ...] | None,
    allow: tuple[str, ...],
    device: Device,
    *,
    search: bool = True,
) -> tuple[list[tuple[float, Form]], dict[str, str]]:
    """(predicted seconds, form) of each form of the region's kind that applies, the sentences of those that refuse.

    search: whether each form offers its best knobs, or only its default ones.
    """
    every = tuple(f for f in FORMS if not f.approximates or settings_allowed(f.name, allow) is not None)
    chosen = every if allowed is None else tuple(form_named(name) for name in allowed)
    offers, refused = [], {}
    for form in (form for form in chosen if form.kind == region.kind):
        if allowed is None and not form().concerns(region):
            continue
        for start in settings_allowed(form.name, allow) or _starts(form):
            why = _mistrusted(start, region) or start.refuse(region) or start.untargeted(device)
            why = why or _unnamed(start, region, allow)
            if why is not None:
                refused[start.spell()] = why
                continue
            best = start.space(region, device)[:1] if search else (start,)
            if not best and (why := start.misfit(region, device)) is not None:
                refused[start.spell()] = why
            offers += [(form.seconds(region, device), form) for form in best]
    return offers, refused


def _mistrusted(form: Form, region: AttentionRegion) -> str | None:
    """Why a form that applies is not taken of our own accord; `force` takes it."""
    if region.device == "cpu" and getattr(form, "provider", None) == "flex":
        return (
            "Inductor's CPU template for FlexAttention (torch 2.13) reads the wrong values where v is a slice of a "
            "packed projection and q, k are computed (benchmarks/flex_fault.py); force it to use it."
        )
    return None


def _starts(form: type[Form]) -> list[Form]:
    """One setting of `form` for each combination of its named (not numeric) knobs of schedule."""
    return _settings(form, lambda k: isinstance(k.choices[0], str) and k.role == "schedule")


def _settings(form: type[Form], varies: Callable[[Knob], bool]) -> list[Form]:
    """One setting of `form` for each combination of the knobs that vary, the others at their defaults."""
    named = {name: k.choices for name, k in form().knobs().items() if varies(k)}
    made = [form(**dict(zip(named, values, strict=True))) for values in product(*named.values())]
    return [setting for setting in made if setting.is_distinct]


def crossover(
    region: AttentionRegion, allowed: tuple[str, ...] | None, allow: tuple[str, ...], device: Device
) -> int | None:
    """The shortest of LENGTHS beyond the region's own at which some form would pay with its default knobs.

    A form that pays at one length pays at all longer ones: what does not pay at the longest is asked once only.
    """
    lengths = [length for length in LENGTHS if length > max(region.shape.L, region.shape.S)]

    def pays(length: int) -> bool:
        longer = _at_length(region, length)
        offers, _ = _offers(longer, allowed, allow, device, search=False)
        written = written_seconds(longer, device)
        return bool(offers) and min(time for time, _ in offers) <= GAIN * written

    if not lengths or not pays(lengths[-1]):
        return None
    return lengths[bisect_left(lengths, True, key=pays)]


@lru_cache(maxsize=4096)
def pays_from(form: Form, region: AttentionRegion, device: Device) -> int | None:
    """The length from which on `form` is predicted to be faster than what is written; None where no length up to the
    longest of LENGTHS is.

    A form that pays at one length pays at all longer ones: LENGTHS are bisected, and between two of them the ratio of
    both times is taken to be a power of the length. Kernels are in the setting that is best for `region`.
    """
    taken = form.by_length(region, device)

    @cache
    def gain(length: int) -> float:
        """Predicted time of the form over that as written; infinite where the form refuses."""
        there = _at_length(region, length)
        return taken(there) / written_seconds(there, device)

    own = max(region.shape.L, region.shape.S)
    lengths = sorted({*LENGTHS, own})
    at = lengths.index(own)
    low, high = (0, at) if gain(own) < 1 else (at, len(lengths) - 1)
    if gain(lengths[high]) >= 1:
        return None
    place = bisect_left(lengths, True, low, high, key=lambda length: gain(length) < 1)
    found, before = lengths[place], lengths[place - 1] if place else 0
    if not before or not math.isfinite(gain(before)) or gain(before) < 1:
        return found
    slope = math.log(gain(found) / gain(before)) / math.log(found / before)
    return min(found, math.ceil(before * gain(before) ** (-1 / slope)))


def _at_length(region: AttentionRegion, length: int) -> AttentionRegion:
    """`region` with so many keys, and as many queries where there were as many."""
    shape = region.shape
    rows = length if shape.L == shape.S else shape.L
    return replace(region, shape=replace(shape, L=rows, S=length))


def target_device(name: str | None, kind: str) -> Device:
    """The device that choices are made for: the one asked for, else the one that tensors of type `kind` are on.

    Raises: UsageError for a name that is not in the table, or a GPU present that is not.
    """
    if name is not None:
        return device_named(name)
    if kind != "cuda" or not torch.cuda.is_available():
        return device_named("cpu")
    return device_from_torch_name(torch.cuda.get_device_name(), torch.cuda.get_device_capability())


def checked_forms(options: Options) -> None:
    """Raise a UsageError now if the options name a form or a device that does not exist."""
    if options.device is not None:
        device_named(options.device)
    for name in options.forms or ():
        form_named(name)
    for name in options.allow:
        if not parse_form(name).approximates:
            raise UsageError(
                f"option allow={options.allow!r}: {name} is exact and needs no leave; allowed are "
                f"{', '.join(form.name for form in FORMS if form.approximates)}. Leave {name!r} out of allow."
            )
    if options.force is not None:
        parse_form(options.force)

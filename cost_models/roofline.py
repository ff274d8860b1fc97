"""Time of an attention from closed formulas.

    time = max(FLOP / rate + scores / elements, bytes / bandwidth) + launches * launch_s, per work

Training adds the backward: 2.5 times the forward where scores are recomputed (flash), twice where they are kept.

Source: Williams, Waterman, Patterson 2009, "Roofline", doi:10.1145/1498765.1498785; FLOP counts as in Dao 2023,
arXiv:2307.08691, section 4.1.
"""

from __future__ import annotations

from attnc.cost_models.cost import Cost, Work
from attnc.cost_models.device import Cpu, Device
from attnc.cost_models.estimate import PLAIN, Estimate
from attnc.expr import TRUE
from attnc.region import ITEM_BYTES, AttentionRegion
from attnc.rule_attention import linear_score

BACKWARD = {"flash": 2.5, "masked": 2.5, "flex": 2.5, "composed": 2.0}
# Passes over the scores of a composed attention: written and read by product, mask, maximum, exponential and sum.
COMPOSED_PASSES = 6


def attention_cost(
    region: AttentionRegion,
    engine: str,
    pairs: float,
    *,
    mask: bool = False,
    launches: int = 1,
    extra_bytes: float = 0.0,
) -> Cost:
    """Cost of one attention over `pairs` pairs per head and batch entry.

    engine: "flash", "flex" or "composed". mask: a flash call reads an additive mask, element by element.
    extra_bytes: moved by passes of their own, before the products.
    """
    s, item = region.shape, ITEM_BYTES.get(region.dtype, 4)
    heads = s.B * s.Hq
    width = 2 * max(s.E, s.Ev) if engine == "flash" else s.E + s.Ev
    flops, scores = 2.0 * heads * pairs * width, heads * pairs
    moved = float(region.bytes)
    if engine == "composed":
        moved += COMPOSED_PASSES * scores * max(item, 4)
    works = [Work(_kernel(region, engine, mask), flops, scores, moved, launches)]
    if extra_bytes:
        works.append(Work("memory", bytes=extra_bytes, launches=1))
    if region.training:
        factor = BACKWARD[engine]
        works.append(Work(works[0].engine, factor * flops, factor * scores, factor * moved, 2 * launches))
        if extra_bytes:
            works.append(Work("memory", bytes=extra_bytes, launches=1))
    return Cost(tuple(works))


def _kernel(region: AttentionRegion, engine: str, mask: bool) -> str:
    if engine == "flash":
        return "masked" if mask else "flash"
    linear = linear_score(region.rule.score)
    scored = linear is None or (engine == "flex" and not linear[1].is_const)
    return f"{engine}_scored" if scored else engine


def seconds(cost: Cost, device: Device, dtype: str = "float32") -> float:
    """Predicted time of `cost` on `device`, in seconds."""
    total = 0.0
    for work in cost.works:
        engine = device.engine(work.engine)
        compute = work.flops / (engine.rate * device.speed(dtype)) + work.exps / engine.elements
        total += max(compute, work.bytes / device.bandwidth) + work.launches * engine.launch_s
    return total


def estimate(cost: Cost, device: Device, dtype: str = "float32") -> Estimate:
    """`seconds` with its interval: of a CPU by its fit, of a GPU as of any plain roofline."""
    bounds = device.bounds if isinstance(device, Cpu) else PLAIN
    return bounds.around(seconds(cost, device, dtype))


def written_cost(region: AttentionRegion, device: Device) -> Cost:
    """Cost of the region as it is written.

    "sdpa" runs flash over all pairs, a mask being in memory and made additive on the way; "sdpa_causal" has the flag
    is_causal instead; "composed" keeps all scores. Heads are repeated.
    """
    s, item = region.shape, ITEM_BYTES.get(region.dtype, 4)
    pairs = float(s.L * (region.columns or s.S))
    # Repeated heads are written and read again.
    repeated = 0.0 if s.group == 1 else 2.0 * s.B * s.Hq * s.S * (s.E + s.Ev) * item
    if region.written == "composed":
        return attention_cost(region, "composed", pairs, launches=6, extra_bytes=repeated)
    if region.written == "flex_attention":
        return attention_cost(region, "flex", pairs)
    if region.written == "sdpa_causal":
        return attention_cost(region, "flash", pairs / 2, extra_bytes=repeated)
    if region.rule.keep == TRUE and region.rule.bias is None:
        return attention_cost(region, "flash", pairs, extra_bytes=repeated)
    # One boolean read, one number written and read for each pair.
    mask = s.B * pairs * (1 + 2 * item)
    return attention_cost(region, "flash", pairs, mask=True, launches=2, extra_bytes=mask + repeated)

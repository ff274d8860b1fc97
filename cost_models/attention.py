"""Seconds of an attention through what torch offers: SDPA, or the operations as written.

On the CPU from engines measured here (`cost_models.roofline`); on GPUs from the latency model fitted on measured
libraries (`cost_models.latency`), and from datasheet roofs where no table covers the case: float32, masks in memory,
scores kept in memory.

Source: Dao 2023, arXiv:2307.08691, figures 4 to 7 (backward against forward).
"""

from __future__ import annotations

from attnc.cost_models import latency
from attnc.cost_models.device import Device, Gpu
from attnc.cost_models.device_kinds import LAUNCH_S, MEMORY_SHARE, TENSOR_TYPE_OF
from attnc.cost_models.estimate import PLAIN, Estimate
from attnc.cost_models.roofline import COMPOSED_PASSES, estimate, written_cost
from attnc.expr import TRUE
from attnc.region import ITEM_BYTES, AttentionRegion

# Backward over forward in time: 2.5 times the FLOP at 63% of the peak instead of 73% (Dao 2023, A100, d = 128).
BACKWARD_TIME = 2.9
# A call with an additive mask in memory goes to a slower kernel of SDPA. Assumed, not measured.
MASKED_SHARE = 0.5
# float32 products outside the tensor cores reach this share of the datasheet's rate. Assumed, not measured.
FP32_SHARE = 0.5
DECODE_ROWS = 16  # query rows of one key head that libraries pack into one tile


def written_seconds(region: AttentionRegion, device: Device) -> float:
    """Predicted time of the region as it is written."""
    return written_estimate(region, device).seconds


def written_estimate(region: AttentionRegion, device: Device) -> Estimate:
    """Predicted time of the region as it is written, with its interval."""
    if not isinstance(device, Gpu):
        return estimate(written_cost(region, device), device, region.dtype)
    if region.written == "composed":
        return PLAIN.around(composed_seconds(region, device))
    s = region.shape
    causal = region.written == "sdpa_causal"
    masked = not causal and (region.rule.keep != TRUE or region.rule.bias is not None)
    # Repeated heads are written and read again.
    copied = 0 if s.group == 1 else 2 * s.B * s.Hq * s.S * (s.E + s.Ev) * ITEM_BYTES.get(region.dtype, 4)
    again = copied / (MEMORY_SHARE * device.bandwidth) + LAUNCH_S if copied else 0.0
    return library_estimate(region, device, causal=causal, masked=masked) + PLAIN.around(again)


def library_estimate(region: AttentionRegion, gpu: Gpu, *, causal: bool, masked: bool = False) -> Estimate:
    """Predicted time of scaled_dot_product_attention; masked: with an additive mask in memory, all pairs computed.

    Its interval is that of the tables where they show the call, else of a plain roofline.
    """
    s = region.shape
    pairs, widened = s.L * s.S / (2 if causal and s.L == s.S else 1), PLAIN.around(widening_seconds(region, gpu))
    if region.dtype not in ("bfloat16", "float16"):
        time = PLAIN.around(_fp32_seconds(region, gpu, pairs))
    else:
        kind = "attn_prefill" if causal else "attn_encoder"
        kind = "attn_decode" if s.group * s.L <= DECODE_ROWS and s.S > s.L else kind
        length = max(s.L, 1)
        columns = {
            "batch": s.B,
            "seq_q": length,
            "seq_kv": s.S,
            "q_heads": s.Hq,
            "kv_heads": s.H,
            "head_dim": (s.E + s.Ev) / 2,
            "window": 0,
            "dtype": "bf16",
        }
        if kind != "attn_decode" and s.L != s.S:  # tables have as many queries as keys: as many pairs
            columns["seq_q"] = columns["seq_kv"] = max(1, round((s.L * s.S) ** 0.5))
        time = latency.predict(kind, gpu, columns)
    if masked:
        added = s.B * s.L * s.S * ITEM_BYTES.get(region.dtype, 4)
        slower = time.seconds / MASKED_SHARE + added / (MEMORY_SHARE * gpu.bandwidth)
        time = PLAIN.around(slower)
    return (time * (1 + BACKWARD_TIME) if region.training else time) + widened


def widening_seconds(region: AttentionRegion, gpu: Gpu) -> float:
    """Time of writing operands that are stored in 8 bits in the type that libraries take."""
    if not region.widened:
        return 0.0
    return LAUNCH_S + region.widened * (1 + ITEM_BYTES.get(region.dtype, 4)) / (MEMORY_SHARE * gpu.bandwidth)


def _fp32_seconds(region: AttentionRegion, gpu: Gpu, pairs: float) -> float:
    s = region.shape
    heads, double = s.B * s.Hq, 2 if region.dtype == "float64" else 1
    products = 2 * heads * pairs * (s.E + s.Ev) * double / (FP32_SHARE * gpu.fp32_flops)
    return LAUNCH_S + max(products + heads * pairs / gpu.exp2_rate, region.bytes / (MEMORY_SHARE * gpu.bandwidth))


def composed_seconds(region: AttentionRegion, gpu: Gpu) -> float:
    """Predicted time with every score in memory: two products and the passes between them."""
    s, item = region.shape, ITEM_BYTES.get(region.dtype, 4)
    kind = TENSOR_TYPE_OF.get(region.dtype, "fp32")
    rate = gpu.tensor.get(kind, gpu.fp32_flops) * gpu.matmul_share() if kind != "fp32" else FP32_SHARE * gpu.fp32_flops
    scores = float(s.B * s.Hq * s.L * (region.columns or s.S))
    moved = region.bytes + COMPOSED_PASSES * scores * item
    once = 2 * scores * (s.E + s.Ev) / rate + moved / (MEMORY_SHARE * gpu.bandwidth) + 3 * LAUNCH_S
    once += widening_seconds(region, gpu)
    return once * (3 if region.training else 1)  # the scores are kept: two products more for each of the two
